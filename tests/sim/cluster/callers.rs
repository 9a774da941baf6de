//! Callers and watchers: gRPC clients that know every replica and go to the next when one does not answer.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{self, watch_deliveries_response::Event};
use nudged::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use super::replica::Door;
use super::story::{Call, To};
use super::wire::Wire;
use crate::app::APP;
use crate::clock::Clock;
use crate::facts::{Answer, Ask, Fact, Facts, Notify};
use crate::history::{is_apns, token_text};

/// How long a caller waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Tries of what is harmless to repeat, each at another replica.
const TRIES: usize = 4;
/// A watcher hears something every ten seconds.
const SILENCE: Duration = Duration::from_secs(13);

pub type Client = PushServiceClient<Channel>;

/// A client of a replica, whichever life that is in.
pub fn client(door: &Door, wire: &Arc<Wire>, outside: &Runtime) -> Client {
    PushServiceClient::new(channel(door, wire, outside))
}

/// What clients call it over.
pub fn channel(door: &Door, wire: &Arc<Wire>, outside: &Runtime) -> Channel {
    let (door, wire, outside) = (Arc::clone(door), Arc::clone(wire), outside.clone());
    let connector = tower::service_fn(move |_: http::Uri| {
        let (door, wire, outside) = (Arc::clone(&door), Arc::clone(&wire), outside.clone());
        async move {
            if wire.is_cut() {
                outside.sleep(Duration::from_secs(3)).await;
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let door = door.lock().unwrap();
            let taken = door.as_ref().map(|door| door.send(wire.end(Box::new(theirs))));
            match taken {
                Some(Ok(())) => Ok(TokioIo::new(wire.end(Box::new(ours)))),
                _ => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            }
        }
    });
    Endpoint::from_static("http://replica").connect_with_connector_lazy(connector)
}

/// What callers know.
pub struct Callers {
    facts: Arc<Facts>,
    clock: Arc<Clock>,
    outside: Runtime,
    replicas: Vec<Client>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    calls: u32,
    waiting: u32,
    notifications: BTreeMap<u32, String>,
}

impl Callers {
    pub fn new(facts: Arc<Facts>, clock: Arc<Clock>, outside: Runtime, replicas: Vec<Client>) -> Self {
        Self { facts, clock, outside, replicas, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    /// Calls under way.
    pub fn waiting(&self) -> u32 {
        self.known().waiting
    }

    /// Asks, and does not wait. Nothing where it cannot be asked: a notification nobody knows cannot be cancelled.
    pub fn act(self: &Arc<Self>, replica: u8, call: &Call) {
        let Some(ask) = self.ask(call) else { return };
        let once = matches!(&ask, Ask::Notify(notify) if !notify.is_keyed);
        self.known().waiting += 1;
        let this = Arc::clone(self);
        drop(self.outside.spawn(async move {
            for attempt in 0..if once { 1 } else { TRIES } {
                let at = (usize::from(replica) + attempt) % this.replicas.len();
                if this.call(at, &ask).await != Answer::Unknown {
                    break;
                }
            }
            this.known().waiting -= 1;
        }));
    }

    async fn call(&self, replica: usize, ask: &Ask) -> Answer {
        let call = {
            let mut known = self.known();
            known.calls += 1;
            known.calls
        };
        self.facts.add(Fact::Asked { call, at: self.clock.now(), ask: ask.clone() });
        let client = self.replicas[replica].clone();
        let answered = self.outside.timeout(PATIENCE, self.answer(client, ask)).await;
        let answer = answered.unwrap_or(Answer::Unknown);
        self.facts.add(Fact::Answered { call, at: self.clock.now(), answer: answer.clone() });
        answer
    }

    fn ask(&self, call: &Call) -> Option<Ask> {
        let user = |number: u8| format!("user{number}");
        let event_type = |number: u8| format!("type{number}");
        Some(match call {
            Call::Register { user: by, token } => Ask::Register { user: user(*by), token: token_text(*token) },
            Call::Unregister { token } => Ask::Unregister { device: None, token: token_text(*token) },
            Call::OptIn { user: by, event_type: of, yes } => {
                Ask::OptIn { user: user(*by), event_type: of.map(event_type), device: None, yes: *yes }
            }
            Call::Subscribe { user: by, topic, active } => {
                Ask::Subscribe { user: user(*by), topic: format!("topic{topic}"), active: *active }
            }
            Call::Cancel { tag } => Ask::Cancel { notification: self.known().notifications.get(tag)?.clone() },
            Call::Notify { tag, event_type: of, to, actor, ttl_secs, is_keyed } => {
                let mut notify = Notify {
                    tag: *tag,
                    event_type: event_type(*of),
                    actor: actor.map(user),
                    ttl_ms: i64::from(*ttl_secs) * 1_000,
                    is_keyed: *is_keyed,
                    ..Notify::default()
                };
                match to {
                    To::Users(users) => notify.users = users.iter().map(|number| user(*number)).collect(),
                    To::Topic(topic) => notify.topics = vec![format!("topic{topic}")],
                    To::Everyone => notify.everyone = true,
                }
                Ask::Notify(notify)
            }
        })
    }

    async fn answer(&self, mut client: Client, ask: &Ask) -> Answer {
        let app_id = APP.to_owned();
        match ask.clone() {
            Ask::Register { user: user_id, token } => {
                let platform = platform_of(&token).into();
                let request = proto::RegisterDeviceRequest { app_id, user_id, platform, token, ..Default::default() };
                told(client.register_device(request).await, |answer| {
                    let device = answer.device.unwrap_or_default();
                    Answer::Registered { active: device.active(), device: device.device_id }
                })
            }
            Ask::Unregister { token, .. } => {
                let platform = platform_of(&token).into();
                let request = proto::UnregisterDeviceRequest { app_id, platform, token, ..Default::default() };
                told(client.unregister_device(request).await, |answer| Answer::Unregistered {
                    existed: answer.existed(),
                })
            }
            Ask::OptIn { user: user_id, event_type, yes, .. } => {
                let opted_in = Some(yes);
                let request = proto::SetOptInRequest { app_id, user_id, event_type, opted_in, ..Default::default() };
                told(client.set_opt_in(request).await, |answer| Answer::Chosen { applied: answer.applied() })
            }
            Ask::Subscribe { user: user_id, topic, active } => {
                // By true time, so that what is said later counts whichever replica's clock is ahead.
                let at = self.clock.true_wall();
                let nanos = i32::try_from(at % 1_000).unwrap_or(0) * 1_000_000;
                let observed_at = Some(prost_types::Timestamp { seconds: at / 1_000, nanos });
                if active {
                    let request = proto::SubscribeRequest { app_id, user_id, topic, observed_at };
                    told(client.subscribe(request).await, |_| Answer::Subscribed)
                } else {
                    let request = proto::UnsubscribeRequest { app_id, user_id, topic, observed_at };
                    told(client.unsubscribe(request).await, |_| Answer::Subscribed)
                }
            }
            Ask::Notify(notify) => told(client.notify_event(event(&notify)).await, |answer| {
                self.known().notifications.insert(notify.tag, answer.notification_id.clone());
                Answer::Accepted { notification: answer.notification_id }
            }),
            Ask::Cancel { notification: notification_id } => {
                let request = proto::CancelNotificationRequest { app_id, notification_id };
                told(client.cancel_notification(request).await, |_| Answer::Cancelled)
            }
        }
    }

    /// What every notification came to, by whichever replica answers. `None`: none did.
    pub async fn look(&self) -> Option<Vec<Seen>> {
        for client in &self.replicas {
            let looking = look(client.clone());
            if let Some(Ok(seen)) = self.outside.timeout(PATIENCE, looking).await {
                return Some(seen);
            }
        }
        None
    }
}

/// A notification and its deliveries, as asked for.
pub struct Seen {
    pub notification: proto::Notification,
    pub deliveries: Vec<proto::Delivery>,
}

async fn look(mut client: Client) -> Result<Vec<Seen>, Status> {
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let (app_id, page_size) = (APP.to_owned(), 1_000);
        let request = proto::ListNotificationsRequest { app_id, page_size, page_token, ..Default::default() };
        let page = client.list_notifications(request).await?.into_inner();
        for listed in page.notifications {
            let (app_id, notification_id) = (APP.to_owned(), listed.notification_id.clone());
            let request = proto::GetNotificationRequest { app_id, notification_id };
            let notification = client.get_notification(request).await?.into_inner().notification.unwrap_or_default();
            let (app_id, notification_id) = (APP.to_owned(), listed.notification_id);
            let request = proto::ListDeliveriesRequest { app_id, notification_id, page_size, ..Default::default() };
            let deliveries = client.list_deliveries(request).await?.into_inner().deliveries;
            seen.push(Seen { notification, deliveries });
        }
        if page.next_page_token.is_empty() {
            return Ok(seen);
        }
        page_token = page.next_page_token;
    }
}

fn event(notify: &Notify) -> proto::NotifyEventRequest {
    let number = prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(notify.tag.into())) };
    proto::NotifyEventRequest {
        app_id: APP.to_owned(),
        event_type: notify.event_type.clone(),
        idempotency_key: if notify.is_keyed { format!("event{}", notify.tag) } else { String::new() },
        user_ids: notify.users.clone(),
        topics: notify.topics.clone(),
        everyone: notify.everyone,
        actor_id: notify.actor.clone().unwrap_or_default(),
        data: Some(prost_types::Struct { fields: [("event_no".to_owned(), number)].into() }),
        content: Some(proto::Content { title: Some("simulated".to_owned()), ..Default::default() }),
        ttl: Some(prost_types::Duration { seconds: notify.ttl_ms / 1_000, nanos: 0 }),
        ..Default::default()
    }
}

fn platform_of(token: &str) -> proto::device::Platform {
    let is_apple = (0..=u8::MAX).any(|number| is_apns(number) && token_text(number) == token);
    if is_apple { proto::device::Platform::Apns } else { proto::device::Platform::Fcm }
}

fn told<T>(result: Result<Response<T>, Status>, answer: impl FnOnce(T) -> Answer) -> Answer {
    match result {
        Ok(response) => answer(response.into_inner()),
        Err(status) => match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::ResourceExhausted => Answer::Refused,
            _ => Answer::Unknown,
        },
    }
}

/// What one watcher was told, in its order: delivery, state and reason.
pub type Told = Arc<Mutex<Vec<(Key, String)>>>;

/// Notification, user and device of a delivery.
pub type Key = (String, String, String);

pub fn key(delivery: &proto::Delivery) -> Key {
    (delivery.notification_id.clone(), delivery.user_id.clone(), delivery.device_id.clone())
}

pub fn state(delivery: &proto::Delivery) -> String {
    format!("{:?}", delivery.state())
}

/// Watches for ever, at one replica after the other, each time from where it was. `begun` is told once it has a place to
/// begin from.
pub async fn watch(outside: Runtime, replicas: Vec<Client>, first: usize, told: Told, begun: Arc<tokio::sync::Notify>) {
    let mut cursor = String::new();
    for at in first.. {
        let mut client = replicas[at % replicas.len()].clone();
        let request = proto::WatchDeliveriesRequest { app_id: APP.to_owned(), cursor: cursor.clone(), filter: None };
        if let Some(Ok(stream)) = outside.timeout(PATIENCE, client.watch_deliveries(request)).await {
            let mut stream = stream.into_inner();
            while let Some(Ok(Some(message))) = outside.timeout(SILENCE, stream.message()).await {
                if cursor.is_empty() {
                    begun.notify_one();
                }
                cursor = message.cursor;
                if let Some(Event::Delivery(delivery)) = message.event {
                    told.lock().unwrap().push((key(&delivery), state(&delivery)));
                }
            }
        }
        outside.sleep(Duration::from_millis(200)).await;
    }
}
