//! GetNotification, ListNotifications, CancelNotification, ListDeliveries, ExplainDelivery.

use uuid::Uuid;

use crate::domain::ids::{DeviceId, NotificationId, UserId, UserKey};
use crate::domain::notification::Notification;
use crate::domain::outcome::State;
use crate::domain::pause::Pauses;
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::storage::{Attempt, Delivery, DeliveryFilter, DeliveryKey, NotificationView, StoreError};

use super::explain::{self, Explanation};
use super::page_token::PageScope;
use super::{Call, Result, Service, ServiceError, fields};

pub const DEFAULT_PAGE: usize = 50;
pub const MAX_PAGE: usize = 200;
pub const DEFAULT_DELIVERIES_PAGE: usize = 100;
pub const MAX_DELIVERIES_PAGE: usize = 1_000;
/// A page of notifications ends early at about this many bytes of content, so that the answer stays below the 4 MiB
/// that gRPC clients accept by default.
const MAX_PAGE_BYTES: usize = 2 * 1024 * 1024;

pub struct ListNotifications {
    pub event_type: String,
    pub page_size: i32,
    pub page_token: String,
}

pub struct ListDeliveries {
    pub notification_id: String,
    pub user_id: String,
    /// Empty: every state.
    pub states: Vec<State>,
    pub page_size: i32,
    pub page_token: String,
}

/// Either `notification_id` and `user_id`, or `nudged_id`.
pub struct ExplainDelivery {
    pub notification_id: String,
    pub user_id: String,
    pub nudged_id: String,
}

/// Where one device's delivery stands, in public ids.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeliveryView {
    pub notification: Uuid,
    pub user: UserId,
    /// `None`: a person suppressed as a whole.
    pub device: Option<DeviceId>,
    /// With a device only.
    pub nudged_id: Option<Uuid>,
    pub state: State,
    pub reason: &'static str,
    pub at: UnixMs,
    pub last_attempt: Option<Attempt>,
}

impl Service {
    pub async fn get_notification(&self, mut call: Call<'_>, id: &str) -> Result<NotificationView> {
        let uuid = notification_uuid(&mut call.violations, "notification_id", id);
        let app = call.checked()?;
        let id = self.notification(uuid)?;
        self.store.get_notification(app.key, id).await.map_err(|error| self.refused(error))
    }

    /// A page, newest first, and the token of the next.
    pub async fn list_notifications(
        &self,
        mut call: Call<'_>,
        input: ListNotifications,
    ) -> Result<(Vec<Notification>, String)> {
        let violations = &mut call.violations;
        let event_type = fields::optional_event_type(violations, &input.event_type);
        let limit = fields::page_size(violations, input.page_size, DEFAULT_PAGE, MAX_PAGE);
        let scope = call.app.as_ref().map(|app| {
            PageScope::new(self.store.identity(), "ListNotifications", app.key).with(input.event_type.as_bytes())
        });
        let before =
            scope.as_ref().and_then(|scope| scope.read(violations, &input.page_token)).map(|[id]| NotificationId(id));
        let app = call.checked()?;
        let scope = scope.expect("there is an app");
        let mut page = self
            .store
            .list_notifications(app.key, event_type, before, limit)
            .await
            .map_err(|error| self.refused(error))?;
        let mut bytes = 0;
        let fits = page.items.iter().take_while(|notification| {
            bytes += weight(notification);
            bytes <= MAX_PAGE_BYTES
        });
        let fits = fits.count().max(1);
        if fits < page.items.len() {
            page.items.truncate(fits);
            page.next = page.items.last().map(|last| last.id);
        }
        Ok((page.items, page.next.map_or_else(String::new, |next| scope.issue([next.0]))))
    }

    /// Whether this call kept anything back.
    pub async fn cancel_notification(&self, mut call: Call<'_>, id: &str) -> Result<bool> {
        let uuid = notification_uuid(&mut call.violations, "notification_id", id);
        let app = call.checked()?;
        let id = self.notification(uuid)?;
        self.store.cancel_notification(app.key, id, self.runtime.now()).await.map_err(|error| self.refused(error))
    }

    /// A page in the order of people, and the token of the next.
    pub async fn list_deliveries(
        &self,
        mut call: Call<'_>,
        input: ListDeliveries,
    ) -> Result<(Vec<DeliveryView>, String)> {
        let violations = &mut call.violations;
        let uuid = notification_uuid(violations, "notification_id", &input.notification_id);
        let user = fields::optional_user(violations, "user_id", &input.user_id);
        let limit = fields::page_size(violations, input.page_size, DEFAULT_DELIVERIES_PAGE, MAX_DELIVERIES_PAGE);
        let mut states: Vec<u8> = input.states.iter().map(|state| state_number(*state)).collect();
        states.sort_unstable();
        states.dedup();
        let scope = call.app.as_ref().map(|app| {
            PageScope::new(self.store.identity(), "ListDeliveries", app.key)
                .with(input.notification_id.as_bytes())
                .with(input.user_id.as_bytes())
                .with(&states)
        });
        let after = scope
            .as_ref()
            .and_then(|scope| scope.read(violations, &input.page_token))
            .map(|[user, device]| DeliveryKey { user: UserKey(user), device: DeviceId(device) });
        let app = call.checked()?;
        let scope = scope.expect("there is an app");
        let id = self.notification(uuid)?;
        let filter = DeliveryFilter { user, states: input.states };
        let page =
            self.store.list_deliveries(app.key, id, filter, after, limit).await.map_err(|error| self.refused(error))?;
        let views = page.items.into_iter().map(|delivery| self.view(id, delivery)).collect();
        let next = page.next.map_or_else(String::new, |next| scope.issue([next.user.0, next.device.0]));
        Ok((views, next))
    }

    pub async fn explain_delivery(&self, mut call: Call<'_>, input: ExplainDelivery) -> Result<Explanation> {
        let violations = &mut call.violations;
        let by_id = !input.nudged_id.is_empty();
        let (mut nudged_id, mut uuid, mut user) = (None, None, None);
        if by_id {
            nudged_id = Uuid::parse_str(&input.nudged_id).ok();
            if nudged_id.is_none() {
                violations.add("nudged_id", "is not a UUID");
            }
            for (field, text) in [("notification_id", &input.notification_id), ("user_id", &input.user_id)] {
                if !text.is_empty() {
                    violations.add(field, "is given together with nudged_id; give one of the two");
                }
            }
        } else {
            uuid = notification_uuid(violations, "notification_id", &input.notification_id);
            user = fields::user_id(violations, &input.user_id);
        }
        let app = call.checked()?;
        let (id, user, focus) = if let Some(nudged_id) = nudged_id {
            let unknown = || ServiceError::DeliveryNotFound { nudged_id: nudged_id.to_string() };
            let (id, device) = self.identity().read_nudged_id(nudged_id).ok_or_else(unknown)?;
            let owner = self.store.device_owner(app.key, device).await;
            // Whatever of it is unknown here, the caller asked for a delivery.
            let user = owner.map_err(|error| match error {
                StoreError::DeviceNotFound { .. } | StoreError::NotificationNotFound { .. } => unknown(),
                other => self.refused(other),
            })?;
            (id, user, Some(device))
        } else {
            (self.notification(uuid)?, user.expect("a missing user is a violation"), None)
        };
        let history = self.store.person_history(app.key, id, &user).await.map_err(|error| match error {
            StoreError::NotificationNotFound { .. } if by_id => {
                ServiceError::DeliveryNotFound { nudged_id: input.nudged_id.clone() }
            }
            other => self.refused(other),
        })?;
        let mut explanation = explain::explain(&history, self.identity(), focus);
        if explanation.decisions.iter().any(|decision| decision.verdict == explain::Verdict::Pending) {
            explain::tell_pauses(&mut explanation, &history, &Pauses(self.read_pauses().await?));
        }
        Ok(explanation)
    }

    /// The internal id behind a public one; a UUID that is not ours names nothing.
    pub(super) fn notification(&self, public: Option<Uuid>) -> Result<NotificationId> {
        let public = public.expect("a missing id is a violation");
        self.identity()
            .read_public_notification(public)
            .ok_or_else(|| ServiceError::NotificationNotFound { notification: public.to_string() })
    }

    pub(super) fn view(&self, notification: NotificationId, delivery: Delivery) -> DeliveryView {
        let device = delivery.entry.device;
        let device = (device != DeviceId(0)).then_some(device);
        DeliveryView {
            notification: self.identity().public_notification(notification),
            user: delivery.user,
            device,
            nudged_id: device.map(|device| self.identity().nudged_id(notification, device)),
            state: delivery.state,
            reason: delivery.reason,
            at: delivery.at,
            last_attempt: delivery.last_attempt,
        }
    }
}

pub(super) fn notification_uuid(violations: &mut Violations, field: &str, text: &str) -> Option<Uuid> {
    if text.is_empty() {
        violations.add(field, "is required");
        return None;
    }
    let uuid = Uuid::parse_str(text).ok();
    if uuid.is_none() {
        violations.add(field, "is not a UUID");
    }
    uuid
}

/// About how many bytes a notification takes in an answer.
fn weight(notification: &Notification) -> usize {
    serde_json::to_vec(&*notification.body).map_or(0, |bytes| bytes.len()) + 512
}

/// For the page token: a filter's states in any order are the same filter.
const fn state_number(state: State) -> u8 {
    match state {
        State::Open => 1,
        State::Sent => 2,
        State::Suppressed => 3,
        State::Expired => 4,
        State::Cancelled => 5,
        State::Dead => 6,
    }
}
