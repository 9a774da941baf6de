//! `[apps.<app_id>.fcm]` and `[apps.<app_id>.fcm.<name>]`: a credential at Google.

use std::path::PathBuf;

use super::apns::{RateLimit, read_endpoint, read_rate};
use super::section::Section;
use super::values::{Endpoint, SecretSource};

pub(super) const KEYS: &[&str] =
    &["service_account", "service_account_file", "endpoint", "ca_file", "rate_per_minute", "ramp_up_secs"];

#[derive(Clone, Debug)]
pub struct FcmCredential {
    /// The service account's JSON; it names the project and the token endpoint.
    pub service_account: SecretSource,
    pub endpoint: Endpoint,
    /// PEM; trusted instead of the public authorities, at the token endpoint as well.
    pub ca_file: Option<PathBuf>,
    pub rate: RateLimit,
}

/// Google's default quota of a project.
const QUOTA_PER_MINUTE: usize = 600_000;

pub(super) fn read(section: &mut Section<'_>) -> Option<FcmCredential> {
    let service_account = section.secret("service_account", "service_account_file");
    if !section.has("service_account") && !section.has("service_account_file") {
        section.missing("service_account_file", "Google needs a service account's JSON key");
    }
    let endpoint = read_endpoint(section, "endpoint", "https://fcm.googleapis.com");
    let ca_file = section.path("ca_file");
    let rate = read_rate(section, QUOTA_PER_MINUTE);
    Some(FcmCredential { service_account: service_account?, endpoint: endpoint?, ca_file, rate })
}
