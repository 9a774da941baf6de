//! Registrations, many at once: those that repeat are answered by one read, the rest written in one transaction.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use diesel::sql_types::{Array, BigInt, Binary, Nullable, SmallInt, Text};

use super::devices::{Decision, Known, MOVED, Repeat, Retired, TOO_MANY_DEVICES, judge, recall, retire, token_hash};
use super::fail::{Attempt, Fail};
use super::gather::{Answers, Work};
use super::query::RunQuery;
use super::statement::constant;
use super::tx::{Tx, step};
use super::users::{ensure_users, users_by_name};
use super::{Inner, dead, device_reads, devices, read, repack};
use crate::domain::deny::DenyKey;
use crate::domain::device::{Device, MAX_DEVICES_PER_USER, Registered, Registration};
use crate::domain::ids::{AppKey, DeviceId, Locale, UserKey};
use crate::domain::platform::{Environment, Platform};
use crate::domain::time::UnixMs;
use crate::storage::Result;
use crate::storage::reach::{Change, ReachDevice};

/// One call.
pub(super) struct Register {
    pub registration: Registration,
    pub hash: [u8; 16],
    pub now: UnixMs,
}

impl Register {
    pub fn new(registration: Registration, now: UnixMs) -> Self {
        let hash = token_hash(&registration.token);
        Self { registration, hash, now }
    }

    fn bytes(&self) -> usize {
        let Registration { user, token, installation_id, details, .. } = &self.registration;
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let labels: usize = details.labels.iter().map(|(key, value)| 64 + key.len() + value.len()).sum();
        user.as_str().len()
            + token.expose().len()
            + text(installation_id)
            + text(&details.time_zone)
            + text(&details.app_version)
            + text(&details.os_version)
            + labels
    }
}

const DOING: &str = "registering a device";

/// The look at whether a registration only repeats what stands: most do.
pub(super) struct Repeated(pub Arc<Register>);

impl Work for Repeated {
    type Answer = Option<Registered>;
    const DOING: &'static str = DOING;

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    async fn run(inner: &Inner, group: &[&Self]) -> Result<Answers<Option<Registered>>> {
        read::read!(inner, DOING, |conn| async {
            let tokens: Vec<_> = group.iter().map(|one| of_token(&one.0)).collect();
            let mut standing: Vec<Option<Registered>> = group.iter().map(|_| None).collect();
            for (place, row) in device_reads::holding_tokens(conn, &tokens).await? {
                let Register { registration, now, .. } = &*group[place].0;
                if row.is_active()
                    && row.user == registration.user.as_str()
                    && devices::stands(&row, registration, *now)?
                {
                    standing[place] = Some(Registered { device: row.into_domain()?, created: false });
                }
            }
            Ok(standing.into_iter().map(|one| Some(Ok(one))).collect())
        })
    }
}

fn of_token(register: &Register) -> (AppKey, Platform, &[u8; 16]) {
    (register.registration.app, register.registration.platform, &register.hash)
}

/// One that does not.
pub(super) struct Changed(pub Arc<Register>);

impl Work for Changed {
    type Answer = Registered;
    const DOING: &'static str = DOING;

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    async fn run(inner: &Inner, group: &[&Self]) -> Result<Answers<Registered>> {
        step!(inner, DOING, |tx| register(tx, group))
    }
}

/// What two registrations of one group may not have in common.
#[derive(PartialEq, Eq, Hash)]
enum Claim<'a> {
    User(AppKey, &'a str),
    Token(AppKey, Platform, &'a [u8; 16]),
    Install(AppKey, &'a str),
    Named(DeviceId),
}

async fn register(tx: &mut Tx, group: &[&Changed]) -> Attempt<Answers<Registered>> {
    let mut answers: Answers<Registered> = group.iter().map(|_| None).collect();
    let mut claimed = HashSet::new();
    let mut members: Vec<(usize, &Register)> = Vec::with_capacity(group.len());
    for (place, Changed(register)) in group.iter().enumerate() {
        let Registration { app, user, platform, installation_id, device, .. } = &register.registration;
        let claims = [
            Some(Claim::User(*app, user.as_str())),
            Some(Claim::Token(*app, *platform, &register.hash)),
            installation_id.as_deref().map(|install| Claim::Install(*app, install)),
            device.map(Claim::Named),
        ];
        if claims.iter().flatten().all(|claim| !claimed.contains(claim)) {
            claimed.extend(claims.into_iter().flatten());
            members.push((place, register));
        }
    }
    // Locked in one order on every replica.
    members.sort_unstable_by_key(|(_, register)| register.hash);
    let registrations: Vec<&Register> = members.iter().map(|(_, register)| *register).collect();
    lock_installs(tx, &registrations).await?;
    let mut known: Vec<_> = members.into_iter().zip(look(tx, &registrations).await?).collect();
    known.sort_unstable_by_key(|((place, _), _)| *place);

    let mut touched = HashSet::new();
    let mut writes = Vec::with_capacity(known.len());
    for ((place, register), known) in known {
        // One row may be come to by its number, its token and its install.
        if known.rows().any(|row| touched.contains(&row.id)) {
            continue;
        }
        touched.extend(known.rows().map(|row| row.id));
        let decision = match judge(&register.registration, &known, Repeat::Within(register.now)) {
            Ok(decision) => decision,
            Err(Fail::Refused(error)) => {
                answers[place] = Some(Err(error));
                continue;
            }
            Err(fail) => return Err(fail),
        };
        let mut write = Write::new(register, register.now);
        match decision {
            Decision::Stands(id) | Decision::Stale(Some(id)) => {
                let row = known.take(id).ok_or_else(|| Fail::corrupt("a device row vanished"))?;
                answers[place] = Some(Ok(Registered { device: row.into_domain()?, created: false }));
                continue;
            }
            // Theirs once, and somebody else's by now: kept as such, so that the caller learns of it.
            Decision::Stale(None) => write.user = known.user,
            Decision::Write { retired, lets_go, dead, target, revives, reaches_alike } => {
                recall(tx, &dead);
                (write.user, write.retired, write.target, write.revives) = (known.user, retired, target, revives);
                (write.is_current, write.reaches_alike, write.lets_go) = (true, reaches_alike, lets_go);
            }
        }
        writes.push((place, write));
    }
    let (places, mut writes): (Vec<usize>, Vec<Write<'_>>) = writes.into_iter().unzip();
    let devices = write(tx, &mut writes).await?;
    evict(tx, &writes, 0).await?;
    report(tx, &writes).await?;
    for ((place, write), device) in places.into_iter().zip(&writes).zip(devices) {
        answers[place] = Some(Ok(Registered { device, created: write.target.is_none() }));
    }
    Ok(answers)
}

/// A device moved in from elsewhere, with its own times. Unlike a call it leaves no row where something later stands: there
/// is nobody to be told of one. Whether anything was written.
pub(super) async fn import(tx: &mut Tx, registration: &Registration, created_at: UnixMs, now: UnixMs) -> Attempt<bool> {
    let register = Register::new(registration.clone(), now);
    lock_installs(tx, &[&register]).await?;
    let known = look(tx, &[&register]).await?.pop().unwrap_or_default();
    let Decision::Write { retired, lets_go, dead, target, reaches_alike, .. } =
        judge(registration, &known, Repeat::SameTime)?
    else {
        return Ok(false);
    };
    recall(tx, &dead);
    let mut write = Write::new(&register, created_at);
    (write.user, write.retired, write.lets_go, write.target) = (known.user, retired, lets_go, target);
    (write.is_current, write.reaches_alike, write.confirmed_at) = (true, reaches_alike, registration.observed_at);
    let mut writes = [write];
    self::write(tx, &mut writes).await?;
    // What is imported is not the newest: it may be the one that goes.
    evict(tx, &writes, 1).await?;
    report(tx, &writes).await?;
    Ok(true)
}

/// Two tokens of one install at the same time: no unique index stands between them.
async fn lock_installs(tx: &mut Tx, group: &[&Register]) -> Attempt<()> {
    let (mut installs, mut apps) = (Vec::new(), Vec::new());
    for register in group {
        if let Some(install) = &register.registration.installation_id {
            installs.push(install.as_str());
            apps.push(register.registration.app.0);
        }
    }
    if installs.is_empty() {
        return Ok(());
    }
    tx.execute(constant!(
        ();
        "SELECT pg_advisory_xact_lock(l.key) FROM (SELECT DISTINCT hashtextextended(e.install, e.app) AS key \
         FROM unnest($1, $2) AS e(install, app) ORDER BY 1) AS l",
        Array<Text> => installs, Array<BigInt> => apps,
    ))
    .await?;
    Ok(())
}

/// All rows that these concern; nobody else changes them before our transaction ends.
async fn look(tx: &mut Tx, group: &[&Register]) -> Attempt<Vec<Known>> {
    let names: Vec<_> = group.iter().map(|one| (one.registration.app, one.registration.user.as_str())).collect();
    let users = users_by_name(tx.conn(), &names).await?;
    let mut known: Vec<Known> = users.into_iter().map(|user| Known { user, ..Known::default() }).collect();
    let named: Vec<DeviceId> = group.iter().filter_map(|one| one.registration.device).collect();
    if !named.is_empty() {
        for row in device_reads::lock_by_ids(tx.conn(), &named).await? {
            if let Some(at) = group.iter().position(|one| one.registration.device == Some(DeviceId(row.id))) {
                known[at].named = Some(row);
            }
        }
    }
    let tokens: Vec<_> = group.iter().map(|one| of_token(one)).collect();
    for (place, row) in device_reads::lock_by_tokens(tx.conn(), &tokens).await? {
        known[place].of_token.push(row);
    }
    let (mut places, mut installs) = (Vec::new(), Vec::new());
    for (place, register) in group.iter().enumerate() {
        let Registration { app, platform, kind, installation_id, .. } = &register.registration;
        if let Some(install) = installation_id {
            places.push(place);
            installs.push((*app, *platform, *kind, install.as_str()));
        }
    }
    if !installs.is_empty() {
        for (at, row) in device_reads::lock_by_installations(tx.conn(), &installs).await? {
            known[places[at]].of_install.push(row);
        }
    }
    Ok(known)
}

/// What a registration writes.
struct Write<'a> {
    register: &'a Register,
    created_at: UnixMs,
    confirmed_at: UnixMs,
    /// `None`: to be given a row.
    user: Option<UserKey>,
    /// Rows that let go of the token or the install first.
    retired: Vec<Retired>,
    lets_go: Option<DeviceId>,
    /// Their own row that it goes into; `None`: a new one.
    target: Option<i64>,
    /// That row was retired.
    revives: bool,
    /// Else it is only kept as a tombstone.
    is_current: bool,
    /// Nothing changes that is packed of a person.
    reaches_alike: bool,
    /// The row in the end.
    id: i64,
}

impl<'a> Write<'a> {
    fn new(register: &'a Register, created_at: UnixMs) -> Self {
        Self {
            register,
            created_at,
            confirmed_at: register.now,
            user: None,
            retired: Vec::new(),
            lets_go: None,
            target: None,
            revives: false,
            is_current: false,
            reaches_alike: false,
            id: 0,
        }
    }

    /// Of its person, once it has its row.
    fn change(&self) -> Change {
        let device = ReachDevice::of(DeviceId(self.id), &self.register.registration);
        Change::With { device, is_new: self.target.is_none() }
    }
}

/// The old rows let go of the token before the new one takes it.
async fn write(tx: &mut Tx, writes: &mut [Write<'_>]) -> Attempt<Vec<Device>> {
    if writes.is_empty() {
        return Ok(Vec::new());
    }
    let retired = writes.iter_mut().flat_map(|write| {
        let now = write.register.now;
        std::mem::take(&mut write.retired).into_iter().map(move |retired| (retired, now))
    });
    let retired = retired.collect();
    retire(tx, retired).await?;
    dead::let_go(tx, writes.iter().filter_map(|write| write.lets_go).collect()).await?;
    let missing: Vec<usize> = (0..writes.len()).filter(|at| writes[*at].user.is_none()).collect();
    let names: Vec<_> = missing
        .iter()
        .map(|at| {
            let Register { registration, now, .. } = writes[*at].register;
            (registration.app, registration.user.as_str(), *now)
        })
        .collect();
    let context = Arc::clone(&tx.context);
    let users = ensure_users(tx.conn(), &context.ids, &names).await?;
    for (at, user) in missing.into_iter().zip(users) {
        writes[at].user = Some(user);
    }
    let mut columns = Columns::default();
    let mut tombstones = Vec::new();
    for write in writes.iter_mut() {
        // Never one that an earlier run took: by its number a row is overwritten.
        let id = write.target.unwrap_or_else(|| tx.context.ids.next_device(write.register.now).0);
        write.id = id;
        columns.push(write)?;
        if write.target.is_some() {
            // What was queued holds the old token or route: the gate reads the new one.
            tx.deny(DenyKey::Device(DeviceId(id)));
        }
        match write.user {
            Some(user) if !write.is_current => {
                tombstones.push((DeviceId(id), write.register.registration.app, user, write.register.now));
            }
            Some(user) if !write.reaches_alike => tx.changed.push((user, write.change())),
            _ => {}
        }
    }
    let kept: HashMap<i64, [i64; 3]> =
        columns.write(tx).await?.into_iter().map(|row| (row.0, [row.1, row.2, row.3])).collect();
    devices::log_tombstones(tx, tombstones).await?;
    let routes: Vec<i64> = writes.iter().map(|write| write.register.registration.route.0).collect();
    let routes = device_reads::routes(tx.conn(), routes).await?;
    let mut written = Vec::with_capacity(writes.len());
    for write in writes.iter() {
        let [created_at, observed_at, confirmed_at] =
            kept.get(&write.id).copied().ok_or_else(|| Fail::corrupt("a device row vanished"))?;
        let Registration { user, platform, kind, route, installation_id, details, .. } = &write.register.registration;
        let (credential, environment, bundle) = match routes.get(&route.0) {
            Some((credential, environment, bundle)) => {
                let known = Environment::from_code(*environment);
                let known = known.ok_or_else(|| Fail::corrupt(format!("environment {environment}")))?;
                (credential.clone(), known, bundle.clone())
            }
            None => (String::new(), Environment::None, String::new()),
        };
        written.push(Device {
            id: DeviceId(write.id),
            user: user.clone(),
            platform: *platform,
            kind: *kind,
            route: *route,
            credential,
            environment,
            bundle,
            installation_id: installation_id.clone(),
            details: details.clone(),
            active: write.is_current,
            retired_reason: (!write.is_current).then(|| MOVED.to_owned()),
            created_at: UnixMs(created_at),
            observed_at: UnixMs(observed_at),
            confirmed_at: UnixMs(confirmed_at),
            retired_at: (!write.is_current).then_some(write.register.now),
        });
    }
    Ok(written)
}

/// Rows for `device`.
#[derive(Default)]
struct Columns<'a> {
    id: Vec<i64>,
    app: Vec<i64>,
    platform: Vec<i16>,
    user: Vec<i64>,
    route: Vec<i64>,
    kind: Vec<i16>,
    installation: Vec<Option<&'a str>>,
    hash: Vec<&'a [u8]>,
    token: Vec<&'a [u8]>,
    locale: Vec<Option<&'a str>>,
    time_zone: Vec<Option<&'a str>>,
    app_version: Vec<Option<&'a str>>,
    os_version: Vec<Option<&'a str>>,
    permission: Vec<i16>,
    labels: Vec<String>,
    observed_at: Vec<i64>,
    confirmed_at: Vec<i64>,
    state: Vec<i16>,
    retired_reason: Vec<Option<&'static str>>,
    retired_at: Vec<Option<i64>>,
    created_at: Vec<i64>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, write: &Write<'a>) -> Attempt<()> {
        let Register { registration, hash, now } = write.register;
        let details = &registration.details;
        let user = write.user.ok_or_else(|| Fail::corrupt("a user's row vanished"))?;
        self.id.push(write.id);
        self.app.push(registration.app.0);
        self.platform.push(registration.platform.code());
        self.user.push(user.0);
        self.route.push(registration.route.0);
        self.kind.push(registration.kind as i16);
        self.installation.push(registration.installation_id.as_deref());
        self.hash.push(&hash[..]);
        self.token.push(registration.token.expose().as_bytes());
        self.locale.push(details.locale.as_ref().map(Locale::as_str));
        self.time_zone.push(details.time_zone.as_deref());
        self.app_version.push(details.app_version.as_deref());
        self.os_version.push(details.os_version.as_deref());
        self.permission.push(details.permission as i16);
        self.labels.push(serde_json::to_string(&details.labels)?);
        self.observed_at.push(registration.observed_at.0);
        self.confirmed_at.push(write.confirmed_at.0);
        self.state.push(if write.is_current { 1 } else { 3 });
        self.retired_reason.push((!write.is_current).then_some(MOVED));
        self.retired_at.push((!write.is_current).then_some(now.0));
        self.created_at.push(write.created_at.0);
        Ok(())
    }

    /// New rows and changed ones, which this also brings back to life, in one statement. Times never go back.
    /// Not an UPDATE that joins: a plan made while there were few devices might read all of them.
    async fn write(self, tx: &mut Tx) -> Attempt<Vec<(i64, i64, i64, i64)>> {
        Ok(constant!(
            (BigInt, BigInt, BigInt, BigInt);
            "INSERT INTO device AS d (id, app, platform, user_key, route, kind, installation_id, token_hash, \
             token_sealed, locale, time_zone, app_version, os_version, permission, labels, observed_at, confirmed_at, \
             state, retired_reason, retired_at, created_at) SELECT unnest($1), unnest($2), unnest($3), unnest($4), \
             unnest($5), unnest($6), unnest($7), unnest($8), unnest($9), unnest($10), unnest($11), unnest($12), \
             unnest($13), unnest($14), unnest($15), unnest($16), unnest($17), unnest($18), unnest($19), unnest($20), \
             unnest($21) \
             ON CONFLICT (id) DO UPDATE SET route = excluded.route, kind = excluded.kind, \
             installation_id = excluded.installation_id, token_hash = excluded.token_hash, \
             token_sealed = excluded.token_sealed, seal_key = 0, locale = excluded.locale, \
             time_zone = excluded.time_zone, app_version = excluded.app_version, os_version = excluded.os_version, \
             permission = excluded.permission, labels = excluded.labels, \
             observed_at = greatest(d.observed_at, excluded.observed_at), \
             confirmed_at = greatest(d.confirmed_at, excluded.confirmed_at), state = 1, retired_reason = NULL, \
             retired_at = NULL, hold_until = CASE WHEN d.doubted_at IS NULL THEN d.hold_until END, doubted_at = NULL \
             RETURNING d.id, d.created_at, d.observed_at, d.confirmed_at",
            Array<BigInt> => self.id, Array<BigInt> => self.app, Array<SmallInt> => self.platform,
            Array<BigInt> => self.user, Array<BigInt> => self.route, Array<SmallInt> => self.kind,
            Array<Nullable<Text>> => self.installation, Array<Binary> => self.hash, Array<Binary> => self.token,
            Array<Nullable<Text>> => self.locale, Array<Nullable<Text>> => self.time_zone,
            Array<Nullable<Text>> => self.app_version, Array<Nullable<Text>> => self.os_version,
            Array<SmallInt> => self.permission, Array<Text> => self.labels, Array<BigInt> => self.observed_at,
            Array<BigInt> => self.confirmed_at, Array<SmallInt> => self.state,
            Array<Nullable<Text>> => self.retired_reason, Array<Nullable<BigInt>> => self.retired_at,
            Array<BigInt> => self.created_at,
        )
        .load(tx.conn())
        .await?)
    }
}

/// Retires the devices seen longest ago beyond the limit, of users who have one more now. `spared` 0: never the one that
/// was just written; 1: that one as well.
async fn evict(tx: &mut Tx, writes: &[Write<'_>], spared: i64) -> Attempt<()> {
    let (mut users, mut kept, mut nows) = (Vec::new(), Vec::new(), HashMap::new());
    for write in writes {
        let is_one_more = write.is_current && (write.target.is_none() || write.revives || spared > 0);
        if let (true, Some(user)) = (is_one_more, write.user) {
            users.push(user.0);
            kept.push(if spared > 0 { 0 } else { write.id });
            nows.insert(user.0, write.register.now);
        }
    }
    if users.is_empty() {
        return Ok(());
    }
    let room = i64::try_from(MAX_DEVICES_PER_USER).unwrap_or(i64::MAX) - 1 + spared;
    // device_by_user
    let surplus: Vec<(i64, i64)> = constant!(
        (BigInt, BigInt);
        concat!(
            "SELECT e.user_key, d.id FROM unnest($1, $2) AS e(user_key, kept) CROSS JOIN LATERAL (SELECT id FROM device \
             WHERE user_key = e.user_key AND ",
            dead::is_active!(""),
            " AND id <> e.kept ORDER BY confirmed_at DESC, id DESC OFFSET $3 + 0) AS d"
        ),
        Array<BigInt> => users, Array<BigInt> => kept, BigInt => room,
    )
    .load(tx.conn())
    .await?;
    let surplus = surplus.into_iter().filter_map(|(user, device)| {
        let retired = Retired { user: UserKey(user), device: DeviceId(device), state: 2, reason: TOO_MANY_DEVICES };
        Some((retired, *nows.get(&user)?))
    });
    retire(tx, surplus.collect()).await
}

/// The person's time zone and language are the latest that any of their devices reported.
async fn report(tx: &mut Tx, writes: &[Write<'_>]) -> Attempt<()> {
    let (mut users, mut zones, mut locales, mut times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut reports: Vec<_> = writes.iter().filter(|write| write.is_current).collect();
    // In one order on every replica.
    reports.sort_unstable_by_key(|write| write.user);
    for write in reports {
        let Registration { details, observed_at, .. } = &write.register.registration;
        if let Some(user) = write.user
            && (details.time_zone.is_some() || details.locale.is_some())
        {
            users.push(user.0);
            zones.push(details.time_zone.as_deref());
            locales.push(details.locale.as_ref().map(Locale::as_str));
            times.push(observed_at.0);
        }
    }
    if users.is_empty() {
        return Ok(());
    }
    if !tx.changed.is_empty() {
        // All at once, in their order; those who are to be packed are locked in any case.
        let changed = tx.changed.iter().map(|(user, _)| *user).chain(users.iter().copied().map(UserKey));
        let changed: Vec<UserKey> = changed.collect();
        repack::lock(tx, changed.into_iter()).await?;
    }
    tx.execute(constant!(
        ();
        "UPDATE app_user SET time_zone = coalesce(e.time_zone, app_user.time_zone), \
         locale = coalesce(e.locale, app_user.locale), time_zone_at = e.at \
         FROM unnest($1, $2, $3, $4) AS e(id, time_zone, locale, at) \
         WHERE app_user.id = e.id AND coalesce(app_user.time_zone_at, 0) <= e.at",
        Array<BigInt> => users, Array<Nullable<Text>> => zones, Array<Nullable<Text>> => locales,
        Array<BigInt> => times,
    ))
    .await?;
    Ok(())
}
