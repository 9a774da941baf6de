//! Opening a database: migrations, the installation's key, and this replica's place in it.

use std::path::PathBuf;
use std::sync::Arc;

use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};

use super::connect::{Target, TargetError};
use super::packing::Packing;
use super::partitions;
use super::query::RunQuery;
use super::statement::constant;
use super::watching;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::IdMaker;
use crate::domain::targets;
use crate::runtime::Runtime;
use crate::storage::moving::{Arrival, SEAL};

/// Version and text of every migration, in order. Versions are as diesel's tools write them.
pub(super) const MIGRATIONS: &[(&str, &str)] = &[
    ("20261124000000", include_str!("../../../migrations/postgres/2026-11-24-000000_foundation/up.sql")),
    ("20261124000001", include_str!("../../../migrations/postgres/2026-11-24-000001_handed/up.sql")),
    ("20261124000002", include_str!("../../../migrations/postgres/2026-11-24-000002_room_for_updates/up.sql")),
    ("20261129000003", include_str!("../../../migrations/postgres/2026-11-29-000003_one_index_of_tokens/up.sql")),
    ("20261129000004", include_str!("../../../migrations/postgres/2026-11-29-000004_reach/up.sql")),
    ("20261129000005", include_str!("../../../migrations/postgres/2026-11-29-000005_reach_kept/up.sql")),
    ("20261130000006", include_str!("../../../migrations/postgres/2026-11-30-000006_byte_order/up.sql")),
    ("20261130000007", include_str!("../../../migrations/postgres/2026-11-30-000007_homes/up.sql")),
    ("20261130000008", include_str!("../../../migrations/postgres/2026-11-30-000008_rowless/up.sql")),
    ("20261130000009", include_str!("../../../migrations/postgres/2026-11-30-000009_dead/up.sql")),
    ("20261130000010", include_str!("../../../migrations/postgres/2026-11-30-000010_retired_in_place/up.sql")),
    ("20261201000011", include_str!("../../../migrations/postgres/2026-12-01-000011_keys_by_key/up.sql")),
];

/// Guards the migrations: ten replicas may start on an empty database at once.
const MIGRATION_LOCK: i64 = 0x6e75_6467_6564;
/// Node numbers have ten bits.
const SLOTS: i32 = 1024;
/// A slot whose replica was last heard of this long ago may be another's: far beyond any pause of a process that could
/// still make ids.
const SLOT_KEPT_MS: i64 = 600_000;

#[derive(Clone)]
pub struct Settings {
    pub url: String,
    /// Read anew for each connection; goes before a password in the URL.
    pub password_file: Option<PathBuf>,
    /// Connections of the pool; two more are kept for the heartbeat and the deny table.
    pub pool: usize,
    /// Lease and due times by the server's clock. A test that passes its own times says no.
    pub server_clock: bool,
    /// The newest pack format to read and write, for one that must get along with an older version.
    pub pack_format: i16,
    /// Days of one partition of the history.
    pub partition_days: u32,
    /// Days after today for which partitions are made ahead; 0: none are made.
    pub days_ahead: u32,
    /// Pack, in the background, whoever is not packed: see [`super::repack`].
    pub pack_people: bool,
    /// Apply missing migrations; otherwise a database that lacks one is refused.
    pub migrate: bool,
}

impl Settings {
    #[must_use]
    pub fn url(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            password_file: None,
            pool: 16,
            server_clock: true,
            pack_format: targets::NEWEST,
            partition_days: 1,
            days_ahead: 3,
            pack_people: true,
            migrate: true,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("database.url cannot be used")]
    Target(#[from] TargetError),
    #[error("cannot connect to the database: {reason}")]
    Connect { reason: String },
    #[error("the database was written by a newer version of nudged (it has the migration {version}); use that version")]
    NewerSchema { version: String },
    #[error("the database lacks {missing} migration(s); run `nudged migrate`")]
    NotMigrated { missing: usize },
    #[error(
        "a move into this database has not come to its end; run `nudged migrate` with the same --from and --to again"
    )]
    Arriving,
    #[error("the migration of the database failed: {reason}")]
    Migrate { reason: String },
    #[error("the database cannot be read at start: {reason}")]
    Read { reason: String },
    #[error("all {SLOTS} replica slots are taken or were until lately; remove rows from the table replica")]
    NoSlot,
}

impl From<diesel::result::Error> for OpenError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Read { reason: error.to_string() }
    }
}

/// What a replica starts with.
pub(super) struct Opened {
    pub identity: IdentityKey,
    pub ids: IdMaker,
    pub slot: i32,
    pub packing: Packing,
    pub watched_from: watching::Origin,
}

pub(super) async fn open(
    runtime: &Runtime,
    target: &Arc<Target>,
    settings: &Settings,
    boot: i64,
) -> Result<Opened, OpenError> {
    let mut conn = target.connect().await.map_err(|error| OpenError::Connect { reason: error.to_string() })?;
    unlimited(&mut conn).await?;
    migrate(&mut conn, settings.migrate).await?;
    // Before the slot, so that the database stays as it is; and after it, for a move may have begun meanwhile.
    if is_arriving(&mut conn).await? {
        return Err(OpenError::Arriving);
    }
    let identity = identity(&mut conn, runtime).await?;
    let packing = Packing::new(settings.pack_format);
    let slot = lease_slot(&mut conn, boot, &packing).await?;
    packing.agree(&mut conn).await?;
    if is_arriving(&mut conn).await? {
        give_slot_back(&mut conn, slot, boot).await?;
        return Err(OpenError::Arriving);
    }
    let ids = id_maker(&mut conn, slot).await?;
    partitions::prepare(&mut conn, partitions::Plan::of(settings)).await?;
    let watched_from = watching::open(&mut conn, runtime).await?;
    Ok(Opened { identity, ids, slot, packing, watched_from })
}

/// A migration or the wait for another replica's may take long.
pub(super) async fn unlimited(conn: &mut AsyncPgConnection) -> diesel::QueryResult<()> {
    conn.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0")
        .await
}

/// Whether rows are still to come from another database.
async fn is_arriving(conn: &mut AsyncPgConnection) -> diesel::QueryResult<bool> {
    let seal: Option<Vec<u8>> = constant!(Binary; "SELECT value FROM secret WHERE name = $1", Text => SEAL)
        .get_result(conn)
        .await
        .optional()?;
    Ok(seal.is_some_and(|json| !serde_json::from_slice::<Arrival>(&json).is_ok_and(|arrival| arrival.done)))
}

async fn applied(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Vec<String>> {
    let there: Option<String> =
        constant!(Nullable<Text>; "SELECT to_regclass('__diesel_schema_migrations')::TEXT").get_result(conn).await?;
    if there.is_none() {
        return Ok(Vec::new());
    }
    constant!(Text; "SELECT version FROM __diesel_schema_migrations ORDER BY version").load(conn).await
}

/// The lock is the session's, so that another replica waits for the end of it all; it goes with the connection too.
pub(super) async fn migrate(conn: &mut AsyncPgConnection, apply: bool) -> Result<(), OpenError> {
    let failed = |error: diesel::result::Error| OpenError::Migrate { reason: error.to_string() };
    check_newest(&applied(conn).await?)?;
    if !apply {
        return match missing(&applied(conn).await?) {
            0 => Ok(()),
            missing => Err(OpenError::NotMigrated { missing }),
        };
    }
    if missing(&applied(conn).await?) == 0 {
        return Ok(());
    }
    constant!((); "SELECT pg_advisory_lock($1)", BigInt => MIGRATION_LOCK).execute(conn).await.map_err(failed)?;
    let done = applied(conn).await?;
    for (version, sql) in MIGRATIONS {
        if done.iter().any(|known| known == version) {
            continue;
        }
        // One text is one transaction.
        let text = format!(
            "BEGIN; CREATE TABLE IF NOT EXISTS __diesel_schema_migrations (version VARCHAR(50) PRIMARY KEY NOT NULL, \
             run_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP); {sql}; \
             INSERT INTO __diesel_schema_migrations (version) VALUES ('{version}'); COMMIT"
        );
        conn.batch_execute(&text).await.map_err(failed)?;
        tracing::info!(version, "the database was migrated");
    }
    constant!((); "SELECT pg_advisory_unlock($1)", BigInt => MIGRATION_LOCK).execute(conn).await.map_err(failed)?;
    Ok(())
}

fn check_newest(applied: &[String]) -> Result<(), OpenError> {
    let newest = MIGRATIONS.last().map_or("", |(version, _)| version);
    match applied.iter().find(|version| version.as_str() > newest) {
        Some(version) => Err(OpenError::NewerSchema { version: version.clone() }),
        None => Ok(()),
    }
}

fn missing(applied: &[String]) -> usize {
    MIGRATIONS.iter().filter(|(version, _)| !applied.iter().any(|known| known == version)).count()
}

/// For `/readyz`. A newer version's migration is no trouble: schemas are expanded before they are contracted, so that
/// two versions can run side by side.
pub(super) async fn missing_migrations(conn: &mut AsyncPgConnection) -> diesel::QueryResult<usize> {
    Ok(missing(&applied(conn).await?))
}

/// The installation's key, made by whoever comes first.
async fn identity(conn: &mut AsyncPgConnection, runtime: &Runtime) -> Result<IdentityKey, OpenError> {
    const NAME: &str = "identity";
    let bytes: [u8; 32] = runtime.secret_bytes();
    constant!(
        (); "INSERT INTO secret (name, value, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        Text => NAME, Binary => &bytes[..], BigInt => runtime.now().0,
    )
    .execute(conn)
    .await?;
    let stored: Vec<u8> =
        constant!(Binary; "SELECT value FROM secret WHERE name = $1", Text => NAME).get_result(conn).await?;
    let bytes: [u8; 32] = stored
        .try_into()
        .map_err(|_| OpenError::Read { reason: "the installation's identity key has another length".to_owned() })?;
    Ok(IdentityKey::new(bytes))
}

/// A number that no live replica has. New ones before old ones, and of those the one silent for longest.
async fn lease_slot(conn: &mut AsyncPgConnection, boot: i64, packing: &Packing) -> Result<i32, OpenError> {
    loop {
        let slot: Option<i32> = constant!(
            Integer;
            "SELECT s.slot FROM generate_series(0, $1 - 1) AS s(slot) LEFT JOIN replica r ON r.slot = s.slot \
             WHERE r.slot IS NULL OR r.heartbeat < (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - $2 \
             ORDER BY r.heartbeat NULLS FIRST, s.slot LIMIT 1",
            Integer => SLOTS, BigInt => SLOT_KEPT_MS,
        )
        .get_result(conn)
        .await
        .optional()?;
        let Some(slot) = slot else { return Err(OpenError::NoSlot) };
        let taken = constant!(
            ();
            "INSERT INTO replica AS r (slot, boot_id, heartbeat, version, pack_format, rowless, dead_in_place) \
             VALUES ($1, $2, (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT, $3, $5, $6, $6) \
             ON CONFLICT (slot) DO UPDATE SET boot_id = excluded.boot_id, heartbeat = excluded.heartbeat, \
             version = excluded.version, pack_format = excluded.pack_format, rowless = excluded.rowless, \
             dead_in_place = excluded.dead_in_place \
             WHERE r.heartbeat < excluded.heartbeat - $4",
            Integer => slot, BigInt => boot, Text => env!("CARGO_PKG_VERSION"), BigInt => SLOT_KEPT_MS,
            SmallInt => packing.read, SmallInt => i16::from(packing.knows_all()),
        )
        .execute(conn)
        .await?;
        if taken == 1 {
            return Ok(slot);
        }
    }
}

async fn give_slot_back(conn: &mut AsyncPgConnection, slot: i32, boot: i64) -> diesel::QueryResult<()> {
    constant!(
        (); "UPDATE replica SET boot_id = 0 WHERE slot = $1 AND boot_id = $2", Integer => slot, BigInt => boot,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Continues after the highest ids there are, so that a slot's earlier owner with a fast clock is not repeated.
async fn id_maker(conn: &mut AsyncPgConnection, slot: i32) -> Result<IdMaker, OpenError> {
    let newest: Option<i64> = constant!(
        Nullable<BigInt>;
        "SELECT max(id) FROM (SELECT max(id) AS id FROM app UNION ALL SELECT max(id) FROM app_user \
         UNION ALL SELECT max(id) FROM route UNION ALL SELECT max(id) FROM opt_in_history \
         UNION ALL SELECT max(id) FROM topic UNION ALL SELECT max(id) FROM event_type_version \
         UNION ALL SELECT max(id) FROM notification UNION ALL SELECT max(id) FROM job \
         UNION ALL SELECT max(id) FROM handed UNION ALL SELECT max(j.id) FROM handed, unnest(job) AS j(id) \
         UNION ALL SELECT max(id) FROM outcome_block UNION ALL SELECT max(id) FROM attempt_detail \
         UNION ALL SELECT max(id) FROM deny UNION ALL SELECT max(id) FROM device_retirement) AS newest"
    )
    .get_result(conn)
    .await?;
    let newest_device: Option<i64> = constant!(Nullable<BigInt>; "SELECT max(id) FROM device").get_result(conn).await?;
    let node = u16::try_from(slot).expect("slots are below 1024");
    Ok(IdMaker::new(node, newest.unwrap_or(0), newest_device.unwrap_or(0)))
}
