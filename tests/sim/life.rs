//! One life of the process: the real store, engine, senders and use cases, put together as `app` does, without sockets.

use std::sync::Arc;
use std::time::Duration;

use nudged::delivery::{self, Engine, Pacing, Routing};
use nudged::domain::deny::DenyFeed;
use nudged::domain::ids::AppId;
use nudged::domain::platform::{Environment, Platform, Route, RouteSpec};
use nudged::domain::retry::RetryPolicy;
use nudged::render::Types;
use nudged::runtime::Runtime;
use nudged::senders::apns::ApnsSender;
use nudged::senders::fcm::FcmSender;
use nudged::senders::http2::{self, SendingThreads};
use nudged::senders::{Registry as Senders, Sender};
use nudged::service::{App, AppDirectory, AppLimits, AppSetup, CredentialSetup, Service};
use nudged::storage::sqlite::SqliteStore;
use nudged::storage::{Registry, Store};

use super::credentials::{self, BUNDLE};
use super::database::{self, Database, Weather};
use super::history::Setup;
use super::provider::{Connector, Endpoint, Exchange, Provider};

const APP: &str = "simulated";
const CREDENTIAL: &str = "default";

pub struct Life {
    pub store: Arc<SqliteStore>,
    pub service: Arc<Service>,
    pub app: Arc<App>,
    engine: Engine,
    threads: SendingThreads,
}

/// The least wait before any retry, on every platform.
pub const FLOOR: Duration = Duration::from_secs(1);

/// Times to live are short here, so the vendors' long floors would leave no retry to look at.
fn settings(setup: &Setup) -> delivery::Settings {
    let policy = RetryPolicy {
        transport_floor: FLOOR,
        throttled_floor: Duration::from_secs(5),
        server_error_floor: Duration::from_secs(2),
        base: Duration::from_secs(2),
        cap: Duration::from_secs(30),
        give_up_after: Duration::from_secs(90),
    };
    delivery::Settings {
        max_in_flight_targets: setup.max_in_flight_targets as usize,
        page_people: setup.page_people as usize,
        drain: Duration::from_secs(5),
        apns: policy,
        fcm: policy,
        ..delivery::Settings::default()
    }
}

impl Life {
    pub async fn begin(
        runtime: &Runtime,
        setup: &Setup,
        database: &Database,
        weather: &Arc<Weather>,
        provider: &Arc<Provider>,
    ) -> Result<Self, String> {
        let text = |error: nudged::storage::StoreError| error.to_string();
        let deny = Arc::new(DenyFeed::default());
        let store = Arc::new(database::open(runtime, database, &deny, weather)?);
        provider.learn_identity(store.identity());
        let threads = SendingThreads::new(runtime, 1).map_err(|error| error.to_string())?;
        let key = store.ensure_app(&app_id(), runtime.now()).await.map_err(text)?;
        let spec = |platform, environment, bundle: &str| RouteSpec {
            app: key,
            platform,
            credential: CREDENTIAL.into(),
            environment,
            bundle: bundle.into(),
        };
        let specs = [
            spec(Platform::Apns, Environment::Production, BUNDLE),
            spec(Platform::Apns, Environment::Sandbox, BUNDLE),
            spec(Platform::Fcm, Environment::None, ""),
        ];
        let routes = store.ensure_routes(&specs, runtime.now()).await.map_err(text)?;
        let (apns, fcm) = senders(runtime, setup, &threads, &deny, provider)?;
        let mut registry = Senders::default();
        let mut routing = Routing::default();
        for route in &routes {
            let sender = if route.spec.platform == Platform::Apns { &apns } else { &fcm };
            registry.insert(route.clone(), Arc::clone(sender));
            let probes = if route.spec.platform == Platform::Apns { 30 } else { 0 };
            routing.pacing.insert(route.id, Pacing { rate: None, environment_probes_per_minute: probes });
        }
        routing.senders = registry;
        let types = Arc::new(Types::default());
        let dyn_store = Arc::clone(&store) as Arc<dyn Store>;
        let engine = Engine::start(delivery::Parts {
            runtime: runtime.clone(),
            store: Arc::clone(&dyn_store),
            owner: store.boot_id(),
            routing,
            types: Arc::clone(&types),
            deny,
            settings: settings(setup),
        })
        .await
        .map_err(text)?;
        let apps = Arc::new(AppDirectory::new(vec![app_setup(key, routes)], None));
        let app = Arc::clone(apps.get(APP).expect("it was just made"));
        let service = Service::new(dyn_store, apps, engine.hand_off(), runtime.clone()).with_types(types);
        Ok(Self { store, service: Arc::new(service), app, engine, threads })
    }

    /// In order, as at a SIGTERM.
    pub async fn end(self) {
        self.engine.shutdown().await;
        self.threads.shutdown().await;
        self.store.close();
    }
}

type AnySender = Arc<dyn Sender>;

fn senders(
    runtime: &Runtime,
    setup: &Setup,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
    provider: &Arc<Provider>,
) -> Result<(AnySender, AnySender), String> {
    let http2 = http2::Settings {
        max_connections: 2,
        max_streams: setup.max_streams as usize,
        request_timeout: Duration::from_millis(setup.request_timeout_ms.into()),
        ..http2::Settings::default()
    };
    let connector = |endpoint| {
        let (provider, runtime) = (Arc::clone(provider), runtime.clone());
        Arc::new(Connector { provider, runtime, endpoint }) as Arc<dyn http2::Connect>
    };
    let apns = ApnsSender::with_connectors(
        runtime,
        threads,
        deny,
        &credentials::apns(setup.with_token, http2),
        connector(Endpoint::ApnsProduction),
        connector(Endpoint::ApnsSandbox),
    );
    let exchange = Arc::new(Exchange { provider: Arc::clone(provider), runtime: runtime.clone() });
    let fcm = FcmSender::with_connectors(
        runtime,
        threads,
        deny,
        &credentials::fcm(http2),
        connector(Endpoint::Fcm),
        exchange,
    );
    let apns = apns.map_err(|error| error.to_string())?;
    let fcm = fcm.map_err(|error| error.to_string())?;
    Ok((Arc::new(apns), Arc::new(fcm)))
}

fn app_id() -> AppId {
    AppId::parse("app_id", APP).unwrap_or_else(|_| unreachable!("a slug"))
}

fn app_setup(key: nudged::domain::ids::AppKey, routes: Vec<Route>) -> AppSetup {
    let credential = |platform, default_environment, bundle: &str| CredentialSetup {
        platform,
        name: CREDENTIAL.into(),
        default_environment,
        default_bundle: bundle.into(),
    };
    AppSetup {
        id: app_id(),
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
