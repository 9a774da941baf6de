//! NotifyEvent: from what a caller says happened to an event the store can take.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{Counter, Histogram, counter, histogram};

use crate::domain::content::{self, Content, Data};
use crate::domain::event_type::{OnMaybe, Ttl};
use crate::domain::ids::{AppKey, CollapseKey, DeviceId, EventType, IdempotencyKey, Topic, TypeVersionId, UserId};
use crate::domain::notification::{
    Accepted, Audience, Body, DEFAULT_TTL_MS, MAX_AHEAD_MS, MAX_DEVICE_IDS, MAX_TOPICS, MAX_TTL_MS, MAX_USER_IDS,
    NewEvent,
};
use crate::domain::sending::Priority;
use crate::domain::time::UnixMs;
use crate::domain::violation::{Violation, Violations};
use crate::planted;
use crate::render::{self, Templates, Variables};
use crate::runtime::Instant;
use crate::storage::{DeclaredType, StoreError};
use crate::telemetry::names;

use super::apps::App;
use super::canonical::{self, CanonicalEvent};
use super::{Call, Result, Service, ServiceError, fields};

/// The scope that everyone and large audiences need.
pub const BROADCAST_SCOPE: &str = "broadcast";
/// The longest `subject`, in bytes.
pub const MAX_SUBJECT_BYTES: usize = 256;
/// Where neither the event nor its type says.
const DEFAULT_TTL: Duration = Duration::from_millis(DEFAULT_TTL_MS.unsigned_abs());
/// How long an app is taken to have no declared types after the store said so: it spares nearly every event of such an
/// app a query. A first declaration by another process takes effect within this time, one of our own at once.
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
    /// For [`Service::rehearse`]: what is asked for, not a part of what is meant, and so not of the canonical form.
    pub dry_run: bool,
}

/// Said of `ttl`, or of `event_at` where the default or the type's TTL applies.
const TTL_ENDED: &str = "the TTL has already ended";

impl Service {
    /// Everything that can be said without the store. Apart from the rest, and boxed, for a future carries what it is given
    /// through every layer it passes: of thousands of calls under way each would be copied a dozen times.
    pub fn checked(&self, mut call: Call<'_>, input: NotifyEvent) -> Result<Box<Checked>> {
        if input.dry_run {
            call.violations.add("dry_run", "is for NotifyEvent only");
        }
        self.check_at(call, input, self.runtime.now())
    }

    fn check_at(&self, call: Call<'_>, input: NotifyEvent, now: UnixMs) -> Result<Box<Checked>> {
        let (begun, may_broadcast) = (self.runtime.instant(), call.may_broadcast);
        let (app, event, given) = check(call, input, now)?;
        if event.audience.everyone && !may_broadcast {
            return Err(ServiceError::PermissionDenied { scope: BROADCAST_SCOPE });
        }
        Ok(Box::new(Checked { app, event, given, now, begun }))
    }

    /// `Ok` means durable.
    pub async fn notify(&self, checked: Box<Checked>) -> Result<Accepted> {
        let begun = checked.begun;
        let accepted = self.accept(checked).await?;
        let meters = self.meters.get_or_init(Meters::new);
        meters.accept_seconds.record((self.runtime.instant() - begun).as_secs_f64());
        if !accepted.duplicate {
            meters.accepted.increment(1);
        }
        Ok(accepted)
    }

    async fn accept(&self, checked: Box<Checked>) -> Result<Accepted> {
        let ttl_given = checked.given.ttl;
        let (checked, _) = self.completed(checked).await?;
        self.limit(&checked.app).await?;
        let Checked { event, now, .. } = *checked;
        match self.store.accept(event, Arc::clone(&self.hand_off), now).await {
            Err(StoreError::AlreadyExpired) => {
                let field = if ttl_given { "ttl" } else { "event_at" };
                Err(ServiceError::Invalid(vec![Violation::new(field, TTL_ENDED)]))
            }
            answer => answer.map_err(|error| self.refused(error)),
        }
    }

    /// Everything up to the store: what is wrong with the event, and what its type decides.
    pub(super) async fn prepare(&self, call: Call<'_>, input: NotifyEvent, now: UnixMs) -> Result<Ready> {
        let checked = self.check_at(call, input, now)?;
        let (checked, templates) = self.completed(checked).await?;
        let Checked { app, event, .. } = *checked;
        Ok(Ready { app, event, templates })
    }

    /// With what the event's type decides.
    async fn completed(&self, mut checked: Box<Checked>) -> Result<(Box<Checked>, Option<Arc<Templates>>)> {
        let declared = match self.known_undeclared(checked.app.key) {
            Some(declared) => declared,
            None => self.declared(&checked.app, &checked.event.event_type).await?,
        };
        let version = standing(&checked.app, &checked.event.event_type, declared)?;
        let templates = match version {
            Some(version) => Some(self.templates(version).await?),
            None => None,
        };
        let Checked { event, given, now, .. } = &mut *checked;
        complete(event, given, version.zip(templates.as_deref()), *now)?;
        Ok((checked, templates))
    }
}

/// What every event counts: looked up by their names once, for that costs more than the counting.
pub(super) struct Meters {
    accept_seconds: Histogram,
    accepted: Counter,
}

impl Meters {
    fn new() -> Self {
        Self { accept_seconds: histogram!(names::ACCEPT_SECONDS), accepted: counter!(names::ACCEPTED) }
    }
}

/// An event in which nothing is wrong that can be found without the store.
pub struct Checked {
    app: Arc<App>,
    event: NewEvent,
    given: Given,
    now: UnixMs,
    begun: Instant,
}

/// An event that the store can take.
pub(super) struct Ready {
    pub app: Arc<App>,
    pub event: NewEvent,
    /// Of the type's standing version, where it is declared.
    pub templates: Option<Arc<Templates>>,
}

/// Apps known to have no declared event types.
#[derive(Default)]
pub(super) struct UndeclaredApps(Mutex<Undeclared>);

#[derive(Default)]
struct Undeclared {
    /// Each until when. Never longer than the configured apps.
    until: HashMap<AppKey, Instant>,
    /// Declarations made by this process: what was read before one must not be kept after it.
    declarations: u64,
}

impl UndeclaredApps {
    /// The app has a declared type now.
    pub(super) fn forget(&self, app: AppKey) {
        let mut known = self.0.lock().expect("no panic while held");
        known.declarations += 1;
        known.until.remove(&app);
    }
}

impl Service {
    /// Where the store said so a moment ago.
    fn known_undeclared(&self, app: AppKey) -> Option<DeclaredType> {
        let known = self.undeclared.0.lock().expect("no panic while held");
        let is_known = known.until.get(&app).is_some_and(|until| self.runtime.instant() < *until);
        is_known.then(DeclaredType::default)
    }

    async fn declared(&self, app: &App, event_type: &EventType) -> Result<DeclaredType> {
        let now = self.runtime.instant();
        let declarations = self.undeclared.0.lock().expect("no panic while held").declarations;
        let declared = self.store.event_type(app.key, event_type).await.map_err(|error| self.refused(error))?;
        if !declared.any_declared {
            let mut known = self.undeclared.0.lock().expect("no panic while held");
            if known.declarations == declarations {
                known.until.insert(app.key, now + UNDECLARED_FOR);
            }
        }
        Ok(declared)
    }
}

/// What the caller left to the type's defaults.
pub(super) struct Given {
    /// Inline content, which may leave fields to the templates.
    content: bool,
    priority: bool,
    ttl: bool,
    /// When the TTL begins.
    worth_from: UnixMs,
}

/// Fills in what the caller left open: from the declared type, else our own defaults.
pub(super) fn complete(
    event: &mut NewEvent,
    given: &Given,
    declared: Option<(TypeVersionId, &Templates)>,
    now: UnixMs,
) -> Result<()> {
    let mut violations = Violations::default();
    let templates = declared.map(|(_, templates)| templates);
    let definition = templates.map(Templates::definition);
    if !given.content && definition.is_none_or(|definition| definition.templates.is_empty()) {
        // Or a push would be silent by mistake.
        let why =
            if definition.is_some() { "the event type has no templates" } else { "the event type is not declared" };
        violations.add("content", format!("is required: {why}"));
    }
    if !given.ttl {
        let ttl = definition.and_then(|definition| definition.ttl).map_or(DEFAULT_TTL, Ttl::duration);
        event.expires_at = given.worth_from.plus(ttl);
        // With a key the store says so, unless the key was answered before.
        if event.expires_at <= now && (event.idempotency.is_none() || !violations.is_empty()) {
            violations.add("event_at", TTL_ENDED);
        }
    }
    violations.finish().map_err(ServiceError::Invalid)?;
    if !given.priority {
        let by_type = definition.and_then(|definition| definition.priority);
        let silent = render::is_silent(&event.body.content, templates);
        event.priority = by_type.unwrap_or(if silent { Priority::Normal } else { Priority::High });
    }
    let Some((version, templates)) = declared else { return Ok(()) };
    let definition = templates.definition();
    event.type_version = Some(version);
    event.default_opt_in = definition.default_opt_in();
    event.lane = definition.lane();
    event.on_maybe = definition.on_maybe;
    if event.collapse_key.is_none() && definition.collapse_key.is_some() {
        let (data, subject) = (&event.body.data, event.body.subject.as_deref());
        let actor = event.actor.as_ref().map(UserId::as_str);
        match templates.collapse_key(&Variables::new(data, actor, subject, event.event_type.as_str())) {
            Ok(key) => event.collapse_key = key,
            // It stands alone then, which loses nothing.
            Err(problem) => templates.report(&[problem]),
        }
    }
    if templates.reads_actor()
        && let Some(actor) = &event.actor
    {
        Arc::make_mut(&mut event.body).actor = Some(actor.to_string());
    }
    Ok(())
}

/// The version that stands, `None` where the app takes undeclared types, or NOT_FOUND: once an app has declared its
/// types, a typo must not slip past an opt-out.
fn standing(app: &App, event_type: &EventType, declared: DeclaredType) -> Result<Option<TypeVersionId>> {
    if declared.current.is_some() || !declared.any_declared || app.allow_undeclared_types {
        return Ok(declared.current);
    }
    let name = event_type.to_string();
    Err(ServiceError::UnknownEventType { name, nearest: declared.nearest })
}

/// Everything that can be said without the store. What the event type decides is filled in by [`complete`].
pub(super) fn check(mut call: Call<'_>, input: NotifyEvent, now: UnixMs) -> Result<(Arc<App>, NewEvent, Given)> {
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
    let given_content = input.content.is_some();
    let content = input.content.unwrap_or_default();
    content.check("content", violations);
    let collapse_key = (!input.collapse_key.is_empty())
        .then(|| violations.take(CollapseKey::parse("collapse_key", &input.collapse_key)))
        .flatten();
    let labels = fields::labels(violations, input.labels);
    if input.max_audience == Some(0) {
        violations.add("max_audience", "must be 1 or more");
    }
    // A repeat gets its first answer however late it comes; the store says so when it was none.
    let may_repeat = idempotency_key.is_some() && violations.is_empty();
    let times = times(violations, input.ttl_ms, input.event_at, input.not_before, now, may_repeat);
    let app = call.checked()?;

    let event_type = event_type.expect("a missing event type is a violation");
    let default_priority = if content.is_silent() { Priority::Normal } else { Priority::High };
    let priority = input.priority.unwrap_or(default_priority);
    let body = Arc::new(Body { content, data: input.data, subject, actor: None, labels });
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
        type_version: None,
        default_opt_in: true,
        lane: None,
        on_maybe: OnMaybe::default(),
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
    let given = Given {
        content: given_content,
        priority: input.priority.is_some(),
        ttl: input.ttl_ms.is_some(),
        worth_from: times.worth_from,
    };
    Ok((app, event, given))
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
    worth_from: UnixMs,
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
    may_repeat: bool,
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
    let not_before = not_before.filter(|_| !planted::is("ttl-runs-while-held-back"));
    let worth_from = not_before.map_or(happened_at, |not_before| not_before.max(happened_at));
    let late = if planted::is("expiry-off-by-an-hour") { 3_600_000 } else { 0 };
    let expires_at = UnixMs(worth_from.0.saturating_add(ttl).saturating_add(late).min(UnixMs::MAX.0));
    // Without one it is the event type's to say.
    if ttl_ms.is_some() && ttl > 0 && expires_at <= now && !may_repeat {
        violations.add("ttl", TTL_ENDED);
    }
    Times { event_at: happened_at, worth_from, expires_at }
}

#[cfg(test)]
mod tests;
