//! Events as columns: their notifications, keys, jobs and first outcome blocks, for one statement that writes them all.

use std::collections::HashSet;

use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::accept::{HASH_VERSION, Prepared};
use super::batch::{BlockColumns, JobColumns, bind_blocks, bind_jobs, insert_blocks, insert_jobs, inserting, rows_of};
use super::fail::Attempt;
use super::handed::{HandedColumns, bind_handed, insert_handed};
use super::query::RunQuery;
use super::rows::priority_code;
use super::statement::constant;
use crate::domain::notification::{IDEMPOTENCY_KEPT_MS, Notification};

/// Rows for `notification` and `idempotency`.
#[derive(Default)]
pub(super) struct EventColumns {
    id: Vec<i64>,
    app: Vec<i64>,
    event_type: Vec<String>,
    type_version: Vec<Option<i64>>,
    default_opt_in: Vec<i16>,
    lane: Vec<i16>,
    priority: Vec<i16>,
    on_maybe: Vec<i16>,
    collapse_key: Vec<Option<String>>,
    actor: Vec<Option<i64>>,
    subject: Vec<Option<String>>,
    content: Vec<String>,
    event_at: Vec<i64>,
    accepted_at: Vec<i64>,
    not_before: Vec<Option<i64>>,
    expires_at: Vec<i64>,
    people: Vec<i64>,
    keyed: Vec<bool>,
    key_app: Vec<i64>,
    key: Vec<String>,
    key_hash: Vec<Vec<u8>>,
    key_notification: Vec<i64>,
    key_expires_at: Vec<i64>,
}

impl EventColumns {
    pub fn push(&mut self, new: &Notification, prepared: &Prepared, people: usize) {
        self.id.push(new.id.0);
        self.app.push(new.app.0);
        self.event_type.push(new.event_type.as_str().to_owned());
        self.type_version.push(new.type_version.map(|version| version.0));
        self.default_opt_in.push(i16::from(new.default_opt_in));
        self.lane.push(new.lane.code());
        self.priority.push(priority_code(new.priority));
        self.on_maybe.push(new.on_maybe.code());
        self.collapse_key.push(new.collapse_key.as_ref().map(|key| key.as_str().to_owned()));
        self.actor.push(new.actor.map(|actor| actor.0));
        self.subject.push(new.body.subject.clone());
        self.content.push(prepared.body.clone());
        self.event_at.push(new.event_at.0);
        self.accepted_at.push(new.accepted_at.0);
        self.not_before.push(new.not_before.map(|at| at.0));
        self.expires_at.push(new.expires_at.0);
        self.people.push(i64::try_from(people).unwrap_or(i64::MAX));
        self.keyed.push(prepared.event.idempotency.is_some());
        if let Some((key, hash)) = &prepared.event.idempotency {
            self.key_app.push(new.app.0);
            self.key.push(key.as_str().to_owned());
            self.key_hash.push(hash.to_vec());
            self.key_notification.push(new.id.0);
            self.key_expires_at.push(new.accepted_at.0 + IDEMPOTENCY_KEPT_MS);
        }
    }

    /// The ids of the notifications that were inserted, each with all that belongs to it. `is_repeated`: some may be there
    /// already. `IS TRUE` keeps the planner from turning the look into a join, which without hashing would compare every row
    /// with every other. A repeated run hands nothing over: see [`super::group`].
    pub async fn write(
        self,
        conn: &mut AsyncPgConnection,
        handed: HandedColumns,
        jobs: JobColumns,
        blocks: BlockColumns,
        is_repeated: bool,
    ) -> Attempt<HashSet<i64>> {
        macro_rules! insert {
            ($on_conflict:literal, $more:expr) => {{
                constant!(
                    Array<BigInt>;
                    concat!(
                        "WITH new_key AS (INSERT INTO idempotency AS i (app, key, hash_version, hash, notification_id, \
                         expires_at) SELECT k.app, k.key, $1, k.hash, k.notification_id, k.expires_at ",
                        rows_of!(
                            "$2" "app", "$3" "key", "$4" "hash", "$5" "notification_id", "$6" "expires_at",
                        ),
                        " AS k ORDER BY k.app, k.key COLLATE \"C\" ON CONFLICT (app, key) DO UPDATE SET \
                         hash_version = excluded.hash_version, hash = excluded.hash, \
                         notification_id = excluded.notification_id, expires_at = excluded.expires_at \
                         WHERE i.expires_at <= excluded.expires_at - $7 RETURNING notification_id), \
                         new_notification AS (INSERT INTO notification (id, app, event_type, type_version, default_opt_in, \
                         lane, priority, on_maybe, collapse_key, actor, subject, content, event_at, accepted_at, not_before, \
                         expires_at, people) SELECT n.id, n.app, n.event_type, n.type_version, n.default_opt_in, n.lane, \
                         n.priority, n.on_maybe, n.collapse_key, n.actor, n.subject, n.content, n.event_at, n.accepted_at, \
                         n.not_before, n.expires_at, n.people ",
                        rows_of!(
                            "$8" "id", "$9" "app", "$10" "event_type", "$11" "type_version", "$12" "default_opt_in",
                            "$13" "lane", "$14" "priority", "$15" "on_maybe", "$16" "collapse_key", "$17" "actor",
                            "$18" "subject", "$19" "content", "$20" "event_at", "$21" "accepted_at", "$22" "not_before",
                            "$23" "expires_at", "$24" "people", "$25" "keyed",
                        ),
                        " AS n WHERE NOT n.keyed OR n.id IN (SELECT notification_id FROM new_key) ",
                        $on_conflict,
                        " RETURNING id)",
                        $more,
                        // One row for all.
                        " SELECT coalesce(array_agg(id), '{}') FROM new_notification"
                    ),
                    SmallInt => HASH_VERSION, Array<BigInt> => self.key_app, Array<Text> => self.key,
                    Array<Binary> => self.key_hash, Array<BigInt> => self.key_notification,
                    Array<BigInt> => self.key_expires_at, BigInt => IDEMPOTENCY_KEPT_MS,
                    Array<BigInt> => self.id, Array<BigInt> => self.app, Array<Text> => self.event_type,
                    Array<Nullable<BigInt>> => self.type_version, Array<SmallInt> => self.default_opt_in,
                    Array<SmallInt> => self.lane, Array<SmallInt> => self.priority, Array<SmallInt> => self.on_maybe,
                    Array<Nullable<Text>> => self.collapse_key, Array<Nullable<BigInt>> => self.actor,
                    Array<Nullable<Text>> => self.subject, Array<Text> => self.content, Array<BigInt> => self.event_at,
                    Array<BigInt> => self.accepted_at, Array<Nullable<BigInt>> => self.not_before,
                    Array<BigInt> => self.expires_at, Array<BigInt> => self.people, Array<Bool> => self.keyed,
                )
            }};
        }
        macro_rules! new_jobs {
            ($($p:literal)+) => {
                concat!(
                    ", new_job AS (",
                    insert_jobs!($($p),+),
                    " WHERE (j.notification_id IN (SELECT id FROM new_notification)) IS TRUE)",
                )
            };
        }
        macro_rules! new_blocks {
            ($($p:literal)+) => {
                concat!(
                    ", new_block AS (",
                    insert_blocks!($($p),+),
                    " WHERE (b.notification_id IN (SELECT id FROM new_notification)) IS TRUE)"
                )
            };
        }
        macro_rules! new_handed {
            () => {
                concat!(", new_handed AS (", insert_handed!(), " WHERE EXISTS (SELECT 1 FROM new_notification))")
            };
        }
        // What is not there is not made ready either: it costs the server what some events do. Nearly always there are only
        // jobs that are handed over.
        if !handed.jobs.id.is_empty() {
            let written: Vec<i64> = if jobs.id.is_empty() && blocks.id.is_empty() {
                let events = insert!("", new_handed!());
                bind_handed!(events, handed).get_result(conn).await?
            } else {
                let events = insert!(
                    "",
                    concat!(
                        new_handed!(),
                        new_jobs!("$36" "$37" "$38" "$39" "$40" "$41" "$42" "$43" "$44" "$45" "$46" "$47" "$48" "$49" "$50"
                            "$51" "$52"),
                        new_blocks!("$53" "$54" "$55" "$56" "$57" "$58" "$59" "$60" "$61"),
                    )
                );
                bind_blocks!(bind_jobs!(bind_handed!(events, handed), jobs), blocks).get_result(conn).await?
            };
            return Ok(written.into_iter().collect());
        }
        macro_rules! written {
            ($on_conflict:literal) => {{
                if blocks.id.is_empty() {
                    let events = insert!(
                        $on_conflict,
                        new_jobs!("$26" "$27" "$28" "$29" "$30" "$31" "$32" "$33" "$34" "$35" "$36" "$37" "$38" "$39" "$40"
                            "$41" "$42")
                    );
                    bind_jobs!(events, jobs).get_result(conn).await?
                } else {
                    let events = insert!(
                        $on_conflict,
                        concat!(
                            new_jobs!("$26" "$27" "$28" "$29" "$30" "$31" "$32" "$33" "$34" "$35" "$36" "$37" "$38" "$39"
                                "$40" "$41" "$42"),
                            new_blocks!("$43" "$44" "$45" "$46" "$47" "$48" "$49" "$50" "$51"),
                        )
                    );
                    bind_blocks!(bind_jobs!(events, jobs), blocks).get_result(conn).await?
                }
            }};
        }
        let written: Vec<i64> = inserting!(is_repeated, written);
        Ok(written.into_iter().collect())
    }
}
