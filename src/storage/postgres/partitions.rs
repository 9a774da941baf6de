//! The history's partitions: made ahead, and dropped when nobody needs them, while traffic runs.
//!
//! `notification`, `outcome_block` and `attempt_detail` are partitioned by their time-ordered id. Deleting the rows of a day
//! takes seconds and leaves dead ones behind; dropping its partition takes neither. The default partition holds what finds
//! no other (ids from before the first one, or of a clock that is days off); [`super::retain`] deletes there row by row.
//!
//! One replica at a time: each step is a transaction of its own under an advisory lock that it takes or leaves. A step that
//! cannot have a table's lock at once ([`LOCK_WAIT`], for which writers wait behind it) is left for the next time: a dump, or
//! any long reader, puts it off and is not disturbed.
//!
//! A partition is dropped when it is older than the history that is kept and nothing in it belongs to open work. That is
//! looked at once without a lock and once more under the locks that the drop takes: whoever read a notification there and
//! made work of it has ended by then, and is seen.

use std::collections::BTreeMap;

use diesel::sql_types::{BigInt, Bool, Float, Text};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use metrics::{counter, gauge};

use super::fail::{Attempt, Fail};
use super::query::RunQuery;
use super::retain::{RETENTION_LOCK, try_lock};
use super::statement::constant;
use super::watching::ID_LAG_MS;
use super::{Inner, Settings};
use crate::domain::ids::{first_id_at, made_at};
use crate::domain::time::UnixMs;
use crate::storage::Result;
use crate::telemetry::names;

const DAY_MS: i64 = 24 * 3_600_000;
/// How long writers may wait behind a step that waits for a lock.
const LOCK_WAIT: &str = "200ms";
/// Steps of one round; the next one goes on.
const MAX_STEPS: usize = 12;

const TABLES: [&str; 3] = ["notification", "outcome_block", "attempt_detail"];

/// How partitions are cut.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// Days of one partition; at least one.
    pub days: i64,
    /// Made for today and so many days after; 0: none are made.
    pub ahead: i64,
}

impl Plan {
    pub fn of(settings: &Settings) -> Self {
        Self { days: i64::from(settings.partition_days.max(1)), ahead: i64::from(settings.days_ahead) }
    }
}

/// Ids from `low` up to and without `high`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Partition {
    name: String,
    low: i64,
    high: i64,
    /// As the server estimates.
    rows: i64,
}

enum Step {
    /// Another replica is at it.
    Busy,
    Made {
        table: &'static str,
    },
    Dropped {
        table: &'static str,
        rows: u64,
    },
    /// There is nothing to do.
    Rest,
}

/// At start, so that not even the first rows go to the default partition. Replicas that start together take turns.
pub(super) async fn prepare(conn: &mut AsyncPgConnection, plan: Plan) -> diesel::QueryResult<()> {
    if plan.ahead == 0 {
        return Ok(());
    }
    if !may_change(conn).await? {
        tracing::info!("this role may not make partitions of the history; `nudged migrate` of their owner keeps them");
        return Ok(());
    }
    let now: i64 =
        constant!(BigInt; "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT").get_result(conn).await?;
    loop {
        conn.batch_execute("BEGIN").await?;
        constant!((); "SELECT pg_advisory_xact_lock($1)", BigInt => RETENTION_LOCK).execute(conn).await?;
        let made = make(conn, plan, UnixMs(now)).await;
        conn.batch_execute("COMMIT").await?;
        match made {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(Fail::Database(error)) => return Err(error),
            Err(fail) => return Err(diesel::result::Error::QueryBuilderError(format!("{fail:?}").into())),
        }
    }
}

/// Whether this session may make and drop partitions: a role that only serves may not, and its rows go where they may.
async fn may_change(conn: &mut AsyncPgConnection) -> diesel::QueryResult<bool> {
    constant!(
        Bool;
        "SELECT pg_has_role(c.relowner, 'USAGE') AND has_schema_privilege(c.relnamespace, 'CREATE') FROM pg_class c \
         WHERE c.oid = 'notification'::regclass"
    )
    .get_result(conn)
    .await
}

/// A round of steps. How many rows were dropped, about; at least one a partition.
pub(super) async fn keep(inner: &Inner, plan: Plan, history_before: UnixMs, now: UnixMs) -> Result<u64> {
    const DOING: &str = "keeping the history's partitions";
    let mut dropped = 0;
    for _ in 0..MAX_STEPS {
        let mut object = inner.connection(DOING).await?;
        let conn: &mut AsyncPgConnection = &mut object;
        let step = inner.context.runtime.timeout(super::tx::RUN_LIMIT, step(conn, plan, history_before, now)).await;
        match step {
            Some(Ok(Step::Made { table })) => tracing::info!(table, "made a partition of the history"),
            Some(Ok(Step::Dropped { table, rows })) => {
                counter!(names::HISTORY_PARTITIONS_DROPPED, "table" => table).increment(1);
                tracing::info!(table, rows, "dropped a partition of the history");
                dropped += rows.max(1);
            }
            Some(Ok(Step::Busy | Step::Rest)) => break,
            failed => {
                // Not the next one's concern in whatever state it is.
                drop(diesel_async::pooled_connection::deadpool::Object::take(object));
                let error = match failed {
                    Some(Err(fail)) => format!("{fail:?}"),
                    _ => "no answer".to_owned(),
                };
                tracing::debug!(error, "the history's partitions are left for later");
                break;
            }
        }
    }
    Ok(dropped)
}

/// In a transaction of its own.
async fn step(conn: &mut AsyncPgConnection, plan: Plan, history_before: UnixMs, now: UnixMs) -> Attempt<Step> {
    conn.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
    let step = if !try_lock(conn).await? {
        Step::Busy
    } else if !may_change(conn).await? {
        Step::Rest
    } else if let Some(table) = make(conn, plan, now).await? {
        Step::Made { table }
    } else {
        drop_one(conn, history_before).await?
    };
    if matches!(step, Step::Rest) && plan.ahead > 0 {
        tell(&list(conn).await?, now);
    }
    conn.batch_execute("COMMIT").await?;
    Ok(step)
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
fn tell(partitions: &BTreeMap<&'static str, Vec<Partition>>, now: UnixMs) {
    for table in TABLES {
        let end = partitions.get(table).and_then(|all| all.last()).map_or(now, |last| made_at(last.high));
        gauge!(names::HISTORY_DAYS_AHEAD, "table" => table).set((end.0 - now.0).max(0) as f64 / DAY_MS as f64);
    }
}

/// All but the default ones, in order.
async fn list(conn: &mut AsyncPgConnection) -> Attempt<BTreeMap<&'static str, Vec<Partition>>> {
    let rows: Vec<(String, String, String, f32)> = constant!(
        (Text, Text, Text, Float);
        "SELECT p.relname::TEXT, c.relname::TEXT, pg_get_expr(c.relpartbound, c.oid), c.reltuples \
         FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent \
         WHERE i.inhparent IN ('notification'::regclass, 'outcome_block'::regclass, 'attempt_detail'::regclass)"
    )
    .load(conn)
    .await?;
    let mut all: BTreeMap<&'static str, Vec<Partition>> = BTreeMap::new();
    for (parent, name, bounds, rows) in rows {
        let Some(table) = TABLES.into_iter().find(|table| *table == parent) else { continue };
        if let Some((low, high)) = read_bounds(&bounds) {
            #[expect(clippy::cast_possible_truncation, reason = "an estimate")]
            all.entry(table).or_default().push(Partition { name, low, high, rows: rows as i64 });
        }
    }
    for partitions in all.values_mut() {
        partitions.sort_unstable_by_key(|one| one.low);
    }
    Ok(all)
}

/// As the server writes them: `FOR VALUES FROM ('1') TO ('2')`. None for the default partition.
fn read_bounds(text: &str) -> Option<(i64, i64)> {
    let mut numbers = text.split('\'').skip(1).step_by(2).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The first partition that is missing, if there is one: its table. Attached rather than made in place, for that lets
/// writers go on; only the default partition is locked while the server makes sure that it holds none of the new one's rows.
async fn make(conn: &mut AsyncPgConnection, plan: Plan, now: UnixMs) -> Attempt<Option<&'static str>> {
    if plan.ahead == 0 {
        return Ok(None);
    }
    let mut partitions = list(conn).await?;
    let today = now.0 - now.0.rem_euclid(DAY_MS);
    let end = first_id_at(UnixMs(today + (1 + plan.ahead) * DAY_MS));
    for table in TABLES {
        let made = partitions.remove(table).unwrap_or_default();
        let mut low = made.last().map_or(0, |last| last.high).max(first_id_at(UnixMs(today)));
        while low < end {
            let begin = made_at(low);
            let high = first_id_at(UnixMs(begin.0 + plan.days * DAY_MS));
            if is_taken(conn, table, low, high).await? {
                // They stay where they are.
                low = high;
                continue;
            }
            let day: String = begin.to_string().chars().take(10).filter(|c| *c != '-').collect();
            let name = format!("{table}_p{day}");
            conn.batch_execute(&format!(
                "CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES \
                 INCLUDING STORAGE); \
                 ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({low}) TO ({high})"
            ))
            .await?;
            return Ok(Some(table));
        }
    }
    Ok(None)
}

#[derive(diesel::QueryableByName)]
struct Answer {
    #[diesel(sql_type = Bool)]
    answer: bool,
}

/// Names cannot be parameters: these texts vary, and are rare.
async fn ask(conn: &mut AsyncPgConnection, condition: &str) -> Attempt<bool> {
    let query = diesel::sql_query(format!("SELECT ({condition}) AS answer"));
    let answer: Answer = diesel_async::RunQueryDsl::get_result(query, conn).await?;
    Ok(answer.answer)
}

/// Rows of this range are in the default partition already.
async fn is_taken(conn: &mut AsyncPgConnection, table: &str, low: i64, high: i64) -> Attempt<bool> {
    ask(conn, &format!("EXISTS (SELECT 1 FROM {table}_default WHERE id >= {low} AND id < {high})")).await
}

async fn drop_one(conn: &mut AsyncPgConnection, history_before: UnixMs) -> Attempt<Step> {
    let oldest_kept = first_id_at(history_before);
    for (table, partitions) in list(conn).await? {
        for one in partitions.into_iter().take_while(|one| one.high <= oldest_kept) {
            if has_open_work(conn, table, &one).await? {
                continue;
            }
            let name = &one.name;
            // The table first, as whoever reads through it does.
            conn.batch_execute(&format!(
                "LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE; LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE; \
                 SET LOCAL statement_timeout = '2s'"
            ))
            .await?;
            if has_open_work(conn, table, &one).await? {
                return Ok(Step::Rest);
            }
            if table == "outcome_block" {
                // outcome_block_by_commit
                conn.batch_execute(&format!(
                    "INSERT INTO watermark AS w (name, value) SELECT 'history', max(newest.xid) FROM app a \
                     CROSS JOIN LATERAL (SELECT xid FROM {name} WHERE app = a.id ORDER BY xid DESC LIMIT 1) AS newest \
                     HAVING max(newest.xid) IS NOT NULL \
                     ON CONFLICT (name) DO UPDATE SET value = greatest(w.value, excluded.value)"
                ))
                .await?;
            }
            conn.batch_execute(&format!("DROP TABLE {name}")).await?;
            return Ok(Step::Dropped { table, rows: u64::try_from(one.rows).unwrap_or(0) });
        }
    }
    Ok(Step::Rest)
}

async fn has_open_work(conn: &mut AsyncPgConnection, table: &str, one: &Partition) -> Attempt<bool> {
    let Partition { name, low, high, .. } = one;
    // job_by_notification and fanout's primary key
    if table == "notification" {
        let of = |table: &str| {
            format!("EXISTS (SELECT 1 FROM {table} WHERE notification_id >= {low} AND notification_id < {high})")
        };
        return ask(conn, &format!("{} OR {}", of("open_job"), of("fanout"))).await;
    }
    // What is open and could have rows here; a row's id may be a little older than its notification's. Then the partition's
    // index by notification.
    let high = first_id_at(UnixMs(made_at(*high).0 + ID_LAG_MS));
    let open = format!(
        "SELECT notification_id FROM open_job WHERE notification_id < {high} \
         UNION SELECT notification_id FROM fanout WHERE notification_id < {high}"
    );
    let here = format!("EXISTS (SELECT 1 FROM {name} h WHERE h.notification_id = open.notification_id)");
    ask(conn, &format!("EXISTS (SELECT 1 FROM ({open}) AS open WHERE {here})")).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_read_as_the_server_writes_them() {
        assert_eq!(read_bounds("FOR VALUES FROM ('12') TO ('345')"), Some((12, 345)));
        assert_eq!(read_bounds("FOR VALUES FROM (MINVALUE) TO ('345')"), None);
        assert_eq!(read_bounds("DEFAULT"), None);
    }
}
