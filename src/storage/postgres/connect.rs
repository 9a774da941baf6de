//! Connections to the server: TLS, several hosts, the password read anew for each.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::runtime::Runtime;

/// What every session begins with. Plans: the hot statements find a handful of rows by key among millions, and the
/// planner's guesses about arrays and freshly filled tables are what makes it scan instead; without these choices it
/// has no other way. The timeouts bound what a stuck statement or a forgotten transaction can hold up.
const SESSION: &str = "SET random_page_cost = 1.1; SET enable_seqscan = off; SET enable_hashjoin = off; \
     SET enable_mergejoin = off; SET jit = off; SET plan_cache_mode = force_generic_plan; \
     SET statement_timeout = 5000; SET lock_timeout = 3000; SET idle_in_transaction_session_timeout = 10000; \
     SET synchronous_commit = on; SET application_name = 'nudged'; \
     SET nudged.packs = on";
/// Longer than this to connect is as good as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How far the server's certificate is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verify {
    Nothing,
    Authority,
    Full,
}

/// Where the server is and how to reach it. Its `Debug` shows no secret.
#[derive(Clone)]
pub struct Target {
    config: tokio_postgres::Config,
    tls: Option<MakeRustlsConnect>,
    password_file: Option<PathBuf>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("hosts", &self.config.get_hosts()).finish_non_exhaustive()
    }
}

/// Why a URL cannot be used. Never repeats the URL: it may hold a password.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("it is not a URL that Postgres' clients understand: {0}")]
    Url(String),
    #[error("sslmode is not disable, prefer, require, verify-ca or verify-full")]
    SslMode,
    #[error("sslmode {mode} needs sslrootcert, the file of the authority's certificates")]
    NoAuthority { mode: &'static str },
    #[error("cannot use the certificates in sslrootcert {}: {reason}", path.display())]
    Authority { path: PathBuf, reason: String },
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
}

impl Target {
    /// Reads a `postgres://` URL. Beyond what tokio-postgres knows: `sslmode=verify-ca` and `verify-full`, and
    /// `sslrootcert`. Without a `target_session_attrs` only a server that takes writes will do.
    pub fn parse(url: &str, password_file: Option<PathBuf>) -> Result<Self, TargetError> {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let (mut mode, mut root, mut kept) = (None, None, Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("sslmode", value)) => mode = Some(value),
                Some(("sslrootcert", value)) => root = Some(PathBuf::from(decode(value))),
                _ => kept.push(pair),
            }
        }
        if !kept.iter().any(|pair| pair.starts_with("target_session_attrs=")) {
            kept.push("target_session_attrs=read-write");
        }
        let (ssl, verify) = match mode.unwrap_or("prefer") {
            "disable" => (SslMode::Disable, None),
            // As libpq: a file of authorities makes `require` check them.
            "prefer" => (SslMode::Prefer, Some(Verify::Nothing)),
            "require" | "verify-ca" if root.is_some() => (SslMode::Require, Some(Verify::Authority)),
            "require" => (SslMode::Require, Some(Verify::Nothing)),
            "verify-ca" => return Err(TargetError::NoAuthority { mode: "verify-ca" }),
            "verify-full" => (SslMode::Require, Some(Verify::Full)),
            _ => return Err(TargetError::SslMode),
        };
        let text = format!("{base}?{}", kept.join("&"));
        let mut config: tokio_postgres::Config = text.parse().map_err(|error: tokio_postgres::Error| {
            TargetError::Url(std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string))
        })?;
        config.ssl_mode(ssl);
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        config.tcp_user_timeout(Duration::from_secs(5));
        config.keepalives_idle(Duration::from_secs(10));
        let tls = verify.map(|verify| tls(verify, root.as_ref())).transpose()?;
        Ok(Self { config, tls, password_file })
    }

    /// A connection ready for the store's statements.
    pub async fn connect(&self) -> ConnectionResult<AsyncPgConnection> {
        let config = self.with_password().await?;
        let mut connection = match &self.tls {
            None => {
                let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(words)?;
                AsyncPgConnection::try_from_client_and_connection(client, connection).await?
            }
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await.map_err(words)?;
                AsyncPgConnection::try_from_client_and_connection(client, connection).await?
            }
        };
        connection.batch_execute(SESSION).await.map_err(ConnectionError::CouldntSetupConfiguration)?;
        Ok(connection)
    }

    /// A bare session for COPY, which diesel does not know.
    pub async fn client(&self, runtime: &Runtime) -> ConnectionResult<tokio_postgres::Client> {
        let config = self.with_password().await?;
        // The tasks end with the client.
        match &self.tls {
            None => {
                let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(words)?;
                runtime.spawn(connection);
                Ok(client)
            }
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await.map_err(words)?;
                runtime.spawn(connection);
                Ok(client)
            }
        }
    }

    async fn with_password(&self) -> ConnectionResult<tokio_postgres::Config> {
        let mut config = self.config.clone();
        if let Some(path) = &self.password_file {
            let unreadable = |error| ConnectionError::BadConnection(format!("cannot read {}: {error}", path.display()));
            let password = tokio::fs::read_to_string(path).await.map_err(unreadable)?;
            config.password(password.trim_end_matches(['\r', '\n']));
        }
        Ok(config)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn words(error: tokio_postgres::Error) -> ConnectionError {
    ConnectionError::BadConnection(explain(&error))
}

/// The whole chain: tokio-postgres itself only says "db error" or "error connecting to server".
pub(super) fn explain(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Percent decoding of one value.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn tls(verify: Verify, root: Option<&PathBuf>) -> Result<MakeRustlsConnect, TargetError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| TargetError::Tls(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    match root {
        Some(path) => {
            let bad = |reason: String| TargetError::Authority { path: path.clone(), reason };
            let certificates = CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| bad(error.to_string()))?;
                roots.add(certificate).map_err(|error| bad(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(bad("there is no certificate in it".to_owned()));
            }
        }
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    }
    let config = match verify {
        Verify::Full => builder.with_root_certificates(roots).with_no_client_auth(),
        Verify::Nothing | Verify::Authority => {
            let chain = match verify {
                Verify::Nothing => None,
                _ => Some(
                    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                        .build()
                        .map_err(|error| TargetError::Tls(error.to_string()))?,
                ),
            };
            let verifier = Arc::new(Lenient { provider, chain });
            builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        }
    };
    Ok(MakeRustlsConnect::new(config))
}

/// The lesser modes that Postgres' clients have: any certificate, or any that the authority issued.
#[derive(Debug)]
struct Lenient {
    provider: Arc<CryptoProvider>,
    chain: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last, so the chain was good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_understood_as_libpq_does() {
        let parse = |url: &str| Target::parse(url, None);
        let target = parse("postgres://u:p%40@a:1,b:2/db?sslmode=disable").unwrap();
        assert_eq!(target.config.get_hosts().len(), 2);
        assert_eq!(target.config.get_password(), Some(&b"p@"[..]));
        assert_eq!(
            target.config.get_target_session_attrs(),
            tokio_postgres::config::TargetSessionAttrs::ReadWrite,
            "a failover is followed"
        );
        assert!(target.tls.is_none());
        assert!(!format!("{target:?}").contains("p@"));
        assert!(parse("postgres://u@a/db").unwrap().tls.is_some());
        assert!(matches!(parse("postgres://u@a/db?sslmode=verify-ca"), Err(TargetError::NoAuthority { .. })));
        assert!(parse("postgres://u@a/db?sslmode=verify-full").is_ok());
        assert!(matches!(parse("postgres://u@a/db?sslmode=allow"), Err(TargetError::SslMode)));
        let missing = parse("postgres://u@a/db?sslmode=verify-full&sslrootcert=%2Fno%2Fsuch");
        assert!(matches!(missing, Err(TargetError::Authority { .. })));
        assert!(matches!(parse("postgres://u@a/db?bogus=1"), Err(TargetError::Url(_))));
    }
}
