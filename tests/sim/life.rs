//! One life of the process: the real store, engine, senders and use cases, put together as `app` does, without sockets.

use std::sync::Arc;
use std::time::Duration;

use nudged::delivery::{self, Engine, Pacing, Routing};
use nudged::domain::deny::DenyFeed;
use nudged::domain::event_type::{Definition, OnMaybe};
use nudged::domain::platform::Platform;
use nudged::domain::retry::RetryPolicy;
use nudged::render::Types;
use nudged::runtime::Runtime;
use nudged::senders::Registry as Senders;
use nudged::senders::http2::{Connect, SendingThreads};
use nudged::service::{App, AppDirectory, Service};
use nudged::storage::sqlite::SqliteStore;
use nudged::storage::{Registry, Store};

use super::app;
use super::database::{self, Database, Weather};
use super::history::{self, Setup};
use super::lies::Lie;
use super::provider::{Connector, Exchange, Provider};

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
        (database, weather, provider): (&Database, &Arc<Weather>, &Arc<Provider>),
        lie: Option<Lie>,
    ) -> Result<Self, String> {
        let text = |error: nudged::storage::StoreError| error.to_string();
        let deny = Arc::new(DenyFeed::default());
        let store = Arc::new(database::open(runtime, database, &deny, weather)?);
        provider.learn_identity(store.identity());
        let threads = SendingThreads::new(runtime, 1).map_err(|error| error.to_string())?;
        let key = store.ensure_app(&app::id(), runtime.now()).await.map_err(text)?;
        let routes = store.ensure_routes(&app::routes(key), runtime.now()).await.map_err(text)?;
        if setup.once {
            let name = history::event_type_text(history::ONCE);
            let definition = Definition { name, on_maybe: OnMaybe::Drop, ..Definition::default() };
            store.put_event_type(key, Arc::new(definition), runtime.now()).await.map_err(text)?;
        }
        let heard = if lie == Some(Lie::DeafSenders) { Arc::default() } else { Arc::clone(&deny) };
        let (apns, fcm) = senders(runtime, setup, &threads, &heard, provider)?;
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
        let apps = Arc::new(AppDirectory::new(vec![app::setup(key, routes)], None));
        let app = Arc::clone(apps.get(app::APP).expect("it was just made"));
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

fn senders(
    runtime: &Runtime,
    setup: &Setup,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
    provider: &Arc<Provider>,
) -> Result<app::Senders, String> {
    let connector = |endpoint| {
        let (provider, runtime) = (Arc::clone(provider), runtime.clone());
        Arc::new(Connector { provider, runtime, endpoint }) as Arc<dyn Connect>
    };
    let exchange = Exchange { provider: Arc::clone(provider), runtime: runtime.clone() };
    let http2 = app::http2(setup.max_streams, setup.request_timeout_ms);
    app::senders(runtime, threads, deny, (setup.with_token, http2), connector, exchange)
}
