//! Group commit: many callers' events in a handful of statements.
//!
//! Events to named people and to topics wait in a queue of bounded count and bytes; one task with a connection of its own
//! takes all that wait, up to a limit, and while their statements run the next group gathers. Reads are batched over the
//! group; everything is then written by one statement, which is its own transaction. The corner cases:
//!
//! - A topic of many, or with whom `max_audience` might be exceeded: the event leaves the group and is accepted alone, by its
//!   caller, with the ids that it has: an earlier try may have met fewer people and written it without an answer.
//! - One key twice in a group: the second waits for the group's end and then finds the first.
//! - A key that was used before, here or by another replica: nothing of that event is inserted (its notification depends on
//!   its key, and the rest on its notification), and a look answers it. Keys are inserted in their order, so two
//!   replicas cannot wait for each other.
//! - A lost answer: ids were made before the first try and every try has the same. A notification that is already there
//!   was ours; nothing is inserted for it again, and its leases go to whoever claims them. What was handed over before a
//!   later statement of the try failed is done, and no further try touches it.
//! - A row that the server refuses: the group is halved until it is alone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use diesel::sql_types::{Array, BigInt, Binary, Integer, Text};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};

use super::accept::{Gate, Planned, Prepared};
use super::batch::{BlockColumns, JobColumns};
use super::effects::{Effects, Ids};
use super::event_columns::EventColumns;
use super::fail::{Attempt, Fail, unavailable};
use super::handed::{self, HandedColumns};
use super::inbox::{self, Groups, Inbox};
use super::query::RunQuery;
use super::reach::{self, Packed};
use super::statement::constant;
use super::subscribers::{self, Asked};
use super::tx::{Remedy, in_transaction, remedy};
use super::users::ensure_people;
use super::{Context, Inner};
use crate::domain::ids::{NotificationId, UserKey};
use crate::domain::notification::{Accepted, SMALL_AUDIENCE};
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{Result, StoreError};
use crate::telemetry::names;

const DOING: &str = "accepting an event";
/// The bytes that waiting events may hold.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// How long a group is tried before its callers are told to come again.
const PATIENCE: Duration = Duration::from_secs(4);
const ATTEMPT_LIMIT: Duration = Duration::from_secs(6);
const RECONNECT: Duration = Duration::from_millis(100);
const MAX_TIMING: u32 = 16;

struct Event {
    prepared: Box<Prepared>,
    now: UnixMs,
    ids: Ids,
    /// Its notification, once that is durable and its jobs are handed over. Whatever becomes of the try that wrote it, a later
    /// one leaves it alone.
    written: Option<NotificationId>,
}

/// What a group makes of an event.
enum Verdict {
    Accepted(Accepted),
    Alone,
}

impl Verdict {
    fn new(notification: NotificationId) -> Self {
        Self::Accepted(Accepted { notification, duplicate: false })
    }
}

/// What its caller is told.
pub(super) enum Answer {
    Accepted(Accepted),
    /// To be accepted in a transaction of its own, with these ids.
    Alone(Box<Prepared>, Ids),
}

type Waiting = inbox::Waiting<Event, Answer>;

/// Where events wait.
pub(super) struct Acceptor(Inbox<Event, Answer>);

impl Acceptor {
    pub fn new() -> (Self, Committer) {
        let (inbox, groups) = inbox::inbox(MAX_BYTES);
        (Self(inbox), Committer { groups, conn: None })
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.0.waiting()
    }

    /// Once queued it happens, whether or not anybody waits for the answer, unless it is to be accepted alone.
    pub async fn accept(&self, prepared: Box<Prepared>, now: UnixMs) -> Result<Answer> {
        let bytes = prepared.bytes();
        self.0.ask(Event { prepared, now, ids: Ids::default(), written: None }, bytes, DOING).await
    }
}

/// The task that writes them.
pub(super) struct Committer {
    groups: Groups<Event, Answer>,
    conn: Option<AsyncPgConnection>,
}

/// A key's earlier use.
struct Used {
    hash: Vec<u8>,
    notification: NotificationId,
}

impl Used {
    fn answer(&self, hash: &[u8]) -> Result<Verdict> {
        let notification = self.notification;
        if self.hash == hash {
            Ok(Verdict::Accepted(Accepted { notification, duplicate: true }))
        } else {
            Err(StoreError::IdempotencyKeyReused { notification })
        }
    }
}

/// An event that nothing speaks against so far.
struct Candidate {
    place: usize,
    id: NotificationId,
    /// Of its topics: not more than may share a group.
    subscribers: Vec<Packed>,
}

impl Committer {
    /// Until the store is closed and the queue is empty.
    pub async fn run(mut self, inner: Arc<Inner>) {
        while let Some(group) = self.groups.next(&inner.context.stopping).await {
            self.commit(&inner, group).await;
        }
    }

    async fn commit(&mut self, inner: &Inner, group: Vec<Waiting>) {
        #[expect(clippy::cast_precision_loss, reason = "a small count")]
        metrics::histogram!(names::WRITER_GROUP_SIZE).record(group.len() as f64);
        let mut groups = VecDeque::from([group]);
        while let Some(group) = groups.pop_front() {
            let (mut group, repeats) = part_repeats(group);
            if !repeats.is_empty() {
                groups.push_front(repeats);
            }
            match self.try_group(inner, &mut group).await {
                Ok(answers) => {
                    for (waiting, verdict) in group.into_iter().zip(answers) {
                        waiting.answer_by(|event| {
                            Ok(match verdict? {
                                Verdict::Accepted(accepted) => Answer::Accepted(accepted),
                                Verdict::Alone => Answer::Alone(event.prepared, event.ids),
                            })
                        });
                    }
                }
                Err(Fail::Database(error)) if group.len() > 1 && remedy(&error) == Remedy::GiveUp => {
                    let second = group.split_off(group.len() / 2);
                    groups.push_front(second);
                    groups.push_front(group);
                }
                Err(fail) => {
                    let text = format!("{fail:?}");
                    tracing::warn!(error = text, events = group.len(), "events could not be accepted");
                    for waiting in group {
                        let written = waiting.request.written;
                        let written = written.map(|notification| Accepted { notification, duplicate: false });
                        waiting.answer(written.map(Answer::Accepted).ok_or_else(|| unavailable(DOING)));
                    }
                }
            }
        }
    }

    /// Until it is durable, refused by the server for what it is, or its callers have waited long enough.
    async fn try_group(&mut self, inner: &Inner, group: &mut [Waiting]) -> Attempt<Vec<Result<Verdict>>> {
        let runtime = &inner.context.runtime;
        let deadline = runtime.instant() + PATIENCE;
        let mut timing = 0;
        loop {
            let error = match runtime.timeout(ATTEMPT_LIMIT, self.attempt(inner, group)).await {
                Some(Err(Fail::Database(error))) => error,
                Some(other) => return other,
                None => {
                    self.conn = None;
                    inner.context.sweep.ask();
                    return Err(Fail::Refused(unavailable(DOING)));
                }
            };
            match remedy(&error) {
                Remedy::Again if timing < MAX_TIMING => timing += 1,
                Remedy::Reconnect => {
                    self.conn = None;
                    if runtime.instant() + RECONNECT >= deadline || inner.context.is_stopping() {
                        // What it may have leased nobody holds.
                        inner.context.sweep.ask();
                        return Err(Fail::Database(error));
                    }
                    runtime.sleep(RECONNECT).await;
                }
                Remedy::Again | Remedy::GiveUp => return Err(Fail::Database(error)),
            }
        }
    }

    async fn attempt(&mut self, inner: &Inner, group: &mut [Waiting]) -> Attempt<Vec<Result<Verdict>>> {
        let context = &inner.context;
        if self.conn.is_none() {
            let connected = inner.target.connect().await;
            self.conn = Some(connected.map_err(|error| Fail::Database(super::tx::unreachable(&error)))?);
        }
        let conn = self.conn.as_mut().expect("connected above");
        let is_repeated = group.iter().any(|waiting| waiting.request.ids.are_used());
        for waiting in group.iter_mut() {
            waiting.request.ids.restart();
        }
        let gate =
            Gate { boot: context.boot, gated: context.deny.position(), gated_at: context.runtime.instant().into_std() };
        let mut asked = Asked::default();
        for (place, waiting) in group.iter().enumerate().filter(|(_, waiting)| waiting.request.written.is_none()) {
            let prepared = &waiting.request.prepared;
            asked.push(place, prepared.event.app, &prepared.topics);
        }
        let mut subscribers = subscribers::of_events(conn, asked).await?;
        let mut answers: Vec<Option<Result<Verdict>>> = group.iter().map(|_| None).collect();
        let mut candidates = Vec::with_capacity(group.len());
        let mut before = Vec::new();
        let mut refused = Vec::new();
        for (place, waiting) in group.iter_mut().enumerate() {
            if let Some(written) = waiting.request.written {
                answers[place] = Some(Ok(Verdict::new(written)));
                continue;
            }
            let id = NotificationId(waiting.request.ids.next(&context.ids, waiting.request.now));
            let candidate = Candidate { place, id, subscribers: subscribers.remove(&place).unwrap_or_default() };
            let event = &waiting.request.prepared.event;
            let limit = event.max_audience.unwrap_or(u32::MAX);
            let (named, subscribed) = (waiting.request.prepared.users.len(), candidate.subscribers.len());
            if event.expires_at <= waiting.request.now {
                refused.push((candidate, StoreError::AlreadyExpired));
            } else if named > limit as usize {
                refused.push((candidate, StoreError::AudienceTooLarge { limit: u64::from(limit) }));
            } else if subscribed > subscribers::MOST || named + subscribed > (limit as usize).min(SMALL_AUDIENCE) {
                // Some may be both, which is not known yet.
                answers[place] = Some(Ok(Verdict::Alone));
            } else {
                // Whether its key was used the insert will tell; to look first would cost every event for the few repeats.
                candidates.push(candidate);
            }
        }
        // A repeat gets its first answer, whatever would be said of the event now.
        let used = used_keys(conn, group, refused.iter().map(|(candidate, _)| candidate.place)).await?;
        for (candidate, refusal) in refused {
            match used.get(&candidate.place) {
                Some(used) if used.notification == candidate.id => before.push(candidate),
                Some(used) => answers[candidate.place] = Some(used.answer(hash_of(&group[candidate.place]))),
                None => answers[candidate.place] = Some(Err(refusal)),
            }
        }
        let users = users(conn, context, group, &mut candidates).await?;
        let (mut rows, mut blocks) = (EventColumns::default(), BlockColumns::default());
        let mut jobs = JobColumns::of(context.packing.written());
        let mut planned = plan(conn, context, group, &candidates, users, &gate, &mut rows).await?;
        let group_id = context.ids.next(group.first().map_or(UnixMs(0), |waiting| waiting.request.now));
        let mut handed =
            HandedColumns { id: group_id, owner: context.boot, jobs: JobColumns::of(context.packing.written()) };
        // Of a try before, whose answer was lost, a group may have the same jobs.
        let rowless = context.packing.rowless() && !is_repeated;
        for (candidate, plan) in candidates.iter().zip(&planned) {
            let waiting = &mut group[candidate.place];
            let (app, now) = (waiting.request.prepared.event.app, waiting.request.now);
            for (id, job, lease) in &plan.jobs {
                if !(rowless && lease.owner != 0 && handed.push(*id, app, job, &plan.jobs)?) {
                    jobs.push(*id, app, job, *lease)?;
                }
            }
            let ids = &mut waiting.request.ids;
            blocks.push(|| ids.next(&context.ids, now), app, candidate.id, None, &plan.suppressed, now);
        }
        let without_rows: HashSet<i64> = handed.jobs.id.iter().copied().collect();
        let leasing = context.leasing.read().await;
        let written = if candidates.is_empty() {
            HashSet::new()
        } else {
            rows.write(conn, handed, jobs, blocks, is_repeated).await?
        };
        let mut effects = Effects::default();
        let mut lost = Vec::new();
        let leased: Vec<i64> = planned.iter().flat_map(|plan| &plan.hand_overs).map(|handed| handed.job.id.0).collect();
        context.held.lock().expect("no panic while held").extend(leased);
        let mut born = Vec::with_capacity(without_rows.len());
        for (candidate, plan) in candidates.into_iter().zip(planned.drain(..)) {
            let Prepared { engine, event, .. } = &*group[candidate.place].request.prepared;
            if !written.contains(&candidate.id.0) {
                inner.let_go(plan.hand_overs.iter().map(|handed| handed.job.id.0));
                lost.push(candidate);
                continue;
            }
            let lane = event.lane.unwrap_or(Lane::Interactive);
            for route in plan.unowned() {
                effects.wake_jobs(engine, route, lane);
            }
            for handed in plan.hand_overs {
                born.extend(without_rows.get(&handed.job.id.0));
                effects.hand_over(engine, handed);
            }
            effects.planned(engine, plan.targets, plan.suppressed);
            if !planted::is("pg-handed-over-twice") {
                group[candidate.place].request.written = Some(candidate.id);
            }
            answers[candidate.place] = Some(Ok(Verdict::new(candidate.id)));
        }
        if !without_rows.is_empty() {
            context.handed.born(group_id, born, context.runtime.instant().into_std());
        }
        drop(leasing);
        effects.apply(&context.deny, &context.runtime);
        if !lost.is_empty() {
            let used = used_keys(conn, group, lost.iter().map(|candidate| candidate.place)).await?;
            for candidate in lost {
                match used.get(&candidate.place) {
                    Some(used)
                        if used.notification != candidate.id
                            && !planted::is("pg-lost-race-for-a-key-counts-as-won") =>
                    {
                        answers[candidate.place] = Some(used.answer(hash_of(&group[candidate.place])));
                    }
                    _ => before.push(candidate),
                }
            }
        }
        free(conn, context, &before).await?;
        for Candidate { place, id, .. } in before {
            answers[place] = Some(Ok(Verdict::new(id)));
        }
        Ok(answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(unavailable(DOING)))).collect())
    }
}

/// Of an event that has a key.
fn hash_of(waiting: &Waiting) -> &[u8] {
    waiting.request.prepared.event.idempotency.as_ref().map_or(&[], |(_, hash)| hash)
}

/// Those whose key is met for the second time wait.
fn part_repeats(group: Vec<Waiting>) -> (Vec<Waiting>, Vec<Waiting>) {
    let mut keys = HashSet::new();
    group.into_iter().partition(|waiting| match &waiting.request.prepared.event.idempotency {
        None => true,
        Some((key, _)) => keys.insert((waiting.request.prepared.event.app, key.clone())),
    })
}

/// Earlier uses of the keys of these events, by their place.
async fn used_keys(
    conn: &mut AsyncPgConnection,
    group: &[Waiting],
    places: impl Iterator<Item = usize>,
) -> Attempt<HashMap<usize, Used>> {
    let (mut at, mut apps, mut keys, mut nows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for place in places {
        let waiting = &group[place];
        if let Some((key, _)) = &waiting.request.prepared.event.idempotency {
            at.push(i32::try_from(place).unwrap_or(i32::MAX));
            apps.push(waiting.request.prepared.event.app.0);
            keys.push(key.as_str());
            nows.push(waiting.request.now.0);
        }
    }
    if at.is_empty() {
        return Ok(HashMap::new());
    }
    // idempotency's primary key. Nothing but it can be used: every row expires later than now, and a plan made for few rows
    // might take the index of that.
    let rows: Vec<(i32, Vec<u8>, i64)> = constant!(
        (Integer, Binary, BigInt);
        "SELECT e.place, i.hash, i.notification_id FROM unnest($1, $2, $3, $4) AS e(place, app, key, now) \
         CROSS JOIN LATERAL (SELECT hash, notification_id FROM idempotency WHERE app = e.app AND key = e.key \
         AND expires_at + 0 > e.now OFFSET 0) AS i",
        Array<Integer> => at, Array<BigInt> => apps, Array<Text> => keys, Array<BigInt> => nows,
    )
    .load(conn)
    .await?;
    let used = |(place, hash, notification)| {
        (usize::try_from(place).unwrap_or(usize::MAX), Used { hash, notification: NotificationId(notification) })
    };
    Ok(rows.into_iter().map(used).collect())
}

/// Everybody the candidates are for, each once and with what is packed of them, and their actors. Whom an event names gets a
/// row where there is none; an actor without one needs none.
async fn users(
    conn: &mut AsyncPgConnection,
    context: &Context,
    group: &[Waiting],
    candidates: &mut [Candidate],
) -> Attempt<Vec<(Vec<Packed>, Option<UserKey>)>> {
    let (mut named, mut actors) = (Vec::new(), Vec::new());
    for candidate in candidates.iter() {
        let Event { prepared, now, .. } = &group[candidate.place].request;
        let event = &prepared.event;
        named.extend(prepared.users.iter().map(|user| (event.app, user.as_str(), *now)));
        actors.extend(event.actor.iter().map(|actor| (event.app, actor.as_str())));
    }
    let (named, actors) = ensure_people(conn, &context.ids, &named, &actors).await?;
    let (mut named, mut actors) = (named.into_iter(), actors.into_iter());
    let of = |candidate: &mut Candidate| {
        let prepared = &*group[candidate.place].request.prepared;
        let mut users = std::mem::take(&mut candidate.subscribers);
        let are_distinct = users.is_empty();
        users.extend(named.by_ref().take(prepared.users.len()));
        if !are_distinct {
            subscribers::merge(&mut users);
        }
        (users, prepared.event.actor.as_ref().and_then(|_| actors.next().flatten()))
    };
    Ok(candidates.iter_mut().map(of).collect())
}

/// What becomes of each candidate, and its row.
async fn plan(
    conn: &mut AsyncPgConnection,
    context: &Context,
    group: &mut [Waiting],
    candidates: &[Candidate],
    users: Vec<(Vec<Packed>, Option<UserKey>)>,
    gate: &Gate,
    rows: &mut EventColumns,
) -> Attempt<Vec<Planned>> {
    let mut events = Vec::with_capacity(candidates.len());
    let mut notifications = Vec::with_capacity(candidates.len());
    for (candidate, (users, actor)) in candidates.iter().zip(users) {
        let Event { prepared, now, .. } = &group[candidate.place].request;
        let notification = prepared.notification(candidate.id, actor, false, *now);
        rows.push(&notification, prepared, users.len());
        events.push((users, &prepared.event.event_type));
        notifications.push(Arc::new(notification));
    }
    let found = reach::of_events(conn, events).await?;
    let mut planned = Vec::with_capacity(candidates.len());
    for ((candidate, notification), mut people) in candidates.iter().zip(notifications).zip(found) {
        let Event { prepared, now, ids, .. } = &mut group[candidate.place].request;
        if let Some(list) = prepared.engine.allow_list(prepared.event.app) {
            people.restrict(conn, &list).await?;
        }
        let next_id = || ids.next(&context.ids, *now);
        planned.push(Planned::new(people, notification, &prepared.engine, gate, next_id, *now));
    }
    Ok(planned)
}

/// Events that an earlier try wrote without an answer: what it leased was handed to nobody.
async fn free(conn: &mut AsyncPgConnection, context: &Context, before: &[Candidate]) -> Attempt<()> {
    if before.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = before.iter().map(|candidate| candidate.id.0).collect();
    // Nobody but this task makes groups.
    in_transaction!(conn, handed::free_unknown(conn, context, None))?;
    constant!(
        ();
        "UPDATE job SET owner = 0, fence = fence + 1, claims = 0 WHERE notification_id = ANY ($1) AND owner = $2",
        Array<BigInt> => ids, BigInt => context.boot.0,
    )
    .execute(conn)
    .await?;
    Ok(())
}
