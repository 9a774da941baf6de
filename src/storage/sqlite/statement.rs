//! Statements that stay prepared.
//!
//! diesel keeps prepared what its query builder proves constant, but neither hand-written SQL nor updates, upserts and
//! batch inserts; parsing costs more than running most of them. The [`constant!`] macro takes the SQL as a `const`, so
//! that it *cannot* vary, gives it an identity of its own (the cache is asked by type, without building the text
//! again) and says that it may be kept. A test counts what gets prepared.

use std::any::Any;
use std::marker::PhantomData;

use diesel::QueryResult;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::sqlite::Sqlite;

/// A constant statement with its binds. `Id` is a type of its own for each text; `Row` the SQL types it returns.
pub struct Constant<Id, Q, Row> {
    query: Q,
    marker: PhantomData<fn() -> (Id, Row)>,
}

impl<Id, Q, Row> Constant<Id, Q, Row> {
    /// Only through [`constant!`], which guarantees that one `Id` means one text.
    pub fn new(query: Q) -> Self {
        Self { query, marker: PhantomData }
    }
}

impl<Id: Any, Q, Row> QueryId for Constant<Id, Q, Row> {
    type QueryId = Id;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl<Id, Q: QueryFragment<Sqlite>, Row> QueryFragment<Sqlite> for Constant<Id, Q, Row> {
    fn walk_ast<'b>(&'b self, pass: AstPass<'_, 'b, Sqlite>) -> QueryResult<()> {
        self.query.walk_ast(pass)
    }

    fn is_safe_to_cache_prepared(&self, _backend: &Sqlite) -> QueryResult<bool> {
        Ok(true)
    }
}

impl<Id, Q, Row> Query for Constant<Id, Q, Row> {
    type SqlType = Row;
}

impl<Connection, Id, Q, Row> diesel::RunQueryDsl<Connection> for Constant<Id, Q, Row> {}

/// `constant!((BigInt, Text); "SELECT … ?1 …", BigInt => value, …)`: rows of these types; `()` for none.
macro_rules! constant {
    ($row:ty; $sql:expr $(, $kind:ty => $value:expr)* $(,)?) => {{
        const SQL: &str = $sql;
        enum Id {}
        $crate::storage::sqlite::statement::Constant::<Id, _, $row>::new(
            diesel::sql_query(SQL)$(.bind::<$kind, _>($value))*
        )
    }};
}

pub(super) use constant;
