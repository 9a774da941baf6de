//! Firebase Cloud Messaging, HTTP v1: one request a device over HTTP/2; there is no batch endpoint any more.

mod auth;
mod classify;
mod config;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod template;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::Duration;

pub use auth::{TokenEndpoint, TokenFuture, TokenReply};
pub use config::{ENDPOINT, Settings, SettingsError};
pub use wire::MAX_PAYLOAD_BYTES;

use self::auth::AccessTokens;
use self::wire::FcmWire;
use super::http2::connect::TcpConnector;
use super::http2::{Connect, Driver, Parts, SendingThreads};
use super::{Batch, EncodeError, Encoded, Inspection, Message, Sender, SenderStatus};
use crate::domain::deny::DenyFeed;
use crate::domain::platform::{Platform, Route};
use crate::domain::sending::SendOptions;
use crate::runtime::Runtime;

pub struct FcmSender {
    driver: Driver,
}

impl FcmSender {
    /// Starts the driver on `threads`; connections and tokens are fetched when they are needed.
    pub fn new(
        runtime: &Runtime,
        threads: &SendingThreads,
        deny: &Arc<DenyFeed>,
        settings: &Settings,
    ) -> Result<Self, SettingsError> {
        let checked = settings.check()?;
        let connector = Arc::new(TcpConnector {
            runtime: runtime.clone(),
            endpoint: checked.endpoint.clone(),
            tls: Arc::clone(&checked.tls),
            timeout: settings.http2.connect_timeout,
        });
        let token_endpoint = Arc::new(checked.token_endpoint);
        Self::with_connectors(runtime, threads, deny, settings, connector, token_endpoint)
    }

    /// The same over any byte streams and with tokens from elsewhere; the endpoint is a name only then.
    pub fn with_connectors(
        runtime: &Runtime,
        threads: &SendingThreads,
        deny: &Arc<DenyFeed>,
        settings: &Settings,
        connector: Arc<dyn Connect>,
        token_endpoint: Arc<dyn TokenEndpoint>,
    ) -> Result<Self, SettingsError> {
        let checked = settings.check()?;
        let make = {
            let (runtime, account) = (runtime.clone(), Arc::clone(&checked.account));
            let (endpoint, project_id) = (checked.endpoint.clone(), checked.project_id.clone());
            move || {
                let tokens = AccessTokens::new(runtime.clone(), Arc::clone(&account), Arc::clone(&token_endpoint));
                FcmWire::new(runtime.clone(), &endpoint, &project_id, tokens)
            }
        };
        make().ok_or(SettingsError::BadProject)?;
        let parts = Parts {
            name: "fcm".into(),
            runtime: runtime.clone(),
            settings: settings.http2,
            deny: Arc::clone(deny),
            connector,
        };
        let driver = Driver::start(threads, parts, move || make().expect("it was made before, from the same parts"));
        Ok(Self { driver })
    }
}

#[async_trait::async_trait]
impl Sender for FcmSender {
    fn platform(&self) -> Platform {
        Platform::Fcm
    }

    fn encode(&self, _route: &Route, message: &Message, options: &SendOptions) -> Result<Encoded, EncodeError> {
        wire::prepare(message, options).map(Encoded::new)
    }

    fn inspect(&self, encoded: &Encoded, ttl: Duration) -> Option<Inspection> {
        encoded.get().map(|prepared| wire::inspect(prepared, ttl))
    }

    fn submit(&self, batch: Batch) -> Result<(), Batch> {
        self.driver.submit(batch)
    }

    fn submit_all(&self, batches: Vec<Batch>) -> Vec<Batch> {
        self.driver.submit_all(batches)
    }

    async fn drain(&self, deadline: Duration) {
        self.driver.drain(deadline).await;
    }

    fn status(&self) -> SenderStatus {
        self.driver.status()
    }
}
