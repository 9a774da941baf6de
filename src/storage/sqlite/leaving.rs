//! The source of a move: see [`crate::storage::moving`].

use std::fs::File;
use std::path::Path;

use diesel::deserialize::{self, FromSql, QueryableByName};
use diesel::row::{Field, NamedRow};
use diesel::sql_types::{BigInt, Binary, Text};
use diesel::sqlite::{Sqlite, SqliteConnection, SqliteType};
use diesel::{Connection as _, OptionalExtension, RunQueryDsl};

use super::open::{self, OpenError, Settings};
use super::statement::constant;
use crate::storage::moving::{Digest, LEFT_BEHIND, Line, MoveError, SEAL, Seal, Table};

/// A database that nobody else uses while this lives: it holds the lock that a server takes.
pub struct Source {
    conn: SqliteConnection,
    _lock: File,
}

#[derive(diesel::QueryableByName)]
struct Name {
    #[diesel(sql_type = Text)]
    name: String,
}

#[derive(diesel::QueryableByName)]
struct Column {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = BigInt)]
    pk: i64,
}

#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

impl QueryableByName<Sqlite> for Line {
    fn build<'a>(row: &impl NamedRow<'a, Sqlite>) -> deserialize::Result<Self> {
        let mut line = Self::default();
        for at in 0..row.field_count() {
            let field = diesel::row::Row::get(row, at).ok_or("a row without its column")?;
            let Some(value) = field.value() else {
                line.null();
                continue;
            };
            match value.value_type() {
                None => line.null(),
                Some(SqliteType::Text) => line.text(&<String as FromSql<Text, Sqlite>>::from_sql(value)?),
                Some(SqliteType::Binary) => line.bytes(&<Vec<u8> as FromSql<Binary, Sqlite>>::from_sql(value)?),
                Some(SqliteType::SmallInt | SqliteType::Integer | SqliteType::Long) => {
                    line.integer(<i64 as FromSql<BigInt, Sqlite>>::from_sql(value)?);
                }
                Some(SqliteType::Float | SqliteType::Double) => {
                    return Err("a floating-point number, which no column of ours holds".into());
                }
            }
        }
        line.end();
        Ok(line)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: diesel::result::Error) -> MoveError {
    MoveError::Source { reason: error.to_string() }
}

impl Source {
    /// Takes the lock and brings the schema to this version. The file must exist.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        if !path.is_file() {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(OpenError::File { doing: "open the database", path: path.to_owned(), source });
        }
        let settings = Settings::file(path);
        let lock = open::lock_file(path)?;
        let mut conn = open::connect(&settings)?;
        open::migrate(&mut conn, true)?;
        // What is open goes with the rows of `job`; the destination does not read the column.
        super::handed::recover(&mut conn)?;
        conn.transaction(super::dead::settle_all)
            .map_err(|fail| OpenError::Read { reason: fail.into_store("write down dead tokens").to_string() })?;
        Ok(Self { conn, _lock: lock })
    }

    pub fn seal(&mut self) -> Result<Option<Seal>, MoveError> {
        seal(&mut self.conn).map_err(failed)
    }

    /// From now on no server takes this database.
    pub fn set_seal(&mut self, seal: &Seal) -> Result<(), MoveError> {
        let json = serde_json::to_vec(seal).expect("a seal is plain data");
        constant!(
            (); "INSERT OR REPLACE INTO secret (name, value, created_at) VALUES (?1, ?2, ?3)",
            Text => SEAL, Binary => json, BigInt => seal.since,
        )
        .execute(&mut self.conn)
        .map_err(failed)?;
        Ok(())
    }

    /// Servers may take it again. Whether it was sealed.
    pub fn break_seal(&mut self) -> Result<bool, MoveError> {
        let broken = constant!((); "DELETE FROM secret WHERE name = ?1", Text => SEAL).execute(&mut self.conn);
        Ok(broken.map_err(failed)? > 0)
    }

    /// Every table with its columns and how many rows there are to move, by name.
    pub fn tables(&mut self) -> Result<Vec<Table>, MoveError> {
        let names: Vec<Name> = diesel::sql_query(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
        )
        .load(&mut self.conn)
        .map_err(failed)?;
        let mut tables = Vec::new();
        for Name { name } in names {
            if LEFT_BEHIND.contains(&name.as_str()) {
                continue;
            }
            let mut columns: Vec<Column> =
                diesel::sql_query(format!("SELECT name, pk FROM pragma_table_info('{name}') ORDER BY cid"))
                    .load(&mut self.conn)
                    .map_err(failed)?;
            let all = columns.iter().map(|column| column.name.clone()).collect();
            columns.retain(|column| column.pk > 0);
            columns.sort_by_key(|column| column.pk);
            let key = columns.into_iter().map(|column| column.name).collect();
            let mut table = Table { name, columns: all, key, rows: 0 };
            let count = format!("SELECT count(*) AS count FROM \"{}\" {}", table.name, table.condition());
            let Count { count } = diesel::sql_query(count).get_result(&mut self.conn).map_err(failed)?;
            table.rows = u64::try_from(count).unwrap_or(0);
            tables.push(table);
        }
        Ok(tables)
    }

    /// Gives `each` row after the first `skip`, as a line, until it says false. Holds one row at a time.
    pub fn read(&mut self, table: &Table, skip: u64, mut each: impl FnMut(&[u8]) -> bool) -> Result<(), MoveError> {
        let sql = format!(
            "SELECT {} FROM \"{}\" {} ORDER BY {} LIMIT -1 OFFSET {skip}",
            table.values(),
            table.name,
            table.condition(),
            table.key_list(),
        );
        let lines = diesel::sql_query(sql)
            .load_iter::<Line, diesel::connection::DefaultLoadingMode>(&mut self.conn)
            .map_err(failed)?;
        for line in lines {
            if !each(&line.map_err(failed)?.0) {
                break;
            }
        }
        Ok(())
    }

    pub fn digest(&mut self, table: &Table) -> Result<Digest, MoveError> {
        let mut digest = Digest::default();
        self.read(table, 0, |line| {
            digest.add(line);
            true
        })?;
        Ok(digest)
    }
}

/// What a sealed database says of its move; a seal that cannot be read is one nevertheless.
pub(super) fn seal(conn: &mut SqliteConnection) -> diesel::QueryResult<Option<Seal>> {
    let stored: Option<(Vec<u8>, i64)> = constant!(
        (Binary, BigInt); "SELECT value, created_at FROM secret WHERE name = ?1", Text => SEAL
    )
    .get_result(conn)
    .optional()?;
    let unread = |since| Seal { copy: String::new(), since, done: true };
    Ok(stored.map(|(json, since)| serde_json::from_slice(&json).unwrap_or_else(|_| unread(since))))
}
