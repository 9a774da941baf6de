//! The house rules a compiler does not know: which module may use which, file sizes, nothing unfinished, and
//! migrations that exist for both databases.
//!
//! The checker reads source text: it strips comments, literals and test code, then resolves every path that begins with
//! `crate`, `super`, `self` or a crate's name. It is a reader, not a compiler: a macro that builds a path escapes it.

#[path = "tidy/source.rs"]
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use source::{Paths, strip};

/// style.md §2: at 800 lines a file is split.
const MAX_LINES: usize = 800;

/// What a module may use of this crate. A name stands for the module and everything in it that is not in [`PRIVATE`].
const ARROWS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("planted", &[]),
    ("runtime", &["domain"]),
    ("config", &["domain"]),
    ("telemetry", &["config", "domain", "runtime"]),
    ("admin", &["domain", "runtime", "telemetry"]),
    ("storage", &["domain", "runtime", "telemetry"]),
    ("senders", &["domain", "runtime", "telemetry"]),
    ("render", &["domain", "runtime", "senders", "telemetry"]),
    ("service", &["domain", "render", "runtime", "senders", "storage", "telemetry"]),
    ("delivery", &["domain", "render", "runtime", "senders", "storage", "telemetry"]),
    ("api", &["domain", "runtime", "service", "telemetry"]),
    ("sandbox", &["domain", "runtime", "telemetry"]),
    ("app", ALL),
    ("commands", ALL),
    // Compiled for tests and fuzzing only.
    ("fuzzing", ALL),
    ("main", &["commands"]),
];

const ALL: &[&str] = &[
    "admin",
    "api",
    "app",
    "commands",
    "config",
    "delivery",
    "domain",
    "render",
    "runtime",
    "sandbox",
    "senders",
    "service",
    "storage",
    "telemetry",
];

/// Implementations behind a trait: named only where concrete types are put together, and by themselves.
const PRIVATE: &[&str] = &["storage::sqlite", "storage::postgres", "senders::apns", "senders::fcm", "senders::http2"];

/// Modules with a reason to look further: (module, what it may name besides its arrows).
const EXCEPTIONS: &[(&str, &str)] = &[
    // One exhaustive match turns every error of ours into a Status (style.md §5).
    ("api::status", "storage::StoreError"),
    // The store's plain answers, which `service` hands through: values without behaviour, to be written as protobuf.
    ("api::convert", "storage::Attempt"),
    ("api::convert", "storage::Counts"),
    ("api::convert", "storage::NotificationView"),
    ("api::convert", "storage::OptIn"),
    ("api::convert", "storage::Subscription"),
];

/// Who puts concrete types together.
const COMPOSERS: &[&str] = &["app", "commands", "fuzzing"];

/// Neighbours that must not know each other.
const APART: &[(&str, &str)] = &[("storage::sqlite", "storage::postgres"), ("senders::apns", "senders::fcm")];

/// Crates that are the business of few modules.
const CRATES: &[(&str, &[&str])] = &[
    ("tonic", &["api", "app", "commands"]),
    ("tonic_prost", &["api"]),
    ("tonic_health", &["api", "app", "commands"]),
    ("tonic_reflection", &["api"]),
    ("tonic_types", &["api"]),
    ("prost", &["api", "commands", "fuzzing"]),
    ("prost_types", &["api", "commands", "fuzzing"]),
    ("diesel", &["storage"]),
    ("diesel_async", &["storage"]),
    ("diesel_migrations", &["storage"]),
    ("libsqlite3_sys", &["storage"]),
    // The benchmark's reference is a bare client.
    ("h2", &["senders", "sandbox", "commands", "api"]),
    ("reqwest", &["senders"]),
    ("a2", &["senders"]),
    ("figment", &["config"]),
    ("clap", &["commands", "main"]),
    ("metrics_exporter_prometheus", &["telemetry"]),
    ("tracing_subscriber", &["telemetry"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry_sdk", &["telemetry"]),
    ("opentelemetry_otlp", &["telemetry"]),
    ("tikv_jemallocator", &["main"]),
    ("anyhow", &["app", "commands", "main"]),
];

/// All that `domain` may use: decisions stay pure.
const DOMAIN_CRATES: &[&str] = &[
    "std",
    "core",
    "alloc",
    "jiff",
    "uuid",
    "serde",
    "serde_json",
    "siphasher",
    "sha2",
    "subtle",
    "zeroize",
    "thiserror",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every `.rs` file below `directory`, with its path relative to the repository.
fn sources(directory: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a readable source file");
                found.push((path.strip_prefix(root()).expect("below the root").to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The modules that are compiled for tests only (`#[cfg(test)] mod suite;`), with everything below them.
fn test_modules(sources: &[(PathBuf, String)]) -> BTreeSet<Vec<String>> {
    sources.iter().flat_map(|(path, text)| source::test_modules(path, text)).collect()
}

fn is_test_file(path: &Path, test_modules: &BTreeSet<Vec<String>>) -> bool {
    let module = source::module_of(path);
    test_modules.iter().any(|test| module.starts_with(test))
}

/// Wrong arrows of one file.
fn wrong_arrows(path: &Path, text: &str) -> Vec<String> {
    let Paths { module, paths } = Paths::read(path, text);
    let Some(from) = module.first() else { return Vec::new() };
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| name == from) else {
        return vec![format!("{}: module `{from}` has no row in ARROWS", path.display())];
    };
    let here = module.join("::");
    let mut wrong = BTreeSet::new();
    for (line, used) in paths {
        let mut report = |why: String| wrong.insert((line, format!("{}:{line}: {why}", path.display())));
        let head = used[0].as_str();
        if head != "crate" {
            if let Some((name, who)) = CRATES.iter().find(|(name, _)| *name == head)
                && !who.contains(&from.as_str())
            {
                report(format!("`{from}` uses the crate `{name}`, which only {} may", who.join(", ")));
            }
            if from == "domain" && !DOMAIN_CRATES.contains(&head) && source::is_crate_name(head, text) {
                report(format!("`domain` uses the crate `{head}`"));
            }
            continue;
        }
        let Some(to) = used.get(1) else { continue };
        let target = used[1..].join("::");
        let within = |path: &str, prefix: &str| path == prefix || path.starts_with(&format!("{prefix}::"));
        if EXCEPTIONS.iter().any(|(module, what)| within(&here, module) && within(&target, what)) {
            continue;
        }
        if to != from && ALL.contains(&to.as_str()) && !allowed.contains(&to.as_str()) {
            report(format!("`{from}` uses `{target}`"));
        }
        for private in PRIVATE {
            if within(&target, private) && to != from && !COMPOSERS.contains(&from.as_str()) {
                report(format!("`{from}` uses `{target}`, an implementation behind a trait"));
            }
        }
        for (a, b) in APART {
            if (within(&here, a) && within(&target, b)) || (within(&here, b) && within(&target, a)) {
                report(format!("`{here}` uses `{target}`, its neighbour"));
            }
        }
    }
    wrong.into_iter().map(|(_, text)| text).collect()
}

#[test]
fn modules_use_only_what_their_arrows_allow() {
    let sources = sources("src");
    let test_modules = test_modules(&sources);
    let wrong: Vec<String> = sources
        .iter()
        .filter(|(path, _)| !is_test_file(path, &test_modules))
        .flat_map(|(path, text)| wrong_arrows(path, text))
        .collect();
    assert!(wrong.is_empty(), "arrows the wrong way (style.md §1):\n{}", wrong.join("\n"));
}

#[test]
fn every_module_has_a_row() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("lib.rs");
    let lib = strip(&lib);
    let declared: Vec<&str> =
        lib.lines().filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert!(!declared.is_empty());
    for module in declared {
        assert!(ARROWS.iter().any(|(name, _)| *name == module), "`{module}` has no row in ARROWS");
    }
}

#[test]
fn no_file_is_too_long() {
    for directory in ["src", "tests", "benches"] {
        for (path, text) in sources(directory) {
            let lines = text.lines().count();
            assert!(lines <= MAX_LINES, "{} has {lines} lines, split it at {MAX_LINES}", path.display());
        }
    }
}

/// Places in the text where something is left undone or switched off.
fn unfinished(text: &str) -> Vec<&'static str> {
    let code: String = strip(text).split_whitespace().collect();
    ["todo!(", "unimplemented!(", "#[ignore]", "#[ignore=", "dbg!("]
        .into_iter()
        .filter(|word| code.contains(word))
        .collect()
}

#[test]
fn nothing_is_left_unfinished_or_ignored() {
    for directory in ["src", "tests", "benches"] {
        for (path, text) in sources(directory) {
            let found = unfinished(&text);
            assert!(found.is_empty(), "{} holds {found:?}", path.display());
        }
    }
}

#[test]
fn both_databases_have_the_same_migrations() {
    let names = |database: &str| -> BTreeMap<String, bool> {
        let directory = root().join("migrations").join(database);
        let entries = fs::read_dir(&directory).expect("a migrations directory");
        entries
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .map(|entry| {
                let whole = ["up.sql", "down.sql"].iter().all(|file| entry.path().join(file).is_file());
                (entry.file_name().to_string_lossy().into_owned(), whole)
            })
            .collect()
    };
    let (sqlite, postgres) = (names("sqlite"), names("postgres"));
    assert!(!sqlite.is_empty());
    assert_eq!(sqlite, postgres, "same folders, each with up.sql and down.sql");
    assert!(sqlite.values().all(|whole| *whole), "up.sql and down.sql are both needed: {sqlite:?}");
}

/// A bug without a row is found by nobody, and a row without a bug shows nothing.
#[test]
fn planted_bugs_and_their_table_agree() {
    let table = fs::read_to_string(root().join("tests/planted.tsv")).expect("the table of planted bugs");
    let rows = table.lines().filter(|line| !line.starts_with('#'));
    let mut listed = BTreeSet::new();
    for row in rows {
        let [name, broken, ref harnesses @ ..] = row.split('\t').collect::<Vec<_>>()[..] else {
            panic!("not three columns: {row}")
        };
        let are_named = !harnesses.is_empty() && harnesses.iter().all(|harness| harness.contains(' '));
        assert!(!broken.is_empty() && are_named, "what is broken, then test programs and their filters: {row}");
        assert!(listed.insert(name.to_owned()), "{name} is there twice");
    }
    let planted: BTreeSet<String> = sources("src")
        .into_iter()
        .flat_map(|(_, text)| {
            let names = text.split("planted::is(\"").skip(1).filter_map(|rest| rest.split('"').next());
            names.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(planted, listed);
    assert!(listed.len() >= 40, "{} are planted", listed.len());
}

/// The checker must see what it claims to see.
mod the_checker {
    use super::*;

    fn arrows(path: &str, text: &str) -> Vec<String> {
        wrong_arrows(Path::new(path), text)
    }

    #[test]
    fn catches_a_wrong_arrow_however_it_is_written() {
        for text in [
            "use crate::storage::Store;",
            "use crate::{domain::ids::AppId, storage::Store};",
            "use crate::{\n    domain::ids::{AppId, UserId},\n    storage::{self, Store},\n};",
            "pub(crate) use crate::storage as kept;",
            "fn f() { crate::storage::open() }",
            "fn f(store: &dyn crate::storage::Store) {}",
            "use super::storage::Store;",
            "use self::super::storage::Store;",
        ] {
            assert!(!arrows("src/api.rs", text).is_empty(), "{text}");
        }
        assert_eq!(arrows("src/api/devices.rs", "use super::super::storage::Store;").len(), 1);
        assert_eq!(arrows("src/api/v1/mod.rs", "use super::super::storage::Store;").len(), 1);
        let found = arrows("src/domain/ids.rs", "//! Ids.\n\nuse crate::runtime::Runtime;");
        assert_eq!(found, ["src/domain/ids.rs:3: `domain` uses `runtime::Runtime`"]);
    }

    #[test]
    fn lets_the_right_arrows_pass() {
        for (path, text) in [
            ("src/api/devices.rs", "use crate::service::devices; use super::convert; use crate::domain::ids::AppId;"),
            ("src/service/events.rs", "use crate::storage::{Queue, Registry}; use crate::senders::Message;"),
            ("src/app.rs", "use crate::storage::sqlite::SqliteStore; use tonic::transport::Server;"),
            (
                "src/storage/sqlite/writer.rs",
                "use crate::storage::Store; use super::super::StoreError; use diesel::sql_query;",
            ),
            ("src/senders/apns/mod.rs", "use crate::senders::http2::Pool; use super::Sender; use h2::client;"),
            ("src/sandbox/apns.rs", "use h2::server; use crate::runtime::Runtime;"),
            ("src/main.rs", "use nudged::commands::Cli;"),
        ] {
            assert_eq!(arrows(path, text), [""; 0], "{path}");
        }
    }

    #[test]
    fn does_not_read_comments_texts_or_tests() {
        let text = "// use crate::storage::Store;\n/* crate::storage /* nested */ crate::app */\n\
                    /// [`crate::storage::Store`]\nconst A: &str = \"crate::storage\"; const B: &str = r#\"crate::app \"x\"\"#;\n\
                    const C: char = '\"'; fn f<'a>(x: &'a str) {}\n\
                    #[cfg(test)]\nmod tests {\n    use crate::storage::Store;\n    fn g() {\n    }\n}\n";
        assert_eq!(arrows("src/domain/ids.rs", text), [""; 0]);
        let after = format!("{text}\nuse crate::storage::Store;");
        assert_eq!(arrows("src/domain/ids.rs", &after).len(), 1, "code after the tests is read again");
    }

    #[test]
    fn knows_which_files_are_tests() {
        let declared = [
            (
                "src/senders/mod.rs",
                "#[cfg(test)]
mod suite;
mod apns;",
            ),
            (
                "src/senders/apns/mod.rs",
                "#[cfg(test)]
#[cfg(unix)]
mod tests;",
            ),
            (
                "src/service/events.rs",
                "#[cfg(test)]
#[path = \"events_tests.rs\"]
mod tests;",
            ),
            (
                "src/sandbox/mod.rs",
                "#[cfg(test)]
mod tests {
}
mod tls;",
            ),
        ];
        let declared: Vec<_> = declared.map(|(path, text)| (PathBuf::from(path), text.to_owned())).into();
        let tests = test_modules(&declared);
        for path in ["src/senders/suite.rs", "src/senders/suite/a.rs", "src/senders/apns/tests.rs"] {
            assert!(is_test_file(Path::new(path), &tests), "{path}");
        }
        assert!(is_test_file(Path::new("src/service/events_tests.rs"), &tests), "by its #[path]");
        for path in ["src/senders/apns/mod.rs", "src/sandbox/tls.rs", "src/senders/tests.rs"] {
            assert!(!is_test_file(Path::new(path), &tests), "{path}");
        }
    }

    #[test]
    fn keeps_implementations_and_crates_in_their_place() {
        assert_eq!(arrows("src/service/events.rs", "use crate::storage::sqlite::SqliteStore;").len(), 1);
        assert_eq!(arrows("src/delivery/claim.rs", "use crate::senders::{apns::Apns, Sender};").len(), 1);
        assert!(!arrows("src/storage/sqlite/mod.rs", "use super::postgres::Pool;").is_empty());
        assert!(!arrows("src/storage/postgres.rs", "use crate::storage::sqlite;").is_empty());
        assert_eq!(arrows("src/service/events.rs", "use tonic::Status;").len(), 1);
        assert_eq!(arrows("src/delivery/claim.rs", "fn f() { diesel::sql_query(x) }").len(), 1);
        assert_eq!(arrows("src/service/mod.rs", "use h2::client;").len(), 1);
        assert_eq!(arrows("src/sandbox/mod.rs", "use crate::senders::Sender;").len(), 1);
        assert_eq!(arrows("src/domain/ids.rs", "use tokio::sync::mpsc;").len(), 1);
        assert_eq!(arrows("src/domain/ids.rs", "use std::fmt; fn f() { fmt::Error; Vec::new(); }").len(), 0);
        assert_eq!(
            arrows("src/main.rs", "use nudged::storage::Store;").len(),
            1,
            "the binary sees the crate by its name"
        );
        assert_eq!(arrows("src/api/status.rs", "use crate::storage::StoreError;"), [""; 0]);
        assert_eq!(arrows("src/api/status.rs", "use crate::storage::Store;").len(), 1);
        assert_eq!(arrows("src/surprise.rs", "").len(), 1, "a module without a row");
    }

    #[test]
    fn sees_what_is_unfinished() {
        assert_eq!(unfinished("fn f() { todo!() }"), ["todo!("]);
        assert_eq!(unfinished("#[ignore = \"slow\"]\nfn f() {}"), ["#[ignore="]);
        assert_eq!(unfinished("// todo!()\nconst A: &str = \"#[ignore]\";"), [""; 0]);
    }
}
