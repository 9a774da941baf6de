//! `nudged key new`: makes an API key, prints it once and the stanza that lets it in.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::MISUSED;
use crate::config::keys::{check_key_name, parse_expiry};
use crate::config::{Scope, Sha256Digest};
use crate::domain::ids::AppId;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;

/// Marks a nudged key for people and for secret scanners.
const PREFIX: &str = "nk_";

#[derive(clap::Subcommand)]
pub enum KeyCommand {
    /// Make a key: prints it once, and the stanza for the configuration
    New(NewKey),
}

#[derive(clap::Args)]
pub struct NewKey {
    /// What logs and the consent history call it, e.g. backend
    pub name: String,
    /// The apps it is for, comma-separated
    #[arg(long, value_delimiter = ',', required = true)]
    pub apps: Vec<String>,
    /// What it may do, comma-separated: register, notify, broadcast, read, read_content, operate, admin
    #[arg(long, value_delimiter = ',', required = true)]
    pub scopes: Vec<String>,
    /// The date (UTC) or RFC 3339 time from which it is refused
    #[arg(long, value_name = "WHEN")]
    pub expires: Option<String>,
}

/// Prints the key and its stanza, or every problem of the arguments.
pub fn new(arguments: &NewKey, runtime: &Runtime) -> anyhow::Result<ExitCode> {
    match Checked::from(arguments, runtime.now()) {
        Ok(checked) => {
            let key = make_key(runtime);
            let mut out = std::io::stdout().lock();
            writeln!(out, "{}\n\n{}", *key, checked.stanza(&key))?;
            out.flush()?;
            eprintln!("The first line is the key. It is shown only now; the configuration needs the stanza alone.");
            Ok(ExitCode::SUCCESS)
        }
        Err(problems) => {
            for problem in problems {
                eprintln!("error: {problem}");
            }
            Ok(ExitCode::from(MISUSED))
        }
    }
}

/// `nk_` and 32 random bytes in 43 characters of base64url.
fn make_key(runtime: &Runtime) -> Zeroizing<String> {
    let bytes = Zeroizing::new(runtime.secret_bytes::<32>());
    Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(*bytes)))
}

struct Checked {
    name: String,
    apps: BTreeSet<AppId>,
    scopes: BTreeSet<Scope>,
    expires_at: Option<UnixMs>,
}

impl Checked {
    fn from(arguments: &NewKey, now: UnixMs) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        if let Err(wrong) = check_key_name(&arguments.name) {
            problems.push(format!("NAME {wrong}"));
        }
        let mut apps = BTreeSet::new();
        for app in &arguments.apps {
            match AppId::parse("--apps", app) {
                Ok(app) => drop(apps.insert(app)),
                Err(violation) => problems.push(format!("--apps: `{app}` {}", violation.description)),
            }
        }
        let mut scopes = BTreeSet::new();
        for scope in &arguments.scopes {
            match Scope::parse(scope) {
                Ok(scope) => drop(scopes.insert(scope)),
                Err(wrong) => problems.push(format!("--scopes: {wrong} (there are: {})", Scope::names())),
            }
        }
        let expires_at = match arguments.expires.as_deref().map(parse_expiry) {
            None => None,
            Some(Ok(at)) if at <= now => {
                problems.push(format!("--expires: {at} is over"));
                None
            }
            Some(Ok(at)) => Some(at),
            Some(Err(wrong)) => {
                problems.push(format!("--expires: {wrong}"));
                None
            }
        };
        if problems.is_empty() {
            Ok(Self { name: arguments.name.clone(), apps, scopes, expires_at })
        } else {
            Err(problems)
        }
    }

    fn stanza(&self, key: &str) -> String {
        let quoted = |text: &str| toml::Value::from(text).to_string();
        let list = |items: Vec<String>| items.iter().map(|item| quoted(item)).collect::<Vec<_>>().join(", ");
        let apps = list(self.apps.iter().map(ToString::to_string).collect());
        let scopes = list(self.scopes.iter().map(ToString::to_string).collect());
        let digest = Sha256Digest(Sha256::digest(key.as_bytes()).into());
        let mut text = format!("[[keys]]\nname = {}\nsha256 = \"{digest}\"\n", quoted(&self.name));
        write!(text, "apps = [{apps}]\nscopes = [{scopes}]\n").expect("a String takes all");
        if let Some(at) = self.expires_at {
            writeln!(text, "expires_at = \"{at}\"").expect("a String takes all");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn arguments(name: &str, apps: &[&str], scopes: &[&str], expires: Option<&str>) -> NewKey {
        let texts = |items: &[&str]| items.iter().map(ToString::to_string).collect();
        NewKey { name: name.to_owned(), apps: texts(apps), scopes: texts(scopes), expires: expires.map(str::to_owned) }
    }

    #[test]
    fn the_printed_stanza_lets_the_printed_key_in() {
        let runtime = Runtime::production();
        let arguments = arguments("back \"end\"", &["pets", "cats"], &["register", "read_content"], Some("2999-01-01"));
        let checked = Checked::from(&arguments, runtime.now()).expect("valid");
        let key = make_key(&runtime);
        assert_eq!(key.len(), 3 + 43);
        assert!(key.starts_with("nk_"));
        let text = format!("[apps.pets]\n[apps.cats]\n{}", checked.stanza(&key));
        assert!(!text.contains(&*key), "the configuration never holds the key");
        let config = Config::from_toml(Path::new("nudged.toml"), &text, []).unwrap_or_else(|errors| panic!("{errors}"));
        let stored = &config.keys[0];
        assert_eq!(stored.sha256, Some(Sha256Digest(Sha256::digest(key.as_bytes()).into())));
        assert_eq!((stored.name.as_str(), stored.apps.len(), stored.scopes.len()), ("back \"end\"", 2, 2));
        assert_eq!(stored.expires_at.map(|at| at.to_string()).as_deref(), Some("2999-01-01T00:00:00Z"));
    }

    #[test]
    fn two_keys_differ() {
        let runtime = Runtime::production();
        assert_ne!(*make_key(&runtime), *make_key(&runtime));
    }

    #[test]
    fn every_wrong_argument_is_named() {
        let arguments = arguments("", &["Pets"], &["notfy"], Some("2020-01-01"));
        let problems = Checked::from(&arguments, Runtime::production().now()).err().expect("wrong").join("\n");
        for part in ["NAME", "`Pets`", "did you mean `notify`", "is over"] {
            assert!(problems.contains(part), "{part} is not in {problems}");
        }
    }
}
