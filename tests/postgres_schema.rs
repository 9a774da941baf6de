//! The Postgres schema against the real server: `up`, `down` and `up` again, and the same tables, columns, nullability
//! and indexes as on SQLite, so that one store can take the other's place.

use std::collections::BTreeSet;

use diesel::sql_types::{Bool, Text};

const POSTGRES_UP: &str = concat!(
    include_str!("../migrations/postgres/2026-11-24-000000_foundation/up.sql"),
    include_str!("../migrations/postgres/2026-11-24-000001_handed/up.sql"),
    include_str!("../migrations/postgres/2026-11-24-000002_room_for_updates/up.sql"),
    include_str!("../migrations/postgres/2026-11-29-000003_one_index_of_tokens/up.sql"),
    include_str!("../migrations/postgres/2026-11-29-000004_reach/up.sql"),
    include_str!("../migrations/postgres/2026-11-29-000005_reach_kept/up.sql"),
    include_str!("../migrations/postgres/2026-11-30-000006_byte_order/up.sql"),
    include_str!("../migrations/postgres/2026-11-30-000007_homes/up.sql"),
    include_str!("../migrations/postgres/2026-11-30-000008_rowless/up.sql"),
    include_str!("../migrations/postgres/2026-11-30-000009_dead/up.sql"),
    include_str!("../migrations/postgres/2026-11-30-000010_retired_in_place/up.sql"),
    include_str!("../migrations/postgres/2026-12-01-000011_keys_by_key/up.sql")
);
const POSTGRES_DOWN: &str = concat!(
    include_str!("../migrations/postgres/2026-12-01-000011_keys_by_key/down.sql"),
    include_str!("../migrations/postgres/2026-11-30-000010_retired_in_place/down.sql"),
    include_str!("../migrations/postgres/2026-11-30-000009_dead/down.sql"),
    include_str!("../migrations/postgres/2026-11-30-000008_rowless/down.sql"),
    include_str!("../migrations/postgres/2026-11-30-000007_homes/down.sql"),
    include_str!("../migrations/postgres/2026-11-30-000006_byte_order/down.sql"),
    include_str!("../migrations/postgres/2026-11-29-000005_reach_kept/down.sql"),
    include_str!("../migrations/postgres/2026-11-29-000004_reach/down.sql"),
    include_str!("../migrations/postgres/2026-11-29-000003_one_index_of_tokens/down.sql"),
    include_str!("../migrations/postgres/2026-11-24-000002_room_for_updates/down.sql"),
    include_str!("../migrations/postgres/2026-11-24-000001_handed/down.sql"),
    include_str!("../migrations/postgres/2026-11-24-000000_foundation/down.sql")
);
const SQLITE_UP: &str = concat!(
    include_str!("../migrations/sqlite/2026-11-24-000000_foundation/up.sql"),
    include_str!("../migrations/sqlite/2026-11-24-000001_handed/up.sql"),
    include_str!("../migrations/sqlite/2026-11-24-000002_room_for_updates/up.sql"),
    include_str!("../migrations/sqlite/2026-11-29-000003_one_index_of_tokens/up.sql"),
    include_str!("../migrations/sqlite/2026-11-29-000004_reach/up.sql"),
    include_str!("../migrations/sqlite/2026-11-29-000005_reach_kept/up.sql"),
    include_str!("../migrations/sqlite/2026-11-30-000006_byte_order/up.sql"),
    include_str!("../migrations/sqlite/2026-11-30-000007_homes/up.sql"),
    include_str!("../migrations/sqlite/2026-11-30-000008_rowless/up.sql"),
    include_str!("../migrations/sqlite/2026-11-30-000009_dead/up.sql"),
    include_str!("../migrations/sqlite/2026-11-30-000010_retired_in_place/up.sql"),
    include_str!("../migrations/sqlite/2026-12-01-000011_keys_by_key/up.sql")
);

#[derive(diesel::QueryableByName, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[expect(clippy::struct_field_names, reason = "`table` and `column` are words of SQL")]
struct Column {
    #[diesel(sql_type = Text)]
    table_name: String,
    #[diesel(sql_type = Text)]
    column_name: String,
    #[diesel(sql_type = Bool)]
    required: bool,
}

#[derive(diesel::QueryableByName, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Index {
    #[diesel(sql_type = Text)]
    name: String,
}

#[derive(PartialEq, Eq, Debug)]
struct Schema {
    columns: BTreeSet<Column>,
    indexes: BTreeSet<Index>,
}

mod sqlite {
    use diesel::connection::SimpleConnection;
    use diesel::{Connection, RunQueryDsl, SqliteConnection, sql_query};

    use super::{SQLITE_UP, Schema};

    pub fn schema() -> Schema {
        let mut conn = SqliteConnection::establish(":memory:").expect("a database in memory");
        conn.batch_execute(SQLITE_UP).expect("the SQLite schema");
        let columns = sql_query(
            "SELECT s.name AS table_name, c.name AS column_name, c.\"notnull\" AS required \
             FROM sqlite_schema s JOIN pragma_table_info(s.name) c WHERE s.type = 'table'",
        );
        let indexes = sql_query("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL");
        Schema {
            columns: columns.load(&mut conn).expect("columns").into_iter().collect(),
            indexes: indexes.load(&mut conn).expect("indexes").into_iter().collect(),
        }
    }
}

mod postgres {
    use diesel::sql_query;
    use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};

    use super::Schema;

    /// A connection to an empty schema of its own on the test server.
    pub async fn connect(schema: &str) -> AsyncPgConnection {
        let url = std::env::var("NUDGED_TEST_POSTGRES_URL").unwrap_or_else(|_| {
            panic!(
                "NUDGED_TEST_POSTGRES_URL is not set: run `make test`, or `scripts/with-postgres.sh cargo test`, which \
                 start a private server; or set it to postgres://user:password@host/database of a server to test on"
            )
        });
        let mut conn = AsyncPgConnection::establish(&url).await.expect("the server at NUDGED_TEST_POSTGRES_URL");
        let fresh =
            format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; SET search_path = {schema}");
        conn.batch_execute(&fresh).await.expect("a schema of our own");
        conn
    }

    /// Partitions and their indexes belong to their table and are left out.
    pub async fn schema(conn: &mut AsyncPgConnection) -> Schema {
        let columns = sql_query(
            "SELECT c.relname::TEXT AS table_name, a.attname::TEXT AS column_name, a.attnotnull AS required \
             FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid \
             WHERE c.relnamespace = current_schema()::REGNAMESPACE AND c.relkind IN ('r', 'p') AND NOT c.relispartition \
             AND a.attnum > 0 AND NOT a.attisdropped",
        );
        let indexes = sql_query(
            "SELECT c.relname::TEXT AS name FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid \
             WHERE c.relnamespace = current_schema()::REGNAMESPACE AND NOT c.relispartition AND NOT i.indisprimary \
             AND NOT EXISTS (SELECT 1 FROM pg_constraint k WHERE k.conindid = c.oid)",
        );
        Schema {
            columns: columns.load(conn).await.expect("columns").into_iter().collect(),
            indexes: indexes.load(conn).await.expect("indexes").into_iter().collect(),
        }
    }
}

#[tokio::test]
async fn the_schema_goes_up_down_and_up_and_matches_sqlite() {
    use diesel_async::SimpleAsyncConnection;

    let name = format!("nudged_schema_{}", std::process::id());
    let mut conn = postgres::connect(&name).await;
    conn.batch_execute(POSTGRES_UP).await.expect("up");
    let first = postgres::schema(&mut conn).await;
    conn.batch_execute(POSTGRES_DOWN).await.expect("down");
    let left = postgres::schema(&mut conn).await;
    assert_eq!(left, Schema { columns: BTreeSet::new(), indexes: BTreeSet::new() }, "down leaves nothing");
    conn.batch_execute(POSTGRES_UP).await.expect("up again");
    let again = postgres::schema(&mut conn).await;
    assert_eq!(first, again);

    let sqlite = sqlite::schema();
    // Jobs without rows are a column of their notification on SQLite, and no replica has to be asked what it knows of.
    let mut again = again;
    let before = again.columns.len();
    again.columns.retain(|Column { table_name, column_name, .. }| {
        let asked = table_name == "replica" && matches!(&**column_name, "rowless" | "dead_in_place");
        table_name != "handed" && !asked
    });
    assert_eq!(before - again.columns.len(), 12);
    let only = |a: &BTreeSet<Column>, b: &BTreeSet<Column>| format!("{:#?}", a.difference(b).collect::<Vec<_>>());
    assert!(again.columns.len() > 100);
    assert!(
        again.columns == sqlite.columns,
        "only on Postgres: {}\nonly on SQLite: {}",
        only(&again.columns, &sqlite.columns),
        only(&sqlite.columns, &again.columns)
    );
    let mut indexes = sqlite.indexes;
    // The one writer of SQLite finds old tokens by device_by_token; many need the partial one that is unique.
    assert!(indexes.insert(Index { name: "device_by_old_token".to_owned() }));
    // … and goes through keys in their own order, which a table has only there.
    assert!(indexes.insert(Index { name: "idempotency_by_expiry".to_owned() }));
    assert_eq!(again.indexes, indexes);

    // Whatever the database's collation: an upgrade of the system's library must not change the order beneath an index.
    let collated = "DO $$ DECLARE found TEXT; BEGIN \
                    SELECT string_agg(i.indexrelid::REGCLASS::TEXT, ', ') INTO found FROM pg_index i \
                    JOIN pg_class c ON c.oid = i.indexrelid CROSS JOIN LATERAL unnest(i.indcollation::OID[]) AS used (id) \
                    WHERE c.relnamespace = current_schema()::REGNAMESPACE \
                    AND used.id NOT IN (0, 'pg_catalog.\"C\"'::REGCOLLATION); \
                    ASSERT found IS NULL, found; END $$";
    conn.batch_execute(collated).await.expect("every index of texts is in the order of their bytes");

    // What only the server can say: ids of any time find a partition, and a block knows its transaction.
    let rows = "INSERT INTO outcome_block (id, app, notification_id, first_user, last_user, at, entries) \
                VALUES (1, 1, 1, 1, 1, 1, '\\x01'), (9223372036854775807, 1, 1, 1, 1, 1, '\\x01'); \
                DO $$ BEGIN ASSERT (SELECT count(*) FROM outcome_block WHERE xid > 0) = 2; END $$";
    conn.batch_execute(rows).await.expect("rows in the default partition");
    conn.batch_execute(&format!("DROP SCHEMA {name} CASCADE")).await.expect("tidied up");
}

/// What the tests above run is what a server does: both stores have every migration, and this file names each of them.
#[test]
fn no_migration_is_left_out() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let names = |store: &str| -> BTreeSet<String> {
        let entries = std::fs::read_dir(root.join("migrations").join(store)).expect("a directory of migrations");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    };
    let of_postgres = names("postgres");
    assert_eq!(of_postgres, names("sqlite"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect("a source file");
    let (here, server) = (read("tests/postgres_schema.rs"), read("src/storage/postgres/open.rs"));
    for name in of_postgres {
        assert!(server.contains(&format!("postgres/{name}/up.sql")), "a server does not run {name}");
        for part in
            [format!("postgres/{name}/up.sql"), format!("postgres/{name}/down.sql"), format!("sqlite/{name}/up.sql")]
        {
            assert!(here.contains(&part), "{part} is not tested");
        }
    }
}
