//! `[database]`: where everything is kept.

use std::path::PathBuf;

use super::section::Section;
use super::values::{SecretSource, SecretText};
use crate::domain::targets;

#[derive(Clone, Debug)]
pub struct Database {
    /// The SQLite file, made (0600) when absent. Default `nudged.db` in the working directory. Not used with `postgres`.
    pub path: PathBuf,
    /// `None`: SQLite.
    pub postgres: Option<Postgres>,
    /// Notifications, results and failed attempts older than this are deleted; what is open stays. Default 30 days.
    pub retention_days: u32,
    /// Free space of the SQLite file's file system below which no event is taken, in MiB; 0: no limit. Default 256.
    pub min_free_mib: u64,
    /// Size of the database from which on no event is taken, in MiB; 0, the default: no limit.
    pub max_mib: u64,
    /// Reading connections, each on its own blocking thread. Default 3.
    pub readers: usize,
    /// Default [`Synchronous::Full`].
    pub synchronous: Synchronous,
    /// The page cache of the writer, the scanner and each reader in MiB. Default 4.
    pub cache_mib: usize,
    /// The most requests in one transaction. Default 256.
    pub group_max: usize,
    /// Requests that may wait in one of the writer's queues; more are refused. Default 8192.
    pub queue_max_requests: usize,
    /// … and the memory they may hold, in MiB. Default 32.
    pub queue_max_mib: usize,
}

/// A Postgres server, shared by any number of replicas.
#[derive(Clone, Debug)]
pub struct Postgres {
    /// Holds a password, or not when `password_file` is given.
    pub url: SecretText,
    /// Read anew for each connection.
    pub password_file: Option<PathBuf>,
    /// Connections for statements; two more are kept for the heartbeat and the deny table. Default 16.
    pub pool: usize,
    /// The newest pack format to read and write. Default: the newest there is. Lower it to the one before while you may
    /// go back to the version before.
    pub pack_format: i16,
    /// Days after today for which partitions of the history are made ahead. Default 3.
    pub days_ahead: u32,
}

/// SQLite's `synchronous` pragma.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Synchronous {
    /// Every commit is on the disk before it is acknowledged.
    Full,
    /// A power cut may lose the last acknowledged events; a crash of the process loses nothing.
    Normal,
}

impl Database {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let (path, url) = match read_location(&mut section) {
            None => (PathBuf::from("nudged.db"), None),
            Some(Location::Sqlite(path)) => (path, None),
            Some(Location::Postgres(url)) => (PathBuf::new(), Some(url)),
        };
        let password_file = section.path("password_file");
        if password_file.is_some() && url.is_none() {
            section.problem("password_file", "SQLite has no password", "leave it out, or give a postgres:// URL");
        }
        let mut postgres = section.table("postgres");
        let pool = postgres.count("pool", 16, 2..=1000);
        let newest = targets::NEWEST.unsigned_abs();
        let pack_format = postgres.count("pack_format", usize::from(newest), 1..=u64::from(newest));
        let pack_format = i16::try_from(pack_format).unwrap_or(targets::NEWEST);
        let days_ahead = count_days(&mut postgres, "days_ahead", 3, 1..=30);
        postgres.finish();
        let postgres = url.map(|url| Postgres { url, password_file, pool, pack_format, days_ahead });
        let retention_days = count_days(&mut section, "retention_days", 30, 1..=3650);
        let min_free_mib = section.number("min_free_mib", 256, 0..=1_000_000_000);
        let max_mib = section.number("max_mib", 0, 0..=1_000_000_000);
        let mut sqlite = section.table("sqlite");
        let synchronous = sqlite.choice(
            "synchronous",
            Synchronous::Full,
            &[("full", Synchronous::Full), ("normal", Synchronous::Normal)],
        );
        if synchronous == Synchronous::Normal {
            sqlite.warning(
                "synchronous",
                "a power cut can lose acknowledged events",
                "use full unless that is acceptable",
            );
        }
        let database = Self {
            path,
            postgres,
            retention_days,
            min_free_mib,
            max_mib,
            readers: sqlite.count("readers", 3, 1..=16),
            synchronous,
            cache_mib: sqlite.count("cache_mib", 4, 1..=65_536),
            group_max: sqlite.count("group_max", 256, 4..=4096),
            queue_max_requests: sqlite.count("queue_max_requests", 8192, 16..=1_000_000),
            queue_max_mib: sqlite.count("queue_max_mib", 32, 1..=65_536),
        };
        sqlite.finish();
        section.finish();
        database
    }
}

fn count_days(
    section: &mut Section<'_>,
    key: &'static str,
    default: usize,
    range: std::ops::RangeInclusive<u64>,
) -> u32 {
    u32::try_from(section.count(key, default, range)).expect("the range is far below")
}

enum Location {
    Sqlite(PathBuf),
    Postgres(SecretText),
}

/// The URL is a secret: on Postgres it holds a password. No message repeats it.
fn read_location(section: &mut Section<'_>) -> Option<Location> {
    let source = section.secret("url", "url_file")?;
    let (key, url) = match &source {
        SecretSource::Inline(text) => ("url", text.expose().to_owned()),
        SecretSource::File(path) => match source.read().map(|bytes| String::from_utf8(bytes.to_vec())) {
            Ok(Ok(text)) => ("url_file", text.trim_end().to_owned()),
            Ok(Err(_)) => {
                section.problem("url_file", &format!("{} is not UTF-8", path.display()), "put the URL into it");
                return None;
            }
            Err(error) => {
                section.problem("url_file", &format!("{error}: {}", error.source), "make the file readable to nudged");
                return None;
            }
        },
    };
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Some(Location::Postgres(SecretText::new(url)));
    }
    match url.strip_prefix("sqlite://") {
        Some(path) if !path.is_empty() && !path.starts_with(':') && !path.contains(['?', '#']) => {
            Some(Location::Sqlite(section.resolve(key, path)))
        }
        _ => {
            section.problem(
                key,
                "is neither sqlite://PATH nor postgres://…",
                "write sqlite://nudged.db, sqlite:///var/lib/nudged/nudged.db for an absolute path, or \
                 postgres://user@host/database",
            );
            None
        }
    }
}
