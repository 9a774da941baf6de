//! [`Registry`]: each method is a step or a read of the modules beside this one.

use std::sync::Arc;

use diesel::sql_types::Bool;
use diesel_async::SimpleAsyncConnection;

use super::accept::Prepared;
use super::fail::unavailable;
use super::group::Answer;
use super::query::RunQuery;
use super::read::read;
use super::statement::constant;
use super::tx::step;
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
    NewSubscription, NotificationView, OptIn, Page, PersonHistory, Registry, ResolvedAudience, Restoration, Result,
    Subscription, WatchFilter, WatchPage,
};

use super::{
    PostgresStore, accept, device_reads, devices, event_types, explain, fanout, imports, notifications, opt_in, pauses,
    registering, restorations, setup, subscriptions, users, watching,
};

#[async_trait::async_trait]
impl Registry for PostgresStore {
    fn identity(&self) -> &IdentityKey {
        &self.inner.context.identity
    }

    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey> {
        let doing = "making an app's row";
        if let Some(key) = read!(&self.inner, doing, |conn| setup::app_key(conn, app))? {
            return Ok(key);
        }
        step!(&self.inner, doing, |tx| setup::ensure_app(tx, app, now))
    }

    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>> {
        step!(&self.inner, "making routes' rows", |tx| setup::ensure_routes(tx, specs, now))
    }

    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered> {
        let register = Arc::new(registering::Register::new(registration, now));
        match self.registrar.repeated.ask(registering::Repeated(Arc::clone(&register))).await? {
            Some(standing) => Ok(standing),
            None => self.registrar.changed.ask(registering::Changed(register)).await,
        }
    }

    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        self.registrar.unregister.ask(devices::Unregister { app, user, device, observed_at, now }).await
    }

    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>> {
        read!(&self.inner, "listing devices", |conn| device_reads::list(conn, app, user, after, limit))
    }

    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)> {
        self.registrar.choices.ask(opt_in::Choice::new(choice, &self.inner.context.ids, now)).await
    }

    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>> {
        read!(&self.inner, "listing choices", |conn| opt_in::list(conn, app, user))
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
        let new = NewSubscription { app, user, topic, active, observed_at };
        self.registrar.subscriptions.ask(subscriptions::Subscribe { new, now }).await
    }

    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>> {
        read!(&self.inner, "listing subscriptions", |conn| subscriptions::list(conn, app, user, after, limit))
    }

    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64> {
        read!(&self.inner, "looking up an import", |conn| imports::position(conn, app, name))
    }

    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>> {
        let doing = "importing";
        let mut imported = Vec::with_capacity(batch.items.len());
        for items in batch.items.chunks(imports::CHUNK) {
            imported.append(&mut step!(&self.inner, doing, |tx| imports::apply(tx, items, now))?);
        }
        step!(&self.inner, doing, |tx| imports::advance(tx, batch.app, &batch.name, batch.position, now))?;
        Ok(imported)
    }

    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>> {
        read!(snapshot; &self.inner, "checking an import", |conn| imports::assess(conn, &items))
    }

    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType> {
        read!(&self.inner, "looking up an event type", |conn| event_types::declared(conn, app, event_type))
    }

    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)> {
        let doing = "storing an event type";
        let new = event_types::Declaration::new(app, definition).map_err(|fail| fail.into_store(doing))?;
        step!(&self.inner, doing, |tx| event_types::put(tx, &new, now))
    }

    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion> {
        read!(&self.inner, "reading an event type", |conn| event_types::get(conn, app, name, version))
    }

    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>> {
        read!(&self.inner, "listing event types", |conn| event_types::list(conn, app, after.as_ref(), limit))
    }

    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "deleting an event type", |tx| event_types::delete(tx, app, name, now))
    }

    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition> {
        read!(&self.inner, "reading an event type's version", |conn| event_types::definition(conn, version))
    }

    async fn accept(&self, event: NewEvent, hand_off: Arc<dyn HandOff>, now: UnixMs) -> Result<Accepted> {
        let doing = "accepting an event";
        let now = self.inner.clock(now);
        // Boxed: it passes many hands, and every one that holds it by value copies it.
        let mut prepared = Box::new(Prepared::new(event, hand_off).map_err(|fail| fail.into_store(doing))?);
        let mut ids = None;
        if prepared.is_for_group() {
            (prepared, ids) = match self.acceptor.accept(prepared, now).await? {
                Answer::Accepted(accepted) => return Ok(accepted),
                Answer::Alone(prepared, ids) => (prepared, Some(ids)),
            };
        }
        if let Some(limit) = prepared.wide_limit() {
            let too_many = read!(snapshot; &self.inner, doing, |conn| prepared.exceeds(conn, limit))?;
            prepared.set_too_many(too_many);
        }
        step!(leasing after ids; &self.inner, doing, |tx| accept::accept(tx, &prepared, now))
    }

    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience> {
        read!(snapshot; &self.inner, "resolving an audience", |conn| accept::rehearse(conn, app, audience, actor))
    }

    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage> {
        let met = read!(snapshot; &self.inner, "reading a page of an audience", |conn| fanout::meet(
            conn,
            app,
            event_type,
            audience,
            after,
            limit,
            &mut false
        ))?;
        Ok(AudiencePage { people: met.found.people, cursor: met.cursor, done: met.done })
    }

    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>> {
        read!(&self.inner, "reading names", |conn| async { Ok(users::user_names(conn, users).await?) })
    }

    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "cancelling a notification", |tx| notifications::cancel(tx, app, id, now))
    }

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView> {
        read!(snapshot; &self.inner, "reading a notification", |conn| notifications::view(conn, app, id))
    }

    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>> {
        read!(&self.inner, "listing notifications", |conn| notifications::list(
            conn,
            app,
            event_type.as_ref(),
            before,
            limit
        ))
    }

    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>> {
        read!(snapshot; &self.inner, "listing deliveries", |conn| explain::deliveries(conn, app, id, &filter, after, limit))
    }

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory> {
        read!(snapshot; &self.inner, "reading a person's history", |conn| explain::person(conn, app, id, user))
    }

    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId> {
        read!(&self.inner, "looking up a device's owner", |conn| device_reads::owner(conn, app, device))
    }

    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage> {
        let (origin, server_clock) = (self.inner.watched_from, self.inner.server_clock);
        read!(&self.inner, "reading for a watcher", |conn| watching::page(
            conn,
            origin,
            server_clock,
            app,
            after,
            filter,
            limit
        ))
    }

    async fn pause(&self, pause: Pause) -> Result<bool> {
        step!(&self.inner, "storing a pause", |tx| pauses::pause(tx, &pause))
    }

    async fn resume(&self, scope: &PauseScope) -> Result<bool> {
        step!(&self.inner, "ending a pause", |tx| pauses::resume(tx, scope))
    }

    async fn pauses(&self) -> Result<Vec<Pause>> {
        read!(&self.inner, "reading the pauses", |conn| pauses::all(conn))
    }

    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration> {
        step!(&self.inner, "holding everything after a restore", |tx| restorations::begin(tx, name, now))
    }

    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)> {
        step!(&self.inner, "cancelling open work", |tx| restorations::cancel_open(tx, before, after, limit, now))
    }

    async fn restorations(&self) -> Result<Vec<Restoration>> {
        read!(&self.inner, "looking for a restore", |conn| restorations::open(conn))
    }

    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "confirming a restore", |tx| restorations::confirm(tx, now))
    }

    async fn ping(&self) -> Result<()> {
        let doing = "answering a ping";
        let standby = read!(&self.inner, doing, |conn| async {
            Ok(constant!(Bool; "SELECT pg_is_in_recovery()").get_result::<bool>(conn).await?)
        })?;
        if standby { Err(unavailable(doing)) } else { Ok(()) }
    }
}
