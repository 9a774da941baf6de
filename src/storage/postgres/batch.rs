//! Rows of one kind as columns, for one statement with arrays: a round trip for hundreds of rows.

use super::fail::{Attempt, Fail};
use super::jobs::Lease;
use super::rows::stored_count;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId};
use crate::domain::notification::NewJob;
use crate::domain::outcome::{self, Entry};
use crate::domain::targets;
use crate::domain::time::UnixMs;

/// Rows for `job`, all of one format.
#[derive(Default)]
pub(super) struct JobColumns {
    pub format: i16,
    pub id: Vec<i64>,
    pub app: Vec<i64>,
    pub notification: Vec<i64>,
    pub route: Vec<i64>,
    pub lane: Vec<i16>,
    pub ready_at: Vec<i64>,
    pub due_at: Vec<i64>,
    pub owner: Vec<i64>,
    pub fence: Vec<i64>,
    pub attempt: Vec<i32>,
    pub claims: Vec<i32>,
    pub first_attempt_at: Vec<Option<i64>>,
    pub first_user: Vec<i64>,
    pub last_user: Vec<i64>,
    pub target_count: Vec<i32>,
    pub targets: Vec<Vec<u8>>,
}

impl JobColumns {
    /// Nothing yet, to be packed in this format.
    pub fn of(format: i16) -> Self {
        Self { format, ..Self::default() }
    }

    pub fn push(&mut self, id: JobId, app: AppKey, job: &NewJob, lease: Lease) -> Attempt<()> {
        let (Some(first), Some(last)) = (job.targets.first(), job.targets.last()) else {
            return Err(Fail::corrupt("a job without targets"));
        };
        self.id.push(id.0);
        self.app.push(app.0);
        self.notification.push(job.notification.0);
        self.route.push(job.route.0);
        self.lane.push(job.lane.code());
        self.ready_at.push(job.ready_at.0);
        self.due_at.push(job.due_at.0);
        self.owner.push(lease.owner);
        self.fence.push(lease.fence);
        self.attempt.push(stored_count(job.attempt));
        self.claims.push(stored_count(job.claims));
        self.first_attempt_at.push(job.first_attempt_at.map(|at| at.0));
        self.first_user.push(first.user.0);
        self.last_user.push(last.user.0);
        self.target_count.push(i32::try_from(job.targets.len()).unwrap_or(i32::MAX));
        self.targets.push(targets::pack(self.format, &job.targets));
        Ok(())
    }

    /// Keeps the rows, by their place, that `wanted` says.
    pub fn retain(&mut self, wanted: impl Fn(usize) -> bool) {
        fn keep<T>(column: &mut Vec<T>, wanted: &impl Fn(usize) -> bool) {
            let mut at = 0..;
            column.retain(|_| at.next().is_some_and(wanted));
        }
        keep(&mut self.id, &wanted);
        keep(&mut self.app, &wanted);
        keep(&mut self.notification, &wanted);
        keep(&mut self.route, &wanted);
        keep(&mut self.lane, &wanted);
        keep(&mut self.ready_at, &wanted);
        keep(&mut self.due_at, &wanted);
        keep(&mut self.owner, &wanted);
        keep(&mut self.fence, &wanted);
        keep(&mut self.attempt, &wanted);
        keep(&mut self.claims, &wanted);
        keep(&mut self.first_attempt_at, &wanted);
        keep(&mut self.first_user, &wanted);
        keep(&mut self.last_user, &wanted);
        keep(&mut self.target_count, &wanted);
        keep(&mut self.targets, &wanted);
    }
}

/// Rows for `outcome_block`.
#[derive(Default)]
pub(super) struct BlockColumns {
    pub id: Vec<i64>,
    pub app: Vec<i64>,
    pub notification: Vec<i64>,
    pub route: Vec<Option<i64>>,
    pub first_user: Vec<i64>,
    pub last_user: Vec<i64>,
    pub at: Vec<i64>,
    pub entries: Vec<Vec<u8>>,
    /// Of the update whose results they are; -1 for planning's.
    pub place: Vec<i64>,
}

impl BlockColumns {
    /// `entries` ascend by (user, device). None for none.
    pub fn push(
        &mut self,
        mut next_id: impl FnMut() -> i64,
        app: AppKey,
        notification: NotificationId,
        from: Option<(RouteId, i64)>,
        entries: &[Entry],
        at: UnixMs,
    ) {
        for chunk in entries.chunks(outcome::MAX_ENTRIES) {
            let (Some(first), Some(last)) = (chunk.first(), chunk.last()) else { continue };
            self.id.push(next_id());
            self.app.push(app.0);
            self.notification.push(notification.0);
            self.route.push(from.map(|(route, _)| route.0));
            self.first_user.push(first.user.0);
            self.last_user.push(last.user.0);
            self.at.push(at.0);
            self.entries.push(outcome::pack(chunk));
            self.place.push(from.map_or(-1, |(_, place)| place));
        }
    }
}

/// Rows for `attempt_detail`.
#[derive(Default)]
pub(super) struct DetailColumns {
    pub id: Vec<i64>,
    pub app: Vec<i64>,
    pub notification: Vec<i64>,
    pub user: Vec<i64>,
    pub device: Vec<i64>,
    pub attempt: Vec<i32>,
    pub at: Vec<i64>,
    pub code: Vec<i16>,
    pub status: Vec<i32>,
    pub reason: Vec<String>,
    pub next_at: Vec<Option<i64>>,
    pub place: Vec<i64>,
}

/// `FROM (SELECT unnest($1) AS a, unnest($2) AS b …)`: the rows that these columns are. `FROM unnest($1, $2 …)` says the
/// same and keeps each column in a store of rows of its own first, which costs three times as much.
macro_rules! rows_of {
    ($param:literal $column:literal $(, $more:literal $name:literal)* $(,)?) => {
        concat!("FROM (SELECT unnest(", $param, ") AS ", $column $(, ", unnest(", $more, ") AS ", $name)*, ")")
    };
}
pub(super) use rows_of;

/// `INSERT INTO job SELECT …`, the arrays being these parameters: its SQL up to WHERE.
macro_rules! insert_jobs {
    ($p1:literal, $p2:literal, $p3:literal, $p4:literal, $p5:literal, $p6:literal, $p7:literal, $p8:literal,
     $p9:literal, $p10:literal, $p11:literal, $p12:literal, $p13:literal, $p14:literal, $p15:literal, $p16:literal,
     $format:literal) => {
        concat!(
            "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, \
             claims, first_attempt_at, first_user, last_user, target_count, targets) \
             SELECT j.id, j.app, j.notification_id, j.route, j.lane, ",
            $format,
            ", j.ready_at, j.due_at, j.owner, j.fence, j.attempt, j.claims, j.first_attempt_at, j.first_user, \
             j.last_user, j.target_count, j.targets ",
            $crate::storage::postgres::batch::rows_of!(
                $p1 "id", $p2 "app", $p3 "notification_id", $p4 "route", $p5 "lane", $p6 "ready_at", $p7 "due_at",
                $p8 "owner", $p9 "fence", $p10 "attempt", $p11 "claims", $p12 "first_attempt_at", $p13 "first_user",
                $p14 "last_user", $p15 "target_count", $p16 "targets",
            ),
            " AS j"
        )
    };
}
pub(super) use insert_jobs;

/// The same for `outcome_block`; `b.place` is there for WHERE. The transaction is asked for its number once, where the
/// column's default would ask for each row.
macro_rules! insert_blocks {
    ($p1:literal, $p2:literal, $p3:literal, $p4:literal, $p5:literal, $p6:literal, $p7:literal, $p8:literal,
     $p9:literal) => {
        concat!(
            "INSERT INTO outcome_block (id, app, notification_id, route, first_user, last_user, at, entries, xid) \
             SELECT b.id, b.app, b.notification_id, b.route, b.first_user, b.last_user, b.at, b.entries, \
             (SELECT pg_current_xact_id()::TEXT::BIGINT) ",
            $crate::storage::postgres::batch::rows_of!(
                $p1 "id", $p2 "app", $p3 "notification_id", $p4 "route", $p5 "first_user", $p6 "last_user", $p7 "at",
                $p8 "entries", $p9 "place",
            ),
            " AS b"
        )
    };
}
pub(super) use insert_blocks;

/// `$statement!(…)` with what its inserts end in. Only a run that repeats one of unknown outcome may meet its own rows, by ids:
/// to look for them costs the server a look and a record of its log more for each row.
macro_rules! inserting {
    ($is_repeated:expr, $statement:ident) => {
        if $is_repeated { $statement!("ON CONFLICT (id) DO NOTHING") } else { $statement!("") }
    };
}
pub(super) use inserting;

/// The arrays of [`insert_jobs!`], as the statement's next parameters.
macro_rules! bind_jobs {
    ($statement:expr, $jobs:expr) => {{
        use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, SmallInt};
        let jobs = $jobs;
        $statement
            .bind::<Array<BigInt>, _>(jobs.id)
            .bind::<Array<BigInt>, _>(jobs.app)
            .bind::<Array<BigInt>, _>(jobs.notification)
            .bind::<Array<BigInt>, _>(jobs.route)
            .bind::<Array<SmallInt>, _>(jobs.lane)
            .bind::<Array<BigInt>, _>(jobs.ready_at)
            .bind::<Array<BigInt>, _>(jobs.due_at)
            .bind::<Array<BigInt>, _>(jobs.owner)
            .bind::<Array<BigInt>, _>(jobs.fence)
            .bind::<Array<Integer>, _>(jobs.attempt)
            .bind::<Array<Integer>, _>(jobs.claims)
            .bind::<Array<Nullable<BigInt>>, _>(jobs.first_attempt_at)
            .bind::<Array<BigInt>, _>(jobs.first_user)
            .bind::<Array<BigInt>, _>(jobs.last_user)
            .bind::<Array<Integer>, _>(jobs.target_count)
            .bind::<Array<Binary>, _>(jobs.targets)
            .bind::<SmallInt, _>(jobs.format)
    }};
}
pub(super) use bind_jobs;

/// The arrays of [`insert_blocks!`], likewise.
macro_rules! bind_blocks {
    ($statement:expr, $blocks:expr) => {{
        use diesel::sql_types::{Array, BigInt, Binary, Nullable};
        let blocks = $blocks;
        $statement
            .bind::<Array<BigInt>, _>(blocks.id)
            .bind::<Array<BigInt>, _>(blocks.app)
            .bind::<Array<BigInt>, _>(blocks.notification)
            .bind::<Array<Nullable<BigInt>>, _>(blocks.route)
            .bind::<Array<BigInt>, _>(blocks.first_user)
            .bind::<Array<BigInt>, _>(blocks.last_user)
            .bind::<Array<BigInt>, _>(blocks.at)
            .bind::<Array<Binary>, _>(blocks.entries)
            .bind::<Array<BigInt>, _>(blocks.place)
    }};
}
pub(super) use bind_blocks;
