//! The files a configuration names: there, readable, not open to everybody, and not expired.
//!
//! What a key or a service account must look like is the sender's business and is asked of it.

use std::fs::Metadata;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use super::Findings;
use crate::app::certificate::{self, Validity};
use crate::config::values::read_bounded;
use crate::config::{ApnsAuth, Config, Origin, SecretSource};
use crate::domain::time::UnixMs;

/// Early enough to have a certificate renewed by hand.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 60 * 60);

const SQLITE_HEADER: &[u8; 16] = b"SQLite format 3\0";

pub(super) fn database(config: &Config, _now: UnixMs, findings: &mut Findings) {
    if config.database.postgres.is_some() {
        return;
    }
    let (key, path) = ("database.url", config.database.path.as_path());
    if !path.exists() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !parent.is_dir() {
            let wrong = format!("its directory {} does not exist", parent.display());
            findings.error(key, file(path), wrong, "make the directory, writable by nudged alone");
        }
        return;
    }
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    let mut opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            findings.error(
                key,
                file(path),
                format!("cannot be opened for writing: {error}"),
                "give it to nudged's user",
            );
            return;
        }
    };
    let mut header = [0; SQLITE_HEADER.len()];
    match opened.metadata() {
        Ok(metadata) => {
            let empty = metadata.len() == 0;
            if !empty && (opened.read_exact(&mut header).is_err() || header != *SQLITE_HEADER) {
                findings.error(key, file(path), "is not a SQLite database", "name another file, or move this one away");
            }
            warn_if_open(key, path, &metadata, findings);
        }
        Err(error) => findings.error(key, file(path), format!("cannot be looked at: {error}"), "check the disk"),
    }
}

pub(super) fn tls(config: &Config, now: UnixMs, findings: &mut Findings) {
    let Some(tls) = &config.grpc.tls else { return };
    let chain = certificates("grpc.tls.cert_file", &tls.cert_file, now, findings);
    let key = secret("grpc.tls.key", &tls.key, findings);
    if let (Some(chain), Some(pem)) = (chain, key)
        && let Err(wrong) = certificate::check_pair(chain, &pem)
    {
        findings.error(
            key_name("grpc.tls.key", &tls.key),
            origin(&tls.key),
            wrong,
            "use the key the certificate was made with",
        );
    }
    if let Some(path) = &tls.client_ca_file {
        certificates("grpc.tls.client_ca_file", path, now, findings);
    }
}

pub(super) fn apns(config: &Config, now: UnixMs, findings: &mut Findings) {
    for (app, name, credential) in
        config.apps.iter().flat_map(|(app, of)| of.apns.iter().map(move |(name, credential)| (app, name, credential)))
    {
        let section = section(app.as_str(), "apns", name);
        match &credential.auth {
            ApnsAuth::Token { key, .. } => drop(secret(&format!("{section}.key"), key, findings)),
            ApnsAuth::Certificate { cert_file, key } => {
                certificates(&format!("{section}.cert_file"), cert_file, now, findings);
                secret(&format!("{section}.cert_key"), key, findings);
            }
        }
        if let Some(path) = &credential.ca_file {
            certificates(&format!("{section}.ca_file"), path, now, findings);
        }
    }
}

pub(super) fn fcm(config: &Config, now: UnixMs, findings: &mut Findings) {
    for (app, name, credential) in
        config.apps.iter().flat_map(|(app, of)| of.fcm.iter().map(move |(name, credential)| (app, name, credential)))
    {
        let section = section(app.as_str(), "fcm", name);
        secret(&format!("{section}.service_account"), &credential.service_account, findings);
        if let Some(path) = &credential.ca_file {
            certificates(&format!("{section}.ca_file"), path, now, findings);
        }
    }
}

/// The configuration file itself, when it holds secrets.
pub(super) fn own_file(config: &Config, _now: UnixMs, findings: &mut Findings) {
    let Some(path) = &config.file else { return };
    let apns = config.apps.values().flat_map(|app| app.apns.values()).map(|credential| match &credential.auth {
        ApnsAuth::Token { key, .. } | ApnsAuth::Certificate { key, .. } => key,
    });
    let fcm = config.apps.values().flat_map(|app| app.fcm.values()).map(|credential| &credential.service_account);
    let tls = config.grpc.tls.iter().map(|tls| &tls.key);
    let inline = apns.chain(fcm).chain(tls).any(|source| matches!(source, SecretSource::Inline(_)));
    if inline && let Ok(metadata) = std::fs::metadata(path) {
        warn_if_open("", path, &metadata, findings);
    }
}

/// `apps.<app>.apns`, `apps.<app>.apns.<name>`.
pub(super) fn section(app: &str, platform: &str, credential: &str) -> String {
    if credential == crate::config::apps::DEFAULT_CREDENTIAL {
        format!("apps.{app}.{platform}")
    } else {
        format!("apps.{app}.{platform}.{credential}")
    }
}

/// A secret's bytes; `None` after a finding.
fn secret(key: &str, source: &SecretSource, findings: &mut Findings) -> Option<zeroize::Zeroizing<Vec<u8>>> {
    let key = key_name(key, source);
    match source.read() {
        Ok(bytes) => {
            if let SecretSource::File(path) = source
                && let Ok(metadata) = std::fs::metadata(path)
            {
                warn_if_open(&key, path, &metadata, findings);
            }
            Some(bytes)
        }
        Err(error) => {
            unreadable(&key, &error.path, &error.source, findings);
            None
        }
    }
}

/// The certificates of a PEM file; `None` after a finding that leaves none. An expired one is an error.
fn certificates(
    key: &str,
    path: &Path,
    now: UnixMs,
    findings: &mut Findings,
) -> Option<Vec<rustls_pki_types::CertificateDer<'static>>> {
    let pem = match read_bounded(path) {
        Ok(pem) => pem,
        Err(error) => {
            unreadable(key, path, &error, findings);
            return None;
        }
    };
    let chain = match certificate::parse_chain(&pem) {
        Ok(chain) => chain,
        Err(wrong) => {
            findings.error(key, file(path), wrong, "use the PEM file; `openssl x509` converts others");
            return None;
        }
    };
    for certificate in &chain {
        match certificate::validity(certificate) {
            None => findings.error(key, file(path), "holds a damaged certificate", "copy it again"),
            Some(Validity { not_after, .. }) if not_after <= now => {
                findings.error(key, file(path), format!("expired at {not_after}"), "renew the certificate");
            }
            Some(Validity { not_before, .. }) if not_before > now => {
                let wrong = format!("is valid only from {not_before} on");
                findings.error(key, file(path), wrong, "wait, or check this machine's clock");
            }
            Some(Validity { not_after, .. }) if not_after.since(now) < EXPIRES_SOON => {
                findings.warning(key, file(path), format!("expires soon, at {not_after}"), "renew the certificate");
            }
            Some(_) => {}
        }
    }
    Some(chain)
}

fn unreadable(key: &str, path: &Path, error: &std::io::Error, findings: &mut Findings) {
    let (wrong, remedy) = match error.kind() {
        std::io::ErrorKind::NotFound => ("does not exist".to_owned(), "put the file there, or correct the path"),
        std::io::ErrorKind::PermissionDenied => {
            ("cannot be read: permission denied".to_owned(), "give it to nudged's user with mode 600")
        }
        _ => (format!("cannot be read: {error}"), "correct the path"),
    };
    findings.error(key, file(path), wrong, remedy);
}

#[cfg(unix)]
fn warn_if_open(key: &str, path: &Path, metadata: &Metadata, findings: &mut Findings) {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        let wrong = format!("is open to every user of this machine (mode {mode:o})");
        findings.warning(key, file(path), wrong, "chmod 600, owned by nudged's user");
    }
}

/// Other systems' access lists are not looked at.
#[cfg(not(unix))]
fn warn_if_open(_key: &str, _path: &Path, _metadata: &Metadata, _findings: &mut Findings) {}

/// A secret's key as it was written: with `_file` when it is one.
fn key_name(key: &str, source: &SecretSource) -> String {
    match source {
        SecretSource::Inline(_) => key.to_owned(),
        SecretSource::File(_) => format!("{key}_file"),
    }
}

pub(super) fn origin(source: &SecretSource) -> Origin {
    match source {
        SecretSource::Inline(_) => Origin::Unset,
        SecretSource::File(path) => file(path),
    }
}

pub(super) fn file(path: &Path) -> Origin {
    Origin::File { path: path.to_owned(), line: None }
}
