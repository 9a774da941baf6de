//! Callers: backends that ask, and note what they were answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nudged::domain::content::Content;
use nudged::domain::platform::{DeviceKind, Environment, Permission, Platform};
use nudged::runtime::Runtime;
use nudged::service::devices::{RegisterDevice, UnregisterDevice};
use nudged::service::events::NotifyEvent;
use nudged::service::opt_in::SetOptIn;
use nudged::service::pauses::PauseDelivery;
use nudged::service::subscriptions::SetSubscription;
use nudged::service::{App, Call, Service, ServiceError};
use serde_json::json;

use super::clock::Clock;
use super::facts::{Answer, Ask, Fact, Facts, Notify};
use super::history::{Act, To, event_type_text, is_apns, token_text};

/// What callers know; it outlives the process they call.
pub struct Callers {
    facts: Arc<Facts>,
    clock: Arc<Clock>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    calls: u32,
    waiting: u32,
    /// The device that a token was registered as last.
    devices: BTreeMap<String, String>,
    notifications: BTreeMap<u32, String>,
    events: BTreeMap<u32, Notify>,
}

/// The process that is there to be called.
#[derive(Clone)]
pub struct Line {
    pub runtime: Runtime,
    pub service: Arc<Service>,
    pub app: Arc<App>,
}

impl Callers {
    pub fn new(facts: Arc<Facts>, clock: Arc<Clock>) -> Self {
        Self { facts, clock, known: Mutex::default() }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    /// Calls without an answer yet.
    pub fn waiting(&self) -> u32 {
        self.known().waiting
    }

    /// Nobody will answer them any more.
    pub fn hang_up(&self) {
        self.known().waiting = 0;
    }

    pub fn notifications(&self) -> Vec<String> {
        let mut all: Vec<String> = self.known().notifications.values().cloned().collect();
        all.sort();
        all
    }

    /// Asks, and does not wait. Nothing where it cannot be asked: a notification nobody knows cannot be cancelled.
    pub fn act(self: &Arc<Self>, line: &Line, act: &Act) {
        let Some((ask, is_sandbox)) = self.ask(act) else { return };
        let call = {
            let mut known = self.known();
            known.calls += 1;
            known.waiting += 1;
            known.calls
        };
        self.facts.add(Fact::Asked { call, at: self.clock.now(), ask: ask.clone() });
        let (this, line) = (Arc::clone(self), line.clone());
        let runtime = line.runtime.clone();
        drop(runtime.spawn(async move {
            let answer = this.answer(&line, ask, is_sandbox).await;
            this.facts.add(Fact::Answered { call, at: this.clock.now(), answer });
            let mut known = this.known();
            known.waiting = known.waiting.saturating_sub(1);
        }));
    }

    fn ask(&self, act: &Act) -> Option<(Ask, bool)> {
        let user = |number: u8| format!("user{number}");
        let event_type = event_type_text;
        let mut known = self.known();
        let mut is_sandbox = false;
        let ask = match act {
            Act::Register { user: by, token, is_sandbox: sandbox } => {
                is_sandbox = *sandbox;
                Ask::Register { user: user(*by), token: token_text(*token) }
            }
            Act::Unregister { user: _, token, by_id } => {
                let token = token_text(*token);
                let device = if *by_id { Some(known.devices.get(&token)?.clone()) } else { None };
                Ask::Unregister { device, token }
            }
            Act::OptIn { user: by, event_type: of, token, yes } => {
                let device = match token {
                    Some(token) => Some(known.devices.get(&token_text(*token))?.clone()),
                    None => None,
                };
                Ask::OptIn { user: user(*by), event_type: of.map(event_type), device, yes: *yes }
            }
            Act::Subscribe { user: by, topic, active } => {
                Ask::Subscribe { user: user(*by), topic: format!("topic{topic}"), active: *active }
            }
            Act::Notify { tag, event_type: of, to, actor, ttl_secs, collapses, is_keyed } => {
                let mut notify = Notify {
                    tag: *tag,
                    event_type: event_type(*of),
                    actor: actor.map(user),
                    ttl_ms: i64::from(*ttl_secs) * 1_000,
                    collapse_key: collapses.then(|| format!("collapse{}", tag % 3)),
                    is_keyed: *is_keyed,
                    ..Notify::default()
                };
                match to {
                    To::Users(users) => notify.users = users.iter().map(|number| user(*number)).collect(),
                    To::Topic(topic) => notify.topics = vec![format!("topic{topic}")],
                    To::Devices(tokens) => {
                        let tokens = tokens.iter().map(|token| token_text(*token));
                        notify.devices = tokens.filter_map(|token| known.devices.get(&token).cloned()).collect();
                    }
                    To::Everyone => notify.everyone = true,
                }
                known.events.insert(*tag, notify.clone());
                Ask::Notify(notify)
            }
            Act::Repeat { tag } => Ask::Notify(known.events.get(tag).filter(|notify| notify.is_keyed)?.clone()),
            Act::Cancel { tag } => Ask::Cancel { notification: known.notifications.get(tag)?.clone() },
            Act::Uninstall { .. }
            | Act::Pause { .. }
            | Act::Resume { .. }
            | Act::Mood(_)
            | Act::Database(_)
            | Act::Jump { .. }
            | Act::Crash { .. }
            | Act::Restart { .. } => return None,
        };
        Some((ask, is_sandbox))
    }

    async fn answer(&self, line: &Line, ask: Ask, is_sandbox: bool) -> Answer {
        let call = Call::new(&line.app).may_broadcast(true);
        match ask {
            Ask::Register { user, token } => self.register(line, call, user, token, is_sandbox).await,
            Ask::Unregister { device, token } => {
                let by_token = device.is_none();
                let input = UnregisterDevice {
                    user_id: String::new(),
                    device_id: device.unwrap_or_default(),
                    platform: by_token.then(|| platform_of(&token)),
                    token: if by_token { token } else { String::new() },
                    observed_at: None,
                };
                told(line.service.unregister_device(call, input).await, |existed| Answer::Unregistered { existed })
            }
            Ask::OptIn { user, event_type, device, yes } => {
                let input = SetOptIn {
                    user_id: user,
                    event_type,
                    device_id: device.unwrap_or_default(),
                    opted_in: Some(yes),
                    source: String::new(),
                    policy_version: String::new(),
                    evidence: String::new(),
                    observed_at: None,
                };
                told(line.service.set_opt_in(call, input).await, |(_, applied)| Answer::Chosen { applied })
            }
            Ask::Subscribe { user, topic, active } => {
                let input = SetSubscription { user_id: user, topic, active, observed_at: None };
                told(line.service.set_subscription(call, input).await, |_| Answer::Subscribed)
            }
            Ask::Notify(notify) => self.notify(line, call, &notify).await,
            Ask::Cancel { notification } => {
                told(line.service.cancel_notification(call, &notification).await, |_| Answer::Cancelled)
            }
        }
    }

    async fn register(&self, line: &Line, call: Call<'_>, user: String, token: String, is_sandbox: bool) -> Answer {
        let platform = platform_of(&token);
        let environment = (is_sandbox && platform == Platform::Apns).then_some(Environment::Sandbox);
        let input = RegisterDevice {
            user_id: user,
            platform: Some(platform),
            token: token.clone(),
            kind: DeviceKind::Alert,
            credential: String::new(),
            environment,
            apns_topic: String::new(),
            installation_id: String::new(),
            device_id: String::new(),
            locale: String::new(),
            time_zone: String::new(),
            app_version: String::new(),
            os_version: String::new(),
            permission: Permission::Granted,
            labels: BTreeMap::new(),
            observed_at: None,
        };
        told(line.service.register_device(call, input).await, |registered| {
            let device = registered.device.id.public();
            self.known().devices.insert(token, device.clone());
            Answer::Registered { device, active: registered.device.active }
        })
    }

    async fn notify(&self, line: &Line, call: Call<'_>, notify: &Notify) -> Answer {
        let mut data = nudged::domain::content::Data::new();
        data.insert("event_no".to_owned(), json!(notify.tag));
        let input = NotifyEvent {
            event_type: notify.event_type.clone(),
            idempotency_key: if notify.is_keyed { format!("event{}", notify.tag) } else { String::new() },
            user_ids: notify.users.clone(),
            topics: notify.topics.clone(),
            device_ids: notify.devices.clone(),
            everyone: notify.everyone,
            actor_id: notify.actor.clone().unwrap_or_default(),
            data,
            content: Some(Content { title: Some("simulated".to_owned()), ..Content::default() }),
            ttl_ms: Some(notify.ttl_ms),
            collapse_key: notify.collapse_key.clone().unwrap_or_default(),
            ..NotifyEvent::default()
        };
        let notified = match line.service.checked(call, input) {
            Ok(checked) => line.service.notify(checked).await,
            Err(error) => Err(error),
        };
        told(notified, |accepted| {
            let notification = line.service.identity().public_notification(accepted.notification).to_string();
            self.known().notifications.insert(notify.tag, notification.clone());
            Answer::Accepted { notification }
        })
    }

    /// An operator's pause, or its end. No fact: whoever is paused waits, and that breaks no promise.
    pub fn pause(self: &Arc<Self>, line: &Line, event_type: Option<u8>, begins: bool) {
        self.known().waiting += 1;
        let (this, line) = (Arc::clone(self), line.clone());
        let runtime = line.runtime.clone();
        drop(runtime.spawn(async move {
            let _ = if begins {
                line.service.pause_delivery(Call::new(&line.app), scope(event_type)).await
            } else {
                line.service.resume_delivery(Call::new(&line.app), scope(event_type)).await
            };
            let mut known = this.known();
            known.waiting = known.waiting.saturating_sub(1);
        }));
    }

    /// An operator who sees to it.
    pub async fn resume(&self, line: &Line, event_type: Option<u8>) {
        while line.service.resume_delivery(Call::new(&line.app), scope(event_type)).await.is_err() {
            line.runtime.sleep(Duration::from_secs(1)).await;
        }
    }
}

fn scope(event_type: Option<u8>) -> PauseDelivery {
    let event_type = event_type.map(event_type_text).unwrap_or_default();
    PauseDelivery { event_type, platform: None, reason: "simulated".to_owned() }
}

fn platform_of(token: &str) -> Platform {
    let is_apple = token.bytes().all(|byte| byte.is_ascii_hexdigit());
    debug_assert!(is_apple == (0..=u8::MAX).any(|number| is_apns(number) && token_text(number) == token));
    if is_apple { Platform::Apns } else { Platform::Fcm }
}

fn told<T>(result: Result<T, ServiceError>, answer: impl FnOnce(T) -> Answer) -> Answer {
    match result {
        Ok(value) => answer(value),
        Err(ServiceError::Store(error)) if !error.is_refusal() => Answer::Unknown,
        Err(_) => Answer::Refused,
    }
}
