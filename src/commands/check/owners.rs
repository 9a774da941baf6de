//! What only the owner of a format can judge: senders their credentials, the store its database.

use std::path::Path;
use std::sync::Arc;

use super::Findings;
use super::files::{self, section};
use crate::app::database::{postgres_settings, sqlite_settings};
use crate::app::senders::{self, CredentialError};
use crate::config::{ApnsAuth, Config, Database, Origin, Postgres, SecretSource};
use crate::domain::deny::DenyFeed;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::storage::sqlite::{self, OpenError, SqliteStore};
use crate::storage::{TroubleCause, TroubleRow, postgres};

/// Keys, certificates and service accounts are what they should be.
pub(super) fn credentials(config: &Config, _now: UnixMs, findings: &mut Findings) {
    for (id, app) in &config.apps {
        for (name, credential) in &app.apns {
            let (ApnsAuth::Token { key, .. } | ApnsAuth::Certificate { key, .. }) = &credential.auth;
            if let Err(error) = senders::apns_settings(credential, &config.delivery) {
                report(&section(id.as_str(), "apns", name), key, &error, findings);
            }
        }
        for (name, credential) in &app.fcm {
            if let Err(error) = senders::fcm_settings(credential, &config.delivery) {
                report(&section(id.as_str(), "fcm", name), &credential.service_account, &error, findings);
            }
        }
    }
}

/// An existing database opens and has the right schema. One that a server uses is taken to be fine: it checked itself.
pub(super) fn database(config: &Config, now: UnixMs, findings: &mut Findings) {
    if let Some(postgres) = &config.database.postgres {
        let origin = match &config.file {
            Some(path) => files::file(path),
            None => Origin::Environment("NUDGED_DATABASE__URL".to_owned()),
        };
        return postgres_server(&config.database, postgres, &origin, now, findings);
    }
    let path = &config.database.path;
    if std::fs::metadata(path).map_or(0, |metadata| metadata.len()) == 0 {
        return;
    }
    let mut settings = sqlite_settings(&config.database);
    settings.migrate = false;
    let origin = files::file(path);
    match SqliteStore::open(Runtime::production(), &settings, Arc::new(DenyFeed::default())) {
        Ok(store) => {
            store.close();
            troubles_of_file(path, now, findings);
        }
        Err(OpenError::NotMigrated { missing }) => findings.warning(
            "database.url",
            origin,
            format!("lacks {missing} migrations of this version"),
            "the next start applies them; `nudged migrate` does it before",
        ),
        Err(OpenError::Locked { .. }) => troubles_of_file(path, now, findings),
        // Reported with the files.
        Err(OpenError::Connect { .. } | OpenError::File { .. } | OpenError::DirectoryMissing { .. }) => {}
        Err(OpenError::Damaged { reason, .. }) if reason.contains("not a database") => {}
        Err(error) => findings.error("database.url", origin, chain(&error), "see docs/config.md, [database]"),
    }
}

/// One that cannot be read is in a state that its server tells of.
fn troubles_of_file(path: &Path, now: UnixMs, findings: &mut Findings) {
    if let Ok(troubles) = sqlite::troubles(path, now) {
        tell(troubles, findings);
    }
}

/// What a running server met and waits out. Deliveries wait until their time to live ends.
fn tell(troubles: Vec<TroubleRow>, findings: &mut Findings) {
    for TroubleRow { trouble, place } in troubles {
        let remedy = match trouble.cause {
            TroubleCause::Configuration => {
                "compare the credential with the platform's console (`nudged check --live` tries it); sending goes on by \
                 itself once it works"
            }
            TroubleCause::Tokens => {
                "look whether environment, topic and project are those of the app's tokens; if the tokens are dead \
                 indeed, call ConfirmRetirements"
            }
        };
        let wrong = format!("is paused since {}: {}", trouble.since, trouble.reason);
        findings.warning(place, Origin::Unset, wrong, remedy);
    }
}

/// The server answers and promises what nudged relies on. Nothing is changed.
fn postgres_server(database: &Database, postgres: &Postgres, origin: &Origin, now: UnixMs, findings: &mut Findings) {
    let settings = postgres_settings(database, postgres);
    let looked = std::thread::scope(|scope| {
        let look = || {
            let tokio =
                tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
            tokio.block_on(postgres::inspect(&settings, now)).map_err(|error| chain(&error))
        };
        // The caller may be inside a runtime, which cannot be entered twice.
        scope.spawn(look).join().unwrap_or_else(|_| Err("the look at the server failed".to_owned()))
    });
    let key = "database.url";
    match looked {
        Ok(inspection) => {
            if inspection.missing_migrations > 0 {
                findings.warning(
                    key,
                    origin.clone(),
                    format!("lacks {} migrations of this version", inspection.missing_migrations),
                    "the next start applies them; `nudged migrate` does it before",
                );
            }
            tell(inspection.troubles, findings);
            for warning in inspection.warnings {
                findings.warning(key, origin.clone(), warning, "see docs/scaling.md");
            }
        }
        Err(error) => findings.error(key, origin.clone(), error, "see docs/config.md, [database]"),
    }
}

/// A sender's error begins with the key it is about.
fn report(section: &str, secret: &SecretSource, error: &CredentialError, findings: &mut Findings) {
    // A file that cannot be read has been reported already.
    if matches!(error, CredentialError::Read { .. }) {
        return;
    }
    let text = chain(error);
    let (key, wrong) = match text.split_once(": ") {
        Some((key, wrong)) if key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') => (Some(key), wrong),
        _ => (None, text.as_str()),
    };
    let about_secret = matches!(key, Some("key_file" | "cert_key_file" | "service_account_file"));
    let origin = if about_secret { files::origin(secret) } else { Origin::Unset };
    let key = key.map_or_else(|| section.to_owned(), |key| format!("{section}.{key}"));
    findings.error(key, origin, wrong, "use the file as the platform gave it, or another credential");
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
