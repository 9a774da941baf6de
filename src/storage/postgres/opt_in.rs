//! Choices: the latest observed one stands, a tie is a "no", and every one ever asked for is kept.

use std::collections::{HashMap, HashSet};

use super::batch::rows_of;
use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::gather::{Answers, Work};
use super::rows::flag;
use super::statement::constant;
use super::tx::{Tx, step};
use super::users::{ensure_users, user_key};
use super::{Inner, device_reads, ids, repack};
use crate::domain::deny::DenyKey;
use crate::domain::ids::{AppKey, DeviceId, EventType, IdMaker, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::storage::reach::Change;
use crate::storage::{ImportEffect, NewOptIn, OptIn, OptInChange, Result, StoreError};

/// The most choices listed of one person.
const MAX_LISTED: i64 = 1_000;
/// The newest lines of a person's consent history that an explanation shows.
const MAX_HISTORY: i64 = 10_000;

type ChoiceTypes = (BigInt, Text, SmallInt, BigInt, BigInt, Nullable<Text>, Nullable<Text>, Nullable<Text>);

#[derive(diesel::Queryable)]
struct ChoiceRow {
    device: i64,
    event_type: String,
    opted_in: i16,
    observed_at: i64,
    recorded_at: i64,
    source: Option<String>,
    policy_version: Option<String>,
    evidence: Option<String>,
}

impl ChoiceRow {
    fn into_domain(self) -> OptIn {
        OptIn {
            event_type: (!self.event_type.is_empty()).then(|| EventType::trusted(&self.event_type)),
            device: (self.device != 0).then_some(DeviceId(self.device)),
            opted_in: flag(self.opted_in),
            observed_at: UnixMs(self.observed_at),
            recorded_at: UnixMs(self.recorded_at),
            source: self.source,
            policy_version: self.policy_version,
            evidence: self.evidence,
        }
    }
}

/// The device's own user must be the one who chooses.
async fn check_device(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<()> {
    let Some(device) = new.device else { return Ok(()) };
    match device_reads::by_id(conn, device).await? {
        Some(row) if row.app == new.app.0 && row.user == new.user.as_str() => Ok(()),
        _ => Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
    }
}

/// The device's number and the name of the type, as they are stored.
fn stored_key(new: &NewOptIn) -> (i64, &str) {
    (new.device.unwrap_or_default().0, new.event_type.as_ref().map_or("", EventType::as_str))
}

async fn stored(conn: &mut AsyncPgConnection, user: UserKey, new: &NewOptIn) -> Attempt<Option<ChoiceRow>> {
    let (device, event_type) = stored_key(new);
    Ok(constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = $1 AND device = $2 AND event_type = $3",
        BigInt => user.0, BigInt => device, Text => event_type,
    )
    .get_result(conn)
    .await
    .optional()?)
}

/// Whether an imported choice takes the place of the one that stands: the later one does, and a "no" observed at the same
/// time. A call's is weighed by [`Columns::apply`].
fn takes_effect(new: &NewOptIn, stored: Option<&ChoiceRow>) -> bool {
    stored.is_none_or(|stored| {
        let tie_says_no = !new.opted_in || flag(stored.opted_in);
        new.observed_at.0 > stored.observed_at || (new.observed_at.0 == stored.observed_at && tie_says_no)
    })
}

/// Whether the history has this very choice already, so that an import that is repeated does not fill it.
async fn is_recorded(conn: &mut AsyncPgConnection, user: UserKey, new: &NewOptIn) -> Attempt<bool> {
    let (device, event_type) = stored_key(new);
    // opt_in_history_by_user
    let known: Option<i64> = constant!(
        BigInt;
        "SELECT id FROM opt_in_history WHERE user_key = $1 AND device = $2 AND event_type = $3 AND observed_at = $4 \
         AND opted_in = $5 LIMIT 1",
        BigInt => user.0, BigInt => device, Text => event_type, BigInt => new.observed_at.0,
        SmallInt => i16::from(new.opted_in),
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(known.is_some())
}

/// A choice moved in from elsewhere: one that lost is recorded, and one that is recorded is not written again.
pub(super) async fn import(tx: &mut Tx, new: &NewOptIn, now: UnixMs) -> Attempt<ImportEffect> {
    let (effect, recorded) = look(tx.conn(), new).await?;
    if !recorded {
        let choice = Choice::new(new.clone(), &tx.context.ids, now);
        set(tx, &[&choice]).await?;
    }
    Ok(effect)
}

/// What [`import`] would do.
pub(super) async fn assess(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<ImportEffect> {
    Ok(look(conn, new).await?.0)
}

/// What a choice comes to, and whether it is recorded already.
async fn look(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<(ImportEffect, bool)> {
    check_device(conn, new).await?;
    let Some(user) = user_key(conn, new.app, &new.user).await? else { return Ok((ImportEffect::Applied, false)) };
    let Some(stored) = stored(conn, user, new).await? else { return Ok((ImportEffect::Applied, false)) };
    let recorded = is_recorded(conn, user, new).await?;
    let applies = takes_effect(new, Some(&stored)) && !recorded;
    Ok((if applies { ImportEffect::Applied } else { ImportEffect::Unchanged }, recorded))
}

/// A call that records a choice.
pub(super) struct Choice {
    new: NewOptIn,
    now: UnixMs,
    /// Its line in the history: one, however often it is run.
    line: i64,
}

impl Choice {
    pub fn new(new: NewOptIn, makes: &IdMaker, now: UnixMs) -> Self {
        Self { new, now, line: makes.next(now) }
    }
}

impl Work for Choice {
    type Answer = (OptIn, bool);
    const DOING: &'static str = "recording a choice";

    fn bytes(&self) -> usize {
        let NewOptIn { user, caller, source, policy_version, evidence, .. } = &self.new;
        let texts = [caller, source, policy_version, evidence];
        user.as_str().len() + texts.into_iter().flatten().map(String::len).sum::<usize>()
    }

    async fn run(inner: &Inner, group: &[&Self]) -> Result<Answers<(OptIn, bool)>> {
        step!(inner, Self::DOING, |tx| set(tx, group))
    }
}

async fn set(tx: &mut Tx, group: &[&Choice]) -> Attempt<Answers<(OptIn, bool)>> {
    let mut answers: Answers<(OptIn, bool)> = group.iter().map(|_| None).collect();
    let named: Vec<DeviceId> = group.iter().filter_map(|choice| choice.new.device).collect();
    let named = if named.is_empty() { Vec::new() } else { device_reads::by_ids(tx.conn(), &named).await? };
    let mut seen = HashSet::new();
    let mut members: Vec<usize> = Vec::with_capacity(group.len());
    for (place, Choice { new, .. }) in group.iter().enumerate() {
        // The device's own user must be the one who chooses.
        let is_theirs = |device: DeviceId| {
            named.iter().any(|row| row.id == device.0 && row.app == new.app.0 && row.user == new.user.as_str())
        };
        if let Some(device) = new.device.filter(|device| !is_theirs(*device)) {
            answers[place] = Some(Err(StoreError::DeviceNotFound { devices: vec![device] }));
        } else if seen.insert((new.app, &new.user, stored_key(new))) {
            members.push(place);
        }
    }
    if members.is_empty() {
        return Ok(answers);
    }
    let names: Vec<_> = members
        .iter()
        .map(|place| {
            let Choice { new, now, .. } = group[*place];
            (new.app, new.user.as_str(), *now)
        })
        .collect();
    // Before people are locked, as everywhere. One that does not stand in the end lost to one that does.
    let chosen = ids(members.iter().filter_map(|place| group[*place].new.device).map(|device| device.0));
    if !chosen.is_empty() {
        tx.execute(constant!(
            (); "UPDATE device SET has_choice = 1 WHERE id = ANY ($1) AND has_choice = 0", Array<BigInt> => chosen,
        ))
        .await?;
    }
    let context = std::sync::Arc::clone(&tx.context);
    let users = ensure_users(tx.conn(), &context.ids, &names).await?;
    // Two choices of one person at the same time take turns, so that what is packed of them holds both.
    repack::lock(tx, users.iter().copied()).await?;
    let members: Vec<(usize, UserKey)> = members.into_iter().zip(users).collect();

    let mut columns = Columns::default();
    for (place, user) in &members {
        columns.push(group[*place], *user);
    }
    let applied = columns.apply(tx).await?;
    columns.record(tx, &applied).await?;
    let mut lost = Vec::new();
    for (at, ((place, user), applied)) in members.into_iter().zip(&applied).enumerate() {
        let Choice { new, now, .. } = group[place];
        let Some(observed_at) = *applied else {
            lost.push((at, place));
            continue;
        };
        let (device, event_type) = stored_key(new);
        tx.changed.push((user, Change::Choice(DeviceId(device), event_type.to_owned(), new.opted_in)));
        if !new.opted_in {
            tx.deny(new.device.map_or(DenyKey::User(user), DenyKey::Device));
        }
        let stands = OptIn {
            event_type: new.event_type.clone(),
            device: new.device,
            opted_in: new.opted_in,
            observed_at,
            recorded_at: *now,
            source: new.source.clone(),
            policy_version: new.policy_version.clone(),
            evidence: new.evidence.clone(),
        };
        answers[place] = Some(Ok((stands, true)));
    }
    // Rare: something later stands.
    for (at, place) in lost {
        let stands = stored(tx.conn(), UserKey(columns.user[at]), &group[place].new).await?;
        let stands = stands.ok_or_else(|| Fail::corrupt("a choice vanished"))?;
        answers[place] = Some(Ok((stands.into_domain(), false)));
    }
    Ok(answers)
}

/// Rows for `opt_in` and its history.
#[derive(Default)]
struct Columns<'a> {
    user: Vec<i64>,
    device: Vec<i64>,
    event_type: Vec<&'a str>,
    app: Vec<i64>,
    opted_in: Vec<i16>,
    observed_at: Vec<i64>,
    recorded_at: Vec<i64>,
    caller: Vec<Option<&'a str>>,
    source: Vec<Option<&'a str>>,
    policy_version: Vec<Option<&'a str>>,
    evidence: Vec<Option<&'a str>>,
    line: Vec<i64>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, Choice { new, now, line }: &'a Choice, user: UserKey) {
        let (device, event_type) = stored_key(new);
        self.user.push(user.0);
        self.device.push(device);
        self.event_type.push(event_type);
        self.app.push(new.app.0);
        self.opted_in.push(i16::from(new.opted_in));
        self.observed_at.push(new.observed_at.0);
        self.recorded_at.push(now.0);
        self.caller.push(new.caller.as_deref());
        self.source.push(new.source.as_deref());
        self.policy_version.push(new.policy_version.as_deref());
        self.evidence.push(new.evidence.as_deref());
        self.line.push(*line);
    }

    /// Which of them stand now, and since when observed: by [`takes_effect`]'s rule, and a "no" that is said now. What was
    /// observed later than now was observed by another clock, or before this one was set back. The time never goes back, so
    /// that nothing observed in between overturns it.
    async fn apply(&self, tx: &mut Tx) -> Attempt<Vec<Option<UnixMs>>> {
        let applied: Vec<(i64, i64, String, i64)> = constant!(
            (BigInt, BigInt, Text, BigInt);
            concat!(
                "INSERT INTO opt_in AS o (user_key, device, event_type, app, opted_in, observed_at, recorded_at, source, \
                 policy_version, evidence) SELECT e.* ",
                rows_of!(
                    "$1" "user_key", "$2" "device", "$3" "event_type", "$4" "app", "$5" "opted_in", "$6" "observed_at",
                    "$7" "recorded_at", "$8" "source", "$9" "policy_version", "$10" "evidence",
                ),
                " AS e ORDER BY e.user_key, e.device \
                 ON CONFLICT (user_key, device, event_type) DO UPDATE SET opted_in = excluded.opted_in, \
                 observed_at = greatest(o.observed_at, excluded.observed_at), recorded_at = excluded.recorded_at, \
                 source = excluded.source, policy_version = excluded.policy_version, evidence = excluded.evidence \
                 WHERE excluded.observed_at > o.observed_at \
                 OR (excluded.observed_at = o.observed_at AND (excluded.opted_in = 0 OR o.opted_in = 1)) \
                 OR (excluded.opted_in = 0 AND excluded.observed_at = excluded.recorded_at) \
                 RETURNING o.user_key, o.device, o.event_type, o.observed_at"
            ),
            Array<BigInt> => &self.user, Array<BigInt> => &self.device, Array<Text> => &self.event_type,
            Array<BigInt> => &self.app, Array<SmallInt> => &self.opted_in, Array<BigInt> => &self.observed_at,
            Array<BigInt> => &self.recorded_at, Array<Nullable<Text>> => &self.source,
            Array<Nullable<Text>> => &self.policy_version, Array<Nullable<Text>> => &self.evidence,
        )
        .load(tx.conn())
        .await?;
        let applied: HashMap<(i64, i64, &str), UnixMs> =
            applied.iter().map(|(user, device, name, at)| ((*user, *device, name.as_str()), UnixMs(*at))).collect();
        let keys = self.user.iter().zip(&self.device).zip(&self.event_type);
        Ok(keys.map(|((user, device), name)| applied.get(&(*user, *device, *name)).copied()).collect())
    }

    /// A line may be there already, also where this step is none that was run before: it may be half of one that was.
    async fn record(&self, tx: &mut Tx, applied: &[Option<UnixMs>]) -> Attempt<()> {
        let applied: Vec<i16> = applied.iter().map(|applied| i16::from(applied.is_some())).collect();
        tx.execute(constant!(
            ();
            "INSERT INTO opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, \
             recorded_at, caller, source, policy_version, evidence) SELECT unnest($1), unnest($2), unnest($3), \
             unnest($4), unnest($5), unnest($6), unnest($7), unnest($8), unnest($9), unnest($10), unnest($11), \
             unnest($12), unnest($13) ON CONFLICT (id) DO NOTHING",
            Array<BigInt> => &self.line, Array<BigInt> => &self.app, Array<BigInt> => &self.user,
            Array<BigInt> => &self.device, Array<Text> => &self.event_type, Array<SmallInt> => &self.opted_in,
            Array<SmallInt> => applied, Array<BigInt> => &self.observed_at, Array<BigInt> => &self.recorded_at,
            Array<Nullable<Text>> => &self.caller, Array<Nullable<Text>> => &self.source,
            Array<Nullable<Text>> => &self.policy_version, Array<Nullable<Text>> => &self.evidence,
        ))
        .await?;
        Ok(())
    }
}

pub(super) async fn list(conn: &mut AsyncPgConnection, app: AppKey, user: &UserId) -> Attempt<Vec<OptIn>> {
    let Some(user) = user_key(conn, app, user).await? else { return Ok(Vec::new()) };
    let rows: Vec<ChoiceRow> = constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = $1 ORDER BY device, event_type LIMIT $2 + 0",
        BigInt => user.0, BigInt => MAX_LISTED,
    )
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(ChoiceRow::into_domain).collect())
}

/// Oldest first.
pub(super) async fn history(conn: &mut AsyncPgConnection, user: UserKey) -> Attempt<Vec<OptInChange>> {
    // opt_in_history_by_user
    let rows: Vec<(ChoiceRow, (i16, Option<String>))> = constant!(
        (ChoiceTypes, (SmallInt, Nullable<Text>));
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence, applied, \
         caller FROM opt_in_history WHERE user_key = $1 ORDER BY id DESC LIMIT $2 + 0",
        BigInt => user.0, BigInt => MAX_HISTORY,
    )
    .load(conn)
    .await?;
    let change = |(choice, (applied, caller)): (ChoiceRow, _)| OptInChange {
        choice: choice.into_domain(),
        applied: flag(applied),
        caller,
    };
    Ok(rows.into_iter().rev().map(change).collect())
}
