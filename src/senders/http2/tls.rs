//! TLS for provider connections: rustls with the aws-lc-rs provider, passed explicitly so that no process-wide default
//! is needed. TLS is a layer that can be left out: everything above takes any [`super::gather::Transport`].

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::senders::secret::Secret;

/// What is wrong with a PEM file given for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the CA file holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")]
    NoCa,
    #[error("a certificate of the CA file cannot be used as a root")]
    BadCa(#[source] rustls::Error),
    #[error("the certificate file holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")]
    NoCertificate,
    #[error("the certificate's key file holds no private key in PEM form (PKCS#8, PKCS#1 or SEC1)")]
    NoKey,
    #[error("certificate and key do not fit together, or the key's kind is not supported")]
    BadIdentity(#[source] rustls::Error),
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// A client certificate with its chain, and its key; both PEM.
#[derive(Clone)]
pub struct Identity {
    pub cert_pem: Vec<u8>,
    pub key_pem: Secret,
}

/// A configuration that trusts `ca_pem` alone, or Mozilla's roots without one, and offers `alpn` in this order.
pub fn client_config(
    ca_pem: Option<&[u8]>,
    identity: Option<&Identity>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca_pem {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots.add(certificate.map_err(|_| TlsError::NoCa)?).map_err(TlsError::BadCa)?;
            }
            if roots.is_empty() {
                return Err(TlsError::NoCa);
            }
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::pem_slice_iter(&identity.cert_pem)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| TlsError::NoCertificate)?;
            if chain.is_empty() {
                return Err(TlsError::NoCertificate);
            }
            let key = PrivateKeyDer::from_pem_slice(identity.key_pem.expose()).map_err(|_| TlsError::NoKey)?;
            builder.with_client_auth_cert(chain, key).map_err(TlsError::BadIdentity)?
        }
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(config)
}
