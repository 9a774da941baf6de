//! Writes a large installation straight into a database file, for measurements. Not for a database in use: it drops
//! the indexes while it writes, and it does not wait for the disk.
//!
//! Rows are as the API would have made them, spread over a year, and in no relation to each other: neighbours in one
//! table are strangers in the next, which is what a database looks like after a year of installs and rotated tokens.

use std::path::Path;

use diesel::connection::SimpleConnection;
use diesel::sql_types::{BigInt, Binary, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryResult, RunQueryDsl};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::devices::token_hash;
use super::statement::constant;
use crate::domain::ids::{AppKey, EPOCH_MS, RouteId, UserId};
use crate::domain::platform::{DeviceToken, Platform};
use crate::domain::time::UnixMs;

/// Everything was made within so long before `now`.
const YEAR_MS: i64 = 365 * 24 * 3600 * 1000;
/// Below the bits of a sequence and a node: see [`crate::domain::ids`].
const ID_SHIFT: u32 = 22;
const DEVICE_SHIFT: u32 = 18;
/// Rows of one transaction.
const CHUNK: usize = 50_000;

/// One person with one device.
pub struct SeedPerson {
    pub user: UserId,
    pub platform: Platform,
    pub token: DeviceToken,
    pub opted_in: bool,
}

/// What is to be there.
pub struct Seed<'a> {
    pub app: AppKey,
    /// By platform.
    pub apns: RouteId,
    pub fcm: RouteId,
    pub topic: &'a str,
    /// At most 2^32.
    pub people: u32,
    /// The first so many people have the topic.
    pub subscribers: u32,
    /// Who is who, by number from 0.
    pub person: &'a dyn Fn(u32) -> SeedPerson,
}

/// Fills a migrated, otherwise empty database that nobody has open.
///
/// # Errors
/// As SQLite answers; the file is of no use then.
pub fn seed(path: &Path, seed: &Seed<'_>, now: UnixMs) -> Result<(), String> {
    let text = path.to_str().ok_or_else(|| format!("{} is not valid UTF-8", path.display()))?;
    let mut conn = SqliteConnection::establish(text).map_err(|error| error.to_string())?;
    write(&mut conn, seed, now).map_err(|error| error.to_string())
}

fn write(conn: &mut SqliteConnection, seed: &Seed<'_>, now: UnixMs) -> QueryResult<()> {
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

    // Who got which place in a table, and then which id.
    let mut order: Vec<u32> = (0..seed.people).collect();
    let mut rng = SmallRng::seed_from_u64(1);
    let step = (YEAR_MS / i64::from(seed.people).max(1)).max(1);
    let began = now.0 - EPOCH_MS - YEAR_MS;
    let made_at = |place: usize| began + i64::try_from(place).unwrap_or(i64::MAX) * step;

    order.shuffle(&mut rng);
    let mut keys = vec![0_i64; order.len()];
    for (place, person) in order.iter().enumerate() {
        keys[*person as usize] = made_at(place) << ID_SHIFT;
    }
    let topic = (began << ID_SHIFT) + 1;
    constant!(
        (); "INSERT INTO topic (id, app, name) VALUES (?1, ?2, ?3)",
        BigInt => topic, BigInt => seed.app.0, Text => seed.topic,
    )
    .execute(conn)?;
    for (chunk, people) in order.chunks(CHUNK).enumerate() {
        conn.transaction(|conn| {
            for (at, person) in people.iter().enumerate() {
                let wall = made_at(chunk * CHUNK + at) + EPOCH_MS;
                write_person(conn, seed, topic, *person, keys[*person as usize], wall)?;
            }
            QueryResult::Ok(())
        })?;
    }
    order.shuffle(&mut rng);
    for (chunk, people) in order.chunks(CHUNK).enumerate() {
        conn.transaction(|conn| {
            for (at, person) in people.iter().enumerate() {
                let made = made_at(chunk * CHUNK + at);
                write_device(conn, seed, *person, keys[*person as usize], made)?;
            }
            QueryResult::Ok(())
        })?;
    }
    for (_, sql) in &indexes {
        conn.batch_execute(sql)?;
    }
    conn.batch_execute("PRAGMA wal_checkpoint(TRUNCATE);")
}

fn write_person(
    conn: &mut SqliteConnection,
    seed: &Seed<'_>,
    topic: i64,
    number: u32,
    key: i64,
    wall: i64,
) -> QueryResult<()> {
    let person = (seed.person)(number);
    constant!(
        (); "INSERT INTO app_user (id, app, external_id, created_at) VALUES (?1, ?2, ?3, ?4)",
        BigInt => key, BigInt => seed.app.0, Text => person.user.as_str(), BigInt => wall,
    )
    .execute(conn)?;
    let opted_in = i16::from(person.opted_in);
    constant!(
        ();
        "INSERT INTO opt_in (user_key, app, opted_in, observed_at, recorded_at, source) \
         VALUES (?1, ?2, ?3, ?4, ?4, 'onboarding')",
        BigInt => key, BigInt => seed.app.0, SmallInt => opted_in, BigInt => wall,
    )
    .execute(conn)?;
    constant!(
        ();
        "INSERT INTO opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, \
         recorded_at, source) VALUES (?1, ?2, ?1, 0, '', ?3, 1, ?4, ?4, 'onboarding')",
        BigInt => key, BigInt => seed.app.0, SmallInt => opted_in, BigInt => wall,
    )
    .execute(conn)?;
    if number < seed.subscribers {
        constant!(
            ();
            "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) VALUES (?1, ?2, 1, ?3, ?3)",
            BigInt => topic, BigInt => key, BigInt => wall,
        )
        .execute(conn)?;
    }
    Ok(())
}

fn write_device(conn: &mut SqliteConnection, seed: &Seed<'_>, number: u32, user: i64, made: i64) -> QueryResult<()> {
    let person = (seed.person)(number);
    let hash = token_hash(&person.token);
    let route = match person.platform {
        Platform::Apns => seed.apns,
        Platform::Fcm => seed.fcm,
    };
    constant!(
        ();
        "INSERT INTO device (id, app, platform, user_key, route, kind, token_hash, token_sealed, locale, app_version, \
         os_version, labels, observed_at, confirmed_at, state, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6, ?7, 'ko-KR', '3.14.0', '18.1', '{}', ?8, ?8, 1, ?8)",
        BigInt => made << DEVICE_SHIFT, BigInt => seed.app.0, SmallInt => person.platform.code(), BigInt => user,
        BigInt => route.0, Binary => &hash[..],
        Binary => person.token.expose().as_bytes(), BigInt => made + EPOCH_MS,
    )
    .execute(conn)?;
    Ok(())
}
