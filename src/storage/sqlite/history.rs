//! Append-only history: results, attempts that failed, devices that stopped being active.
//!
//! A row of it is small and lies at the end of its table, so that a statement costs more to bind, begin and end than the
//! insert: a step gathers its rows in a [`History`], which writes them several to a statement.

use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::rows::stored_count;
use super::statement::constant;
use crate::domain::device::Retirement;
use crate::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserKey};
use crate::domain::outcome::{self, Entry, ResultCode};
use crate::domain::time::UnixMs;
use crate::storage::Attempt as SendAttempt;

/// What one step adds. Nothing is written before [`History::write`].
#[derive(Default)]
pub(super) struct History<'a> {
    blocks: Vec<Block>,
    attempts: Vec<FailedAttempt<'a>>,
    retirements: Vec<Retired<'a>>,
}

/// A row of `outcome_block`.
struct Block {
    id: i64,
    app: i64,
    notification: i64,
    route: Option<i64>,
    first: i64,
    last: i64,
    entries: Vec<u8>,
}

/// A row of `attempt_detail`.
struct FailedAttempt<'a> {
    id: i64,
    app: i64,
    notification: i64,
    code: i16,
    told: &'a SendAttempt,
}

/// A row of `device_retirement`.
struct Retired<'a> {
    id: i64,
    app: i64,
    user: i64,
    dead: &'a Retirement,
}

/// Inserts `$rows`, eight to a statement as far as that goes. `$bind` binds the values of one row.
macro_rules! insert {
    ($tx:expr, $rows:expr, $bind:ident, $head:literal, $places:literal) => {{
        let (many, few) = $rows.as_chunks::<8>();
        for [a, b, c, d, e, f, g, h] in many {
            let eight = constant!((); concat!(
                $head, $places, ", ", $places, ", ", $places, ", ", $places, ", ",
                $places, ", ", $places, ", ", $places, ", ", $places
            ));
            let two = $bind!($bind!(eight, a), b);
            let four = $bind!($bind!(two, c), d);
            let six = $bind!($bind!(four, e), f);
            $tx.execute($bind!($bind!(six, g), h))?;
        }
        for row in few {
            $tx.execute($bind!(constant!((); concat!($head, $places)), row))?;
        }
    }};
}

impl<'a> History<'a> {
    /// Results in this order, which ascends by (user, device).
    pub fn results(
        &mut self,
        tx: &mut Tx<'_>,
        app: AppKey,
        notification: NotificationId,
        route: Option<RouteId>,
        entries: &[Entry],
        now: UnixMs,
    ) {
        for chunk in entries.chunks(outcome::MAX_ENTRIES) {
            let (Some(first), Some(last)) = (chunk.first(), chunk.last()) else { continue };
            self.blocks.push(Block {
                id: tx.next_id(now),
                app: app.0,
                notification: notification.0,
                route: route.map(|route| route.0),
                first: first.user.0,
                last: last.user.0,
                entries: outcome::pack(chunk),
            });
        }
    }

    pub fn attempt(
        &mut self,
        tx: &mut Tx<'_>,
        app: AppKey,
        notification: NotificationId,
        told: &'a SendAttempt,
        now: UnixMs,
    ) -> Attempt<()> {
        let code = ResultCode::named(told.result)
            .ok_or_else(|| Fail::corrupt(format!("no result is called {}", told.result)))?;
        let (id, code) = (tx.next_id(now), i16::from(code.code()));
        self.attempts.push(FailedAttempt { id, app: app.0, notification: notification.0, code, told });
        Ok(())
    }

    /// The device was active when the transaction began.
    pub fn retirement(&mut self, tx: &mut Tx<'_>, app: AppKey, user: UserKey, dead: &'a Retirement, now: UnixMs) {
        let id = tx.next_id(now);
        self.retirements.push(Retired { id, app: app.0, user: user.0, dead });
    }

    pub fn write(self, tx: &mut Tx<'_>, now: UnixMs) -> Attempt<()> {
        if !self.blocks.is_empty() || !self.retirements.is_empty() {
            let number = tx.number(now);
            self.write_blocks(tx, number, now)?;
            self.write_retirements(tx, number, now)?;
        }
        self.write_attempts(tx)
    }

    fn write_blocks(&self, tx: &mut Tx<'_>, number: i64, now: UnixMs) -> Attempt<()> {
        macro_rules! bind {
            ($statement:expr, $row:expr) => {
                $statement
                    .bind::<BigInt, _>($row.id)
                    .bind::<BigInt, _>($row.app)
                    .bind::<BigInt, _>($row.notification)
                    .bind::<Nullable<BigInt>, _>($row.route)
                    .bind::<BigInt, _>($row.first)
                    .bind::<BigInt, _>($row.last)
                    .bind::<BigInt, _>(now.0)
                    .bind::<Binary, _>(&$row.entries[..])
                    .bind::<BigInt, _>(number)
            };
        }
        insert!(
            tx,
            self.blocks,
            bind,
            "INSERT INTO outcome_block (id, app, notification_id, route, first_user, last_user, at, entries, xid) VALUES ",
            "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
        );
        Ok(())
    }

    fn write_retirements(&self, tx: &mut Tx<'_>, number: i64, now: UnixMs) -> Attempt<()> {
        macro_rules! bind {
            ($statement:expr, $row:expr) => {
                $statement
                    .bind::<BigInt, _>($row.id)
                    .bind::<BigInt, _>($row.app)
                    .bind::<BigInt, _>($row.dead.device.0)
                    .bind::<BigInt, _>($row.user)
                    .bind::<Text, _>(&*$row.dead.reason)
                    .bind::<BigInt, _>(now.0)
                    .bind::<BigInt, _>(number)
            };
        }
        insert!(
            tx,
            self.retirements,
            bind,
            "INSERT INTO device_retirement (id, app, device, user_key, reason, at, xid) VALUES ",
            "(?, ?, ?, ?, ?, ?, ?)"
        );
        Ok(())
    }

    fn write_attempts(&self, tx: &mut Tx<'_>) -> Attempt<()> {
        macro_rules! bind {
            ($statement:expr, $row:expr) => {
                $statement
                    .bind::<BigInt, _>($row.id)
                    .bind::<BigInt, _>($row.app)
                    .bind::<BigInt, _>($row.notification)
                    .bind::<BigInt, _>($row.told.user.0)
                    .bind::<BigInt, _>($row.told.device.0)
                    .bind::<Integer, _>(stored_count($row.told.attempt))
                    .bind::<BigInt, _>($row.told.at.0)
                    .bind::<SmallInt, _>($row.code)
                    .bind::<Integer, _>(i32::from($row.told.answer.status))
                    .bind::<Text, _>(&*$row.told.answer.reason)
                    .bind::<Nullable<BigInt>, _>($row.told.next_at.map(|at| at.0))
            };
        }
        insert!(
            tx,
            self.attempts,
            bind,
            "INSERT INTO attempt_detail (id, app, notification_id, user_key, device, attempt, at, code, status, reason, \
             next_at) VALUES ",
            "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        );
        Ok(())
    }
}

/// Appends results that are all a step adds. None for none.
pub(super) fn insert_results(
    tx: &mut Tx<'_>,
    app: AppKey,
    notification: NotificationId,
    route: Option<RouteId>,
    entries: &[Entry],
    now: UnixMs,
) -> Attempt<()> {
    let mut history = History::default();
    history.results(tx, app, notification, route, entries, now);
    history.write(tx, now)
}

/// A device is no longer active, or never was.
pub(super) fn log_retirement(tx: &mut Tx<'_>, device: DeviceId, reason: &str, now: UnixMs) -> Attempt<()> {
    let (id, transaction) = (tx.next_id(now), tx.number(now));
    tx.execute(constant!(
        ();
        "INSERT INTO device_retirement (id, app, device, user_key, reason, at, xid) \
         SELECT ?1, app, id, user_key, ?3, ?4, ?5 FROM device WHERE id = ?2",
        BigInt => id, BigInt => device.0, Text => reason, BigInt => now.0, BigInt => transaction,
    ))?;
    Ok(())
}
