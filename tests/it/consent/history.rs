//! People of one history change their minds one step after the other; what they were told goes into the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{CancelNotificationRequest, UnregisterDeviceRequest, device};
use rand::Rng as _;
use rand::rngs::SmallRng;
use tonic::transport::Channel;

use super::super::server::{APP, opt_in, register};
use super::model::Model;
use super::{android, keyed, name, now_ms, phone, tablet};

pub struct History {
    client: PushServiceClient<Channel>,
    number: u64,
    random: SmallRng,
    model: Model,
    people: Vec<Person>,
    /// Whose the tablet is.
    tablet_of: Option<usize>,
    changes: u64,
}

struct Person {
    number: u64,
    opted_in: bool,
    has_phone: bool,
}

impl History {
    /// Of people who are registered with phone and Android and said yes.
    pub fn new(client: PushServiceClient<Channel>, number: u64, own: Vec<u64>, random: SmallRng) -> Self {
        let mut model = Model::default();
        let person = |number| {
            // Since before anything was sent.
            model.allow(&phone(number), 0);
            model.allow(&android(number), 0);
            Person { number, opted_in: true, has_phone: true }
        };
        let people = own.into_iter().map(person).collect();
        Self { client, number, random, model, people, tablet_of: None, changes: 0 }
    }

    /// Until it is told to stop; then everybody says no. What they were told, and how many changes there were.
    pub async fn run(mut self, stop: Arc<AtomicBool>) -> (Model, u64) {
        while !stop.load(Ordering::Relaxed) {
            let at = self.random.random_range(0..self.people.len());
            match self.random.random_range(0..10) {
                0..5 => self.choose(at, !self.people[at].opted_in).await,
                5..7 => self.phone(at).await,
                7..9 => self.move_tablet(at).await,
                _ => self.cancel().await,
            }
            self.changes += 1;
            tokio::time::sleep(Duration::from_millis(self.random.random_range(0..60))).await;
        }
        for at in 0..self.people.len() {
            self.choose(at, false).await;
        }
        (self.model, self.changes)
    }

    async fn choose(&mut self, at: usize, yes: bool) {
        let person = self.people[at].number;
        let before = now_ms();
        opt_in(&mut self.client, &name(person), yes).await;
        let after = now_ms();
        self.people[at].opted_in = yes;
        let mut theirs = vec![android(person)];
        theirs.extend(self.people[at].has_phone.then(|| phone(person)));
        theirs.extend((self.tablet_of == Some(at)).then(|| tablet(self.number)));
        for token in theirs {
            if yes { self.model.allow(&token, before) } else { self.model.forbid(&token, after) }
        }
    }

    /// Unregisters the phone, or registers it again.
    async fn phone(&mut self, at: usize) {
        let Person { number, opted_in, has_phone } = self.people[at];
        let (token, before) = (phone(number), now_ms());
        if has_phone {
            let request = UnregisterDeviceRequest {
                app_id: APP.into(),
                platform: device::Platform::Apns.into(),
                token: token.clone(),
                ..UnregisterDeviceRequest::default()
            };
            self.client.unregister_device(request).await.unwrap();
            self.model.forbid(&token, now_ms());
        } else {
            register(&mut self.client, &name(number), device::Platform::Apns, &token).await;
            if opted_in {
                self.model.allow(&token, before);
            }
        }
        self.people[at].has_phone = !has_phone;
    }

    /// Its new owner decides for it from now on.
    async fn move_tablet(&mut self, at: usize) {
        if self.tablet_of == Some(at) {
            return;
        }
        let (token, before) = (tablet(self.number), now_ms());
        register(&mut self.client, &name(self.people[at].number), device::Platform::Apns, &token).await;
        // Tokens are told apart by their owner's choice.
        self.model.forbid(&token, now_ms());
        if self.people[at].opted_in {
            self.model.allow(&token, before);
        }
        self.tablet_of = Some(at);
    }

    /// An event for all of them, taken back a moment later.
    async fn cancel(&mut self) {
        let key = format!("cancelled-{}-{}", self.number, self.changes);
        let names: Vec<String> = self.people.iter().map(|person| name(person.number)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let id = self.client.notify_event(keyed(&key, &names)).await.unwrap().into_inner().notification_id;
        tokio::time::sleep(Duration::from_millis(self.random.random_range(0..200))).await;
        let request = CancelNotificationRequest { app_id: APP.into(), notification_id: id };
        self.client.cancel_notification(request).await.unwrap();
        self.model.cancel(&key, now_ms());
    }
}
