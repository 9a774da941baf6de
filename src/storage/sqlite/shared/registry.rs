//! [`Registry`] over the link.

use std::sync::Arc;

use super::SharedStore;
use super::answered::Answered;
use crate::domain::device::{Device, DeviceRef, Registered, Registration};
use crate::domain::event_type::{Definition, TypeVersion};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppId, AppKey, DeviceId, EventType, NotificationId, Topic, TypeVersionId, UserId, UserKey};
use crate::domain::notification::{Accepted, Audience, HandOff, NewEvent, Notification};
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::platform::{Route, RouteSpec};
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::storage::{
    AudiencePage, DeclaredType, Delivery, DeliveryFilter, DeliveryKey, ImportBatch, ImportItem, Imported, NewOptIn,
    NotificationView, OptIn, Page, PersonHistory, Registry, ResolvedAudience, Restoration, Result, Subscription,
    WatchFilter, WatchPage,
};

/// `at_hub!(self, doing, |store| call)`: the answer of a call of the hub's store.
macro_rules! at_hub {
    ($self:ident, $doing:expr, |$store:ident| $call:expr) => {
        $self.replica.ask($doing, move |$store| $crate::storage::sqlite::shared::inline($call)).await
    };
}
pub(super) use at_hub;

#[async_trait::async_trait]
impl Registry for SharedStore {
    fn identity(&self) -> &IdentityKey {
        &self.replica.hub.identity
    }

    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey> {
        at_hub!(self, "making an app's row", |store| store.ensure_app(app, now))
    }

    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>> {
        at_hub!(self, "making routes' rows", |store| store.ensure_routes(specs, now))
    }

    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered> {
        at_hub!(self, "registering a device", |store| store.register_device(registration, now))
    }

    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        let doing = "unregistering a device";
        at_hub!(self, doing, |store| store.unregister_device(app, user, device, observed_at, now))
    }

    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>> {
        at_hub!(self, "listing devices", |store| store.list_devices(app, user, after, limit))
    }

    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)> {
        at_hub!(self, "recording a choice", |store| store.set_opt_in(choice, now))
    }

    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>> {
        at_hub!(self, "listing choices", |store| store.list_opt_ins(app, user))
    }

    async fn set_subscription(
        &self,
        app: AppKey,
        user: UserId,
        topic: Topic,
        active: bool,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        let doing = "recording a subscription";
        at_hub!(self, doing, |store| store.set_subscription(app, user, topic, active, observed_at, now))
    }

    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>> {
        at_hub!(self, "listing subscriptions", |store| store.list_subscriptions(app, user, after, limit))
    }

    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64> {
        at_hub!(self, "looking up an import", |store| store.import_position(app, name))
    }

    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>> {
        at_hub!(self, "importing", |store| store.import(batch, now))
    }

    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>> {
        at_hub!(self, "checking an import", |store| store.assess_import(items))
    }

    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType> {
        at_hub!(self, "looking up an event type", |store| store.event_type(app, event_type))
    }

    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)> {
        at_hub!(self, "storing an event type", |store| store.put_event_type(app, definition, now))
    }

    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion> {
        at_hub!(self, "reading an event type", |store| store.get_event_type(app, name, version))
    }

    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>> {
        at_hub!(self, "listing event types", |store| store.list_event_types(app, after, limit))
    }

    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool> {
        at_hub!(self, "deleting an event type", |store| store.delete_event_type(app, name, now))
    }

    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition> {
        at_hub!(self, "reading an event type's version", |store| store.type_definition(version))
    }

    async fn accept(&self, event: NewEvent, hand_off: Arc<dyn HandOff>, now: UnixMs) -> Result<Accepted> {
        let replica = &self.replica;
        let now = replica.clock(now);
        let leasing = replica.leasing().await;
        let answered = Answered::new(hand_off, replica.deny.position(), replica.runtime.instant().into_std());
        let theirs = Arc::clone(&answered);
        let accepted = at_hub!(self, "accepting an event", |store| store.accept(event, theirs, now));
        match &accepted {
            Ok(_) => {
                leasing.took(answered.leased());
                answered.pass_on();
            }
            Err(error) if error.is_refusal() => leasing.took([]),
            Err(_) => {}
        }
        accepted
    }

    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience> {
        at_hub!(self, "resolving an audience", |store| store.resolve_audience(app, audience, actor))
    }

    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage> {
        let doing = "reading a page of an audience";
        at_hub!(self, doing, |store| store.audience_page(app, event_type, audience, after, limit))
    }

    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>> {
        at_hub!(self, "reading names", |store| store.user_names(users))
    }

    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool> {
        at_hub!(self, "cancelling a notification", |store| store.cancel_notification(app, id, now))
    }

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView> {
        at_hub!(self, "reading a notification", |store| store.get_notification(app, id))
    }

    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>> {
        at_hub!(self, "listing notifications", |store| store.list_notifications(app, event_type, before, limit))
    }

    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>> {
        at_hub!(self, "listing deliveries", |store| store.list_deliveries(app, id, filter, after, limit))
    }

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory> {
        at_hub!(self, "reading a person's history", |store| store.person_history(app, id, user))
    }

    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId> {
        at_hub!(self, "looking up a device's owner", |store| store.device_owner(app, device))
    }

    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage> {
        at_hub!(self, "reading for a watcher", |store| store.watch(app, after, filter, limit))
    }

    async fn pause(&self, pause: Pause) -> Result<bool> {
        at_hub!(self, "storing a pause", |store| store.pause(pause))
    }

    async fn resume(&self, scope: &PauseScope) -> Result<bool> {
        at_hub!(self, "ending a pause", |store| store.resume(scope))
    }

    async fn pauses(&self) -> Result<Vec<Pause>> {
        at_hub!(self, "reading the pauses", |store| store.pauses())
    }

    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration> {
        at_hub!(self, "holding everything after a restore", |store| store.begin_restoration(name, now))
    }

    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)> {
        at_hub!(self, "cancelling open work", |store| store.cancel_open(before, after, limit, now))
    }

    async fn restorations(&self) -> Result<Vec<Restoration>> {
        at_hub!(self, "looking for a restore", |store| store.restorations())
    }

    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool> {
        at_hub!(self, "confirming a restore", |store| store.confirm_restorations(now))
    }

    async fn ping(&self) -> Result<()> {
        at_hub!(self, "answering a ping", |store| store.ping())
    }
}
