//! What the server's database holds, read beside it.

use std::collections::BTreeMap;
use std::path::Path;

use diesel::sql_types::{BigInt, Text};
use diesel::{Connection, RunQueryDsl, SqliteConnection, sql_query};

#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

#[derive(diesel::QueryableByName)]
struct Name {
    #[diesel(sql_type = Text)]
    name: String,
}

/// The answer of a query whose only column is `count`.
pub fn count(database: &Path, query: &str) -> u64 {
    let mut conn = SqliteConnection::establish(database.to_str().unwrap()).unwrap();
    let row: Count = sql_query(query).get_result(&mut conn).unwrap();
    u64::try_from(row.count).unwrap()
}

/// Changes what a server left; how many rows. No server may run on it.
pub fn execute(database: &Path, statement: &str) -> usize {
    let mut conn = SqliteConnection::establish(database.to_str().unwrap()).unwrap();
    sql_query(statement).execute(&mut conn).unwrap()
}

/// Rows of every table.
pub fn counts(database: &Path) -> BTreeMap<String, u64> {
    let mut conn = SqliteConnection::establish(database.to_str().unwrap()).unwrap();
    let tables = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name";
    let tables: Vec<Name> = sql_query(tables).load(&mut conn).unwrap();
    assert!(tables.len() > 20, "the whole schema");
    let rows = |table: Name| {
        let rows = count(database, &format!("SELECT count(*) AS count FROM \"{}\"", table.name));
        (table.name, rows)
    };
    tables.into_iter().map(rows).collect()
}
