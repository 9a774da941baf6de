//! [`Registry`]: each method is a step or a read of the modules beside this one.

use std::future::ready;
use std::sync::Arc;

use diesel::RunQueryDsl;
use diesel::sql_types::Integer;
use futures_util::future::BoxFuture;

use super::accept::Prepared;
use super::group::Tx;
use super::readers::{Asker, snapshot};
use super::statement::constant;
use super::writer::Class;
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
    SMALL, SqliteStore, accept, devices, event_types, explain, fanout, imports, notifications, opt_in, pauses, people,
    restorations, setup, subscriptions, watching,
};

#[async_trait::async_trait]
impl Registry for SqliteStore {
    fn identity(&self) -> &IdentityKey {
        &self.context.identity
    }

    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey> {
        let doing = "making an app's row";
        let (name, theirs) = (app.clone(), app.clone());
        if let Some(key) = self.read(Asker::Caller, doing, move |conn| setup::app_key(conn, &theirs)).await? {
            return Ok(key);
        }
        self.write(Class::Consent, SMALL, doing, move |tx| setup::ensure_app(tx, &name, now)).await
    }

    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>> {
        let specs = specs.to_vec();
        self.write(Class::Consent, SMALL, "making routes' rows", move |tx| setup::ensure_routes(tx, &specs, now)).await
    }

    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered> {
        let doing = "registering a device";
        let registration = Arc::new(registration);
        let theirs = Arc::clone(&registration);
        let standing = self.read_quickly(doing, move |conn| devices::unchanged(conn, &theirs, now)).await?;
        if let Some(standing) = standing {
            return Ok(standing);
        }
        let bytes = SMALL + 2 * registration.token.expose().len();
        self.write(Class::Consent, bytes, doing, move |tx| devices::register(tx, &registration, now)).await
    }

    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        self.write(Class::Consent, SMALL, "unregistering a device", move |tx| {
            devices::unregister(tx, app, user.as_ref(), &device, observed_at, now)
        })
        .await
    }

    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing devices", move |conn| devices::list(conn, app, &user, after, limit)).await
    }

    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)> {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let bytes = SMALL + text(&choice.source) + text(&choice.policy_version) + text(&choice.evidence);
        self.write(Class::Consent, bytes, "recording a choice", move |tx| opt_in::set(tx, &choice, now)).await
    }

    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing choices", move |conn| opt_in::list(conn, app, &user)).await
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
        self.write(Class::Consent, SMALL, "recording a subscription", move |tx| subscriptions::set(tx, &new, now)).await
    }

    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing subscriptions", move |conn| {
            subscriptions::list(conn, app, &user, after, limit)
        })
        .await
    }

    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64> {
        let name = name.to_owned();
        self.read(Asker::Caller, "looking up an import", move |conn| imports::position(conn, app, &name)).await
    }

    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>> {
        let ImportBatch { app, name, position, mut items } = batch;
        let mut imported = Vec::with_capacity(items.len());
        loop {
            let rest = items.split_off(items.len().min(imports::CHUNK));
            let last = rest.is_empty();
            let bytes = SMALL + SMALL * items.len();
            // The progress comes with the last of them.
            let progress = last.then(|| (app, name.clone(), position));
            let apply = move |tx: &mut Tx<'_>| imports::apply(tx, &items, progress.as_ref(), now);
            imported.append(&mut self.write(Class::Import, bytes, "importing", apply).await?);
            if last {
                return Ok(imported);
            }
            items = rest;
        }
    }

    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>> {
        self.read(Asker::Caller, "checking an import", move |conn| snapshot(conn, |conn| imports::assess(conn, &items)))
            .await
    }

    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType> {
        let name = event_type.clone();
        self.read(Asker::Caller, "looking up an event type", move |conn| event_types::declared(conn, app, &name)).await
    }

    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)> {
        let doing = "storing an event type";
        let new = event_types::Declaration::new(app, definition).map_err(|fail| fail.into_store(doing))?;
        self.write(Class::Consent, SMALL + new.bytes(), doing, move |tx| event_types::put(tx, &new, now)).await
    }

    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion> {
        let name = name.clone();
        self.read(Asker::Caller, "reading an event type", move |conn| event_types::get(conn, app, &name, version)).await
    }

    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>> {
        self.read(Asker::Caller, "listing event types", move |conn| event_types::list(conn, app, after.as_ref(), limit))
            .await
    }

    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool> {
        let name = name.clone();
        self.write(Class::Consent, SMALL, "deleting an event type", move |tx| event_types::delete(tx, app, &name, now))
            .await
    }

    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition> {
        self.read(Asker::Engine, "reading an event type's version", move |conn| event_types::definition(conn, version))
            .await
    }

    // Not `async`, or the event would be moved into a future first, which is then moved into its box.
    fn accept<'store, 'call>(
        &'store self,
        event: NewEvent,
        hand_off: Arc<dyn HandOff>,
        now: UnixMs,
    ) -> BoxFuture<'call, Result<Accepted>>
    where
        'store: 'call,
        Self: 'call,
    {
        let doing = "accepting an event";
        // Boxed: it passes many hands, and every one that holds it by value copies it.
        let mut prepared = match Prepared::new(event, hand_off) {
            Ok(prepared) => Box::new(prepared),
            Err(fail) => return Box::pin(ready(Err(fail.into_store(doing)))),
        };
        let accept = move |prepared: Box<Prepared>| {
            let bytes = prepared.bytes();
            self.write(Class::Accept, bytes, doing, move |tx| accept::accept(tx, &prepared, now))
        };
        let Some(limit) = prepared.wide_limit() else { return Box::pin(accept(prepared)) };
        Box::pin(async move {
            let counted = self.read(Asker::Caller, doing, move |conn| {
                let too_many = snapshot(conn, |conn| prepared.exceeds(conn, limit))?;
                prepared.set_too_many(too_many);
                Ok(prepared)
            });
            accept(counted.await?).await
        })
    }

    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience> {
        let (audience, actor) = (audience.clone(), actor.cloned());
        self.read(Asker::Caller, "resolving an audience", move |conn| {
            snapshot(conn, |conn| accept::rehearse(conn, app, &audience, actor.as_ref()))
        })
        .await
    }

    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage> {
        let (event_type, audience) = (event_type.clone(), Arc::clone(audience));
        self.read(Asker::Caller, "reading a page of an audience", move |conn| {
            snapshot(conn, |conn| {
                let met = fanout::meet(conn, app, &event_type, &audience, after, limit)?;
                Ok(AudiencePage { people: met.found.people, cursor: met.cursor, done: met.done })
            })
        })
        .await
    }

    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>> {
        let users = users.to_vec();
        self.read(Asker::Caller, "reading names", move |conn| Ok(people::user_names(conn, &users)?)).await
    }

    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool> {
        self.write(Class::Consent, SMALL, "cancelling a notification", move |tx| {
            notifications::cancel(tx, app, id, now)
        })
        .await
    }

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView> {
        self.read(Asker::Caller, "reading a notification", move |conn| {
            snapshot(conn, |conn| notifications::view(conn, app, id))
        })
        .await
    }

    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>> {
        self.read(Asker::Caller, "listing notifications", move |conn| {
            notifications::list(conn, app, event_type.as_ref(), before, limit)
        })
        .await
    }

    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>> {
        self.read(Asker::Caller, "listing deliveries", move |conn| {
            snapshot(conn, |conn| explain::deliveries(conn, app, id, &filter, after, limit))
        })
        .await
    }

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory> {
        let user = user.clone();
        self.read(Asker::Caller, "reading a person's history", move |conn| {
            snapshot(conn, |conn| explain::person(conn, app, id, &user))
        })
        .await
    }

    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId> {
        self.read(Asker::Caller, "looking up a device's owner", move |conn| devices::owner(conn, app, device)).await
    }

    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage> {
        let (filter, context) = (filter.clone(), Arc::clone(&self.context));
        self.read(Asker::Caller, "reading for a watcher", move |conn| {
            watching::page(conn, &context.horizon, app, after, &filter, limit, context.runtime.now())
        })
        .await
    }

    async fn pause(&self, pause: Pause) -> Result<bool> {
        let bytes = SMALL + pause.reason.len();
        self.write(Class::Consent, bytes, "storing a pause", move |tx| pauses::pause(tx, &pause)).await
    }

    async fn resume(&self, scope: &PauseScope) -> Result<bool> {
        let scope = scope.clone();
        self.write(Class::Consent, SMALL, "ending a pause", move |tx| pauses::resume(tx, &scope)).await
    }

    async fn pauses(&self) -> Result<Vec<Pause>> {
        self.read(Asker::Engine, "reading the pauses", pauses::all).await
    }

    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration> {
        let name = name.to_owned();
        let doing = "holding everything after a restore";
        self.write(Class::Consent, SMALL, doing, move |tx| restorations::begin(tx, &name, now)).await
    }

    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)> {
        self.write(Class::Consent, SMALL, "cancelling open work", move |tx| {
            restorations::cancel_open(tx, before, after, limit, now)
        })
        .await
    }

    async fn restorations(&self) -> Result<Vec<Restoration>> {
        self.read(Asker::Caller, "looking for a restore", restorations::open).await
    }

    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool> {
        self.write(Class::Consent, SMALL, "confirming a restore", move |tx| restorations::confirm(tx, now)).await
    }

    async fn ping(&self) -> Result<()> {
        let doing = "answering a ping";
        self.read(Asker::Caller, doing, |conn| Ok(constant!(Integer; "SELECT 1").get_result::<i32>(conn)?)).await?;
        self.write(Class::Consent, 0, doing, |_| Ok(())).await
    }
}
