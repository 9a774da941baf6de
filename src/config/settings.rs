//! Every key that was asked for, with what was set and where: for `nudged config print`, and for telling what a new
//! configuration changes.

use std::fmt;
use std::path::{Path, PathBuf};

use figment::value::Value;

use super::problem::Origin;
use super::reference::{self, Key, Preset, Section};

/// One key.
#[derive(Clone)]
pub struct Setting {
    /// `grpc.listen`, `keys[0].name`, `apps.ifriendspet.apns.watch.key_file`.
    pub key: String,
    /// Its segments.
    pub(super) path: Vec<String>,
    /// As it was set, whatever that is; may be a secret.
    pub(super) value: Option<Value>,
    pub origin: Origin,
}

/// All of them, in the order in which they were read. Its `Debug` shows no value.
#[derive(Clone, Default)]
pub struct Settings(pub(super) Vec<Setting>);

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({} keys)", self.0.len())
    }
}

impl Setting {
    /// The section as the file has it, and the section and key as the reference calls them.
    fn place(&self) -> (String, String, &str) {
        let (key, section) = self.path.split_last().map_or(("", &[][..]), |(key, section)| (key.as_str(), section));
        match section {
            [first, _] if first == "keys" => (format!("[[keys]] # {}", section[1]), "keys".to_owned(), key),
            [first, _, rest @ ..] if first == "apps" => {
                let platform = rest.first().map_or_else(String::new, |platform| format!(".{platform}"));
                (format!("[{}]", section.join(".")), format!("apps.<app_id>{platform}"), key)
            }
            section => (format!("[{}]", section.join(".")), section.join("."), key),
        }
    }

    fn reference(&self) -> Option<(&'static Section, &'static Key)> {
        let (_, section, key) = self.place();
        reference::find(&section, key)
    }

    /// As TOML; a secret as `"[redacted]"`.
    fn shown(&self, value: &Value) -> String {
        let secret = self.reference().is_none_or(|(_, key)| key.secret);
        match (secret, value.as_str()) {
            // An SQLite URL is a path.
            (true, Some(url)) if url.starts_with("sqlite://") && self.key == "database.url" => quoted(url),
            (true, _) => quoted("[redacted]"),
            (false, _) => toml(value),
        }
    }
}

impl Settings {
    /// Keys whose values differ, restart needed or not.
    #[must_use]
    pub fn changed(&self, other: &Self) -> Changed {
        let mut changed = Changed::default();
        let mut note = |setting: &Setting| {
            let live = setting.reference().is_some_and(|(section, key)| reference::is_live(section, key));
            let keys = if live { &mut changed.live } else { &mut changed.restart };
            if !keys.contains(&setting.key) {
                keys.push(setting.key.clone());
            }
        };
        let value = |settings: &Self, key: &str| {
            settings.0.iter().find(|setting| setting.key == key).and_then(|setting| setting.value.clone())
        };
        for setting in &self.0 {
            if !same(setting.value.as_ref(), value(other, &setting.key).as_ref()) {
                note(setting);
            }
        }
        for setting in other.0.iter().filter(|setting| setting.value.is_some()) {
            if value(self, &setting.key).is_none() {
                note(setting);
            }
        }
        changed
    }

    /// The files that keys name. `directory`: what relative paths in the configuration file start from.
    #[must_use]
    pub fn files(&self, directory: &Path) -> Vec<PathBuf> {
        let named = self.0.iter().filter(|setting| setting.key.ends_with("_file"));
        named
            .filter_map(|setting| {
                let text = setting.value.as_ref()?.as_str()?;
                Some(match setting.origin {
                    Origin::Environment(_) => PathBuf::from(text),
                    Origin::File { .. } | Origin::Unset => directory.join(text),
                })
            })
            .collect()
    }

    /// What holds, as a file with the origin of each value beside it.
    #[must_use]
    pub fn print(&self) -> String {
        let mut lines: Vec<(String, Vec<(String, String)>)> = Vec::new();
        for setting in &self.0 {
            let (header, _, key) = setting.place();
            let default = setting.reference().map(|(_, key)| key.default);
            let (line, origin) = match (&setting.value, default) {
                (Some(value), _) => (format!("{key} = {}", setting.shown(value)), setting.origin.to_string()),
                (None, Some(Preset::Value(value))) => (format!("{key} = {value}"), "default".to_owned()),
                (None, Some(Preset::Absent("none" | "required" | "required, or the next", _)) | None) => continue,
                (None, Some(Preset::Absent(words, _))) => (format!("#{key}"), format!("default: {words}")),
            };
            match lines.iter_mut().find(|(known, _)| *known == header) {
                Some((_, keys)) => keys.push((line, origin)),
                None => lines.push((header, vec![(line, origin)])),
            }
        }
        let widest = lines.iter().flat_map(|(_, keys)| keys).map(|(line, _)| line.chars().count());
        let column = widest.filter(|width| *width <= 60).max().unwrap_or(0);
        let section = |(header, keys): &(String, Vec<(String, String)>)| {
            let keys = keys.iter().map(|(line, origin)| format!("{line:column$}  # {origin}\n"));
            format!("{header}\n{}", keys.collect::<Vec<_>>().concat())
        };
        lines.iter().map(section).collect::<Vec<_>>().join("\n")
    }
}

/// See [`Settings::changed`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changed {
    /// A reload applies these.
    pub live: Vec<String>,
    /// These take effect at the next start.
    pub restart: Vec<String>,
}

/// Tags say where a value came from, not what it is.
fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => toml(a) == toml(b),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

fn toml(value: &Value) -> String {
    match value {
        Value::String(_, text) => quoted(text),
        Value::Char(_, one) => quoted(&one.to_string()),
        Value::Bool(_, flag) => flag.to_string(),
        Value::Num(_, number) => match (number.to_i128(), number.to_u128(), number.to_f64()) {
            (Some(number), _, _) => number.to_string(),
            (_, Some(number), _) => number.to_string(),
            (_, _, number) => number.unwrap_or_default().to_string(),
        },
        Value::Empty(..) => quoted(""),
        Value::Dict(_, dict) => {
            let pairs: Vec<String> = dict.iter().map(|(key, value)| format!("{key} = {}", toml(value))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        Value::Array(_, items) => format!("[{}]", items.iter().map(toml).collect::<Vec<_>>().join(", ")),
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
