//! A service account for FCM, and whether it can be one: checked without a network.

use std::sync::Arc;

use serde::Deserialize;

use super::auth::{FETCH_TIMEOUT, HttpTokenEndpoint, ServiceAccount};
use crate::senders::http2::tls::{TlsError, client_config};
use crate::senders::http2::{self, Endpoint, EndpointError};
use crate::senders::secret::{Secret, fingerprint};

pub const ENDPOINT: &str = "https://fcm.googleapis.com";

/// One `[apps.<app>.fcm]` section.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The key file as Google gives it.
    pub service_account_json: Secret,
    pub endpoint: String,
    /// Trusted instead of the public roots, for FCM and for the token endpoint.
    pub ca_pem: Option<Vec<u8>>,
    pub http2: http2::Settings,
}

/// The parts of Google's key file that are used.
#[derive(Deserialize)]
struct KeyFile {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    project_id: String,
    #[serde(default)]
    client_email: String,
    #[serde(default)]
    private_key: String,
    #[serde(default)]
    private_key_id: String,
    #[serde(default)]
    token_uri: String,
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.private_key);
    }
}

impl Settings {
    /// The same for the same credential: key file, endpoint and authority.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let ca = self.ca_pem.as_deref().unwrap_or(b"");
        fingerprint([self.service_account_json.expose(), self.endpoint.as_bytes(), ca])
    }

    /// With Google's endpoint and the public roots.
    #[must_use]
    pub fn new(service_account_json: Secret) -> Self {
        Self { service_account_json, endpoint: ENDPOINT.to_owned(), ca_pem: None, http2: http2::Settings::default() }
    }

    /// Every check that needs no network.
    pub fn validate(&self) -> Result<(), SettingsError> {
        self.check().map(|_| ())
    }

    pub(super) fn check(&self) -> Result<Checked, SettingsError> {
        let file: KeyFile =
            serde_json::from_slice(self.service_account_json.expose()).map_err(|_| SettingsError::NotJson)?;
        if file.kind != "service_account" {
            return Err(SettingsError::OtherKind);
        }
        let required = [
            ("project_id", &file.project_id),
            ("client_email", &file.client_email),
            ("private_key", &file.private_key),
            ("private_key_id", &file.private_key_id),
            ("token_uri", &file.token_uri),
        ];
        if let Some((field, _)) = required.into_iter().find(|(_, value)| value.is_empty()) {
            return Err(SettingsError::Missing { field });
        }
        let is_project = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
        if !file.project_id.chars().all(is_project) {
            return Err(SettingsError::BadProject);
        }
        let token_origin = token_origin(&file.token_uri)?;
        let account = ServiceAccount::new(file.client_email.clone(), file.private_key_id.clone(), &file.private_key)
            .ok_or(SettingsError::BadKey)?;
        let endpoint = Endpoint::parse(&self.endpoint).map_err(SettingsError::Endpoint)?;
        let ca_pem = self.ca_pem.as_deref();
        let tls = client_config(ca_pem, None, &[b"h2"])?;
        // One slow exchange an hour: HTTP/1.1 will do where HTTP/2 is not spoken.
        let token_tls = client_config(ca_pem, None, &[b"h2", b"http/1.1"])?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(token_tls)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .timeout(FETCH_TIMEOUT)
            .https_only(token_origin.is_tls())
            .user_agent(concat!("nudged/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(SettingsError::Client)?;
        Ok(Checked {
            account: Arc::new(account),
            project_id: file.project_id.clone(),
            endpoint,
            tls: Arc::new(tls),
            token_endpoint: HttpTokenEndpoint { client, url: file.token_uri.clone() },
        })
    }
}

/// The token goes to this address in exchange for a signature, so it is held to the endpoint's rules.
fn token_origin(url: &str) -> Result<Endpoint, SettingsError> {
    let parts = url.parse::<http::Uri>().map_err(|_| SettingsError::BadTokenUri)?.into_parts();
    let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
        return Err(SettingsError::BadTokenUri);
    };
    Endpoint::parse(&format!("{scheme}://{authority}")).map_err(|_| SettingsError::BadTokenUri)
}

pub(super) struct Checked {
    pub(super) account: Arc<ServiceAccount>,
    pub(super) project_id: String,
    pub(super) endpoint: Endpoint,
    pub(super) tls: Arc<rustls::ClientConfig>,
    pub(super) token_endpoint: HttpTokenEndpoint,
}

/// What is wrong, with the configuration key it came from, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("service_account_file: is not the JSON key file of a service account; download it again from Google")]
    NotJson,
    #[error("service_account_file: `type` is not \"service_account\"; other kinds of credentials are not supported")]
    OtherKind,
    #[error("service_account_file: `{field}` is missing; the file must be the unchanged one from Google")]
    Missing { field: &'static str },
    #[error("service_account_file: `project_id` holds characters that no project id has")]
    BadProject,
    #[error("service_account_file: `token_uri` must be an https URL")]
    BadTokenUri,
    #[error("service_account_file: `private_key` is no RSA key in PEM form")]
    BadKey,
    #[error("ca_file")]
    Tls(#[from] TlsError),
    #[error("endpoint")]
    Endpoint(#[source] EndpointError),
    #[error("setting up the client for the token endpoint")]
    Client(#[source] reqwest::Error),
}
