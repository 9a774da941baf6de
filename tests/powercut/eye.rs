//! A connection beside the store's: what the database holds, checkpoints, and a snapshot that stands in their way.

use std::collections::BTreeMap;
use std::path::Path;

use diesel::connection::SimpleConnection as _;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection as _, RunQueryDsl as _};
use nudged::storage::sqlite::Synchronous;

/// Every row of every table.
pub type Dump = BTreeMap<String, Vec<String>>;

pub struct Eye {
    conn: SqliteConnection,
    is_holding: bool,
}

#[derive(diesel::QueryableByName)]
struct Text {
    #[diesel(sql_type = diesel::sql_types::Text)]
    text: String,
}

impl Eye {
    pub fn open(path: &Path, synchronous: Synchronous) -> Self {
        let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
        let synchronous = match synchronous {
            Synchronous::Full => "FULL",
            Synchronous::Normal => "NORMAL",
        };
        conn.batch_execute(&format!("PRAGMA busy_timeout = 100; PRAGMA synchronous = {synchronous}")).unwrap();
        Self { conn, is_holding: false }
    }

    fn texts(&mut self, sql: &str) -> Vec<String> {
        let rows: Vec<Text> =
            diesel::sql_query(sql).load(&mut self.conn).unwrap_or_else(|error| panic!("{sql}: {error}"));
        rows.into_iter().map(|row| row.text).collect()
    }

    pub fn dump(&mut self) -> Dump {
        let tables =
            "SELECT name AS text FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'";
        let mut dump = Dump::new();
        for table in self.texts(tables) {
            let columns = self.texts(&format!("SELECT name AS text FROM pragma_table_info('{table}') ORDER BY cid"));
            let values: Vec<String> = columns.iter().map(|column| format!("quote(\"{column}\")")).collect();
            let rows = format!("SELECT {} AS text FROM \"{table}\" ORDER BY 1", values.join(" || ' ' || "));
            let rows = self.texts(&rows);
            dump.insert(table, rows);
        }
        dump
    }

    /// What is wrong with the file; empty for nothing.
    pub fn damage(&mut self) -> Vec<String> {
        let mut said = self.texts("SELECT integrity_check AS text FROM pragma_integrity_check");
        said.retain(|line| line != "ok");
        said
    }

    /// `how`: PASSIVE, FULL, RESTART or TRUNCATE. One that others stand in the way of does what it can.
    pub fn checkpoint(&mut self, how: &str) {
        if !self.is_holding {
            let _ = self.conn.batch_execute(&format!("PRAGMA wal_checkpoint({how})"));
        }
    }

    /// Begins or ends a snapshot.
    pub fn hold(&mut self) {
        self.conn.batch_execute(if self.is_holding { "COMMIT" } else { "BEGIN; SELECT count(*) FROM app" }).unwrap();
        self.is_holding = !self.is_holding;
    }
}

/// Where two dumps differ, for people.
pub fn difference(one: &Dump, other: &Dump) -> String {
    let mut told = Vec::new();
    let nothing = Vec::new();
    for table in one.keys().chain(other.keys().filter(|table| !one.contains_key(*table))) {
        let (ours, theirs) = (one.get(table).unwrap_or(&nothing), other.get(table).unwrap_or(&nothing));
        told.extend(ours.iter().filter(|row| !theirs.contains(row)).map(|row| format!("- {table}: {row}")));
        told.extend(theirs.iter().filter(|row| !ours.contains(row)).map(|row| format!("+ {table}: {row}")));
    }
    let more = told.len().saturating_sub(12);
    told.truncate(12);
    if more > 0 {
        told.push(format!("… and {more} rows more"));
    }
    told.join("\n")
}
