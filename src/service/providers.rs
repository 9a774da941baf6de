//! How providers are doing, dead tokens that an operator vouches for, and dead deliveries sent again.

use std::time::Duration;

use uuid::Uuid;

use crate::domain::ids::{DeviceId, RouteId, UserId};
use crate::domain::outcome::{ResultCode, State};
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::domain::provider::{RouteCondition, RouteStatus};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::storage::{RedriveBatch, RedriveFilter, StoreError, Trouble};

use super::apps::DEFAULT_CREDENTIAL;
use super::page_token::PageScope;
use super::{Call, Result, Service, ServiceError, fields};

/// How long an operator's word about dead tokens holds.
const CONFIRMED_FOR: Duration = Duration::from_secs(3600);
/// Blocks of history in one step of the store, and steps of one call.
const REDRIVE_BLOCKS: usize = 50;
const REDRIVE_STEPS: usize = 20;
/// A call ends with the step that brings it beyond so many deliveries.
const REDRIVE_MOST: u64 = 20_000;

/// Which route an operator means.
#[derive(Clone, Default)]
pub struct RouteChoice {
    pub platform: Option<Platform>,
    /// Empty: `default`.
    pub credential: String,
    pub environment: Option<Environment>,
    /// Empty: the credential's first.
    pub bundle: String,
}

/// Which dead deliveries to send again.
#[derive(Clone, Default)]
pub struct Redrive {
    pub nudged_id: String,
    pub notification_id: String,
    pub user_id: String,
    pub reasons: Vec<String>,
    pub died_from: Option<UnixMs>,
    pub died_before: Option<UnixMs>,
    pub page_token: String,
}

/// What a call to redrive came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RedriveAnswer {
    pub redriven: u64,
    pub too_late: u64,
    /// Empty at the end.
    pub next_page_token: String,
}

impl Service {
    /// Every route of the app as this process sees it; one that only another process has paused is shown as paused too.
    pub async fn provider_status(&self, call: Call<'_>) -> Result<Vec<RouteStatus>> {
        let app = call.checked()?;
        let mut routes = self.hand_off.provider_status(app.key);
        let troubles = self.store.troubles(self.runtime.now()).await.map_err(|error| self.refused(error))?;
        for status in &mut routes {
            if status.condition == RouteCondition::Working
                && let Some(trouble) = troubles.iter().find(|trouble| stops(trouble, status, self.runtime.now()))
            {
                status.condition = RouteCondition::Paused {
                    cause: trouble.cause.name(),
                    reason: trouble.reason.clone(),
                    since: trouble.since,
                    next_probe: UnixMs(0),
                };
            }
        }
        Ok(routes)
    }

    /// Lets a route's tokens be retired for an hour. Whether it was known to be paused.
    pub async fn confirm_retirements(&self, mut call: Call<'_>, input: RouteChoice) -> Result<bool> {
        let violations = &mut call.violations;
        let environment = match (input.platform, input.environment) {
            (None, _) => {
                violations.add("platform", "is required");
                None
            }
            (Some(Platform::Apns), None) => {
                violations.add("apns_environment", "is required for APNS");
                None
            }
            (Some(Platform::Fcm), Some(_)) => {
                violations.add("apns_environment", "is for APNS only");
                None
            }
            (Some(Platform::Fcm), None) => Some(Environment::None),
            (Some(Platform::Apns), given) => given,
        };
        let app = call.checked()?;
        let name = if input.credential.is_empty() { DEFAULT_CREDENTIAL } else { &input.credential };
        let route = input.platform.zip(environment).and_then(|(platform, environment)| {
            let credential = app.credentials.get(&platform)?.get(name)?;
            let bundle = if input.bundle.is_empty() { &*credential.default_bundle } else { &input.bundle };
            credential.route(environment, bundle)
        });
        let Some(route) = route else { return Ok(false) };
        let until = self.runtime.now().plus(CONFIRMED_FOR);
        let confirmed =
            self.store.confirm_trouble(&route_name(route), until).await.map_err(|error| self.refused(error))?;
        self.hand_off.troubles_changed();
        Ok(confirmed)
    }

    /// Opens dead deliveries again, a bounded number of them.
    pub async fn redrive(&self, mut call: Call<'_>, input: Redrive) -> Result<RedriveAnswer> {
        let violations = &mut call.violations;
        let (mut filter, one) = read_filter(violations, &input);
        let scope = call.app.as_ref().map(|app| self.redrive_scope(app.key, &input));
        let after = scope.as_ref().and_then(|scope| scope.read(violations, &input.page_token)).map_or(0, |[id]| id);
        let app = call.checked()?;
        let scope = scope.expect("there is an app");
        match one {
            Target::Any => {}
            Target::Notification(public) => {
                let known = self.identity().read_public_notification(public);
                let missing = || ServiceError::NotificationNotFound { notification: public.to_string() };
                let id = known.ok_or_else(missing)?;
                self.store.get_notification(app.key, id).await.map_err(|error| self.refused(error))?;
                filter.notification = Some(id);
            }
            Target::Delivery(nudged_id) => {
                let missing = || ServiceError::DeliveryNotFound { nudged_id: nudged_id.to_string() };
                let (id, device) = self.identity().read_nudged_id(nudged_id).ok_or_else(missing)?;
                self.store.device_owner(app.key, device).await.map_err(|error| match error {
                    StoreError::DeviceNotFound { .. } => missing(),
                    other => self.refused(other),
                })?;
                (filter.notification, filter.device) = (Some(id), Some(device));
            }
        }
        let mut answer = RedriveAnswer::default();
        let mut batch = RedriveBatch { app: app.key, filter, after, max_blocks: REDRIVE_BLOCKS };
        for _ in 0..REDRIVE_STEPS {
            let step =
                self.store.redrive(batch.clone(), self.runtime.now()).await.map_err(|error| self.refused(error))?;
            for (route, lane) in &step.routes {
                self.hand_off.wake_jobs(*route, *lane);
            }
            answer.redriven += step.redriven;
            answer.too_late += step.too_late;
            batch.after = step.after;
            if step.done {
                return Ok(answer);
            }
            if answer.redriven >= REDRIVE_MOST {
                break;
            }
        }
        answer.next_page_token = scope.issue([batch.after]);
        Ok(answer)
    }

    fn redrive_scope(&self, app: crate::domain::ids::AppKey, input: &Redrive) -> PageScope<'_> {
        let time = |at: Option<UnixMs>| at.map_or(0, |at| at.0).to_be_bytes();
        PageScope::new(self.store.identity(), "RedriveDeliveries", app)
            .with(input.nudged_id.as_bytes())
            .with(input.notification_id.as_bytes())
            .with(input.user_id.as_bytes())
            .with(input.reasons.join(",").as_bytes())
            .with(&time(input.died_from))
            .with(&time(input.died_before))
    }
}

/// The stored name of a route's own trouble.
fn route_name(route: RouteId) -> String {
    format!("route/{}", route.0)
}

/// Whether a stored trouble is this route's, or its credential's, and still met by somebody.
fn stops(trouble: &Trouble, status: &RouteStatus, now: UnixMs) -> bool {
    let RouteSpec { app, platform, credential, .. } = &status.spec;
    let of_credential = format!("credential/{}/{}/{credential}", app.0, platform.name());
    let fresh = now.0 - trouble.seen_at.0 < crate::storage::TROUBLE_KEPT_MS;
    fresh && (trouble.name == route_name(status.route) || trouble.name == of_credential)
}

/// What of the filter is yet to be looked up.
enum Target {
    Any,
    Notification(Uuid),
    Delivery(Uuid),
}

fn read_filter(violations: &mut Violations, input: &Redrive) -> (RedriveFilter, Target) {
    let mut uuid = |field: &str, text: &str| {
        if text.is_empty() {
            return None;
        }
        let uuid = Uuid::parse_str(text).ok();
        if uuid.is_none() {
            violations.add(field, "is not a UUID");
        }
        uuid
    };
    let (nudged_id, notification) =
        (uuid("nudged_id", &input.nudged_id), uuid("notification_id", &input.notification_id));
    if !input.nudged_id.is_empty() {
        for (field, text) in [("notification_id", &input.notification_id), ("user_id", &input.user_id)] {
            if !text.is_empty() {
                violations.add(field, "is given together with nudged_id; give one of the two");
            }
        }
    }
    let user: Option<UserId> = fields::optional_user(violations, "user_id", &input.user_id);
    let mut reasons = Vec::new();
    for (at, reason) in input.reasons.iter().enumerate() {
        match ResultCode::named(reason).filter(|code| code.state() == State::Dead) {
            Some(code) => reasons.push(code),
            None => violations.add(format!("reasons[{at}]"), "is no reason to be dead"),
        }
    }
    if let (Some(from), Some(before)) = (input.died_from, input.died_before)
        && from >= before
    {
        violations.add("died_before", "is not after died_from");
    }
    let filter = RedriveFilter {
        notification: None,
        user,
        device: None::<DeviceId>,
        reasons,
        died_from: input.died_from,
        died_before: input.died_before,
    };
    let target = match (nudged_id, notification) {
        (Some(nudged_id), _) => Target::Delivery(nudged_id),
        (None, Some(notification)) => Target::Notification(notification),
        (None, None) => Target::Any,
    };
    (filter, target)
}
