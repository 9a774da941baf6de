//! Leases of many replicas: who holds what, and what is taken from the dead.

use diesel::sql_types::{BigInt, Text};

use super::super::fail::Attempt;
use super::super::group::Tx;
use super::super::handed;
use super::super::rows::json_ids;
use super::super::statement::constant;
use super::super::writer::Class;
use super::super::{SMALL, SqliteStore};
use super::{Replica, inline};
use crate::domain::ids::NotificationId;
use crate::storage::Result;

/// A call that may take leases. Unless it is told what became of them, they are looked for: also when its caller went away
/// before the answer came.
pub(super) struct Leasing<'a> {
    replica: &'a Replica,
    known: bool,
    _shared: tokio::sync::RwLockReadGuard<'a, ()>,
}

impl Leasing<'_> {
    /// The engine has these.
    pub fn took(mut self, ids: impl IntoIterator<Item = i64>) {
        self.known = true;
        self.replica.held.lock().expect("no panic while held").extend(ids);
    }
}

impl Drop for Leasing<'_> {
    fn drop(&mut self) {
        if !self.known {
            self.replica.sweep.ask();
        }
    }
}

impl Replica {
    pub(super) async fn leasing(&self) -> Leasing<'_> {
        Leasing { replica: self, known: false, _shared: self.leasing.read().await }
    }

    pub(super) fn let_go(&self, ids: impl IntoIterator<Item = i64>) {
        let mut held = self.held.lock().expect("no panic while held");
        for id in ids {
            held.remove(&id);
        }
    }
}

/// Frees what is leased to anybody but these. How many jobs that were.
pub(super) fn release_all_but(store: &SqliteStore, alive: Vec<i64>) -> Result<u64> {
    free(store, "releasing other owners' jobs", move |tx| {
        let alive = json_ids(alive.iter().copied());
        let jobs = tx.execute(constant!(
            ();
            "UPDATE job SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner NOT IN (SELECT value FROM json_each(?1))",
            Text => &*alive,
        ))?;
        tx.execute(constant!(
            ();
            "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner <> 0 \
             AND owner NOT IN (SELECT value FROM json_each(?1))",
            Text => &*alive,
        ))?;
        Ok(jobs as u64)
    })
}

/// Frees what this owner has, but for what it knows of. How many jobs that were.
pub(super) fn release_unknown(store: &SqliteStore, owner: i64, known: Vec<i64>) -> Result<u64> {
    free(store, "freeing leases that nobody knows of", move |tx| {
        let known = json_ids(known.iter().copied());
        let jobs = tx.execute(constant!(
            ();
            "UPDATE job SET owner = 0, fence = fence + 1 WHERE owner = ?1 AND id NOT IN (SELECT value FROM json_each(?2))",
            BigInt => owner, Text => &*known,
        ))?;
        tx.execute(constant!(
            ();
            "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner = ?1 \
             AND notification_id NOT IN (SELECT value FROM json_each(?2))",
            BigInt => owner, Text => &*known,
        ))?;
        Ok(jobs as u64)
    })
}

fn free(
    store: &SqliteStore,
    doing: &'static str,
    mut step: impl FnMut(&mut Tx<'_>) -> Attempt<u64> + Send + 'static,
) -> Result<u64> {
    inline(store.write(Class::Outcome, SMALL, doing, move |tx| {
        // Whose a job without a row is, only a row can tell.
        handed::age(tx, tx.gated_at, Some(NotificationId(i64::MAX)))?;
        step(tx)
    }))
}
