//! Reads, each on a pooled connection of its own.
//!
//! A read that begins after a write was answered sees it: both go to the same server, and a statement sees what was
//! committed before it began. Never a standby: no decision comes from one.

use std::time::Duration;

use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::deadpool::Object;

use super::Inner;
use super::fail::{Attempt, Fail, unavailable};
use crate::runtime::Instant;
use crate::storage::Result;

const PATIENCE: Duration = Duration::from_secs(3);
pub(super) const LIMIT: Duration = Duration::from_secs(10);
const RECONNECT: Duration = Duration::from_millis(100);

/// The runs of one read; see [`read!`].
pub(super) struct Reads<'a> {
    inner: &'a Inner,
    doing: &'static str,
    deadline: Instant,
}

impl<'a> Reads<'a> {
    pub fn new(inner: &'a Inner, doing: &'static str) -> Self {
        Self { inner, doing, deadline: inner.context.runtime.instant() + PATIENCE }
    }

    /// `None`: run it again.
    pub async fn end<T>(&self, object: Object<AsyncPgConnection>, result: Option<Attempt<T>>) -> Option<Result<T>> {
        let runtime = &self.inner.context.runtime;
        match result {
            Some(Ok(value)) => Some(Ok(value)),
            Some(Err(fail @ (Fail::Refused(_) | Fail::Corrupt(_)))) => Some(Err(fail.into_store(self.doing))),
            failed => {
                // Whatever state it is in, it is not the next reader's concern.
                drop(Object::take(object));
                let error = match failed {
                    Some(Err(fail)) => fail.into_store(self.doing),
                    _ => unavailable(self.doing),
                };
                if runtime.instant() + RECONNECT >= self.deadline || self.inner.context.is_stopping() {
                    return Some(Err(error));
                }
                runtime.sleep(RECONNECT).await;
                None
            }
        }
    }
}

/// `read!(inner, doing, |conn| work)`, and `read!(snapshot; …)` for several statements that see one state.
macro_rules! read {
    ($inner:expr, $doing:expr, |$conn:ident| $work:expr) => {{
        let inner = $inner;
        let reads = $crate::storage::postgres::read::Reads::new(inner, $doing);
        loop {
            let mut object = match inner.connection($doing).await {
                Ok(object) => object,
                Err(error) => break Err(error),
            };
            let result = {
                let $conn: &mut diesel_async::AsyncPgConnection = &mut object;
                inner.context.runtime.timeout($crate::storage::postgres::read::LIMIT, async { $work.await }).await
            };
            if let Some(answer) = reads.end(object, result).await {
                break answer;
            }
        }
    }};
    (snapshot; $inner:expr, $doing:expr, |$conn:ident| $work:expr) => {
        $crate::storage::postgres::read::read!($inner, $doing, |$conn| async {
            $conn.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
            let result = $work.await;
            $conn.batch_execute("COMMIT").await?;
            result
        })
    };
}
pub(super) use read;
