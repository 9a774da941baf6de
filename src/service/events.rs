//! NotifyEvent: from what a caller says happened to an event the store can take.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::domain::content::{self, Content, Data};
use crate::domain::ids::{AppKey, CollapseKey, DeviceId, EventType, IdempotencyKey, Topic, UserId};
use crate::domain::notification::{
    Accepted, Audience, Body, DEFAULT_TTL_MS, MAX_AHEAD_MS, MAX_DEVICE_IDS, MAX_TOPICS, MAX_TTL_MS, MAX_USER_IDS,
    NewEvent,
};
use crate::domain::sending::Priority;
use crate::domain::time::UnixMs;
use crate::domain::violation::{Violation, Violations};
use crate::runtime::Instant;
use crate::storage::DeclaredType;

use super::apps::App;
use super::canonical::{self, CanonicalEvent};
use super::{Call, Result, Service, ServiceError, fields};

/// The scope that everyone and large audiences need.
pub const BROADCAST_SCOPE: &str = "broadcast";
/// The longest `subject`, in bytes.
pub const MAX_SUBJECT_BYTES: usize = 256;
/// How long an app is taken to have no declared types after the store said so: it spares nearly every event of such an
/// app a query. The first declaration takes effect within this time.
const UNDECLARED_FOR: Duration = Duration::from_secs(1);

/// An event as it arrived; empty texts mean absent.
#[derive(Clone, Default)]
pub struct NotifyEvent {
    pub event_type: String,
    pub idempotency_key: String,
    pub user_ids: Vec<String>,
    pub topics: Vec<String>,
    pub device_ids: Vec<String>,
    pub everyone: bool,
    pub actor_id: String,
    pub subject: String,
    pub data: Data,
    pub content: Option<Content>,
    pub priority: Option<Priority>,
    pub ttl_ms: Option<i64>,
    pub collapse_key: String,
    pub event_at: Option<UnixMs>,
    pub not_before: Option<UnixMs>,
    pub labels: BTreeMap<String, String>,
    pub max_audience: Option<u32>,
}

impl Service {
    /// `Ok` means durable.
    pub async fn notify(&self, call: Call<'_>, input: NotifyEvent) -> Result<Accepted> {
        let now = self.runtime.now();
        let may_broadcast = call.may_broadcast;
        let (app, mut event) = check(call, input, now)?;
        if event.audience.everyone && !may_broadcast {
            return Err(ServiceError::PermissionDenied { scope: BROADCAST_SCOPE });
        }
        let declared = self.declared(app, &event.event_type).await?;
        event.default_opt_in = default_opt_in(app, &event.event_type, declared)?;
        self.store.accept(event, Arc::clone(&self.hand_off), now).await.map_err(|error| self.refused(error))
    }
}

/// Apps known to have no declared event types, each until when. Never longer than the configured apps.
#[derive(Default)]
pub(super) struct UndeclaredApps(Mutex<HashMap<AppKey, Instant>>);

impl Service {
    async fn declared(&self, app: &App, event_type: &EventType) -> Result<DeclaredType> {
        let now = self.runtime.instant();
        if self.undeclared.0.lock().expect("no panic while held").get(&app.key).is_some_and(|until| now < *until) {
            return Ok(DeclaredType::default());
        }
        let declared = self.store.event_type(app.key, event_type).await.map_err(|error| self.refused(error))?;
        if !declared.any_declared {
            self.undeclared.0.lock().expect("no panic while held").insert(app.key, now + UNDECLARED_FOR);
        }
        Ok(declared)
    }
}

/// The type's default opt-in, or NOT_FOUND: once an app has declared its types, a typo must not slip past an opt-out.
fn default_opt_in(app: &App, event_type: &EventType, declared: DeclaredType) -> Result<bool> {
    if let Some(default) = declared.default_opt_in {
        return Ok(default);
    }
    if !declared.any_declared || app.allow_undeclared_types {
        return Ok(true);
    }
    let name = event_type.to_string();
    Err(ServiceError::UnknownEventType { name, nearest: declared.nearest })
}

/// Everything that can be said without the store. The type's default opt-in is filled in later.
fn check(mut call: Call<'_>, input: NotifyEvent, now: UnixMs) -> Result<(&App, NewEvent)> {
    let may_broadcast = call.may_broadcast;
    let violations = &mut call.violations;
    let event_type = violations.take(EventType::parse("event_type", &input.event_type));
    let idempotency_key = (!input.idempotency_key.is_empty())
        .then(|| violations.take(IdempotencyKey::parse("idempotency_key", &input.idempotency_key)))
        .flatten();
    let audience = audience(violations, &input);
    let actor = fields::optional_user(violations, "actor_id", &input.actor_id);
    let subject = fields::optional_line(violations, "subject", input.subject, MAX_SUBJECT_BYTES);
    if !violations.names("data") {
        content::check_data("data", &input.data, violations);
    }
    // Declared types bring their own words one day; until then even they need inline content, or a push would be
    // silent by mistake.
    if input.content.is_none() {
        violations.add("content", "is required");
    }
    let content = input.content.unwrap_or_default();
    content.check("content", violations);
    let collapse_key = (!input.collapse_key.is_empty())
        .then(|| violations.take(CollapseKey::parse("collapse_key", &input.collapse_key)))
        .flatten();
    let labels = fields::labels(violations, input.labels);
    if input.max_audience == Some(0) {
        violations.add("max_audience", "must be 1 or more");
    }
    let times = times(violations, input.ttl_ms, input.event_at, input.not_before, now);
    let app = call.checked()?;

    let event_type = event_type.expect("a missing event type is a violation");
    let default_priority = if content.is_silent() { Priority::Normal } else { Priority::High };
    let priority = input.priority.unwrap_or(default_priority);
    let body = Arc::new(Body { content, data: input.data, subject, labels });
    let idempotency = idempotency_key.map(|key| {
        let hash = canonical::hash(&CanonicalEvent {
            app: &app.id,
            event_type: &event_type,
            audience: &audience,
            actor: actor.as_ref(),
            body: &body,
            priority,
            ttl_ms: input.ttl_ms.unwrap_or(DEFAULT_TTL_MS),
            collapse_key: collapse_key.as_ref(),
            event_at: input.event_at,
            not_before: input.not_before,
            max_audience: input.max_audience,
        });
        (key, hash)
    });
    let event = NewEvent {
        app: app.key,
        event_type,
        default_opt_in: true,
        idempotency,
        audience,
        actor,
        body,
        priority,
        collapse_key,
        event_at: times.event_at,
        not_before: input.not_before,
        expires_at: times.expires_at,
        max_audience: input.max_audience,
        may_broadcast,
    };
    Ok((app, event))
}

/// Sorted and distinct; limits count what was given.
fn audience(violations: &mut Violations, input: &NotifyEvent) -> Audience {
    let mut count = |field: &str, given: usize, max: usize| {
        if given > max {
            violations.add(field, format!("has {given} entries, at most {max} are allowed"));
        }
    };
    count("user_ids", input.user_ids.len(), MAX_USER_IDS);
    count("topics", input.topics.len(), MAX_TOPICS);
    count("device_ids", input.device_ids.len(), MAX_DEVICE_IDS);
    let audience = Audience {
        user_ids: ids(violations, "user_ids", &input.user_ids, MAX_USER_IDS, UserId::parse),
        topics: ids(violations, "topics", &input.topics, MAX_TOPICS, Topic::parse),
        device_ids: ids(violations, "device_ids", &input.device_ids, MAX_DEVICE_IDS, |field, text| {
            DeviceId::parse_public(text).ok_or_else(|| Violation::new(field, "is not a device_id"))
        }),
        everyone: input.everyone,
    };
    if !input.everyone && input.user_ids.is_empty() && input.topics.is_empty() && input.device_ids.is_empty() {
        violations.add("user_ids", "an audience is required: user_ids, topics, device_ids or everyone");
    }
    audience
}

fn ids<T: Ord>(
    violations: &mut Violations,
    field: &str,
    texts: &[String],
    max: usize,
    parse: impl Fn(&str, &str) -> Result<T, Violation>,
) -> Vec<T> {
    let mut ids = Vec::with_capacity(texts.len().min(max));
    for (at, text) in texts.iter().take(max).enumerate() {
        match parse(field, text) {
            Ok(id) => ids.push(id),
            Err(violation) => violations.add(format!("{field}[{at}]"), violation.description),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

struct Times {
    event_at: UnixMs,
    expires_at: UnixMs,
}

/// The TTL runs from the latest of event time (else now) and `not_before`. One that has already ended is refused: the
/// event would be accepted only to expire.
fn times(
    violations: &mut Violations,
    ttl_ms: Option<i64>,
    event_at: Option<UnixMs>,
    not_before: Option<UnixMs>,
    now: UnixMs,
) -> Times {
    let farthest = now.0.saturating_add(MAX_AHEAD_MS);
    for (field, at) in [("event_at", event_at), ("not_before", not_before)] {
        if at.is_some_and(|at| at.0 > farthest) {
            violations.add(field, "is more than a year ahead of now");
        }
    }
    let happened_at = event_at.unwrap_or(now);
    let ttl = ttl_ms.unwrap_or(DEFAULT_TTL_MS);
    if ttl <= 0 {
        violations.add("ttl", "must be more than 0");
    } else if ttl > MAX_TTL_MS {
        violations.add("ttl", "is longer than 28 days");
    }
    let worth_from = not_before.map_or(happened_at, |not_before| not_before.max(happened_at));
    let expires_at = UnixMs(worth_from.0.saturating_add(ttl).min(UnixMs::MAX.0));
    if ttl > 0 && expires_at <= now {
        let field = if ttl_ms.is_some() { "ttl" } else { "event_at" };
        violations.add(field, "the TTL has already ended");
    }
    Times { event_at: happened_at, expires_at }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
