//! Statements that stay prepared.
//!
//! diesel keeps prepared what its query builder proves constant, but neither hand-written SQL nor updates, upserts and
//! batch inserts; parsing costs more than running most of them. The [`constant!`] macro takes the SQL as a `const`, so
//! that it *cannot* vary, and gives it an identity of its own, by which the cache finds it without building the text
//! again. A test counts what gets prepared.
//!
//! The fragment is written out here, for diesel's `sql_query` declares itself unfit for the cache in a way that a
//! wrapper cannot take back where a statement is executed by reference. Parameters are numbered in the text (`?1`);
//! diesel writes a `?` for each value it collects, and those go into a comment at the end.
//!
//! One thing undoes all this inside SQLite: its planner looks at a bare parameter behind LIMIT or OFFSET, and then
//! parses the statement again whenever that parameter is bound. `LIMIT ?1 + 0` is an expression, which it leaves alone.

use std::any::Any;
use std::marker::PhantomData;

use diesel::QueryResult;
use diesel::backend::{Backend, DieselReserveSpecialization};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::serialize::ToSql;
use diesel::sql_types::HasSqlType;

/// A constant statement with its values. `Id` is a type of its own for each text; `Row` the SQL types it returns.
pub struct Constant<Id, Values, Row> {
    sql: &'static str,
    values: Values,
    marker: PhantomData<fn() -> (Id, Row)>,
}

impl<Id, Row> Constant<Id, (), Row> {
    /// Only through [`constant!`], which guarantees that one `Id` means one text.
    pub fn new(sql: &'static str) -> Self {
        Self { sql, values: (), marker: PhantomData }
    }
}

impl<Id, Values, Row> Constant<Id, Values, Row> {
    /// The value of the next parameter.
    pub fn bind<Kind, V>(self, value: V) -> Constant<Id, (Values, Value<Kind, V>), Row> {
        let value = Value { value, marker: PhantomData };
        Constant { sql: self.sql, values: (self.values, value), marker: PhantomData }
    }
}

/// A value with its SQL type.
pub struct Value<Kind, V> {
    value: V,
    marker: PhantomData<fn() -> Kind>,
}

/// The values of a statement, in order.
pub trait Values<DB: Backend> {
    fn walk<'b>(&'b self, pass: &mut AstPass<'_, 'b, DB>) -> QueryResult<()>;
}

impl<DB: Backend> Values<DB> for () {
    fn walk<'b>(&'b self, _pass: &mut AstPass<'_, 'b, DB>) -> QueryResult<()> {
        Ok(())
    }
}

impl<DB, Before, Kind, V> Values<DB> for (Before, Value<Kind, V>)
where
    DB: Backend + HasSqlType<Kind>,
    Before: Values<DB>,
    V: ToSql<Kind, DB>,
{
    fn walk<'b>(&'b self, pass: &mut AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self.0.walk(pass)?;
        pass.push_bind_param::<Kind, V>(&self.1.value)
    }
}

impl<Id: Any, Values, Row> QueryId for Constant<Id, Values, Row> {
    type QueryId = Id;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl<DB: Backend + DieselReserveSpecialization, Id, V: Values<DB>, Row> QueryFragment<DB> for Constant<Id, V, Row> {
    fn walk_ast<'b>(&'b self, mut pass: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        pass.push_sql(self.sql);
        pass.push_sql(" --");
        self.values.walk(&mut pass)
    }
}

impl<Id, Values, Row> Query for Constant<Id, Values, Row> {
    type SqlType = Row;
}

impl<Connection, Id, Values, Row> diesel::RunQueryDsl<Connection> for Constant<Id, Values, Row> {}

/// `constant!((BigInt, Text); "SELECT … ?1 …", BigInt => value, …)`: rows of these types; `()` for none.
macro_rules! constant {
    ($row:ty; $sql:expr $(, $kind:ty => $value:expr)* $(,)?) => {{
        const SQL: &str = $sql;
        enum Id {}
        $crate::storage::statement::Constant::<Id, (), $row>::new(SQL)$(.bind::<$kind, _>($value))*
    }};
}

pub(super) use constant;
