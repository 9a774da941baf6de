//! NotifyEvent with `dry_run`: what would be sent to whom, and nothing done.
//!
//! The same parts decide as for a real event: the checks and the type's defaults ([`super::events`]), the store's way of
//! meeting an audience's people, the plan of the gates, the rendering and the senders' encoding. What differs is that
//! nothing is written and everybody is met here, page by page, also of a large audience. Pages are read as callers' reads
//! are, so the engine goes first; when the caller hangs up, the reading ends with the page at hand.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::domain::consent::EventRules;
use crate::domain::ids::{AppKey, DeviceId, IdempotencyKey, NotificationId, RouteId, UserId, UserKey};
use crate::domain::notification::{NewEvent, SMALL_AUDIENCE, TargetFacts};
use crate::domain::outcome::ResultCode;
use crate::domain::plan::{self, Person, plan};
use crate::domain::platform::{Lane, RouteSpec};
use crate::domain::sending::SendOptions;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::render::{self, Templates, Variant};
use crate::storage::StoreError;

use super::event_types::Payload;
use super::events::{BROADCAST_SCOPE, NotifyEvent, Ready};
use super::{Call, Result, Sending, Service, ServiceError};

/// People of whom samples are given.
pub const SAMPLE_PEOPLE: usize = 50;
/// Devices of one person in the samples.
pub const SAMPLE_DEVICES: usize = 10;
/// Payloads of all samples, in bytes: many clients take messages of 4 MiB at most.
pub const SAMPLE_BYTES: usize = 1024 * 1024;
/// The most people counted.
pub const MAX_PEOPLE: u64 = 2_000_000;
/// Dry runs for large audiences at once: they read a lot.
pub const MAX_LARGE: usize = 4;

/// What an event would come to.
#[derive(Debug)]
pub struct Rehearsal {
    /// Distinct, before the gates.
    pub people: u64,
    pub lane: Lane,
    /// Devices by reason; people suppressed as a whole count once.
    pub suppressed: BTreeMap<&'static str, u64>,
    /// Devices by route, sorted; `None`: a route that is not in the configuration.
    pub targets: Vec<(Option<RouteSpec>, u64)>,
    pub samples: Vec<Sample>,
    /// There are more people than [`MAX_PEOPLE`].
    pub partial: bool,
}

/// What becomes of one device, or of a person suppressed as a whole.
#[derive(Debug)]
pub struct Sample {
    pub user: UserId,
    pub device: Option<DeviceId>,
    pub decision: Decision,
}

#[derive(Debug)]
pub enum Decision {
    Suppressed(ResultCode),
    Send {
        /// Whose words it gets; empty: those without a language.
        locale: String,
        /// `None` where this process has no sender for the route.
        payload: Option<Payload>,
    },
}

/// Bounds the large dry runs of a process.
pub(super) struct LargeDryRuns(Semaphore);

impl Default for LargeDryRuns {
    fn default() -> Self {
        Self(Semaphore::new(MAX_LARGE))
    }
}

impl Service {
    /// What [`Service::notify`] would do with the same event now.
    pub async fn rehearse(&self, mut call: Call<'_>, mut input: NotifyEvent) -> Result<Rehearsal> {
        let now = self.runtime.now();
        let may_read = call.may_read;
        // Checked, and then forgotten: it is not looked up, so an event that is over is over.
        let key = std::mem::take(&mut input.idempotency_key);
        if !key.is_empty() {
            call.violations.take(IdempotencyKey::parse("idempotency_key", &key));
        }
        input.dry_run = false;
        let Ready { app, event, templates, .. } = self.prepare(call, input, now).await?;
        let met = self.meet(&event, now).await?;
        let samples =
            if may_read { self.samples(app.key, &event, templates.as_deref(), &met, now).await? } else { Vec::new() };
        let apps = self.apps();
        let mut targets: Vec<(Option<RouteSpec>, u64)> =
            met.targets.iter().map(|(route, count)| (apps.route(*route).cloned(), *count)).collect();
        targets.sort();
        Ok(Rehearsal {
            people: met.people,
            lane: event.lane.unwrap_or(if met.large { Lane::Bulk } else { Lane::Interactive }),
            suppressed: met.suppressed,
            targets,
            samples,
            partial: met.partial,
        })
    }

    /// Everybody, counted; the first of them kept.
    async fn meet(&self, event: &NewEvent, now: UnixMs) -> Result<Met> {
        let refused = |error| self.refused(error);
        let resolved = self.store.resolve_audience(event.app, &event.audience, event.actor.as_ref()).await;
        let resolved = resolved.map_err(refused)?;
        let rules = EventRules {
            default_opt_in: event.default_opt_in,
            actor: resolved.actor,
            expires_at: event.expires_at,
            cancelled: false,
        };
        let mut met = Met { people: resolved.unknown.len() as u64, rules: Some(rules), ..Met::default() };
        if !resolved.unknown.is_empty() {
            // Their rows would be made, and would have nothing else.
            met.suppressed.insert(ResultCode::NoDevice.name(), met.people);
        }
        let mut after = UserKey(0);
        let mut place = None;
        loop {
            let limit = SMALL_AUDIENCE + 1;
            let page = self.store.audience_page(event.app, &event.event_type, &resolved.audience, after, limit).await;
            let mut page = page.map_err(refused)?;
            for (_, device) in page.people.iter_mut().flat_map(|person| &mut person.devices) {
                device.route_known = self.hand_off.knows_route(device.route);
            }
            if let Some(list) = self.hand_off.allow_list(event.app) {
                let targets = plan::targets(&page.people);
                let known = self.store.names_and_labels(&targets).await.map_err(refused)?;
                plan::restrict(&mut page.people, &list, &targets, &known);
            }
            met.count(&page.people, &rules, now);
            if !met.large && (event.audience.everyone || met.people > SMALL_AUDIENCE as u64) {
                met.large = true;
                if !event.may_broadcast {
                    return Err(ServiceError::PermissionDenied { scope: BROADCAST_SCOPE });
                }
                let free = self.large_dry_runs.0.try_acquire();
                place = Some(free.map_err(|_| {
                    ServiceError::Store(StoreError::Overloaded { what: "too many dry runs for many people" })
                })?);
            }
            if let Some(limit) = event.max_audience
                && met.people > u64::from(limit)
            {
                return Err(ServiceError::AudienceTooLarge { limit: u64::from(limit) });
            }
            if page.done {
                break;
            }
            if met.people >= MAX_PEOPLE {
                met.partial = true;
                break;
            }
            after = page.cursor;
        }
        drop(place);
        met.unknown = resolved.unknown;
        Ok(met)
    }

    async fn samples(
        &self,
        app: AppKey,
        event: &NewEvent,
        templates: Option<&Templates>,
        met: &Met,
        now: UnixMs,
    ) -> Result<Vec<Sample>> {
        let rules = met.rules.expect("set when people were met");
        let users: Vec<UserKey> = met.sampled.iter().map(|person| person.user).collect();
        let names = self.store.user_names(&users).await.map_err(|error| self.refused(error))?;
        let planned = plan(&met.sampled, &rules, now);
        let mut targets: Vec<Target> = planned.jobs.into_iter().flat_map(|(_, targets)| targets).collect();
        targets.sort_unstable();
        let facts = self.store.gate_facts(NotificationId(0), &event.event_type, &targets).await;
        let facts = facts.map_err(|error| self.refused(error))?.facts;

        let mut decided: Vec<(UserKey, DeviceId, Result<TargetFacts, ResultCode>)> =
            planned.suppressed.iter().map(|entry| (entry.user, entry.device, Err(entry.code))).collect();
        // One that was deleted since the page was read is left out.
        decided.extend(facts.into_iter().flatten().map(|facts| (facts.target.user, facts.target.device, Ok(facts))));
        decided.sort_unstable_by_key(|(user, device, _)| (*user, *device));

        let mut writer = PayloadWriter::new(self, app, event, templates, now);
        let mut samples = Vec::new();
        let mut of_person = (UserKey(0), 0_usize);
        for (user, device, decision) in decided {
            of_person = if of_person.0 == user { (user, of_person.1 + 1) } else { (user, 1) };
            let name = users.binary_search(&user).ok().and_then(|at| names.get(at).cloned().flatten());
            let Some(name) = name else { continue };
            if of_person.1 > SAMPLE_DEVICES {
                continue;
            }
            let decision = match decision {
                Err(code) => Decision::Suppressed(code),
                Ok(facts) => writer.decide(&facts),
            };
            if writer.bytes > SAMPLE_BYTES {
                return Ok(samples);
            }
            samples.push(Sample { user: name, device: (device.0 != 0).then_some(device), decision });
        }
        let room = SAMPLE_PEOPLE.saturating_sub(users.len());
        samples.extend(met.unknown.iter().take(room).map(|user| Sample {
            user: user.clone(),
            device: None,
            decision: Decision::Suppressed(ResultCode::NoDevice),
        }));
        Ok(samples)
    }
}

#[derive(Default)]
struct Met {
    people: u64,
    large: bool,
    partial: bool,
    suppressed: BTreeMap<&'static str, u64>,
    targets: HashMap<RouteId, u64>,
    rules: Option<EventRules>,
    /// The first of them, ascending.
    sampled: Vec<Person>,
    /// Without a row.
    unknown: Vec<UserId>,
}

impl Met {
    fn count(&mut self, people: &[Person], rules: &EventRules, now: UnixMs) {
        self.people += people.len() as u64;
        let planned = plan(people, rules, now);
        for (route, targets) in &planned.jobs {
            *self.targets.entry(*route).or_default() += targets.len() as u64;
        }
        for entry in &planned.suppressed {
            *self.suppressed.entry(entry.code.name()).or_default() += 1;
        }
        let room = SAMPLE_PEOPLE.saturating_sub(self.sampled.len());
        self.sampled.extend(people.iter().take(room).cloned());
    }
}

/// Renders and encodes each variant once, as a worker does.
struct PayloadWriter<'a> {
    /// Of the configuration at the beginning.
    sending: Arc<Sending>,
    event: &'a NewEvent,
    templates: Option<&'a Templates>,
    app_default: Option<crate::domain::ids::Locale>,
    now: UnixMs,
    known: HashMap<(RouteId, Variant<'a>), Option<Payload>>,
    /// Given out so far.
    bytes: usize,
}

impl<'a> PayloadWriter<'a> {
    fn new(service: &Service, app: AppKey, event: &'a NewEvent, templates: Option<&'a Templates>, now: UnixMs) -> Self {
        let app_default = templates.and_then(|_| service.types.default_locale(app));
        Self { sending: service.sending(), event, templates, app_default, now, known: HashMap::new(), bytes: 0 }
    }

    fn decide(&mut self, facts: &TargetFacts) -> Decision {
        let content = &self.event.body.content;
        let variant = render::choose(content, self.templates, facts.locale.as_ref(), self.app_default.as_ref());
        let known = self.known.get(&(facts.route, variant)).cloned();
        let payload = known.unwrap_or_else(|| {
            let made = self.encode(facts.route, variant);
            self.known.insert((facts.route, variant), made.clone());
            made
        });
        if let Some(Payload { refused: Some((code, _)), .. }) = &payload {
            return Decision::Suppressed(*code);
        }
        self.bytes += payload.as_ref().map_or(0, |payload| payload.body.len() + 256);
        let of_entry = || {
            let entry = variant.entry.zip(self.templates)?;
            Some(entry.1.definition().templates.get(entry.0)?.locale.clone())
        };
        Decision::Send { locale: variant.inline.map(str::to_owned).or_else(of_entry).unwrap_or_default(), payload }
    }

    fn encode(&self, route: RouteId, variant: Variant<'_>) -> Option<Payload> {
        let (route, sender) = self.sending.senders.get(route)?;
        let event = self.event;
        let (name, default) = (event.event_type.as_str(), self.app_default.as_ref());
        let message = render::render(&event.body, name, self.templates, variant, default).message;
        let options = SendOptions {
            priority: event.priority,
            collapse_key: event.collapse_key.clone(),
            expires_at: event.expires_at,
            push_id: !self.sending.without_push_id.contains(&route.id),
        };
        let starts = event.not_before.map_or(self.now, |not_before| not_before.max(self.now));
        Some(Payload::of(sender, route, &message, &options, event.expires_at.since(starts)))
    }
}
