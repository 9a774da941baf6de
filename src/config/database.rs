//! `[database]`: where everything is kept.

use std::path::PathBuf;

use super::section::Section;
use super::values::SecretSource;

#[derive(Clone, Debug)]
pub struct Database {
    /// The SQLite file, made (0600) when absent. Default `nudged.db` in the working directory.
    pub path: PathBuf,
    /// Reading connections, each on its own blocking thread. Default 3.
    pub readers: usize,
    /// Default [`Synchronous::Full`].
    pub synchronous: Synchronous,
    /// The writer's page cache in MiB; readers have a quarter of it each. Default 16.
    pub cache_mib: usize,
    /// The most requests in one transaction. Default 256.
    pub group_max: usize,
    /// Requests that may wait in one of the writer's queues; more are refused. Default 8192.
    pub queue_max_requests: usize,
    /// … and the memory they may hold, in MiB. Default 32.
    pub queue_max_mib: usize,
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
        let path = read_path(&mut section).unwrap_or_else(|| PathBuf::from("nudged.db"));
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
            readers: sqlite.count("readers", 3, 1..=16),
            synchronous,
            cache_mib: sqlite.count("cache_mib", 16, 1..=65_536),
            group_max: sqlite.count("group_max", 256, 4..=4096),
            queue_max_requests: sqlite.count("queue_max_requests", 8192, 16..=1_000_000),
            queue_max_mib: sqlite.count("queue_max_mib", 32, 1..=65_536),
        };
        sqlite.finish();
        section.finish();
        database
    }
}

/// The URL is a secret: on Postgres it holds a password. No message repeats it.
fn read_path(section: &mut Section<'_>) -> Option<PathBuf> {
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
        section.problem(
            key,
            "this version has only SQLite; Postgres is not supported yet",
            "use sqlite://PATH, e.g. sqlite:///var/lib/nudged/nudged.db",
        );
        return None;
    }
    match url.strip_prefix("sqlite://") {
        Some(path) if !path.is_empty() && !path.starts_with(':') && !path.contains(['?', '#']) => {
            Some(section.resolve(key, path))
        }
        _ => {
            section.problem(
                key,
                "is not sqlite://PATH",
                "write sqlite://nudged.db, or sqlite:///var/lib/nudged/nudged.db for an absolute path",
            );
            None
        }
    }
}
