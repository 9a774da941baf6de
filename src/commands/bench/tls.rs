//! The reference's connections: TCP, TLS that trusts the sandbox's CA, HTTP/2.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use h2::client::SendRequest;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::TlsConnector;

use super::gather::gather;
use crate::runtime::Runtime;

pub fn client_config(ca_file: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let pem = std::fs::read(ca_file).with_context(|| format!("reading {}", ca_file.display()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// `https://127.0.0.1:PORT`, with or without a path.
pub fn address(endpoint: &str) -> anyhow::Result<SocketAddr> {
    let authority = endpoint.strip_prefix("https://").and_then(|rest| rest.split('/').next()).unwrap_or_default();
    authority.parse().with_context(|| format!("{endpoint} is no loopback endpoint"))
}

/// A connection whose task runs on the current `LocalSet`.
pub async fn connect(
    runtime: &Runtime,
    tls: &Arc<ClientConfig>,
    address: SocketAddr,
) -> anyhow::Result<SendRequest<Bytes>> {
    let tcp = runtime.connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(address.ip().into());
    let stream = TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        bail!("{address} does not speak HTTP/2");
    }
    let (io, driver) = gather(stream);
    let (sender, connection) = h2::client::Builder::new().enable_push(false).handshake::<_, Bytes>(io).await?;
    // Ends with the process; requests see its errors.
    drop(runtime.spawn_local(driver.drive(connection)));
    Ok(sender)
}
