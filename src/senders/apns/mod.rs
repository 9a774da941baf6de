//! Apple Push Notification service.
//!
//! One sender per credential, with a driver each for Apple's production and sandbox hosts; a route's environment chooses.
//! Both are idle until something is sent.

mod auth;
mod classify;
mod config;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::Duration;

pub use config::{Auth, MAX_TOPICS, PRODUCTION, SANDBOX, Settings, SettingsError};
pub use wire::MAX_PAYLOAD_BYTES;

use self::wire::ApnsWire;
use super::http2::connect::TcpConnector;
use super::http2::{Connect, Driver, Endpoint, Parts, SendingThreads};
use super::{Batch, EncodeError, Encoded, Inspection, Message, Sender, SenderStatus};
use crate::domain::deny::DenyFeed;
use crate::domain::platform::{Environment, Platform, Route};
use crate::domain::sending::SendOptions;
use crate::runtime::Runtime;

pub struct ApnsSender {
    topics: Vec<String>,
    with_token: bool,
    production: Driver,
    sandbox: Driver,
}

impl ApnsSender {
    /// Starts the drivers on `threads`; connections are made when they are needed.
    pub fn new(
        runtime: &Runtime,
        threads: &SendingThreads,
        deny: &Arc<DenyFeed>,
        settings: &Settings,
    ) -> Result<Self, SettingsError> {
        let checked = settings.check()?;
        let connector = |endpoint: &Endpoint| -> Arc<dyn Connect> {
            Arc::new(TcpConnector {
                runtime: runtime.clone(),
                endpoint: endpoint.clone(),
                tls: Arc::clone(&checked.tls),
                timeout: settings.http2.connect_timeout,
            })
        };
        let (production, sandbox) = (connector(&checked.production), connector(&checked.sandbox));
        Self::with_connectors(runtime, threads, deny, settings, production, sandbox)
    }

    /// The same over any byte streams; endpoints are names only then.
    pub fn with_connectors(
        runtime: &Runtime,
        threads: &SendingThreads,
        deny: &Arc<DenyFeed>,
        settings: &Settings,
        production: Arc<dyn Connect>,
        sandbox: Arc<dyn Connect>,
    ) -> Result<Self, SettingsError> {
        let checked = settings.check()?;
        let start = |name: &str, endpoint: Endpoint, connector| {
            let tokens = checked.tokens.clone();
            let parts = Parts {
                name: name.into(),
                runtime: runtime.clone(),
                settings: settings.http2,
                deny: Arc::clone(deny),
                connector,
            };
            Driver::start(threads, parts, move || ApnsWire::new(endpoint.clone(), tokens.clone()))
        };
        Ok(Self {
            topics: settings.topics.clone(),
            with_token: checked.tokens.is_some(),
            production: start("apns production", checked.production.clone(), production),
            sandbox: start("apns sandbox", checked.sandbox.clone(), sandbox),
        })
    }

    fn driver(&self, route: &Route) -> &Driver {
        match route.spec.environment {
            Environment::Sandbox => &self.sandbox,
            Environment::Production | Environment::None => &self.production,
        }
    }
}

#[async_trait::async_trait]
impl Sender for ApnsSender {
    fn platform(&self) -> Platform {
        Platform::Apns
    }

    fn encode(&self, route: &Route, message: &Message, options: &SendOptions) -> Result<Encoded, EncodeError> {
        let bundle = &*route.spec.bundle;
        if !self.topics.iter().any(|topic| topic == bundle) {
            return Err(EncodeError::Invalid(format!("the bundle {bundle:?} is not configured")));
        }
        wire::prepare(bundle, message, options, self.with_token).map(Encoded::new)
    }

    fn inspect(&self, encoded: &Encoded, _ttl: Duration) -> Option<Inspection> {
        encoded.get().map(wire::inspect)
    }

    fn submit(&self, batch: Batch) -> Result<(), Batch> {
        self.driver(&batch.route).submit(batch)
    }

    fn submit_all(&self, batches: Vec<Batch>) -> Vec<Batch> {
        let Some(first) = batches.first() else { return batches };
        let route = Arc::clone(&first.route);
        let (same, mut others): (Vec<_>, Vec<_>) = batches.into_iter().partition(|batch| batch.route.id == route.id);
        let mut left = self.driver(&route).submit_all(same);
        if !others.is_empty() {
            others = self.submit_all(others);
            left.append(&mut others);
        }
        left
    }

    async fn drain(&self, deadline: Duration) {
        tokio::join!(self.production.drain(deadline), self.sandbox.drain(deadline));
    }

    fn status(&self) -> SenderStatus {
        let (a, b) = (self.production.status(), self.sandbox.status());
        SenderStatus {
            connections: a.connections + b.connections,
            in_flight: a.in_flight + b.in_flight,
            queued: a.queued.saturating_add(b.queued),
        }
    }
}
