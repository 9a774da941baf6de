//! What both stores decide alike when dead deliveries are opened again: which died last, and the jobs they become.

use std::collections::{BTreeMap, HashMap};

use super::fail::Attempt;
use super::providers::RedriveBatch;
use crate::domain::ids::{AppKey, NotificationId, RouteId, UserKey};
use crate::domain::notification::NewJob;
use crate::domain::outcome::{self, Entry, ResultCode};
use crate::domain::platform::Lane;
use crate::domain::targets::{MAX_TARGETS, Target};
use crate::domain::time::UnixMs;

/// A step ends with the block that brings it beyond so many deliveries.
const MAX_FOUND: usize = 5_000;

/// A block as read.
pub(super) struct Block {
    pub id: i64,
    pub app: i64,
    pub notification: i64,
    pub route: Option<i64>,
    pub at: i64,
    pub entries: Vec<u8>,
}

/// A delivery that died in a block.
#[derive(Clone, Copy)]
pub(super) struct Dead {
    block: i64,
    route: RouteId,
    target: Target,
}

/// What a step found, and how far it came.
#[derive(Default)]
pub(super) struct Found {
    pub dead: BTreeMap<NotificationId, Vec<Dead>>,
    pub after: i64,
    pub done: bool,
}

/// `blocks` ascend by id; fewer than asked for are the last there are. `user`: the row of the user wanted, where one is.
pub(super) fn find(batch: &RedriveBatch, user: Option<UserKey>, blocks: &[Block]) -> Attempt<Found> {
    let mut found = Found { after: batch.after, done: blocks.len() < batch.max_blocks, ..Found::default() };
    let mut count = 0;
    for block in blocks {
        if count >= MAX_FOUND {
            found.done = false;
            break;
        }
        found.after = block.id;
        let filter = &batch.filter;
        let in_time = filter.died_from.is_none_or(|from| block.at >= from.0)
            && filter.died_before.is_none_or(|before| block.at < before.0);
        let (Some(route), true, true) = (block.route, in_time, block.app == batch.app.0) else { continue };
        for entry in outcome::unpack(&block.entries)? {
            if filter.takes(entry.user, user, entry.device, entry.code) {
                let target = Target { user: entry.user, device: entry.device };
                let dead = Dead { block: block.id, route: RouteId(route), target };
                found.dead.entry(NotificationId(block.notification)).or_default().push(dead);
                count += 1;
            }
        }
    }
    Ok(found)
}

/// The users that a notification's dead deliveries span, and the first block of them.
pub(super) fn span(dead: &[Dead]) -> (i64, UserKey, UserKey) {
    let users = || dead.iter().map(|dead| dead.target.user);
    (
        dead.iter().map(|dead| dead.block).min().unwrap_or(0),
        users().min().unwrap_or_default(),
        users().max().unwrap_or_default(),
    )
}

/// Those that no later block names. `later`: blocks after the first of `dead`, in any order.
pub(super) fn still_dead(dead: Vec<Dead>, later: &[(i64, Vec<u8>)]) -> Attempt<Vec<Dead>> {
    let mut last: HashMap<Target, i64> = HashMap::with_capacity(dead.len());
    for one in &dead {
        let known = last.entry(one.target).or_insert(one.block);
        *known = (*known).max(one.block);
    }
    for (id, entries) in later {
        for entry in outcome::unpack(entries)? {
            if let Some(known) = last.get_mut(&Target { user: entry.user, device: entry.device }) {
                *known = (*known).max(*id);
            }
        }
    }
    Ok(dead.into_iter().filter(|one| last.get(&one.target) == Some(&one.block)).collect())
}

/// Free jobs due now, and the entries that say so.
pub(super) fn reopen(
    notification: NotificationId,
    lane: Lane,
    mut dead: Vec<Dead>,
    now: UnixMs,
) -> (Vec<NewJob>, Vec<Entry>) {
    dead.sort_unstable_by_key(|one| (one.route, one.target));
    let mut jobs = Vec::new();
    for of_route in dead.chunk_by(|a, b| a.route == b.route) {
        for part in of_route.chunks(MAX_TARGETS) {
            jobs.push(NewJob {
                notification,
                route: of_route[0].route,
                lane,
                targets: part.iter().map(|one| one.target).collect(),
                attempt: 0,
                claims: 0,
                ready_at: now,
                due_at: now,
                first_attempt_at: None,
            });
        }
    }
    let mut entries: Vec<Entry> = dead
        .iter()
        .map(|one| Entry { user: one.target.user, device: one.target.device, code: ResultCode::Redriven })
        .collect();
    entries.sort_unstable();
    (jobs, entries)
}

/// Whether it may still be sent.
pub(super) fn in_time(app: AppKey, owner: i64, expires_at: i64, cancelled_at: Option<i64>, now: UnixMs) -> bool {
    owner == app.0 && cancelled_at.is_none() && expires_at > now.0
}
