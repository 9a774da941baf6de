//! The handlers of PushService: read the message, resolve the app, call the service, write the answer.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use http::Extensions;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::service::events::Checked;
use crate::service::{Call, Service, ServiceError, notifications, subscriptions};
use crate::telemetry::traces::CallSpan;

use super::auth::{Caller, KeyRing};
use super::imports::Answers;
use super::limits::{Deadline, ServerLimits};
use super::proto::push_service_server::PushService;
use super::scopes::Scope;
use super::status::{ApiError, status};
use super::stream::{EventStream, Window};
use super::watch::{self, WatchLimits, WatchStream};
use super::{access, convert, imports, proto};

/// Implements the generated trait. Cheap to clone.
#[derive(Clone)]
pub struct PushApi {
    service: Arc<Service>,
    keys: Arc<KeyRing>,
    /// Open NotifyEvents streams.
    streams: Arc<Semaphore>,
    /// Open imports.
    imports: Arc<Semaphore>,
    /// Open watchers.
    watchers: Arc<Semaphore>,
    window: Window,
    watch_limits: WatchLimits,
    /// Streams stop reading then.
    shutdown: CancellationToken,
}

impl PushApi {
    #[must_use]
    pub fn new(
        service: Arc<Service>,
        keys: Arc<KeyRing>,
        streams: Arc<Semaphore>,
        imports: Arc<Semaphore>,
        watchers: Arc<Semaphore>,
        limits: &ServerLimits,
        shutdown: CancellationToken,
    ) -> Self {
        let window = Window { events: limits.stream_window_events, bytes: limits.stream_window_bytes };
        Self { service, keys, streams, imports, watchers, window, watch_limits: limits.into(), shutdown }
    }

    /// Who calls, and the message. The auth layer leaves a caller in every request it lets through.
    fn open<T>(&self, request: Request<T>) -> Result<(Caller, T), Status> {
        let (_, mut extensions, message) = request.into_parts();
        Ok((self.caller(&mut extensions)?, message))
    }

    fn caller(&self, extensions: &mut Extensions) -> Result<Caller, Status> {
        let caller = extensions.remove::<Caller>();
        caller.ok_or_else(|| self.fail(ApiError::Internal("a request without a caller".to_owned())))
    }

    /// NotifyEvent. What needs no waiting is done before there is a future, which would carry the message from layer to layer.
    pub(super) fn notify(
        self: Arc<Self>,
        extensions: &mut Extensions,
        message: proto::NotifyEventRequest,
    ) -> BoxFuture<'static, Result<proto::NotifyEventResponse, Status>> {
        let span = extensions.remove::<CallSpan>();
        let checked = match self.caller(extensions) {
            Ok(caller) if message.dry_run => return Box::pin(async move { self.rehearse(caller, message).await }),
            Ok(caller) => self.checked(&caller, message),
            Err(status) => Err(status),
        };
        Box::pin(async move {
            let accepted = self.service.notify(checked?).await.map_err(|error| self.fail(error))?;
            let id = accepted.notification;
            if let Some(span) = span {
                span.accepted(&self.service.identity().public_notification(id).to_string());
            }
            // Looked up only where it is written.
            tracing::debug!(notification_id = %self.service.identity().public_notification(id),
                duplicate = accepted.duplicate, "an event was accepted");
            Ok(convert::accepted(self.service.identity(), accepted))
        })
    }

    fn call<'a>(&'a self, caller: &'a Caller, app_id: &str) -> Result<Call<'a>, Status> {
        access::call(&self.service.apps(), caller, app_id).map_err(|error| self.fail(error))
    }

    fn checked(&self, caller: &Caller, message: proto::NotifyEventRequest) -> Result<Box<Checked>, Status> {
        let mut call = self.call(caller, &message.app_id)?;
        let input = convert::notify_event(call.violations(), message);
        self.service.checked(call, input).map_err(|error| self.fail(error))
    }

    async fn rehearse(
        &self,
        caller: Caller,
        message: proto::NotifyEventRequest,
    ) -> Result<proto::NotifyEventResponse, Status> {
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::notify_event(call.violations(), message);
        let rehearsal = self.service.rehearse(call, input).await;
        rehearsal.map(convert::rehearsed).map_err(|error| self.fail(error))
    }

    fn import<K: imports::Kind>(
        &self,
        request: Request<Streaming<K::Request>>,
    ) -> Result<Response<Answers<K::Response>>, Status> {
        let place = Arc::clone(&self.imports).try_acquire_owned();
        let place = place.map_err(|_| self.fail(ApiError::TooManyStreams))?;
        let deadline = request.extensions().get::<Deadline>().copied();
        let (caller, incoming) = self.open(request)?;
        let (service, keys, shutdown) = (Arc::clone(&self.service), Arc::clone(&self.keys), self.shutdown.clone());
        let parts = imports::Parts { service, keys, caller, deadline, shutdown, place };
        Ok(Response::new(imports::answers::<K>(parts, incoming)))
    }

    fn fail(&self, error: impl Into<ApiError>) -> Status {
        status(&error.into(), self.service.runtime())
    }

    fn answer<T>(&self, answer: Result<T, ServiceError>) -> Result<Response<T>, Status> {
        answer.map(Response::new).map_err(|error| self.fail(error))
    }
}

#[tonic::async_trait]
impl PushService for PushApi {
    async fn register_device(
        &self,
        request: Request<proto::RegisterDeviceRequest>,
    ) -> Result<Response<proto::RegisterDeviceResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::register_device(call.violations(), message);
        let registered = self.service.register_device(call, input).await;
        self.answer(registered.map(|registered| proto::RegisterDeviceResponse {
            device: Some(convert::device(registered.device)),
            created: Some(registered.created),
        }))
    }

    async fn unregister_device(
        &self,
        request: Request<proto::UnregisterDeviceRequest>,
    ) -> Result<Response<proto::UnregisterDeviceResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::unregister_device(call.violations(), message);
        let existed = self.service.unregister_device(call, input).await;
        self.answer(existed.map(|existed| proto::UnregisterDeviceResponse { existed: Some(existed) }))
    }

    async fn list_devices(
        &self,
        request: Request<proto::ListDevicesRequest>,
    ) -> Result<Response<proto::ListDevicesResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let page = self.service.list_devices(call, convert::list_devices(message)).await;
        self.answer(page.map(|(devices, next_page_token)| proto::ListDevicesResponse {
            devices: devices.into_iter().map(convert::device).collect(),
            next_page_token,
        }))
    }

    async fn set_opt_in(
        &self,
        request: Request<proto::SetOptInRequest>,
    ) -> Result<Response<proto::SetOptInResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::set_opt_in(call.violations(), message);
        let stands = self.service.set_opt_in(call, input).await;
        self.answer(stands.map(|(choice, applied)| proto::SetOptInResponse {
            opt_in: Some(convert::opt_in(choice)),
            applied: Some(applied),
        }))
    }

    async fn list_opt_ins(
        &self,
        request: Request<proto::ListOptInsRequest>,
    ) -> Result<Response<proto::ListOptInsResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let choices = self.service.list_opt_ins(call, &message.user_id).await;
        self.answer(
            choices.map(|choices| proto::ListOptInsResponse {
                opt_ins: choices.into_iter().map(convert::opt_in).collect(),
            }),
        )
    }

    async fn subscribe(
        &self,
        request: Request<proto::SubscribeRequest>,
    ) -> Result<Response<proto::SubscribeResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let proto::SubscribeRequest { user_id, topic, observed_at, .. } = message;
        let input = convert::set_subscription(call.violations(), user_id, topic, true, observed_at);
        let applied = self.service.set_subscription(call, input).await;
        self.answer(applied.map(|applied| proto::SubscribeResponse { applied: Some(applied) }))
    }

    async fn unsubscribe(
        &self,
        request: Request<proto::UnsubscribeRequest>,
    ) -> Result<Response<proto::UnsubscribeResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let proto::UnsubscribeRequest { user_id, topic, observed_at, .. } = message;
        let input = convert::set_subscription(call.violations(), user_id, topic, false, observed_at);
        let applied = self.service.set_subscription(call, input).await;
        self.answer(applied.map(|applied| proto::UnsubscribeResponse { applied: Some(applied) }))
    }

    async fn list_subscriptions(
        &self,
        request: Request<proto::ListSubscriptionsRequest>,
    ) -> Result<Response<proto::ListSubscriptionsResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let proto::ListSubscriptionsRequest { user_id, page_size, page_token, .. } = message;
        let input = subscriptions::ListSubscriptions { user_id, page_size, page_token };
        let page = self.service.list_subscriptions(call, input).await;
        self.answer(page.map(|(subscriptions, next_page_token)| proto::ListSubscriptionsResponse {
            subscriptions: subscriptions.iter().map(convert::subscription).collect(),
            next_page_token,
        }))
    }

    type ImportDevicesStream = Answers<proto::ImportDevicesResponse>;

    async fn import_devices(
        &self,
        request: Request<Streaming<proto::ImportDevicesRequest>>,
    ) -> Result<Response<Self::ImportDevicesStream>, Status> {
        self.import::<imports::Devices>(request)
    }

    type ImportOptInsStream = Answers<proto::ImportOptInsResponse>;

    async fn import_opt_ins(
        &self,
        request: Request<Streaming<proto::ImportOptInsRequest>>,
    ) -> Result<Response<Self::ImportOptInsStream>, Status> {
        self.import::<imports::OptIns>(request)
    }

    type ImportSubscriptionsStream = Answers<proto::ImportSubscriptionsResponse>;

    async fn import_subscriptions(
        &self,
        request: Request<Streaming<proto::ImportSubscriptionsRequest>>,
    ) -> Result<Response<Self::ImportSubscriptionsStream>, Status> {
        self.import::<imports::Subscriptions>(request)
    }

    // Not `async`: what needs no waiting is done before there is a future, which has room for all that it ever holds, and is
    // moved into a box with it for every call.
    async fn notify_event(
        &self,
        request: Request<proto::NotifyEventRequest>,
    ) -> Result<Response<proto::NotifyEventResponse>, Status> {
        let (_, mut extensions, message) = request.into_parts();
        Arc::new(self.clone()).notify(&mut extensions, message).await.map(Response::new)
    }

    type NotifyEventsStream = EventStream;

    async fn notify_events(
        &self,
        request: Request<Streaming<proto::NotifyEventsRequest>>,
    ) -> Result<Response<EventStream>, Status> {
        let place = Arc::clone(&self.streams).try_acquire_owned();
        let place = place.map_err(|_| self.fail(ApiError::TooManyStreams))?;
        let deadline = request.extensions().get::<Deadline>().copied();
        let (caller, incoming) = self.open(request)?;
        let stream = EventStream::new(
            Arc::clone(&self.service),
            Arc::clone(&self.keys),
            caller,
            incoming,
            self.window,
            deadline,
            self.shutdown.clone(),
            place,
        );
        Ok(Response::new(stream))
    }

    async fn get_notification(
        &self,
        request: Request<proto::GetNotificationRequest>,
    ) -> Result<Response<proto::GetNotificationResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let view = self.service.get_notification(call, &message.notification_id).await;
        let with_content = caller.has(Scope::ReadContent);
        self.answer(view.map(|view| proto::GetNotificationResponse {
            notification: Some(convert::notification_view(self.service.identity(), &view, with_content)),
        }))
    }

    async fn list_notifications(
        &self,
        request: Request<proto::ListNotificationsRequest>,
    ) -> Result<Response<proto::ListNotificationsResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let proto::ListNotificationsRequest { event_type, page_size, page_token, .. } = message;
        let input = notifications::ListNotifications { event_type, page_size, page_token };
        let page = self.service.list_notifications(call, input).await;
        let with_content = caller.has(Scope::ReadContent);
        let identity = self.service.identity();
        self.answer(page.map(|(items, next_page_token)| proto::ListNotificationsResponse {
            notifications: items.iter().map(|item| convert::notification(identity, item, with_content)).collect(),
            next_page_token,
        }))
    }

    async fn cancel_notification(
        &self,
        request: Request<proto::CancelNotificationRequest>,
    ) -> Result<Response<proto::CancelNotificationResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let cancelled = self.service.cancel_notification(call, &message.notification_id).await;
        self.answer(cancelled.map(|cancelled| proto::CancelNotificationResponse { cancelled: Some(cancelled) }))
    }

    async fn list_deliveries(
        &self,
        request: Request<proto::ListDeliveriesRequest>,
    ) -> Result<Response<proto::ListDeliveriesResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::list_deliveries(call.violations(), message);
        let page = self.service.list_deliveries(call, input).await;
        self.answer(page.map(|(deliveries, next_page_token)| proto::ListDeliveriesResponse {
            deliveries: deliveries.into_iter().map(convert::delivery).collect(),
            next_page_token,
        }))
    }

    type WatchDeliveriesStream = WatchStream;

    async fn watch_deliveries(
        &self,
        request: Request<proto::WatchDeliveriesRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let place = Arc::clone(&self.watchers).try_acquire_owned();
        let place = place.map_err(|_| self.fail(ApiError::TooManyStreams))?;
        let deadline = request.extensions().get::<Deadline>().copied();
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::watch_deliveries(call.violations(), message);
        let watch = self.service.open_watch(call, input).await.map_err(|error| self.fail(error))?;
        let parts = watch::Parts {
            service: Arc::clone(&self.service),
            keys: Arc::clone(&self.keys),
            caller,
            limits: self.watch_limits,
            deadline,
            shutdown: self.shutdown.clone(),
            place,
        };
        Ok(Response::new(WatchStream::open(parts, watch)))
    }

    async fn explain_delivery(
        &self,
        request: Request<proto::ExplainDeliveryRequest>,
    ) -> Result<Response<proto::ExplainDeliveryResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let proto::ExplainDeliveryRequest { notification_id, user_id, nudged_id, .. } = message;
        let input = notifications::ExplainDelivery { notification_id, user_id, nudged_id };
        let explanation = self.service.explain_delivery(call, input).await;
        self.answer(explanation.map(|explanation| convert::explanation(self.service.identity(), explanation)))
    }
}
