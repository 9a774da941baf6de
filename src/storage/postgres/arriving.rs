//! The destination of a move: see [`crate::storage::moving`].

use bytes::Bytes;
use futures_util::{SinkExt as _, TryStreamExt as _};
use tokio_postgres::Client;

use super::connect::Target;
use super::open::{self, OpenError, Settings};
use super::replica::DEAD_AFTER_MS;
use crate::runtime::Runtime;
use crate::storage::moving::{Arrival, Digest, MoveError, SEAL, Table};

/// Tells the planner of tables that hold something. One that is known to be empty is planned for as if it stayed so, until
/// the server looks again.
pub(super) const ANALYZE_FILLED: &str = "DO $$ DECLARE t REGCLASS; filled BOOLEAN; BEGIN \
     FOR t IN SELECT oid FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::REGNAMESPACE LOOP \
     EXECUTE format('SELECT EXISTS (SELECT FROM %s)', t) INTO filled; \
     IF filled THEN EXECUTE format('ANALYZE %s', t); END IF; END LOOP; END $$";

/// One move at a time.
const MOVE_LOCK: i64 = 0x006d_6f76_6564;

/// A migrated database with a session of its own, which holds [`MOVE_LOCK`].
pub struct Destination {
    client: Client,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: tokio_postgres::Error) -> MoveError {
    let mut reason = error.to_string();
    if let Some(error) = error.as_db_error() {
        reason = format!("{reason}: {error}");
        if let Some(place) = error.where_() {
            // The place may quote a row.
            reason = format!("{reason} ({})", place.split(':').next().unwrap_or_default());
        }
    }
    MoveError::Destination { reason }
}

impl Destination {
    /// Migrates the database and makes sure that no other move is under way and no server uses it.
    pub async fn open(runtime: &Runtime, settings: &Settings) -> Result<Self, OpenError> {
        let target = Target::parse(&settings.url, settings.password_file.clone())?;
        let unreachable = |error: diesel::ConnectionError| OpenError::Connect { reason: error.to_string() };
        let mut conn = target.connect().await.map_err(unreachable)?;
        open::unlimited(&mut conn).await?;
        open::migrate(&mut conn, true).await?;
        let client = target.client(runtime).await.map_err(unreachable)?;
        // Nothing is packed of whom this brings; the first server packs everybody.
        let session = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
             SET synchronous_commit = on; SET bytea_output = hex; SET application_name = 'nudged migrate'; SET nudged.packs = on";
        client.batch_execute(session).await.map_err(|error| OpenError::Read { reason: error.to_string() })?;
        Ok(Self { client })
    }

    /// Refuses while another move has it.
    pub async fn lock(&self) -> Result<(), MoveError> {
        let row = self.client.query_one("SELECT pg_try_advisory_lock($1)", &[&MOVE_LOCK]).await.map_err(failed)?;
        if row.get(0) { Ok(()) } else { Err(MoveError::DestinationBusy) }
    }

    /// Refuses while a server uses it. To be asked after the seal is set: a server that starts looks for the seal after
    /// it has taken its slot.
    pub async fn check_unserved(&self) -> Result<(), MoveError> {
        let sql = "SELECT count(*) FROM replica WHERE boot_id <> 0 \
             AND heartbeat > (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - $1";
        let replicas: i64 = self.client.query_one(sql, &[&DEAD_AFTER_MS]).await.map_err(failed)?.get(0);
        if replicas == 0 { Ok(()) } else { Err(MoveError::DestinationServed { replicas }) }
    }

    pub async fn arrival(&self) -> Result<Option<Arrival>, MoveError> {
        let row = self.client.query_opt("SELECT value FROM secret WHERE name = $1", &[&SEAL]).await.map_err(failed)?;
        let Some(row) = row else { return Ok(None) };
        let json: Vec<u8> = row.get(0);
        serde_json::from_slice(&json).map(Some).map_err(|_| MoveError::OtherCopy)
    }

    /// The same tables and columns as the source's.
    pub async fn check_schema(&self, tables: &[Table]) -> Result<(), MoveError> {
        for table in tables {
            let sql = "SELECT attname::TEXT FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 \
                 AND NOT attisdropped";
            let rows = self.client.query(sql, &[&table.name]).await.map_err(failed)?;
            let mut theirs: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            let mut ours = table.columns.clone();
            theirs.sort();
            ours.sort();
            if theirs != ours {
                let detail = format!("the source has {}, the destination {}", ours.join(", "), theirs.join(", "));
                return Err(MoveError::Schema { table: table.name.clone(), detail });
            }
        }
        Ok(())
    }

    /// Nothing but what a migration leaves.
    pub async fn check_empty(&self, tables: &[Table]) -> Result<(), MoveError> {
        for table in tables.iter().filter(|table| table.name != "secret") {
            let sql = format!("SELECT EXISTS (SELECT 1 FROM \"{}\")", table.name);
            if self.client.query_one(&sql, &[]).await.map_err(failed)?.get(0) {
                return Err(MoveError::DestinationNotEmpty { table: table.name.clone() });
            }
        }
        Ok(())
    }

    /// The first step of a copy: the keys that an empty database was given go, and its seal is set.
    pub async fn begin(&mut self, arrival: &Arrival) -> Result<(), MoveError> {
        let transaction = self.client.transaction().await.map_err(failed)?;
        transaction.execute("DELETE FROM secret", &[]).await.map_err(failed)?;
        write_seal(&transaction, arrival).await?;
        transaction.commit().await.map_err(failed)
    }

    /// Rows, as lines, with what `arrival` says of them.
    pub async fn write(&mut self, table: &Table, lines: Bytes, arrival: &Arrival) -> Result<(), MoveError> {
        let transaction = self.client.transaction().await.map_err(failed)?;
        let sql = format!("COPY \"{}\" ({}) FROM STDIN", table.name, table.column_list());
        let sink = transaction.copy_in(&sql).await.map_err(failed)?;
        let mut sink = std::pin::pin!(sink);
        sink.send(lines).await.map_err(failed)?;
        sink.finish().await.map_err(failed)?;
        write_seal(&transaction, arrival).await?;
        transaction.commit().await.map_err(failed)
    }

    /// Everything has arrived: the planner is told, and servers may come.
    pub async fn finish(&mut self, arrival: &Arrival) -> Result<(), MoveError> {
        self.client.batch_execute(ANALYZE_FILLED).await.map_err(failed)?;
        let transaction = self.client.transaction().await.map_err(failed)?;
        write_seal(&transaction, arrival).await?;
        transaction.commit().await.map_err(failed)
    }

    pub async fn digest(&self, table: &Table) -> Result<Digest, MoveError> {
        let sql =
            format!("COPY (SELECT {} FROM \"{}\" {}) TO STDOUT", table.column_list(), table.name, table.condition());
        let stream = self.client.copy_out(&sql).await.map_err(failed)?;
        let mut stream = std::pin::pin!(stream);
        let mut digest = Digest::default();
        // The server sends a row a message.
        while let Some(lines) = stream.try_next().await.map_err(failed)? {
            lines.split_inclusive(|byte| *byte == b'\n').for_each(|line| digest.add(line));
        }
        Ok(digest)
    }
}

async fn write_seal(transaction: &tokio_postgres::Transaction<'_>, arrival: &Arrival) -> Result<(), MoveError> {
    let json = serde_json::to_vec(arrival).expect("an arrival is plain data");
    let sql = "INSERT INTO secret (name, value, created_at) VALUES ($1, $2, $3) \
         ON CONFLICT (name) DO UPDATE SET value = excluded.value";
    transaction.execute(sql, &[&SEAL, &json, &arrival.since]).await.map_err(failed)?;
    Ok(())
}
