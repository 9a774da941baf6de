//! Rows to domain types and back. Numbers that no version of ours wrote are `Corrupt`, never a guess.

use std::fmt::Write as _;
use std::sync::Arc;

use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};

use super::fail::{Attempt, Fail};
use crate::domain::consent::DeviceState;
use crate::domain::device::{Device, DeviceDetails};
use crate::domain::event_type::OnMaybe;
use crate::domain::ids::{
    AppKey, CollapseKey, DeviceId, EventType, JobId, Locale, NotificationId, RouteId, TypeVersionId, UserId, UserKey,
};
use crate::domain::notification::{Job, Notification};
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::platform::{DeviceKind, DeviceToken, Environment, Lane, Permission, Platform};
use crate::domain::sending::Priority;
use crate::domain::targets::{self, Progress};
use crate::domain::time::UnixMs;

/// Numbers as a JSON array, for `json_each(?)`.
pub(super) fn json_ids(ids: impl Iterator<Item = i64>) -> String {
    let mut json = String::from("[");
    for id in ids {
        if json.len() > 1 {
            json.push(',');
        }
        let _ = write!(json, "{id}");
    }
    json.push(']');
    json
}

pub(super) fn flag(stored: i16) -> bool {
    stored != 0
}

pub(super) fn choice(stored: Option<i16>) -> Option<bool> {
    stored.map(flag)
}

pub(super) fn device_state(stored: i16) -> Attempt<DeviceState> {
    match stored {
        1 => Ok(DeviceState::Active),
        2 => Ok(DeviceState::Retired),
        3 => Ok(DeviceState::Moved),
        other => Err(Fail::corrupt(format!("device state {other}"))),
    }
}

pub(super) fn lane(stored: i16) -> Attempt<Lane> {
    Lane::from_code(stored).ok_or_else(|| Fail::corrupt(format!("lane {stored}")))
}

/// `seal_key` 0: the token's bytes as they are, the only way of this version.
pub(super) fn token(seal_key: i16, sealed: Vec<u8>) -> Attempt<DeviceToken> {
    if seal_key != 0 {
        return Err(Fail::corrupt(format!("a token sealed by key {seal_key}")));
    }
    let text = String::from_utf8(sealed).map_err(|_| Fail::corrupt("a token is not text"))?;
    Ok(DeviceToken::trusted(&text))
}

pub(super) const fn priority_code(priority: Priority) -> i16 {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
    }
}

fn priority(stored: i16) -> Attempt<Priority> {
    match stored {
        0 => Ok(Priority::High),
        1 => Ok(Priority::Normal),
        other => Err(Fail::corrupt(format!("priority {other}"))),
    }
}

/// The columns of [`NotificationRow`], from `notification`.
macro_rules! notification_columns {
    () => {
        "id, app, event_type, type_version, default_opt_in, lane, priority, collapse_key, actor, content, event_at, \
         accepted_at, not_before, expires_at, cancelled_at, people, on_maybe"
    };
}
pub(super) use notification_columns;

pub(super) type NotificationTypes = (
    BigInt,
    BigInt,
    Text,
    Nullable<BigInt>,
    SmallInt,
    SmallInt,
    SmallInt,
    Nullable<Text>,
    Nullable<BigInt>,
    Text,
    BigInt,
    BigInt,
    Nullable<BigInt>,
    BigInt,
    Nullable<BigInt>,
    Nullable<BigInt>,
    SmallInt,
);

#[derive(diesel::Queryable)]
pub(super) struct NotificationRow {
    pub id: i64,
    app: i64,
    event_type: String,
    type_version: Option<i64>,
    default_opt_in: i16,
    lane: i16,
    priority: i16,
    collapse_key: Option<String>,
    actor: Option<i64>,
    pub content: String,
    event_at: i64,
    accepted_at: i64,
    not_before: Option<i64>,
    expires_at: i64,
    cancelled_at: Option<i64>,
    pub people: Option<i64>,
    on_maybe: i16,
}

impl NotificationRow {
    pub fn into_domain(self) -> Attempt<Notification> {
        Ok(Notification {
            id: NotificationId(self.id),
            app: AppKey(self.app),
            event_type: EventType::trusted(&self.event_type),
            type_version: self.type_version.map(TypeVersionId),
            default_opt_in: flag(self.default_opt_in),
            lane: lane(self.lane)?,
            priority: priority(self.priority)?,
            on_maybe: OnMaybe::from_code(self.on_maybe),
            collapse_key: self.collapse_key.as_deref().map(CollapseKey::trusted),
            actor: self.actor.map(UserKey),
            body: Arc::new(serde_json::from_str(&self.content)?),
            event_at: UnixMs(self.event_at),
            accepted_at: UnixMs(self.accepted_at),
            not_before: self.not_before.map(UnixMs),
            expires_at: UnixMs(self.expires_at),
            cancelled_at: self.cancelled_at.map(UnixMs),
        })
    }
}

/// The columns of [`JobRow`], from `job`.
macro_rules! job_columns {
    () => {
        "id, notification_id, route, lane, format, ready_at, due_at, fence, attempt, claims, first_attempt_at, \
         targets, progress"
    };
}
pub(super) use job_columns;

pub(super) type JobTypes = (
    BigInt,
    BigInt,
    BigInt,
    SmallInt,
    SmallInt,
    BigInt,
    BigInt,
    BigInt,
    Integer,
    Integer,
    Nullable<BigInt>,
    Binary,
    Nullable<Binary>,
);

#[derive(diesel::Queryable)]
pub(super) struct JobRow {
    pub id: i64,
    pub notification_id: i64,
    pub route: i64,
    lane: i16,
    format: i16,
    ready_at: i64,
    pub due_at: i64,
    fence: i64,
    attempt: i32,
    claims: i32,
    first_attempt_at: Option<i64>,
    targets: Vec<u8>,
    progress: Option<Vec<u8>>,
}

impl JobRow {
    pub fn to_domain(&self) -> Attempt<Job> {
        let targets = targets::unpack(self.format, &self.targets)?;
        let progress = Progress::from_bytes(self.progress.as_deref().unwrap_or_default(), targets.len());
        Ok(Job {
            id: JobId(self.id),
            notification: NotificationId(self.notification_id),
            route: RouteId(self.route),
            lane: lane(self.lane)?,
            targets,
            progress,
            attempt: count(self.attempt)?,
            claims: count(self.claims)?,
            fence: self.fence,
            ready_at: UnixMs(self.ready_at),
            first_attempt_at: self.first_attempt_at.map(UnixMs),
        })
    }
}

pub(super) fn count(stored: i32) -> Attempt<u32> {
    u32::try_from(stored).map_err(|_| Fail::corrupt("a negative count"))
}

/// Counters saturate: they guard and explain, nothing is computed from the last one.
pub(super) fn stored_count(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// [`DeviceRow`]s, with the part from WHERE on; before it, in brackets, where state, reason and time are elsewhere than in
/// the device's row.
macro_rules! select_devices {
    ($tail:literal) => {
        $crate::storage::rows::select_devices!(["d.state, d.retired_reason, d.retired_at"] $tail)
    };
    ([$($state:tt)+] $($tail:tt)+) => {
        concat!(
            "SELECT d.id, d.app, d.platform, d.user_key, d.route, d.kind, d.installation_id, d.locale, \
             d.time_zone, d.app_version, d.os_version, d.permission, d.labels, d.observed_at, d.confirmed_at, ",
            $($state)+,
            ", d.created_at, u.external_id, coalesce(r.credential, ''), \
             CAST(coalesce(r.environment, 0) AS SMALLINT), coalesce(r.bundle, '') \
             FROM device d JOIN app_user u ON u.id = d.user_key LEFT JOIN route r ON r.id = d.route ",
            $($tail)+
        )
    };
}
pub(super) use select_devices;

pub(super) type DeviceTypes = (
    BigInt,
    BigInt,
    SmallInt,
    BigInt,
    BigInt,
    SmallInt,
    Nullable<Text>,
    Nullable<Text>,
    Nullable<Text>,
    Nullable<Text>,
    Nullable<Text>,
    SmallInt,
    Text,
    BigInt,
    BigInt,
    SmallInt,
    Nullable<Text>,
    Nullable<BigInt>,
    BigInt,
    Text,
    Text,
    SmallInt,
    Text,
);

#[derive(diesel::Queryable)]
pub(super) struct DeviceRow {
    pub id: i64,
    pub app: i64,
    pub platform: i16,
    pub user_key: i64,
    pub route: i64,
    pub kind: i16,
    pub installation_id: Option<String>,
    pub locale: Option<String>,
    pub time_zone: Option<String>,
    pub app_version: Option<String>,
    pub os_version: Option<String>,
    pub permission: i16,
    pub labels: String,
    pub observed_at: i64,
    pub confirmed_at: i64,
    /// 1 active, 2 retired, 3 moved; on Postgres also [`super::postgres`]'s 4, retired in place.
    pub state: i16,
    pub retired_reason: Option<String>,
    pub retired_at: Option<i64>,
    pub created_at: i64,
    pub user: String,
    credential: String,
    environment: i16,
    bundle: String,
}

impl DeviceRow {
    pub fn is_active(&self) -> bool {
        self.state == 1
    }

    pub fn into_domain(self) -> Attempt<Device> {
        let platform =
            Platform::from_code(self.platform).ok_or_else(|| Fail::corrupt(format!("platform {}", self.platform)))?;
        let environment = Environment::from_code(self.environment)
            .ok_or_else(|| Fail::corrupt(format!("environment {}", self.environment)))?;
        Ok(Device {
            id: DeviceId(self.id),
            user: UserId::trusted(&self.user),
            platform,
            kind: kind(self.kind)?,
            route: RouteId(self.route),
            credential: self.credential,
            environment,
            bundle: self.bundle,
            installation_id: self.installation_id,
            details: DeviceDetails {
                locale: self.locale.as_deref().map(Locale::trusted),
                time_zone: self.time_zone,
                app_version: self.app_version,
                os_version: self.os_version,
                permission: Permission::from_code(self.permission),
                labels: serde_json::from_str(&self.labels)?,
            },
            active: self.state == 1,
            retired_reason: self.retired_reason,
            created_at: UnixMs(self.created_at),
            observed_at: UnixMs(self.observed_at),
            confirmed_at: UnixMs(self.confirmed_at),
            retired_at: self.retired_at.map(UnixMs),
        })
    }
}

fn kind(stored: i16) -> Attempt<DeviceKind> {
    match stored {
        1 => Ok(DeviceKind::Alert),
        other => Err(Fail::corrupt(format!("device kind {other}"))),
    }
}

/// Pauses as they are stored: by name, since when, and why.
pub(super) fn pauses(found: Vec<(String, i64, String)>) -> Vec<Pause> {
    let mut pauses = Vec::with_capacity(found.len());
    for (name, since, reason) in found {
        let Some(scope) = PauseScope::parse(&name) else {
            // A newer version's: it cannot be obeyed, and must not stop the rest.
            tracing::error!(name, "a pause cannot be read and is not obeyed");
            continue;
        };
        pauses.push(Pause { scope, since: UnixMs(since), reason });
    }
    pauses
}
