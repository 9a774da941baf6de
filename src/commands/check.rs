//! `nudged check`: every problem at once, each with its file, its key, what is wrong and what to do.
//!
//! Nothing is changed, and no provider is called unless `--live` asks for it. [`PROBES`] is the list of what is looked at; a part that owns a format
//! (a sender its credentials, the store its database) is asked by a probe of its own rather than imitated here.

mod files;
mod live;
mod owners;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use crate::config::{Config, Origin, Problem};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;

/// Looks at one aspect of a configuration. `now` decides what is expired.
pub type Probe = fn(&Config, now: UnixMs, &mut Findings);

/// In the order of their output.
const PROBES: &[Probe] = &[
    files::database,
    owners::database,
    files::tls,
    files::apns,
    files::fcm,
    owners::credentials,
    files::own_file,
    keys,
];

#[derive(clap::Args)]
pub struct CheckArgs {
    /// Try every credential at its platform, with a push that can reach nobody
    #[arg(long)]
    pub live: bool,
}

/// Everything found so far.
#[derive(Default)]
pub struct Findings {
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Findings {
    /// Something that keeps nudged from starting or a credential from working.
    pub fn error(&mut self, key: impl Into<String>, origin: Origin, wrong: impl Into<String>, remedy: &str) {
        self.errors.push(Problem { key: key.into(), origin, wrong: wrong.into(), remedy: remedy.to_owned() });
    }

    /// Something that works and deserves a look.
    pub fn warning(&mut self, key: impl Into<String>, origin: Origin, wrong: impl Into<String>, remedy: &str) {
        self.warnings.push(Problem { key: key.into(), origin, wrong: wrong.into(), remedy: remedy.to_owned() });
    }

    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        write!(f, "{}, {}", count(self.errors.len(), "error"), count(self.warnings.len(), "warning"))
    }
}

/// Prints what was found; the exit code says whether nudged can start.
pub fn run(arguments: &CheckArgs, explicit: Option<&Path>, runtime: &Runtime) -> anyhow::Result<ExitCode> {
    let (config, problems) = Config::read(explicit);
    let mut findings = look(&config, problems, runtime.now());
    if arguments.live {
        let tried = super::block_on(live::credentials(&config, runtime, &mut findings))?;
        for line in tried {
            println!("{line}");
        }
    }
    let credentials: usize = config.apps.values().map(|app| app.apns.len() + app.fcm.len()).sum();
    let file = config.file.as_ref().map_or_else(|| "no configuration file".to_owned(), |f| f.display().to_string());
    println!("{file}: {} apps, {credentials} credentials, {} keys", config.apps.len(), config.keys.len());
    println!("{findings}");
    Ok(if findings.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look(config: &Config, problems: Vec<Problem>, now: UnixMs) -> Findings {
    let mut findings = Findings { errors: problems, warnings: config.warnings.clone() };
    for probe in PROBES {
        probe(config, now, &mut findings);
    }
    findings
}

fn keys(config: &Config, now: UnixMs, findings: &mut Findings) {
    for key in &config.keys {
        if let Some(at) = key.expires_at.filter(|at| *at <= now) {
            findings.warning(
                format!("keys (`{}`)", key.name),
                Origin::Unset,
                format!("expired at {at}; every call with it is refused"),
                "remove it, or make a new one with `nudged key new`",
            );
        }
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests;
