//! The files that make `nudged serve --config DIR/nudged.toml` just work, and scripts find the ports.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::json;

use super::credentials::{self, APNS_KEY_FILE, CA_FILE, SERVICE_ACCOUNT_FILE};
use super::{Sandbox, SandboxError};

/// The daemon's configuration.
pub(super) const CONFIG_FILE: &str = "nudged.toml";

/// Endpoints for scripts.
pub(super) const ENDPOINTS_FILE: &str = "sandbox.json";

pub(super) fn write(dir: &Path, sandbox: &Sandbox) -> Result<(), SandboxError> {
    let absolute = std::path::absolute(dir).map_err(|source| SandboxError::File { path: dir.to_owned(), source })?;
    credentials::write(&dir.join(CONFIG_FILE), &config(&absolute, sandbox), 0o600)?;
    let endpoints = json!({
        "apns": sandbox.apns_endpoint(),
        "fcm": sandbox.fcm_endpoint(),
        "token": sandbox.token_endpoint(),
        "control": format!("http://{}", sandbox.control_addr()),
    });
    credentials::write(&dir.join(ENDPOINTS_FILE), &format!("{endpoints:#}\n"), 0o644)
}

fn config(dir: &Path, sandbox: &Sandbox) -> String {
    let options = sandbox.options();
    let file = |name: &str| quoted_path(&dir.join(name));
    let database =
        options.database_url.clone().unwrap_or_else(|| format!("sqlite://{}", dir.join("nudged.db").display()));
    let mut text = String::from("# Written by `nudged sandbox`; the next start writes it anew.\n");
    let mut line =
        |line: std::fmt::Arguments<'_>| text.write_fmt(format_args!("{line}\n")).expect("a String takes all");
    line(format_args!("[database]\nurl = {}\n", quoted(&database)));
    line(format_args!("[grpc]\ndefault_app = {}", quoted(&options.app_id)));
    if let Some(listen) = options.grpc_listen {
        line(format_args!("listen = \"{listen}\""));
    }
    if let Some(listen) = options.admin_listen {
        line(format_args!("\n[admin]\nlisten = \"{listen}\""));
    }
    let app = key(&options.app_id);
    line(format_args!("\n[apps.{app}.apns]\nkey_file = {}", file(APNS_KEY_FILE)));
    line(format_args!("key_id = {}", quoted(credentials::KEY_ID)));
    line(format_args!("team_id = {}", quoted(credentials::TEAM_ID)));
    line(format_args!("topic = {}", quoted(&options.bundle_id)));
    if !options.extra_topics.is_empty() {
        let topics: Vec<String> = options.extra_topics.iter().map(|topic| quoted(topic)).collect();
        line(format_args!("topics = [{}]", topics.join(", ")));
    }
    line(format_args!("environment = \"sandbox\""));
    let apns = quoted(sandbox.apns_endpoint());
    line(format_args!("endpoint = {apns}\nendpoint_sandbox = {apns}\nca_file = {}", file(CA_FILE)));
    line(format_args!("\n[apps.{app}.fcm]\nservice_account_file = {}", file(SERVICE_ACCOUNT_FILE)));
    line(format_args!("endpoint = {}\nca_file = {}", quoted(sandbox.fcm_endpoint()), file(CA_FILE)));
    // Google's quota is not this machine's.
    line(format_args!("rate_per_minute = 0"));
    text
}

/// A TOML key: bare where that is allowed.
fn key(text: &str) -> String {
    let bare = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if bare { text.to_owned() } else { quoted(text) }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}
