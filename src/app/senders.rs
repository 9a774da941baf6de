//! Senders' settings from the configuration: reads the credential files and leaves the checks to the senders.

use std::path::{Path, PathBuf};

use crate::config::{ApnsAuth, ApnsCredential, Delivery, FcmCredential, SecretSource};
use crate::senders::{Secret, apns, fcm, http2};

/// Why a credential cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Apns(#[from] apns::SettingsError),
    #[error(transparent)]
    Fcm(#[from] fcm::SettingsError),
}

/// `[apps.<app>.apns]`, read and checked without the network.
pub fn apns_settings(credential: &ApnsCredential, delivery: &Delivery) -> Result<apns::Settings, CredentialError> {
    let auth = match &credential.auth {
        ApnsAuth::Token { key, key_id, team_id } => {
            apns::Auth::Token { p8_pem: secret(key)?, key_id: key_id.clone(), team_id: team_id.clone() }
        }
        ApnsAuth::Certificate { cert_file, key } => {
            apns::Auth::Certificate { cert_pem: file(cert_file)?, key_pem: secret(key)? }
        }
    };
    let mut settings = apns::Settings::new(auth, credential.topics.clone());
    settings.endpoint = credential.endpoint.to_string();
    settings.endpoint_sandbox = credential.endpoint_sandbox.to_string();
    settings.ca_pem = credential.ca_file.as_deref().map(file).transpose()?;
    settings.http2 = connections(delivery);
    settings.validate()?;
    Ok(settings)
}

/// `[apps.<app>.fcm]`, read and checked without the network.
pub fn fcm_settings(credential: &FcmCredential, delivery: &Delivery) -> Result<fcm::Settings, CredentialError> {
    let mut settings = fcm::Settings::new(secret(&credential.service_account)?);
    settings.endpoint = credential.endpoint.to_string();
    settings.ca_pem = credential.ca_file.as_deref().map(file).transpose()?;
    settings.http2 = connections(delivery);
    settings.validate()?;
    Ok(settings)
}

fn connections(delivery: &Delivery) -> http2::Settings {
    http2::Settings {
        max_connections: delivery.max_connections,
        max_streams: delivery.max_streams,
        // Everything in flight fits one driver's queue: permits, not queues, are what bounds the work.
        max_queued_targets: delivery.max_in_flight_targets,
        request_timeout: delivery.send_timeout,
        ..http2::Settings::default()
    }
}

fn secret(source: &SecretSource) -> Result<Secret, CredentialError> {
    let bytes = source.read().map_err(|error| CredentialError::Read { path: error.path, source: error.source })?;
    Ok(Secret::new(bytes.to_vec()))
}

fn file(path: &Path) -> Result<Vec<u8>, CredentialError> {
    std::fs::read(path).map_err(|source| CredentialError::Read { path: path.to_owned(), source })
}
