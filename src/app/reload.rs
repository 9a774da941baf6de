//! A new configuration without a restart: keys, apps, credentials, limits and the listener's certificate.
//!
//! Everything new is read and made first; whatever is wrong with any of it leaves the whole of the old in force. What
//! only a start can change (listeners, database, the engine's sizes, logging) stays as it was and is named in the log.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use metrics::{counter, gauge};
use tokio::task::JoinHandle;

use super::routes::{self, Credentials, Workshop};
use super::{App, keys, read_tls};
use crate::config::settings::Changed;
use crate::config::{Config, Grpc, Problem, Settings, values};
use crate::service::AppDirectory;
use crate::telemetry::names;

/// What a reload starts from.
pub(super) struct Live {
    /// Of the start: what holds for everything that a reload cannot change.
    started: Config,
    /// Of the last configuration that was applied, as are the files.
    applied: Settings,
    files: Vec<PathBuf>,
    credentials: Credentials,
    /// Replaced senders on their last answers. Bounded: finished ones are let go at the next reload.
    draining: Vec<JoinHandle<()>>,
}

impl Live {
    pub fn new(config: &Config, credentials: Credentials) -> Self {
        gauge!(names::CONFIG_CURRENT).set(1.0);
        Self {
            started: config.clone(),
            applied: config.settings.clone(),
            files: config.files(),
            credentials,
            draining: Vec::new(),
        }
    }

    pub async fn drained(self) {
        for drain in self.draining {
            if let Err(error) = drain.await {
                tracing::error!(%error, "a replaced sender ended badly");
            }
        }
    }
}

impl App {
    /// Reads the configuration anew, as `serve` did, and applies it or says all that is wrong with it. Gives the files
    /// that are worth watching from now on.
    pub async fn reload(&self, explicit: Option<&Path>) -> Vec<PathBuf> {
        let path = explicit.map(Path::to_owned);
        let (config, problems) = self.runtime.blocking(move || Config::read(path.as_deref())).await;
        let mut live = self.live.lock().await;
        let mut files = config.files();
        let applied = if problems.is_empty() {
            self.apply(&mut live, &config).await.map_err(|error| format!("{error:#}"))
        } else {
            Err(problems.iter().map(line).collect::<Vec<_>>().join("; "))
        };
        let current = match applied {
            Ok(changed) => {
                tracing::info!(changed = changed.live.join(", "), "the configuration is reloaded");
                if !changed.restart.is_empty() {
                    tracing::warn!(keys = changed.restart.join(", "), "these changes take effect at the next start");
                }
                for warning in &config.warnings {
                    tracing::warn!(key = warning.key, origin = %warning.origin, "{}; {}", warning.wrong, warning.remedy);
                }
                true
            }
            Err(problems) => {
                tracing::error!(problems, "the configuration cannot be reloaded; the one before stays in force");
                // It may be put right in a file that only the old one names.
                files.extend(live.files.iter().cloned());
                files.sort();
                files.dedup();
                false
            }
        };
        let result = if current { "applied" } else { "failed" };
        counter!(names::CONFIG_RELOADS, "result" => result).increment(1);
        gauge!(names::CONFIG_CURRENT).set(f64::from(u8::from(current)));
        files
    }

    async fn apply(&self, live: &mut Live, new: &Config) -> anyhow::Result<Changed> {
        let started = &live.started;
        if new.file.is_none()
            && let Some(file) = &started.file
        {
            anyhow::bail!("{} is gone", file.display());
        }
        // A file cut short may be good TOML: it must not open the server to everybody. Nor does it matter which address
        // the new file names; this one is listened on.
        if new.keys.is_empty() && (!self.keys.is_open() || !values::is_loopback(self.grpc_address)) {
            anyhow::bail!("keys: there are none, so every caller could do everything; that takes a restart");
        }
        let mut changed = new.settings.changed(&live.applied);
        changed.restart = new.settings.changed(&started.settings).restart;
        let tls = match (&started.grpc.tls, &new.grpc.tls) {
            (Some(_), Some(tls)) => Some(read_tls(tls)?),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                changed.restart.push("grpc.tls".to_owned());
                None
            }
        };
        let config = Config {
            grpc: Grpc { default_app: new.grpc.default_app.clone(), ..started.grpc.clone() },
            admin: started.admin.clone(),
            database: started.database.clone(),
            delivery: started.delivery.clone(),
            log: started.log.clone(),
            ..new.clone()
        };
        let store = self.store.store();
        let workshop = Workshop {
            runtime: &self.runtime,
            store: &*store,
            threads: &self.threads,
            deny: &self.deny,
            known: &live.credentials,
        };
        let routed = routes::build(&config, &workshop).await?;
        if let Some(tls) = &tls {
            self.server.replace_tls(tls).context("grpc.tls")?;
        }

        let sending = routed.sending();
        self.gauges.set(&config, &routed.apps);
        // Nothing fails from here on. Keys that are gone must not meet apps that are new, nor new keys apps that are
        // gone: what they share is checked by every call.
        self.types.set_default_locales(routed.default_locales);
        self.service.reconfigure(AppDirectory::new(routed.apps, config.grpc.default_app.clone()), sending);
        self.keys.replace(keys::api_keys(&config.keys));
        let retired = self.engine.reroute(routed.routing);
        live.credentials = routed.credentials;
        live.applied = new.settings.clone();
        live.files = new.files();
        live.draining.retain(|drain| !drain.is_finished());
        if !retired.is_empty() {
            tracing::info!(senders = retired.len(), "credentials were replaced or removed; their senders drain");
        }
        for sender in retired {
            let deadline = started.delivery.drain;
            live.draining.push(self.runtime.spawn(async move { sender.drain(deadline).await }));
        }
        Ok(changed)
    }
}

/// A problem in one line.
fn line(problem: &Problem) -> String {
    problem.to_string().replace("\n    ", ", ")
}
