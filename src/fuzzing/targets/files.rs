//! Files that operators give us: the configuration, a catalogue, rows to import.

use std::ffi::OsString;
use std::path::Path;

use crate::commands::catalog::fuzzing as catalogue_file;
use crate::commands::import::fuzzing::{Read, read};
use crate::config::{Config, ConfigErrors, Settings};
use crate::fuzzing::shape;

use super::{halves, text};

pub const CONFIG_WORDS: &[&str] = &[
    "[grpc]\n",
    "[database]\n",
    "[delivery]\n",
    "[apps.pets]\n",
    "[apps.pets.fcm]\n",
    "[apps.pets.apns]\n",
    "[[keys]]\n",
    "[log]\n",
    "[traces]\n",
    "[admin]\n",
    "listen = ",
    "\"127.0.0.1:50051\"",
    "url = ",
    "scopes = [",
    "\"notify\"",
    "apps = [\"pets\"]",
    "sha256 = ",
    "NUDGED_GRPC__LISTEN=",
    "NUDGED_KEYS=",
    "NUDGED_APPS__PETS__FCM__SERVICE_ACCOUNT_FILE=",
    "__",
    "=",
    "true",
    "18446744073709551616",
    "-9223372036854775808",
    "1e400",
    "1979-05-27T07:32:00Z",
    "\"\"\"",
    "'''",
    "a.b.c = 1",
    "{ a = 1 }",
    "\u{0}",
];
pub const CATALOGUE_WORDS: &[&str] = &[
    "[[event_types]]\n",
    "[[event_types.templates]]\n",
    "name = \"comment.created\"\n",
    "locale = \"ko\"\n",
    "title = \"{{ data.a }}\"\n",
    "ttl = \"24h\"\n",
    "purpose = \"ADVERTISING\"\n",
    "{\"event_types\":[",
    "{\"name\":\"a\"}",
    "\"templates\":[{\"body\":\"b\"}]",
    "app = \"pets\"\n",
    "badge = \"1\"\n",
    "lane = \"BULK\"\n",
    "\\u0000",
    "\"\"\"",
];
pub const IMPORT_WORDS: &[&str] = &[
    "user_id,",
    "platform,",
    "token,",
    "observed_at",
    "labels.team,",
    "opted_in,",
    "event_type,",
    "topic,",
    "\n",
    "\r\n",
    "\r",
    "\"",
    "\"\"",
    ",",
    "FCM",
    "APNS",
    "true",
    "*",
    "2026-11-24T00:00:00Z",
    "1795478400",
    "1795478400123",
    "-9223372036854775808",
    "9223372036854775807",
    "{\"user_id\":\"choco\"",
    "\"observed_at\":",
    "\"labels\":{\"a\":\"b\"}",
    "}",
    "null",
    "\u{feff}",
];

/// What a configuration came to; the same text always comes to the same.
fn understood(read: impl Fn() -> Result<Config, ConfigErrors>) -> u64 {
    let first = read();
    let told = |read: &Result<Config, ConfigErrors>| match read {
        // Where a value came from is numbered anew in each reading.
        Ok(config) => format!("{:?}", Config { settings: Settings::default(), ..config.clone() }),
        Err(errors) => format!("{:?}", errors.problems),
    };
    assert_eq!(told(&first), told(&read()), "the same again");
    match first {
        Ok(config) => shape(&(config.apps.len(), config.keys.len(), config.warnings.len())),
        Err(errors) => {
            assert!(!errors.problems.is_empty());
            let mut keys: Vec<(String, usize)> = errors
                .problems
                .iter()
                .map(|problem| {
                    assert!(!problem.wrong.is_empty());
                    let known = problem.key.split('.').take(1).collect::<String>();
                    (known.chars().take(8).collect(), problem.wrong.len().min(40))
                })
                .take(4)
                .collect();
            keys.dedup();
            shape(&keys)
        }
    }
}

/// A configuration file.
pub fn config(input: &[u8]) -> u64 {
    let text = text(input);
    understood(|| Config::from_toml(Path::new("nudged.toml"), &text, []))
}

/// Environment variables, one a line.
pub fn config_env(input: &[u8]) -> u64 {
    let text = text(input);
    understood(|| {
        let variables = text.lines().filter_map(|line| line.split_once('=')).filter(|(name, _)| !name.contains('\0'));
        let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        Config::from_toml(Path::new("nudged.toml"), "[apps.pets]\n", variables)
    })
}

/// TOML, or JSON where the first byte is a brace: what reads is the same in both written forms.
pub fn catalogue(input: &[u8]) -> u64 {
    let text = text(input);
    let Some(read) = catalogue_file::read(&text, text.starts_with('{')) else { return 0 };
    for (written, json) in [(&read.toml, false), (&read.json, true)] {
        let again = catalogue_file::read(written, json).expect("what we wrote");
        assert_eq!(again, read);
    }
    shape(&(read.violations.min(8), read.types.min(4)))
}

fn lines_ascend(rows: &[Read]) {
    assert!(rows.is_sorted_by(|a, b| a.number < b.number), "a line's number is its item's sequence");
    assert!(rows.first().is_none_or(|row| row.number > 0));
}

/// The first byte: what is imported.
fn import(input: &[u8], csv: bool) -> u64 {
    let (kind, bytes) = halves(input);
    let kind = kind.first().copied().unwrap_or_default();
    let Some(rows) = read(kind, csv, bytes.to_vec(), 0) else { return 0 };
    lines_ascend(&rows);
    assert!(rows.len() <= bytes.len());
    for row in &rows {
        match &row.item {
            Ok(message) => assert!(message.len() <= 2 * bytes.len() + 200, "{} bytes of one row", message.len()),
            Err(violations) => assert!(!violations.is_empty() && violations.len() <= bytes.len() + 1),
        }
    }
    // Gone on from anywhere, the rest is the same.
    if let Some(middle) = rows.get(rows.len() / 2) {
        let rest = read(kind, csv, bytes.to_vec(), middle.number).expect("as before");
        assert_eq!(rest, rows[rows.len() / 2 + 1..]);
    }
    // Line ends are a matter of taste.
    if csv && !bytes.contains(&b'"') && !bytes.contains(&b'\r') {
        for end in [&b"\r\n"[..], b"\r"] {
            let other: Vec<u8> = bytes.split(|byte| *byte == b'\n').collect::<Vec<_>>().join(end);
            let other = read(kind, csv, other, 0).expect("as before");
            lines_ascend(&other);
            assert_eq!(other.len(), rows.len());
            for (row, other) in rows.iter().zip(&other) {
                assert_eq!(row.item.is_ok(), other.item.is_ok(), "line {}", row.number);
            }
        }
    }
    let came_to = |row: &Read| row.item.as_ref().map(|_| ()).map_err(|violations| violations[0].field.clone());
    let mut kinds: Vec<_> = rows.iter().map(came_to).collect();
    kinds.dedup();
    kinds.truncate(6);
    shape(&(kind % 3, kinds))
}

pub fn import_csv(input: &[u8]) -> u64 {
    import(input, true)
}

pub fn import_ndjson(input: &[u8]) -> u64 {
    import(input, false)
}
