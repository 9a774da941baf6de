//! TLS of the gRPC listener: what new connections are greeted with, replaceable while serving.
//!
//! tonic's own TLS is fixed when serving begins, and a certificate that a renewal replaced would be presented until the
//! next restart. So handshakes are made here, each with the certificate that holds at that moment.

use std::sync::{Arc, RwLock};

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// PEM texts, as read from the configured files.
pub struct TlsSetup {
    pub cert_pem: Vec<u8>,
    pub key_pem: Vec<u8>,
    /// Client certificates are asked for, and must be signed by it; none has to be presented.
    pub client_ca_pem: Option<Vec<u8>>,
}

/// Why a [`TlsSetup`] cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{what} is not PEM or has none of it")]
    Pem { what: &'static str },
    #[error("the certificate and its key cannot be used")]
    Identity(#[source] rustls::Error),
    #[error("the client CA cannot be used")]
    ClientCa(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The TLS that holds now.
pub struct Tls {
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    pub fn new(setup: &TlsSetup) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(Arc::new(config(setup)?)) })
    }

    /// Holds for every connection accepted from now on; open ones go on with what they began with.
    pub fn replace(&self, setup: &TlsSetup) -> Result<(), TlsError> {
        let config = Arc::new(config(setup)?);
        *self.current.write().expect("no panic while held") = config;
        Ok(())
    }

    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().expect("no panic while held"))
    }
}

fn config(setup: &TlsSetup) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chain = certificates(&setup.cert_pem, "the certificate")?;
    let key = PrivateKeyDer::from_pem_slice(&setup.key_pem).map_err(|_| TlsError::Pem { what: "the private key" })?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Identity)?;
    let builder = match &setup.client_ca_pem {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(pem, "the client CA")? {
                roots.add(authority).map_err(|error| TlsError::ClientCa(error.into()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = verifier.allow_unauthenticated().build();
            builder.with_client_cert_verifier(verifier.map_err(|error| TlsError::ClientCa(error.into()))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Identity)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) | Err(_) => Err(TlsError::Pem { what }),
    }
}
