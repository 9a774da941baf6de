//! `[[keys]]`: who may call, for which apps, and what.

use std::collections::BTreeSet;
use std::fmt;

use super::problem::nearest;
use super::section::Section;
use super::values::Sha256Digest;
use crate::domain::ids::AppId;
use crate::domain::time::UnixMs;

const MAX_NAME_BYTES: usize = 64;

/// What a key allows. The names are part of the contract with operators.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Scope {
    /// Devices, opt-ins and subscriptions.
    Register,
    /// Events for up to 500 people.
    Notify,
    /// Everyone, and larger audiences.
    Broadcast,
    /// Look at anything, with content and tokens masked.
    Read,
    /// … unmasked.
    ReadContent,
    /// Redrive, pause, resume.
    Operate,
    /// Event types and everything else.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 7] =
        [Self::Register, Self::Notify, Self::Broadcast, Self::Read, Self::ReadContent, Self::Operate, Self::Admin];

    /// The word used in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Notify => "notify",
            Self::Broadcast => "broadcast",
            Self::Read => "read",
            Self::ReadContent => "read_content",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }

    /// The error says what is wrong and names the nearest scope.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|scope| scope.name() == text).ok_or_else(|| {
            match nearest(text, Self::ALL.into_iter().map(Self::name)) {
                Some(meant) => format!("there is no scope `{text}`; did you mean `{meant}`?"),
                None => format!("there is no scope `{text}`"),
            }
        })
    }

    /// Every scope's name, comma-separated.
    #[must_use]
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An API key as the configuration knows it: its hash, never itself.
#[derive(Clone, Debug)]
pub struct Key {
    /// For logs and the consent history: 1 to 64 bytes.
    pub name: String,
    /// Of the whole key, `nk_` included. Absent for a key that is only a client certificate.
    pub sha256: Option<Sha256Digest>,
    /// Of the client certificate's DER form; a caller that presents it is this key.
    pub client_cert_sha256: Option<Sha256Digest>,
    /// Never empty.
    pub apps: BTreeSet<AppId>,
    /// Never empty.
    pub scopes: BTreeSet<Scope>,
    /// Refused from this moment on.
    pub expires_at: Option<UnixMs>,
    /// Its place in the list.
    pub(super) index: usize,
}

/// A name fit for a key: shown in logs, so neither long nor with control characters.
pub fn check_key_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
        return Err(format!("must have 1 to {MAX_NAME_BYTES} bytes and no control characters"));
    }
    Ok(text.to_owned())
}

/// An RFC 3339 time with offset, or a date, which means its beginning in UTC.
pub fn parse_expiry(text: &str) -> Result<UnixMs, String> {
    let at = text.parse::<jiff::Timestamp>().or_else(|_| format!("{text}T00:00:00Z").parse());
    match at {
        Ok(at) => Ok(UnixMs(at.as_millisecond())),
        Err(_) => Err(format!("`{text}` is neither a date nor an RFC 3339 time")),
    }
}

pub(super) fn read(sections: Vec<Section<'_>>) -> Vec<Key> {
    let mut names = BTreeSet::new();
    let mut secrets = BTreeSet::new();
    let mut keys = Vec::new();
    for (index, mut section) in sections.into_iter().enumerate() {
        let key = read_key(&mut section, index);
        if let Some(key) = key {
            if !names.insert(key.name.clone()) {
                section.problem("name", &format!("`{}` is used twice", key.name), "give each key its own name");
            }
            for (field, digest) in [("sha256", key.sha256), ("client_cert_sha256", key.client_cert_sha256)] {
                if digest.is_some_and(|digest| !secrets.insert((field, digest))) {
                    section.problem(field, "is used by two keys", "make one of them anew with `nudged key new`");
                }
            }
            keys.push(key);
        }
        section.finish();
    }
    keys
}

fn read_key(section: &mut Section<'_>, index: usize) -> Option<Key> {
    let name = section.parsed("name", "use a short word, e.g. \"backend\"", check_key_name);
    if !section.has("name") {
        section.missing("name", "logs and the consent history name the key");
    }
    let remedy = "copy it from what `nudged key new` printed";
    let sha256 = section.parsed("sha256", remedy, Sha256Digest::parse);
    let remedy = "use the output of `openssl x509 -noout -fingerprint -sha256` after the equals sign";
    let client_cert_sha256 = section.parsed("client_cert_sha256", remedy, Sha256Digest::parse);
    if !section.has("sha256") && !section.has("client_cert_sha256") {
        section.missing("sha256", "nothing proves the key; `nudged key new` makes one");
    }
    let remedy = "write e.g. 2027-01-01 or 2027-01-01T09:00:00+09:00";
    let expires_at = section.parsed("expires_at", remedy, parse_expiry);
    let apps = read_set(section, "apps", "a key is bound to apps", "name [apps.…] sections", |text| {
        AppId::parse("", text).map_err(|violation| format!("`{text}` {}", violation.description))
    });
    let remedy = format!("use: {}", Scope::names());
    let scopes = read_set(section, "scopes", "a key without scopes may do nothing", &remedy, Scope::parse);
    // A key that is only partly understood must not appear to allow something.
    if (section.has("expires_at") && expires_at.is_none()) || (sha256.is_none() && client_cert_sha256.is_none()) {
        return None;
    }
    Some(Key { name: name?, sha256, client_cert_sha256, apps: apps?, scopes: scopes?, expires_at, index })
}

/// A list that must not be empty; `None` after any problem.
fn read_set<T: Ord>(
    section: &mut Section<'_>,
    key: &'static str,
    why: &str,
    remedy: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Option<BTreeSet<T>> {
    let items = section.list(key);
    if items.is_empty() {
        if section.has(key) {
            section.problem(key, &format!("names nothing: {why}"), remedy);
        } else {
            section.missing(key, why);
        }
        return None;
    }
    let mut set = BTreeSet::new();
    let mut whole = true;
    for item in items {
        match parse(&item) {
            Ok(value) => {
                set.insert(value);
            }
            Err(wrong) => {
                section.problem(key, &wrong, remedy);
                whole = false;
            }
        }
    }
    whole.then_some(set)
}
