//! One life of one replica: the whole service on the shared store, put together as `app` does, without sockets.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use nudged::api::auth::KeyRing;
use nudged::api::limits::ServerLimits;
use nudged::api::server::Server;
use nudged::delivery::{self, Engine, Pacing, Routing};
use nudged::domain::deny::DenyFeed;
use nudged::domain::platform::Platform;
use nudged::domain::retry::RetryPolicy;
use nudged::domain::time::UnixMs;
use nudged::render::Types;
use nudged::runtime::Runtime;
use nudged::senders::Registry as Senders;
use nudged::senders::http2::{Connect, ConnectError, ConnectFuture, SendingThreads};
use nudged::service::{AppDirectory, Service};
use nudged::storage::Store;
use nudged::storage::sqlite::shared::{Hub, Link, SharedStore};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

use super::story::Setup;
use super::wire::{End, StoreLink, Wire};
use crate::app;
use crate::provider::{Connector, Exchange, Provider};

/// The least wait before any retry, on every platform.
pub const FLOOR: Duration = Duration::from_secs(1);

/// What a replica finds where it starts.
pub struct Place {
    pub hub: Arc<Hub>,
    /// Of what is outside: true time.
    pub outside: Runtime,
    pub provider: Arc<Provider>,
    pub link: Arc<StoreLink>,
    pub to_providers: Arc<Wire>,
    /// The canary: the feed of "no"s says that it is complete, whatever it knows.
    pub lies: bool,
}

/// Where callers find it. Empty while it is down.
pub type Door = Arc<Mutex<Option<mpsc::UnboundedSender<End>>>>;

pub struct Replica {
    runtime: Runtime,
    store: Arc<SharedStore>,
    engine: Engine,
    threads: SendingThreads,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

/// Times to live are short here, so the vendors' long floors would leave no retry to look at.
fn settings(setup: &Setup) -> delivery::Settings {
    let policy = RetryPolicy {
        transport_floor: FLOOR,
        throttled_floor: Duration::from_secs(3),
        server_error_floor: Duration::from_secs(1),
        base: Duration::from_secs(1),
        cap: Duration::from_secs(8),
        give_up_after: Duration::from_secs(90),
    };
    delivery::Settings {
        poll: Duration::from_secs(2),
        page_people: setup.page_people as usize,
        drain: Duration::from_secs(5),
        apns: policy,
        fcm: policy,
        ..delivery::Settings::default()
    }
}

impl Replica {
    pub async fn start(seed: u64, clock: UnixMs, setup: &Setup, place: &Place, door: &Door) -> Result<Self, String> {
        let text = |error: nudged::storage::StoreError| error.to_string();
        let runtime = Runtime::simulated(seed, clock);
        let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
        let link = Arc::clone(&place.link) as Arc<dyn Link>;
        let store =
            SharedStore::open(&place.hub, runtime.clone(), link, Arc::clone(&deny), true).await.map_err(text)?;
        let store = Arc::new(store);
        if place.lies {
            lie(&runtime, &deny);
        }
        let dyn_store = Arc::clone(&store) as Arc<dyn Store>;
        let key = dyn_store.ensure_app(&app::id(), runtime.now()).await.map_err(text)?;
        let routes = dyn_store.ensure_routes(&app::routes(key), runtime.now()).await.map_err(text)?;
        place.provider.learn_identity(dyn_store.identity());
        let threads = SendingThreads::new(&runtime, 1).map_err(|error| error.to_string())?;
        let (apns, fcm) = senders(&runtime, setup, &threads, &deny, place)?;
        let mut routing = Routing::default();
        let mut senders = Senders::default();
        for route in &routes {
            let is_apns = route.spec.platform == Platform::Apns;
            senders.insert(route.clone(), Arc::clone(if is_apns { &apns } else { &fcm }));
            let probes = if is_apns { 30 } else { 0 };
            routing.pacing.insert(route.id, Pacing { rate: None, environment_probes_per_minute: probes });
        }
        routing.senders = senders;
        let types = Arc::new(Types::default());
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
        let service = Service::new(dyn_store, apps, engine.hand_off(), runtime.clone()).with_types(types);
        let limits = ServerLimits { drain: Duration::from_secs(3), ..ServerLimits::default() };
        let keys = Arc::new(KeyRing::new(Vec::new()));
        let server = Server::new(Arc::new(service), keys, limits, runtime.clone());
        server.health().set_serving(true).await;
        let (callers, sockets) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let until = stop.clone();
        let serving = runtime.spawn(async move {
            if let Err(error) = server.serve_on(UnboundedReceiverStream::new(sockets), until).await {
                tracing::error!(%error, "it cannot serve");
            }
        });
        *door.lock().unwrap() = Some(callers);
        Ok(Self { runtime, store, engine, threads, stop, serving })
    }

    /// Without a word. Its connections are broken by whoever has its wires.
    pub fn crash(self, door: &Door) {
        *door.lock().unwrap() = None;
        self.runtime.crash();
    }

    /// In order, as at a SIGTERM.
    pub async fn stop(self, door: &Door) {
        *door.lock().unwrap() = None;
        self.stop.cancel();
        let _ = self.serving.await;
        self.engine.shutdown().await;
        self.threads.shutdown().await;
        self.store.close().await;
    }
}

/// Proves the feed complete without looking.
fn lie(runtime: &Runtime, deny: &Arc<DenyFeed>) {
    let (theirs, deny) = (runtime.clone(), Arc::clone(deny));
    drop(runtime.spawn(async move {
        loop {
            deny.prove(theirs.instant().into_std());
            theirs.sleep(Duration::from_millis(100)).await;
        }
    }));
}

/// A way to a provider that a partition can close.
struct Through {
    wire: Arc<Wire>,
    inner: Connector,
    outside: Runtime,
}

impl Connect for Through {
    fn connect(&self) -> ConnectFuture {
        let (wire, outside) = (Arc::clone(&self.wire), self.outside.clone());
        let connecting = self.inner.connect();
        Box::pin(async move {
            if wire.is_cut() {
                let after = Duration::from_secs(3);
                outside.sleep(after).await;
                return Err(ConnectError::Timeout { after });
            }
            Ok(Box::new(wire.end(connecting.await?)) as _)
        })
    }
}

fn senders(
    runtime: &Runtime,
    setup: &Setup,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
    place: &Place,
) -> Result<app::Senders, String> {
    let connector = |endpoint| {
        let (provider, runtime) = (Arc::clone(&place.provider), place.outside.clone());
        let inner = Connector { provider, runtime, endpoint };
        let (wire, outside) = (Arc::clone(&place.to_providers), place.outside.clone());
        Arc::new(Through { wire, inner, outside }) as Arc<dyn Connect>
    };
    let exchange = Exchange { provider: Arc::clone(&place.provider), runtime: place.outside.clone() };
    let http2 = app::http2(setup.max_streams, setup.request_timeout_ms);
    app::senders(runtime, threads, deny, (true, http2), connector, exchange)
}
