//! `[apps.<app_id>.apns]` and `[apps.<app_id>.apns.<name>]`: a credential at Apple.

use std::path::PathBuf;
use std::time::Duration;

use super::section::Section;
use super::values::{Endpoint, SecretSource};

pub(super) const KEYS: &[&str] = &[
    "key",
    "key_file",
    "key_id",
    "team_id",
    "cert_file",
    "cert_key",
    "cert_key_file",
    "topic",
    "topics",
    "environment",
    "endpoint",
    "endpoint_sandbox",
    "ca_file",
    "rate_per_minute",
    "ramp_up_secs",
    "environment_probes_per_minute",
];

const PRODUCTION: &str = "https://api.push.apple.com";
const SANDBOX: &str = "https://api.sandbox.push.apple.com";

#[derive(Clone, Debug)]
pub struct ApnsCredential {
    pub auth: ApnsAuth,
    /// Bundle ids that may be pushed to; never empty. The first is the default.
    pub topics: Vec<String>,
    /// Of devices that name none.
    pub environment: ApnsEnvironment,
    pub endpoint: Endpoint,
    pub endpoint_sandbox: Endpoint,
    /// PEM; trusted instead of the public authorities.
    pub ca_file: Option<PathBuf>,
    pub rate: RateLimit,
    /// Tokens that are bad in one environment and tried in the other, a minute. Default 30; 0 = never.
    pub environment_probes_per_minute: u32,
}

/// How fast a credential is used, over all replicas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RateLimit {
    /// 0 = as fast as the provider takes it.
    pub per_minute: u32,
    /// From a tenth of the rate to all of it after a minute without use. Default 60 s.
    pub ramp_up: Duration,
}

pub(super) fn read_rate(section: &mut Section<'_>, default_per_minute: usize) -> RateLimit {
    let per_minute = section.count("rate_per_minute", default_per_minute, 0..=100_000_000);
    RateLimit {
        per_minute: u32::try_from(per_minute).unwrap_or(u32::MAX),
        ramp_up: section.seconds("ramp_up_secs", 60, 0..=3600),
    }
}

#[derive(Clone, Debug)]
pub enum ApnsAuth {
    /// A provider token signed with a .p8 key.
    Token {
        key: SecretSource,
        /// 10 characters.
        key_id: String,
        /// 10 characters.
        team_id: String,
    },
    /// A client certificate.
    Certificate {
        /// PEM, leaf first.
        cert_file: PathBuf,
        /// PEM.
        key: SecretSource,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApnsEnvironment {
    Production,
    Sandbox,
}

pub(super) fn read(section: &mut Section<'_>) -> Option<ApnsCredential> {
    let auth = read_auth(section);
    let topics = read_topics(section);
    let environments = [("production", ApnsEnvironment::Production), ("sandbox", ApnsEnvironment::Sandbox)];
    let environment = section.choice("environment", ApnsEnvironment::Production, &environments);
    let endpoint = read_endpoint(section, "endpoint", PRODUCTION);
    let endpoint_sandbox = read_endpoint(section, "endpoint_sandbox", SANDBOX);
    let ca_file = section.path("ca_file");
    let rate = read_rate(section, 0);
    let probes = section.count("environment_probes_per_minute", 30, 0..=6000);
    Some(ApnsCredential {
        auth: auth?,
        topics: topics?,
        environment,
        endpoint: endpoint?,
        endpoint_sandbox: endpoint_sandbox?,
        ca_file,
        rate,
        environment_probes_per_minute: u32::try_from(probes).unwrap_or(u32::MAX),
    })
}

/// An endpoint with a default that is known to parse; `None` after a problem.
pub(super) fn read_endpoint(section: &mut Section<'_>, key: &'static str, default: &str) -> Option<Endpoint> {
    let given = section.parsed(key, &format!("write https://host:port, e.g. {default}"), Endpoint::parse);
    if section.has(key) { given } else { Endpoint::parse(default).ok() }
}

fn read_auth(section: &mut Section<'_>) -> Option<ApnsAuth> {
    let ten = |text: &str| {
        if text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            Ok(text.to_owned())
        } else {
            Err(format!("`{text}` does not have 10 letters and digits"))
        }
    };
    let key = section.secret("key", "key_file");
    let key_id = section.parsed("key_id", "it is part of the .p8 file's name, AuthKey_XXXXXXXXXX.p8", ten);
    let team_id = section.parsed("team_id", "it is shown in Apple's developer account under Membership", ten);
    let cert_file = section.path("cert_file");
    let cert_key = section.secret("cert_key", "cert_key_file");
    let token = ["key", "key_file", "key_id", "team_id"].iter().any(|key| section.has(key));
    let certificate = ["cert_file", "cert_key", "cert_key_file"].iter().any(|key| section.has(key));
    match (token, certificate) {
        (true, true) => {
            let first = ["cert_file", "cert_key", "cert_key_file"].into_iter().find(|key| section.has(key));
            section.problem(
                first.unwrap_or("cert_file"),
                "a token key and a certificate are both given",
                "keep one kind; a second credential goes into [apps.<app>.apns.<name>]",
            );
            None
        }
        (false, false) => {
            section
                .missing("key_file", "Apple needs a .p8 key (key_file, key_id, team_id) or a certificate (cert_file)");
            None
        }
        (true, false) => {
            if !section.has("key") && !section.has("key_file") {
                section.missing("key_file", "the .p8 key signs the provider tokens");
            }
            for (name, why) in
                [("key_id", "Apple finds the key by its id"), ("team_id", "Apple checks the team the key belongs to")]
            {
                if !section.has(name) {
                    section.missing(name, why);
                }
            }
            Some(ApnsAuth::Token { key: key?, key_id: key_id?, team_id: team_id? })
        }
        (false, true) => {
            if !section.has("cert_file") {
                section.missing("cert_file", "the key needs its certificate (PEM)");
            }
            if !section.has("cert_key") && !section.has("cert_key_file") {
                section.missing("cert_key_file", "the certificate needs its key; it may be the same PEM file");
            }
            Some(ApnsAuth::Certificate { cert_file: cert_file?, key: cert_key? })
        }
    }
}

fn read_topics(section: &mut Section<'_>) -> Option<Vec<String>> {
    let bundle_id = |text: &str| {
        let ok =
            text.len() <= 255 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if ok { Ok(text.to_owned()) } else { Err(format!("`{text}` is not a bundle id")) }
    };
    let remedy = "use the app's bundle id, e.g. com.example.app";
    let first = section.parsed("topic", remedy, bundle_id);
    let mut topics: Vec<String> = first.into_iter().collect();
    let mut whole = topics.len() == usize::from(section.has("topic"));
    for topic in section.list("topics") {
        match bundle_id(&topic) {
            Ok(topic) if topics.contains(&topic) => {}
            Ok(topic) => topics.push(topic),
            Err(wrong) => {
                section.problem("topics", &wrong, remedy);
                whole = false;
            }
        }
    }
    if !section.has("topic") && topics.is_empty() && whole {
        section.missing("topic", "pushes go to a bundle id");
        return None;
    }
    (whole && !topics.is_empty()).then_some(topics)
}
