//! The app that is simulated: its routes, and the senders that go with them.

use std::sync::Arc;
use std::time::Duration;

use nudged::domain::deny::DenyFeed;
use nudged::domain::ids::{AppId, AppKey};
use nudged::domain::platform::{Environment, Platform, Route, RouteSpec};
use nudged::runtime::Runtime;
use nudged::senders::Sender;
use nudged::senders::apns::ApnsSender;
use nudged::senders::fcm::FcmSender;
use nudged::senders::http2::{self, Connect, SendingThreads};
use nudged::service::{AppLimits, AppSetup, CredentialSetup};

use super::credentials::{self, BUNDLE};
use super::provider::{Endpoint, Exchange};

pub const APP: &str = "simulated";
const CREDENTIAL: &str = "default";

/// APNs and FCM.
pub type Senders = (Arc<dyn Sender>, Arc<dyn Sender>);

pub fn id() -> AppId {
    AppId::parse("app_id", APP).unwrap_or_else(|_| unreachable!("a slug"))
}

pub fn routes(app: AppKey) -> [RouteSpec; 3] {
    let spec = |platform, environment, bundle: &str| RouteSpec {
        app,
        platform,
        credential: CREDENTIAL.into(),
        environment,
        bundle: bundle.into(),
    };
    [
        spec(Platform::Apns, Environment::Production, BUNDLE),
        spec(Platform::Apns, Environment::Sandbox, BUNDLE),
        spec(Platform::Fcm, Environment::None, ""),
    ]
}

pub fn setup(key: AppKey, routes: Vec<Route>) -> AppSetup {
    let credential = |platform, default_environment, bundle: &str| CredentialSetup {
        platform,
        name: CREDENTIAL.into(),
        default_environment,
        default_bundle: bundle.into(),
    };
    AppSetup {
        id: id(),
        key,
        allow_undeclared_types: true,
        limits: AppLimits::default(),
        credentials: vec![
            credential(Platform::Apns, Environment::Production, BUNDLE),
            credential(Platform::Fcm, Environment::None, ""),
        ],
        routes,
    }
}

pub fn http2(max_streams: u32, request_timeout_ms: u32) -> http2::Settings {
    http2::Settings {
        max_connections: 2,
        max_streams: max_streams as usize,
        request_timeout: Duration::from_millis(request_timeout_ms.into()),
        ..http2::Settings::default()
    }
}

/// `with_token`: APNs by its provider token, otherwise by a certificate.
pub fn senders(
    runtime: &Runtime,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
    (with_token, http2): (bool, http2::Settings),
    connector: impl Fn(Endpoint) -> Arc<dyn Connect>,
    exchange: Exchange,
) -> Result<Senders, String> {
    let apns = ApnsSender::with_connectors(
        runtime,
        threads,
        deny,
        &credentials::apns(with_token, http2),
        connector(Endpoint::ApnsProduction),
        connector(Endpoint::ApnsSandbox),
    );
    let fcm = FcmSender::with_connectors(
        runtime,
        threads,
        deny,
        &credentials::fcm(http2),
        connector(Endpoint::Fcm),
        Arc::new(exchange),
    );
    let apns = apns.map_err(|error| error.to_string())?;
    let fcm = fcm.map_err(|error| error.to_string())?;
    Ok((Arc::new(apns), Arc::new(fcm)))
}
