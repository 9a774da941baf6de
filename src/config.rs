//! Configuration: defaults, below `nudged.toml`, below `NUDGED_<SECTION>__<KEY>` environment variables.
//!
//! Conventions, the same in every section:
//! - Durations are whole numbers whose key says the unit: `…_secs`, `…_ms`.
//! - Secrets may be given in place (`<key>`) or as a file (`<key>_file`); a file is read when the secret is used.
//! - Relative paths start at the configuration file's directory; those from the environment (and the default database)
//!   at the working directory.
//! - Lists from the environment are comma-separated or TOML (`["a", "b"]`); `NUDGED_KEYS` is a TOML array of tables.
//! - An unknown key is an error that names the nearest known one. All problems are reported at once.
//!
//! The structs know neither senders nor the API: `app` turns them into each component's own settings.

pub mod admin;
pub mod apns;
pub mod apps;
pub mod database;
pub mod delivery;
pub mod fcm;
pub mod grpc;
pub mod keys;
mod layers;
pub mod log;
pub mod problem;
pub mod reference;
mod section;
pub mod settings;
pub mod traces;
pub mod values;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::domain::ids::AppId;

pub use admin::Admin;
pub use apns::{ApnsAuth, ApnsCredential, ApnsEnvironment, RateLimit};
pub use apps::App;
pub use database::{Database, Postgres, Synchronous};
pub use delivery::Delivery;
pub use fcm::FcmCredential;
pub use grpc::{Grpc, GrpcTls};
pub use keys::{Key, Scope};
pub use log::{Log, LogFormat};
pub use problem::{ConfigErrors, Origin, Problem};
pub use settings::Settings;
pub use traces::Traces;
pub use values::{Endpoint, SecretSource, SecretText, Sha256Digest};

use layers::{File, Layers};
use section::{Found, Reader};

/// In the working directory, when no file is named.
const DEFAULT_FILE: &str = "nudged.toml";

/// Everything an operator can set, checked. Its `Debug` shows no secret.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it came from, when there was one.
    pub file: Option<PathBuf>,
    pub grpc: Grpc,
    pub admin: Admin,
    pub database: Database,
    pub delivery: Delivery,
    pub log: Log,
    pub traces: Traces,
    pub keys: Vec<Key>,
    pub apps: BTreeMap<AppId, App>,
    /// Every key with its value and origin.
    pub settings: Settings,
    /// What is allowed but deserves a look; to be logged at start-up.
    pub warnings: Vec<Problem>,
}

impl Config {
    /// Reads `explicit`, else `nudged.toml` in the working directory if there is one, and this process's environment.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigErrors> {
        let (config, problems) = Self::read(explicit);
        if problems.is_empty() { Ok(config) } else { Err(ConfigErrors { problems }) }
    }

    /// As [`Config::load`], but gives what could be understood together with the problems: for `nudged check`.
    #[must_use]
    pub fn read(explicit: Option<&Path>) -> (Self, Vec<Problem>) {
        match File::find(explicit) {
            Ok(file) => Self::from_layers(file, std::env::vars_os()),
            Err(problem) => {
                let (config, mut problems) = Self::from_layers(None, std::env::vars_os());
                problems.insert(0, problem);
                (config, problems)
            }
        }
    }

    /// The files that this configuration was read from and names: when one changes, it is time to reload. Without a file
    /// the one that would be read.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let file = self.file.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
        let mut files = self.settings.files(&file.parent().map(Path::to_owned).unwrap_or_default());
        files.push(file);
        files.sort();
        files.dedup();
        files
    }

    /// From a text as if it stood in `path`, and the given environment: for tests and `nudged demo`.
    pub fn from_toml(
        path: &Path,
        text: &str,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigErrors> {
        let file = File { path: path.to_owned(), text: text.to_owned() };
        let (config, problems) = Self::from_layers(Some(file), environment);
        if problems.is_empty() { Ok(config) } else { Err(ConfigErrors { problems }) }
    }

    fn from_layers(
        file: Option<File>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> (Self, Vec<Problem>) {
        let (mut config, found) = Self::understand(file, environment);
        config.warnings = found.warnings;
        config.settings = found.settings;
        (config, found.problems)
    }

    fn understand(file: Option<File>, environment: impl IntoIterator<Item = (OsString, OsString)>) -> (Self, Found) {
        let path = file.as_ref().map(|file| file.path.clone());
        let layers = Layers::merge(file.as_ref(), environment);
        let reader = Reader::new(file, layers);
        let mut root = reader.root();
        let config = Self {
            file: path,
            grpc: Grpc::read(root.table("grpc")),
            admin: Admin::read(root.table("admin")),
            database: Database::read(root.table("database")),
            delivery: Delivery::read(root.table("delivery")),
            log: Log::read(root.table("log")),
            traces: Traces::read(root.table("traces")),
            keys: keys::read(root.list_of_tables("keys")),
            apps: apps::read(root.table("apps")),
            settings: Settings::default(),
            warnings: Vec::new(),
        };
        root.finish();
        config.validate(&reader);
        (config, reader.finish())
    }

    /// Rules between sections.
    fn validate(&self, reader: &Reader) {
        let mut root = reader.root();
        let grpc = root.table("grpc");
        if let Some(app) = &self.grpc.default_app
            && !self.apps.contains_key(app)
        {
            let wrong = format!("there is no app `{app}`");
            grpc.problem("default_app", &wrong, &self.app_remedy(app.as_str()));
        }
        if !values::is_loopback(self.grpc.listen) {
            // A key that could not be read is a problem of its own.
            if root.list_of_tables("keys").is_empty() {
                grpc.problem(
                    "listen",
                    &format!("{} can be reached from other machines, but no API keys are configured", self.grpc.listen),
                    "make a key with `nudged key new` and add its [[keys]] stanza, or listen on 127.0.0.1, where no \
                     key is needed",
                );
            }
            if self.grpc.tls.is_none() {
                grpc.warning(
                    "listen",
                    &format!("{} can be reached from other machines without TLS", self.grpc.listen),
                    "set grpc.tls.cert_file and grpc.tls.key_file, unless a proxy in front does TLS",
                );
            }
        }
        let has_client_ca = self.grpc.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some());
        for (index, key) in root.list_of_tables("keys").iter().enumerate() {
            // The sections and the parsed keys are in the same order; a key that could not be read is not in `keys`.
            let Some(parsed) = self.keys.iter().find(|parsed| parsed.index == index) else { continue };
            for app in &parsed.apps {
                if !self.apps.contains_key(app) {
                    key.problem("apps", &format!("there is no app `{app}`"), &self.app_remedy(app.as_str()));
                }
            }
            if parsed.client_cert_sha256.is_some() && !has_client_ca {
                key.problem(
                    "client_cert_sha256",
                    "client certificates are not asked for",
                    "set grpc.tls.client_ca_file to the authority that issues them",
                );
            }
        }
    }

    fn app_remedy(&self, name: &str) -> String {
        match problem::nearest(name, self.apps.keys().map(AppId::as_str)) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => format!("add a section [apps.{name}]"),
        }
    }
}

#[cfg(test)]
mod tests;
