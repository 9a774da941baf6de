//! TLS of the fake providers, and the topics in an APNs client certificate.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use super::SandboxError;
use super::credentials::Identity;

/// Apple's extension that lists a push certificate's topics.
pub(super) const TOPICS_OID: &[u64] = &[1, 2, 840, 113_635, 100, 6, 3, 6];

/// The same in DER, tag and length included.
const TOPICS_OID_DER: &[u8] = &[0x06, 0x0a, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x63, 0x64, 0x06, 0x03, 0x06];

const TAG_BOOLEAN: u8 = 0x01;
const TAG_OCTET_STRING: u8 = 0x04;
const TAG_UTF8_STRING: u8 = 0x0c;
const TAG_SEQUENCE: u8 = 0x30;

/// The provider is passed explicitly: a process-wide default may be another one, or none.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// APNs: HTTP/2 only; a client certificate is welcome and not needed.
pub(super) fn apns(identity: &Identity) -> Result<TlsAcceptor, SandboxError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca.clone()).map_err(SandboxError::Tls)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| SandboxError::Tls(rustls::Error::General(error.to_string())))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(SandboxError::Tls)?
        .with_client_cert_verifier(verifier);
    acceptor(config, identity, &["h2"])
}

/// Google's services: no client certificates.
pub(super) fn google(identity: &Identity, protocols: &[&str]) -> Result<TlsAcceptor, SandboxError> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(SandboxError::Tls)?
        .with_no_client_auth();
    acceptor(config, identity, protocols)
}

fn acceptor(
    config: rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>,
    identity: &Identity,
    protocols: &[&str],
) -> Result<TlsAcceptor, SandboxError> {
    let mut config = config
        .with_single_cert(identity.server_chain.clone(), identity.server_key.clone_key())
        .map_err(SandboxError::Tls)?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The extension's content: SEQUENCE of topic and SEQUENCE of kind, alternating, as in Apple's certificates.
pub(super) fn topics_extension(topics: &[String]) -> Vec<u8> {
    let mut items = Vec::new();
    for topic in topics {
        let kind = match topic.rsplit_once('.') {
            Some((_, "voip")) => "voip",
            Some((_, "complication")) => "complication",
            _ => "app",
        };
        element(&mut items, TAG_UTF8_STRING, topic.as_bytes());
        let mut kinds = Vec::new();
        element(&mut kinds, TAG_UTF8_STRING, kind.as_bytes());
        element(&mut items, TAG_SEQUENCE, &kinds);
    }
    let mut content = Vec::new();
    element(&mut content, TAG_SEQUENCE, &items);
    content
}

/// The topics a certificate lists; empty when it has no such extension. The chain was verified in the handshake, so
/// the extension is our own CA's word.
pub(super) fn certificate_topics(certificate: &[u8]) -> Vec<String> {
    let Some(at) = certificate.windows(TOPICS_OID_DER.len()).position(|window| window == TOPICS_OID_DER) else {
        return Vec::new();
    };
    let mut rest = &certificate[at + TOPICS_OID_DER.len()..];
    let mut topics = Vec::new();
    let content = loop {
        match take_element(&mut rest) {
            Some((TAG_BOOLEAN, _)) => {} // critical
            Some((TAG_OCTET_STRING, content)) => break content,
            _ => return topics,
        }
    };
    let mut content = content;
    if let Some((TAG_SEQUENCE, mut items)) = take_element(&mut content) {
        while let Some((tag, value)) = take_element(&mut items) {
            if let (TAG_UTF8_STRING, Ok(topic)) = (tag, std::str::from_utf8(value)) {
                topics.push(topic.to_owned());
            }
        }
    }
    topics
}

fn element(out: &mut Vec<u8>, tag: u8, content: &[u8]) {
    out.push(tag);
    let length = u16::try_from(content.len()).expect("topics are short");
    let [high, low] = length.to_be_bytes();
    match length {
        0..=0x7f => out.push(low),
        0x80..=0xff => out.extend_from_slice(&[0x81, low]),
        _ => out.extend_from_slice(&[0x82, high, low]),
    }
    out.extend_from_slice(content);
}

/// The next tag and its content; lengths of up to two bytes, which is all a certificate's extension needs.
fn take_element<'a>(rest: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&tag, after) = rest.split_first()?;
    let (&first, after) = after.split_first()?;
    let (length, after) = match first {
        0..=0x7f => (usize::from(first), after),
        0x81 => (usize::from(*after.first()?), &after[1..]),
        0x82 => (usize::from(u16::from_be_bytes([*after.first()?, *after.get(1)?])), &after[2..]),
        _ => return None,
    };
    let content = after.get(..length)?;
    *rest = &after[length..];
    Some((tag, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_survive_the_certificate() {
        let topics: Vec<String> = (0..9).map(|n| format!("com.example.a-rather-long-bundle-id.number-{n}")).collect();
        let mut certificate = vec![1, 2, 3];
        certificate.extend_from_slice(TOPICS_OID_DER);
        element(&mut certificate, TAG_OCTET_STRING, &topics_extension(&topics));
        assert_eq!(certificate_topics(&certificate), topics);
        assert!(certificate_topics(&certificate[..40]).is_empty(), "a truncated extension lists nothing");
    }
}
