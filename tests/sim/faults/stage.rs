//! The whole service with one app, from gRPC to the senders, on a store of the simulation, and fake providers over pipes.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nudged::api::auth::KeyRing;
use nudged::api::limits::ServerLimits;
use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::server::Server;
use nudged::delivery::{self, Engine, Pacing, Routing};
use nudged::domain::deny::DenyFeed;
use nudged::domain::pacing::Rate;
use nudged::domain::platform::Platform;
use nudged::domain::time::UnixMs;
use nudged::render::Types;
use nudged::runtime::Runtime;
use nudged::sandbox::{Keys, Options, Pipes};
use nudged::senders::apns::{self, ApnsSender};
use nudged::senders::fcm::{self, FcmSender, TokenEndpoint, TokenFuture, TokenReply};
use nudged::senders::http2::{self, Connect, ConnectError, ConnectFuture, SendingThreads};
use nudged::senders::{Registry as Senders, Secret, Sender};
use nudged::service::{AppDirectory, Service};
use nudged::storage::sqlite::SqliteStore;
use nudged::storage::sqlite::shared::{Hub, Link, SharedStore};
use nudged::storage::{BootId, Store};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::play::cell::{Cell, Floors, Found, Stage, play};
use super::play::script::Door;
use crate::app;
use crate::clock::START_MS;
use crate::cluster::callers;
use crate::cluster::wire::Wire;
use crate::credentials::BUNDLE;
use crate::database::{self, Database};

/// Added to every answer, so that others are in flight when a fault comes, and a fault comes while its connection drains.
const LATENCY: Duration = Duration::from_millis(150);
/// A connection is made in so long.
const CONNECTING: Duration = Duration::from_millis(20);
/// To the shared store, there and back.
const TO_THE_STORE: Duration = Duration::from_millis(1);
/// Beyond the hour in which a token is held and after which FCM is not tried again.
const PATIENCE: Duration = Duration::from_secs(2 * 3600);
/// A paused route is not tried for five seconds at least.
const SLOWEST_LOOK: Duration = Duration::from_secs(4);
/// Longer than anything that a cell waits for: whether a connection is still the same says something only while nothing but
/// faults replaces it.
const IDLE: Duration = Duration::from_secs(24 * 3600);
/// One poll in so many is put behind the others.
const REORDER_ONE_IN: u32 = 8;
/// As docs/reliability.md has them under "Identity and timing".
const FLOORS: Floors = Floors {
    apns_error: Duration::from_secs(15 * 60),
    fcm_error: Duration::from_secs(10),
    throttled: Duration::from_secs(60),
};
/// Google's default quota, as in the configuration.
const FCM_RATE: Rate = Rate { per_minute: 600_000, ramp_up: Duration::from_secs(60) };
const APNS_PROBES_PER_MINUTE: u32 = 30;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    Memory,
    /// WAL files.
    Files,
    /// The store that several replicas share, with one of them.
    Shared,
}

impl Place {
    pub const ALL: [Self; 3] = [Self::Memory, Self::Files, Self::Shared];
}

fn options() -> Options {
    Options { bundle_id: BUNDLE.to_owned(), project_id: "simulated".to_owned(), latency: LATENCY, ..Options::default() }
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys::new(&Runtime::production(), &options()).expect("randomness"));

/// To be called before the first cell.
pub fn prepare() {
    LazyLock::force(&KEYS);
}

/// Plays a cell on a stage of its own.
pub fn run(cell: &Cell, place: Place, seed: u64) -> Found {
    let cell = Cell { app: app::APP.to_owned(), ..cell.clone() };
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without system resources");
    let database = match place {
        Place::Memory => Some(Database::new(database::Place::Memory)),
        Place::Files => Some(Database::new(database::Place::File)),
        Place::Shared => None,
    };
    let found = tokio.block_on(async {
        let runtime = Runtime::simulated(seed ^ (cell.number as u64) << 32, UnixMs(START_MS));
        runtime.reorder(REORDER_ONE_IN);
        let house = House::open(&runtime, cell.door(), database.as_ref()).await;
        let (_, found) = play(cell, Arc::clone(&house.stage)).await;
        found
    });
    // Whatever still runs ends here, before its database.
    drop(tokio);
    found
}

struct House {
    stage: Arc<Stage>,
    /// What ends when it is dropped.
    _engine: Engine,
    _threads: SendingThreads,
}

impl House {
    /// `database`: of this process alone, or the one in a hub.
    async fn open(runtime: &Runtime, door: Door, database: Option<&Database>) -> Self {
        let pipes = Arc::new(Pipes::new(runtime, options(), &KEYS).expect("good options"));
        let (store, owner, deny) = open_store(runtime, database).await;
        let key = store.ensure_app(&app::id(), runtime.now()).await.expect("a new database");
        let routes = store.ensure_routes(&app::routes(key), runtime.now()).await.expect("a new database");
        let threads = SendingThreads::new(runtime, 1).expect("none in simulated time");
        let (apns, fcm) = senders(runtime, &threads, &deny, &pipes, door);
        let (mut routing, mut senders) = (Routing::default(), Senders::default());
        for route in &routes {
            let (sender, pacing) = match route.spec.platform {
                Platform::Apns => (&apns, Pacing { rate: None, environment_probes_per_minute: APNS_PROBES_PER_MINUTE }),
                Platform::Fcm => (&fcm, Pacing { rate: Some(FCM_RATE), environment_probes_per_minute: 0 }),
            };
            senders.insert(route.clone(), Arc::clone(sender));
            routing.pacing.insert(route.id, pacing);
        }
        routing.senders = senders;
        let types = Arc::new(Types::default());
        let engine = Engine::start(delivery::Parts {
            runtime: runtime.clone(),
            store: Arc::clone(&store),
            owner,
            routing,
            types: Arc::clone(&types),
            deny,
            settings: delivery::Settings::default(),
        });
        let engine = engine.await.expect("there is no open work");
        let apps = Arc::new(AppDirectory::new(vec![app::setup(key, routes)], None));
        let service = Service::new(store, apps, engine.hand_off(), runtime.clone()).with_types(types);
        let channel = serve(runtime, service).await;
        let stage = Stage {
            providers: pipes,
            client: PushServiceClient::new(channel.clone()),
            admin: AdminServiceClient::new(channel),
            runtime: runtime.clone(),
            patience: PATIENCE,
            floors: FLOORS,
            slowest_look: SLOWEST_LOOK,
        };
        Self { stage: Arc::new(stage), _engine: engine, _threads: threads }
    }
}

struct Straight;

impl Link for Straight {
    fn there(&self) -> Option<Duration> {
        Some(TO_THE_STORE)
    }

    fn back(&self) -> Option<Duration> {
        Some(TO_THE_STORE)
    }
}

async fn open_store(runtime: &Runtime, database: Option<&Database>) -> (Arc<dyn Store>, BootId, Arc<DenyFeed>) {
    if let Some(database) = database {
        let deny = Arc::new(DenyFeed::default());
        let store = SqliteStore::open(runtime.clone(), &database.settings(), Arc::clone(&deny)).expect("it opens");
        let boot = store.boot_id();
        return (Arc::new(store), boot, deny);
    }
    let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
    let hub = Hub::open(runtime.clone()).expect("a database in memory");
    let store = SharedStore::open(&hub, runtime.clone(), Arc::new(Straight), Arc::clone(&deny), true).await;
    let store = store.expect("a straight link");
    let boot = store.boot_id();
    (Arc::new(store), boot, deny)
}

/// A way to call it.
async fn serve(runtime: &Runtime, service: Service) -> Channel {
    let keys = Arc::new(KeyRing::new(Vec::new()));
    let server = Server::new(Arc::new(service), keys, ServerLimits::default(), runtime.clone());
    server.health().set_serving(true).await;
    let (door, sockets) = mpsc::unbounded_channel();
    // Until the runtime is dropped.
    drop(runtime.spawn(async move {
        let served = server.serve_on(UnboundedReceiverStream::new(sockets), CancellationToken::new()).await;
        served.expect("it serves");
    }));
    let door = Arc::new(std::sync::Mutex::new(Some(door)));
    callers::channel(&door, &Arc::<Wire>::default(), runtime)
}

struct Way {
    runtime: Runtime,
    pipes: Arc<Pipes>,
    platform: Platform,
    door: Door,
}

impl Connect for Way {
    fn connect(&self) -> ConnectFuture {
        let (runtime, pipes) = (self.runtime.clone(), Arc::clone(&self.pipes));
        let (platform, door) = (self.platform, self.door);
        Box::pin(async move {
            runtime.sleep(CONNECTING).await;
            match door {
                Door::Open | Door::Mute => {}
                Door::Closed => {
                    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 443));
                    return Err(ConnectError::Tcp { address, source: io::ErrorKind::ConnectionRefused.into() });
                }
                Door::Untrusted => {
                    let source = io::Error::other("invalid peer certificate: UnknownIssuer");
                    return Err(ConnectError::Tls { host: "localhost".into(), source });
                }
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            match platform {
                // Held, and neither read nor written.
                _ if door == Door::Mute => drop(runtime.spawn(async move {
                    let _held = theirs;
                    std::future::pending::<()>().await;
                })),
                Platform::Apns => pipes.apns(theirs),
                Platform::Fcm => pipes.fcm(theirs),
            }
            Ok(Box::new(ours) as _)
        })
    }
}

struct Exchange(Arc<Pipes>);

impl TokenEndpoint for Exchange {
    fn post(&self, form: Vec<(&'static str, String)>) -> TokenFuture {
        let pipes = Arc::clone(&self.0);
        Box::pin(async move {
            let (status, body) = pipes.exchange(&form).await;
            Ok(TokenReply { status: status.as_u16(), headers: http::HeaderMap::new(), body: body.to_vec() })
        })
    }
}

/// As they are configured by default, but for [`IDLE`].
fn senders(
    runtime: &Runtime,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
    pipes: &Arc<Pipes>,
    door: Door,
) -> (Arc<dyn Sender>, Arc<dyn Sender>) {
    let credentials = KEYS.credentials();
    let http2 = http2::Settings { idle_after: IDLE, ..http2::Settings::default() };
    let auth = apns::Auth::Token {
        p8_pem: Secret::new(credentials.apns_key_pem.as_bytes()),
        key_id: credentials.key_id.clone(),
        team_id: credentials.team_id.clone(),
    };
    let apns = apns::Settings { http2, ..apns::Settings::new(auth, vec![BUNDLE.to_owned()]) };
    let fcm = fcm::Settings { http2, ..fcm::Settings::new(Secret::new(credentials.service_account_json.as_bytes())) };
    let way = |platform| -> Arc<dyn Connect> {
        Arc::new(Way { runtime: runtime.clone(), pipes: Arc::clone(pipes), platform, door })
    };
    let (production, sandbox) = (way(Platform::Apns), way(Platform::Apns));
    let apns =
        ApnsSender::with_connectors(runtime, threads, deny, &apns, production, sandbox).expect("the sandbox's key");
    let exchange = Arc::new(Exchange(Arc::clone(pipes)));
    let fcm = FcmSender::with_connectors(runtime, threads, deny, &fcm, way(Platform::Fcm), exchange);
    (Arc::new(apns), Arc::new(fcm.expect("the sandbox's account")))
}
