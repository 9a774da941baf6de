//! Running a constant statement. diesel-async's own trait is for every type there is, and would answer for the
//! `.load()` of an atomic and the `.first()` of a slice wherever it is imported. Boxed, for the compiler cannot see
//! through diesel's futures that they are `Send` for every lifetime; an allocation is nothing beside the round trip.

use diesel::QueryResult;
use diesel::query_builder::QueryId;
use diesel_async::methods::{ExecuteDsl, LoadQuery};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use futures_util::future::BoxFuture;

use super::statement::Constant;
use crate::planted;

/// The three ways to run a [`Constant`].
pub(super) trait RunQuery: Sized + Send {
    fn load<'a, T>(self, conn: &'a mut AsyncPgConnection) -> BoxFuture<'a, QueryResult<Vec<T>>>
    where
        T: Send + 'a,
        Self: LoadQuery<'a, AsyncPgConnection, T> + 'a,
    {
        Box::pin(RunQueryDsl::load(self, conn))
    }

    fn get_result<'a, T>(self, conn: &'a mut AsyncPgConnection) -> BoxFuture<'a, QueryResult<T>>
    where
        T: Send + 'a,
        Self: LoadQuery<'a, AsyncPgConnection, T> + 'a,
    {
        // Not diesel-async's, which answers with the first row: a statement that is its own transaction has rows before its
        // COMMIT, which may fail yet.
        if planted::is("pg-answer-before-commit") {
            return Box::pin(RunQueryDsl::get_result(self, conn));
        }
        let rows = RunQuery::load::<T>(self, conn);
        Box::pin(async move { rows.await?.into_iter().next().ok_or(diesel::result::Error::NotFound) })
    }

    fn execute<'a>(self, conn: &'a mut AsyncPgConnection) -> BoxFuture<'a, QueryResult<usize>>
    where
        Self: ExecuteDsl<AsyncPgConnection> + QueryId + 'a,
    {
        Box::pin(RunQueryDsl::execute(self, conn))
    }
}

impl<Id, Values: Send, Row> RunQuery for Constant<Id, Values, Row> {}
