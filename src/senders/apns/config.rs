//! A credential for APNs, and whether it can be one: checked without a network.

use std::sync::Arc;

use super::auth::ProviderTokens;
use crate::senders::http2::tls::{Identity, TlsError, client_config};
use crate::senders::http2::{self, Endpoint, EndpointError};
use crate::senders::secret::{Secret, fingerprint};

pub const PRODUCTION: &str = "https://api.push.apple.com";
pub const SANDBOX: &str = "https://api.sandbox.push.apple.com";

/// Apple's ids of keys and teams.
const ID_CHARS: usize = 10;
/// Apple allows a key some 400 topics.
pub const MAX_TOPICS: usize = 400;
const MAX_TOPIC_BYTES: usize = 255;

/// How we prove to Apple who we are.
#[derive(Clone, Debug)]
pub enum Auth {
    /// A signing key of the team (`.p8`), good for all its apps.
    Token { p8_pem: Secret, key_id: String, team_id: String },
    /// A client certificate, good for its own topics.
    Certificate { cert_pem: Vec<u8>, key_pem: Secret },
}

/// One `[apps.<app>.apns]` section.
#[derive(Clone, Debug)]
pub struct Settings {
    pub auth: Auth,
    /// The bundle ids that may be sent to, at least one.
    pub topics: Vec<String>,
    pub endpoint: String,
    pub endpoint_sandbox: String,
    /// Trusted instead of the public roots.
    pub ca_pem: Option<Vec<u8>>,
    pub http2: http2::Settings,
}

impl Settings {
    /// The same for the same credential: keys, ids, topics, endpoints and authority.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let (kind, auth): (&[u8], [&[u8]; 3]) = match &self.auth {
            Auth::Token { p8_pem, key_id, team_id } => {
                (b"token", [p8_pem.expose(), key_id.as_bytes(), team_id.as_bytes()])
            }
            Auth::Certificate { cert_pem, key_pem } => (b"certificate", [cert_pem, key_pem.expose(), b""]),
        };
        let rest = [self.endpoint.as_bytes(), self.endpoint_sandbox.as_bytes(), self.ca_pem.as_deref().unwrap_or(b"")];
        let topics = self.topics.iter().map(String::as_bytes);
        fingerprint([kind].into_iter().chain(auth).chain(rest).chain(topics))
    }

    /// With Apple's endpoints and the public roots.
    #[must_use]
    pub fn new(auth: Auth, topics: Vec<String>) -> Self {
        Self {
            auth,
            topics,
            endpoint: PRODUCTION.to_owned(),
            endpoint_sandbox: SANDBOX.to_owned(),
            ca_pem: None,
            http2: http2::Settings::default(),
        }
    }

    /// Every check that needs no network.
    pub fn validate(&self) -> Result<(), SettingsError> {
        self.check().map(|_| ())
    }

    pub(super) fn check(&self) -> Result<Checked, SettingsError> {
        if self.topics.is_empty() {
            return Err(SettingsError::NoTopic);
        }
        if self.topics.len() > MAX_TOPICS {
            return Err(SettingsError::TooManyTopics { count: self.topics.len() });
        }
        for topic in &self.topics {
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if topic.is_empty() || topic.len() > MAX_TOPIC_BYTES || !topic.chars().all(is_name) {
                return Err(SettingsError::BadTopic { topic: topic.clone() });
            }
        }
        let (tokens, identity) = match &self.auth {
            Auth::Token { p8_pem, key_id, team_id } => {
                let is_id = |id: &str| id.len() == ID_CHARS && id.chars().all(|c| c.is_ascii_alphanumeric());
                if !is_id(key_id) {
                    return Err(SettingsError::BadKeyId);
                }
                if !is_id(team_id) {
                    return Err(SettingsError::BadTeamId);
                }
                let tokens = ProviderTokens::new(p8_pem, key_id, team_id).ok_or(SettingsError::BadKey)?;
                (Some(Arc::new(tokens)), None)
            }
            Auth::Certificate { cert_pem, key_pem } => {
                (None, Some(Identity { cert_pem: cert_pem.clone(), key_pem: key_pem.clone() }))
            }
        };
        let tls = client_config(self.ca_pem.as_deref(), identity.as_ref(), &[b"h2"])?;
        Ok(Checked {
            tokens,
            tls: Arc::new(tls),
            production: Endpoint::parse(&self.endpoint).map_err(SettingsError::Endpoint)?,
            sandbox: Endpoint::parse(&self.endpoint_sandbox).map_err(SettingsError::EndpointSandbox)?,
        })
    }
}

pub(super) struct Checked {
    pub(super) tokens: Option<Arc<ProviderTokens>>,
    pub(super) tls: Arc<rustls::ClientConfig>,
    pub(super) production: Endpoint,
    pub(super) sandbox: Endpoint,
}

/// What is wrong, with the configuration key it came from, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("topic: no bundle id is configured; set `topic` to the app's bundle id")]
    NoTopic,
    #[error("topics: {count} bundle ids are configured, at most {MAX_TOPICS} are allowed")]
    TooManyTopics { count: usize },
    #[error("topic: {topic:?} is no bundle id (letters, digits, `.`, `-`, `_`, at most 255)")]
    BadTopic { topic: String },
    #[error("key_id: must be the 10 letters and digits Apple shows beside the key")]
    BadKeyId,
    #[error("team_id: must be the 10 letters and digits of the developer team")]
    BadTeamId,
    #[error(
        "key_file: is no APNs signing key; it must be the unchanged .p8 file from Apple (-----BEGIN PRIVATE KEY-----, P-256)"
    )]
    BadKey,
    #[error("cert_file, cert_key_file or ca_file")]
    Tls(#[from] TlsError),
    #[error("endpoint")]
    Endpoint(#[source] EndpointError),
    #[error("endpoint_sandbox")]
    EndpointSandbox(#[source] EndpointError),
}
