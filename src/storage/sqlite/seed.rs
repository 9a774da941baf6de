//! Writes a large installation straight into a database file, for measurements. Not for a database in use: it drops
//! the indexes while it writes, and it does not wait for the disk.

use std::path::Path;

use diesel::connection::SimpleConnection;
use diesel::sql_types::{BigInt, Binary, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryResult, RunQueryDsl};

use super::devices::token_hash;
use super::fail::Attempt;
use super::homes::home;
use super::statement::constant;
use crate::domain::time::UnixMs;
use crate::storage::seed::{Made, Scattered, Seed};

/// Rows of one transaction.
const CHUNK: usize = 50_000;

/// Fills a migrated, otherwise empty database that nobody has open.
///
/// # Errors
/// As SQLite answers; the file is of no use then.
pub fn seed(path: &Path, seed: &Seed<'_>, now: UnixMs) -> Result<(), String> {
    let text = path.to_str().ok_or_else(|| format!("{} is not valid UTF-8", path.display()))?;
    let mut conn = SqliteConnection::establish(text).map_err(|error| error.to_string())?;
    write(&mut conn, seed, now).map_err(|fail| fail.into_store("fill the database").to_string())
}

fn write(conn: &mut SqliteConnection, seed: &Seed<'_>, now: UnixMs) -> Attempt<()> {
    conn.batch_execute(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; PRAGMA cache_size = -262144; \
         PRAGMA wal_autocheckpoint = 20000; PRAGMA temp_store = FILE;",
    )?;
    let indexes: Vec<(String, String)> = constant!(
        (Text, Text);
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL \
         AND tbl_name IN ('app_user', 'device', 'opt_in_history', 'subscription')"
    )
    .load(conn)?;
    for (name, _) in &indexes {
        conn.batch_execute(&format!("DROP INDEX {name}"))?;
    }
    let mut scattered = Scattered::new(seed.people, now);
    scattered.rekey(|person| home(seed.app, &(seed.person)(person).user).0);
    for (at, topic) in seed.topics.iter().enumerate() {
        constant!(
            (); "INSERT INTO topic (id, app, name) VALUES (?1, ?2, ?3)",
            BigInt => scattered.topic(at), BigInt => seed.app.0, Text => topic.name,
        )
        .execute(conn)?;
    }
    // Rows at random places would take an hour where there are ten million.
    let mut people: Vec<Made> = scattered.people().collect();
    people.sort_unstable_by_key(|made| made.user_key);
    for chunk in people.chunks(CHUNK) {
        conn.transaction(|conn| chunk.iter().try_for_each(|made| write_person(conn, seed, &scattered, *made)))?;
    }
    let devices: Vec<Made> = scattered.devices().collect();
    for chunk in devices.chunks(CHUNK) {
        conn.transaction(|conn| chunk.iter().try_for_each(|made| write_device(conn, seed, *made)))?;
    }
    for (_, sql) in &indexes {
        conn.batch_execute(sql)?;
    }
    super::reach::pack_all(conn)?;
    Ok(conn.batch_execute("PRAGMA wal_checkpoint(TRUNCATE);")?)
}

fn write_person(conn: &mut SqliteConnection, seed: &Seed<'_>, scattered: &Scattered, made: Made) -> QueryResult<()> {
    let person = (seed.person)(made.person);
    let (key, at) = (made.user_key, made.at());
    constant!(
        (); "INSERT INTO app_user (id, app, external_id, created_at) VALUES (?1, ?2, ?3, ?4)",
        BigInt => key, BigInt => seed.app.0, Text => person.user.as_str(), BigInt => at,
    )
    .execute(conn)?;
    let opted_in = i16::from(person.opted_in);
    constant!(
        ();
        "INSERT INTO opt_in (user_key, app, opted_in, observed_at, recorded_at, source) \
         VALUES (?1, ?2, ?3, ?4, ?4, 'onboarding')",
        BigInt => key, BigInt => seed.app.0, SmallInt => opted_in, BigInt => at,
    )
    .execute(conn)?;
    constant!(
        ();
        "INSERT INTO opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, \
         recorded_at, source) VALUES (?1, ?2, ?3, 0, '', ?4, 1, ?5, ?5, 'onboarding')",
        BigInt => made.row(), BigInt => seed.app.0, BigInt => key, SmallInt => opted_in, BigInt => at,
    )
    .execute(conn)?;
    for (place, topic) in seed.topics.iter().enumerate() {
        if (topic.has)(made.person) {
            constant!(
                ();
                "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) \
                 VALUES (?1, ?2, 1, ?3, ?3)",
                BigInt => scattered.topic(place), BigInt => key, BigInt => at,
            )
            .execute(conn)?;
        }
    }
    Ok(())
}

fn write_device(conn: &mut SqliteConnection, seed: &Seed<'_>, made: Made) -> QueryResult<()> {
    let person = (seed.person)(made.person);
    let hash = token_hash(&person.token);
    constant!(
        ();
        "INSERT INTO device (id, app, platform, user_key, route, kind, token_hash, token_sealed, locale, app_version, \
         os_version, labels, observed_at, confirmed_at, state, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6, ?7, 'ko-KR', '3.14.0', '18.1', '{}', ?8, ?8, 1, ?8)",
        BigInt => made.device(), BigInt => seed.app.0, SmallInt => person.platform.code(), BigInt => made.user_key,
        BigInt => seed.route(person.platform).0, Binary => &hash[..],
        Binary => person.token.expose().as_bytes(), BigInt => made.at(),
    )
    .execute(conn)?;
    Ok(())
}
