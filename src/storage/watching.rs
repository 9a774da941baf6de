//! What watchers are told, and the part of reading it that both stores share.
//!
//! Nothing is written for watchers but a line for each device that is retired: results are read from the outcome blocks,
//! by an index on (app, transaction, id). Each store reads a bounded number of rows after a position; here they are put
//! into one order, unpacked and chosen from. A page ends where the first of its lists was cut, so that a later row of one
//! list never overtakes an earlier one of the other.

use std::collections::{BTreeSet, HashMap};

use super::fail::{Attempt, Fail};
use super::{Attempt as SendAttempt, Delivery, DeliveryKey, StoreError};
use crate::domain::ids::{DeviceId, NotificationId, RouteId, UserId, UserKey};
use crate::domain::outcome::{self, ResultCode, State};
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::planted;

/// Blocks looked at for one page, whether or not a filter wants them.
pub(super) const MAX_BLOCKS: i64 = 512;
/// Packed bytes of the blocks of one page that a filter wants; one block may be larger.
pub(super) const MAX_BLOCK_BYTES: i64 = 16 * 1024;
/// Retirements read for one page.
pub(super) const MAX_RETIREMENTS: i64 = 256;

/// What a watcher wants to be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchFilter {
    pub deliveries: bool,
    pub retirements: bool,
    /// Of deliveries: only this notification's.
    pub notification: Option<NotificationId>,
    pub user: Option<UserId>,
    /// Of deliveries. Empty: every state.
    pub states: Vec<State>,
}

impl Default for WatchFilter {
    fn default() -> Self {
        Self { deliveries: true, retirements: true, notification: None, user: None, states: Vec::new() }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Watched {
    Delivery {
        notification: NotificationId,
        delivery: Delivery,
    },
    DeviceRetired {
        device: DeviceId,
        /// Empty for an erased person.
        user: UserId,
        reason: String,
        at: UnixMs,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchEvent {
    /// After this event.
    pub position: WatchPosition,
    pub watched: Watched,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchPage {
    pub events: Vec<WatchEvent>,
    /// After all of the page, also after what the filter did not want.
    pub position: WatchPosition,
    /// There may be more already.
    pub more: bool,
}

/// What kind of row; the first one says how far there is anything.
pub(super) const HEAD: i32 = 0;
pub(super) const BLOCK: i32 = 1;

/// A row of the one statement that reads a page.
#[derive(diesel::Queryable)]
pub(super) struct WatchRow {
    pub kind: i32,
    /// Head: the transaction up to which everything has ended.
    pub xid: i64,
    /// Head: the newest transaction of which something was deleted.
    pub id: i64,
    /// The notification, or the device.
    subject: i64,
    /// The user of a retirement.
    user: i64,
    route: Option<i64>,
    /// Head: the clock.
    pub at: i64,
    /// Of a block: how many were looked at.
    examined: i64,
    /// None where the filter does not want the block.
    entries: Option<Vec<u8>>,
    reason: Option<String>,
}

/// Chosen, and not yet described.
pub(super) struct Found {
    position: WatchPosition,
    at: UnixMs,
    user: UserKey,
    device: DeviceId,
    what: What,
}

enum What {
    Delivery { notification: NotificationId, code: ResultCode, route: Option<RouteId> },
    Retired { reason: String },
}

/// What a page comes to before names are known.
pub(super) struct Chosen {
    pub found: Vec<Found>,
    position: WatchPosition,
    more: bool,
}

/// The user of a statement: 0 for everybody, and a number that nobody has for one whom we do not know.
pub(super) fn user_number(filter: &WatchFilter, user: Option<UserKey>) -> i64 {
    match (&filter.user, user) {
        (None, _) => 0,
        (Some(_), None) => -1,
        (Some(_), Some(user)) => user.0,
    }
}

/// Attempts read for so many deliveries.
pub(super) fn most_attempts(of: &[DeliveryOf]) -> i64 {
    const EACH: i64 = 64;
    i64::try_from(of.len()).unwrap_or(i64::MAX).saturating_mul(EACH)
}

/// Whether a watcher may go on from here. `horizon`: a later transaction was not reached by this database.
pub(super) fn check(after: &WatchPosition, epoch: i64, deleted: i64, horizon: i64) -> Result<(), StoreError> {
    if after.epoch != epoch || after.transaction > horizon {
        return Err(StoreError::CursorForeign);
    }
    if after.misses(deleted) {
        return Err(StoreError::CursorExpired);
    }
    Ok(())
}

/// Puts the rows in order and takes from them what the filter wants, `limit` at most. `end`: where a page ends that
/// reaches as far as there is anything. `user`: the filter's, `None` for nobody we know.
pub(super) fn choose(
    mut rows: Vec<WatchRow>,
    after: &WatchPosition,
    end: WatchPosition,
    filter: &WatchFilter,
    user: Option<UserKey>,
    limit: usize,
) -> Attempt<Chosen> {
    let (mut blocks, mut retirements, mut examined) = (0_i64, 0_i64, 0_i64);
    let (mut last_block, mut last_retirement) = (None, None);
    for row in &rows {
        let place = (row.xid, row.id);
        if row.kind == BLOCK {
            blocks += 1;
            examined = row.examined;
            last_block = last_block.max(Some(place));
        } else {
            retirements += 1;
            last_retirement = last_retirement.max(Some(place));
        }
    }
    // Where each list was cut.
    let cut = [
        last_block.filter(|_| blocks < examined || examined >= MAX_BLOCKS),
        last_retirement.filter(|_| retirements >= MAX_RETIREMENTS),
    ];
    let cut = cut.into_iter().flatten().min();
    rows.retain(|row| cut.is_none_or(|cut| (row.xid, row.id) <= cut));
    rows.sort_unstable_by_key(|row| (row.xid, row.id));

    let theirs = |one: UserKey| filter.user.is_none() || Some(one) == user;
    let epoch = after.epoch;
    let mut found = Vec::new();
    for row in rows {
        let position = |entry| WatchPosition::within(epoch, row.xid, row.id, entry);
        if row.kind != BLOCK {
            if theirs(UserKey(row.user)) {
                let reason = row.reason.ok_or_else(|| Fail::corrupt("a retirement without a reason"))?;
                found.push(Found {
                    position: position(WatchPosition::ALL_ENTRIES),
                    at: UnixMs(row.at),
                    user: UserKey(row.user),
                    device: DeviceId(row.subject),
                    what: What::Retired { reason },
                });
            }
        } else if let Some(entries) = row.entries {
            let entries = outcome::unpack(&entries)?;
            let told = if (row.xid, row.id) == (after.transaction, after.row) { after.entry } else { 0 };
            let told = told.saturating_add(u32::from(told > 0 && planted::is("watcher-skips-at-the-boundary")));
            let last = entries.len();
            for (number, entry) in (1_u32..).zip(entries).skip(usize::try_from(told).unwrap_or(usize::MAX)) {
                if !theirs(entry.user) || !(filter.states.is_empty() || filter.states.contains(&entry.code.state())) {
                    continue;
                }
                let is_last = usize::try_from(number).is_ok_and(|number| number == last);
                let notification = NotificationId(row.subject);
                found.push(Found {
                    position: position(if is_last { WatchPosition::ALL_ENTRIES } else { number }),
                    at: UnixMs(row.at),
                    user: entry.user,
                    device: entry.device,
                    what: What::Delivery { notification, code: entry.code, route: row.route.map(RouteId) },
                });
                if found.len() >= limit {
                    break;
                }
            }
        }
        if found.len() >= limit {
            let position = found.last().expect("a limit is at least one").position;
            return Ok(Chosen { found, position, more: true });
        }
    }
    Ok(match cut {
        Some((xid, id)) => {
            let position = WatchPosition::within(epoch, xid, id, WatchPosition::ALL_ENTRIES);
            Chosen { found, position, more: true }
        }
        None => Chosen { found, position: end, more: false },
    })
}

/// A delivery among others.
pub(super) type DeliveryOf = (NotificationId, UserKey, DeviceId);

impl Chosen {
    /// Whose names are needed.
    pub fn users(&self) -> Vec<UserKey> {
        let users: BTreeSet<UserKey> = self.found.iter().map(|found| found.user).collect();
        users.into_iter().collect()
    }

    /// Whose failed attempts are worth a look.
    pub fn failures(&self) -> Vec<DeliveryOf> {
        let failed = |found: &Found| match found.what {
            What::Delivery { notification, code, .. }
                if code.state() == State::Dead || code == ResultCode::MovedToRetry =>
            {
                Some((notification, found.user, found.device))
            }
            What::Delivery { .. } | What::Retired { .. } => None,
        };
        self.found.iter().filter_map(failed).collect()
    }

    /// `attempts`: oldest first.
    pub fn describe(
        self,
        names: &HashMap<UserKey, UserId>,
        attempts: &HashMap<DeliveryOf, Vec<SendAttempt>>,
    ) -> WatchPage {
        let describe = |found: Found| {
            let Found { position, at, user, device, what } = found;
            // An erased person has no name any more.
            let name = names.get(&user).cloned().unwrap_or_else(|| UserId::trusted(""));
            let watched = match what {
                What::Retired { reason } => Watched::DeviceRetired { device, user: name, reason, at },
                What::Delivery { notification, code, route } => {
                    let known = attempts.get(&(notification, user, device)).map_or(&[][..], Vec::as_slice);
                    // As it was then: there may have been more since.
                    let last = known.iter().rev().find(|attempt| attempt.at <= at).or(known.first());
                    let delivery = Delivery {
                        entry: DeliveryKey { user, device },
                        user: name,
                        reason: code.name(),
                        state: code.state(),
                        route,
                        at,
                        last_attempt: last.cloned(),
                    };
                    Watched::Delivery { notification, delivery }
                }
            };
            WatchEvent { position, watched }
        };
        WatchPage { events: self.found.into_iter().map(describe).collect(), position: self.position, more: self.more }
    }
}
