//! The composition root: builds store, senders, engine and servers, owns every task, and stops them in order.
//!
//! Runtimes: the engine, the database's answers and reqwest share the caller's multi-thread runtime; each gRPC thread and
//! each sending thread has a current-thread runtime of its own, because there every queued request would wake another
//! thread and be flushed alone.
//!
//! Shutdown: `/readyz` and health say so, the gRPC server stops accepting and answers what it has, the engine stops
//! claiming and drains the senders, outcomes are written, leases given back, the database closed. Dropping an `App`
//! instead is a crash: nothing is lost, the next start takes up the work.

pub(crate) mod certificate;
pub mod database;
mod disk;
mod gauges;
pub mod keys;
pub mod moving;
mod readiness;
mod reload;
pub mod routes;
pub mod senders;
pub mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle as ThreadHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::database::OpenStore;
use crate::admin::{AdminParts, AdminServer, Heartbeat};
use crate::api::auth::KeyRing;
use crate::api::limits::ServerLimits;
use crate::api::server::{Health, Server};
use crate::api::tls::TlsSetup;
use crate::config::{Config, Grpc, GrpcTls};
use crate::delivery::{self, Engine};
use crate::domain::deny::DenyFeed;
use crate::domain::room::RoomLimits;
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::http2::SendingThreads;
use crate::service::restore::{self, AfterRestore};
use crate::service::{AppDirectory, Service};
use crate::storage::Store;
use crate::telemetry::Metrics;

/// A runtime silent for so long is stuck.
const MAX_SILENCE: Duration = Duration::from_secs(10);

/// A running server.
pub struct App {
    grpc_address: SocketAddr,
    admin_address: SocketAddr,
    store: OpenStore,
    engine: Engine,
    threads: SendingThreads,
    health: Health,
    gauges: Arc<gauges::CredentialGauges>,
    grpc: Vec<ThreadHandle<()>>,
    stop_grpc: CancellationToken,
    admin: JoinHandle<()>,
    heartbeat: JoinHandle<()>,
    disk: JoinHandle<()>,
    stop_admin: CancellationToken,
    readiness: readiness::Shutdown,
    runtime: Runtime,
    // What a reload replaces, or needs.
    live: tokio::sync::Mutex<reload::Live>,
    service: Arc<Service>,
    keys: Arc<KeyRing>,
    server: Arc<Server>,
    types: Arc<Types>,
    deny: Arc<DenyFeed>,
}

impl App {
    /// Everything up and serving, or an error that says what to do.
    pub async fn start(runtime: Runtime, config: &Config, metrics: Metrics) -> anyhow::Result<Self> {
        Self::start_with(runtime, config, metrics, None).await
    }

    /// [`App::start`] on a database that was restored from a backup, under the operator's name of that restore.
    pub async fn start_after_restore(
        runtime: Runtime,
        config: &Config,
        metrics: Metrics,
        name: &str,
    ) -> anyhow::Result<Self> {
        Self::start_with(runtime, config, metrics, Some(name)).await
    }

    async fn start_with(
        runtime: Runtime,
        config: &Config,
        metrics: Metrics,
        restore: Option<&str>,
    ) -> anyhow::Result<Self> {
        let (store, deny) = OpenStore::open(&runtime, &config.database).await?;
        if let Some(name) = restore
            && let Err(error) = hold_after_restore(&store, &runtime, name).await
        {
            store.close(&runtime).await;
            return Err(error);
        }
        let threads =
            SendingThreads::new(&runtime, config.delivery.sender_threads).context("starting sending threads")?;
        let dyn_store: Arc<dyn Store> = store.store();
        let known = routes::Credentials::new();
        let workshop =
            routes::Workshop { runtime: &runtime, store: &*dyn_store, threads: &threads, deny: &deny, known: &known };
        let routed = routes::build(config, &workshop).await?;
        let types = Arc::new(Types::default());
        let sending = routed.sending();
        types.set_default_locales(routed.default_locales);
        let engine = Engine::start(delivery::Parts {
            runtime: runtime.clone(),
            store: Arc::clone(&dyn_store),
            owner: store.boot_id(),
            routing: routed.routing,
            types: Arc::clone(&types),
            deny: Arc::clone(&deny),
            settings: engine_settings(config),
        })
        .await
        .context("taking up open work")?;

        let mut disk = disk::DiskWatch::new(&runtime, &store, engine.hand_off(), &config.database);
        disk.look().await;
        let gauges = gauges::CredentialGauges::new(engine.route_states(), runtime.clone());
        gauges.set(config, &routed.apps);
        let apps = Arc::new(AppDirectory::new(routed.apps, config.grpc.default_app.clone()));
        let service = Service::new(dyn_store, apps, engine.hand_off(), runtime.clone());
        let service = service.with_types(Arc::clone(&types)).with_sending(sending);
        let service = Arc::new(service);
        let key_ring = Arc::new(KeyRing::new(keys::api_keys(&config.keys)));
        let mut server = Server::new(Arc::clone(&service), Arc::clone(&key_ring), limits(config)?, runtime.clone());
        if let Some(tls) = &config.grpc.tls {
            server = server.with_tls(&read_tls(tls)?)?;
        }
        let health = server.health();
        let server = Arc::new(server);
        let stop_grpc = CancellationToken::new();
        let Served { address: grpc_address, threads: grpc, mut heartbeats, runtimes } =
            serve_grpc(&runtime, &config.grpc, &server, &stop_grpc)?;

        let engine_heartbeat = Heartbeat::new(&runtime, "engine", MAX_SILENCE);
        heartbeats.push(engine_heartbeat.clone());
        let shutdown = readiness::Shutdown::default();
        let checks = vec![
            Arc::new(readiness::DatabaseAnswers(store.clone())) as _,
            Arc::new(readiness::MigrationsFit(store.clone())) as _,
            Arc::new(readiness::RoomLeft(engine.hand_off())) as _,
            Arc::new(shutdown.clone()) as _,
        ];
        let runtimes = [("engine", vec![Handle::current()]), ("grpc", runtimes), ("send", threads.runtimes())];
        let collectors = vec![Arc::clone(&gauges) as _, Arc::new(gauges::TaskGauges { runtimes }) as _];
        let parts = AdminParts { runtime: runtime.clone(), metrics, heartbeats, checks, collectors };
        let admin_server = AdminServer::bind(config.admin.listen, parts).await?;
        let admin_address = admin_server.address();
        let stop_admin = CancellationToken::new();
        let admin = runtime.spawn(admin_server.run(stop_admin.clone()));
        let heartbeat = runtime.spawn(engine_heartbeat.run(stop_admin.clone()));
        let disk = runtime.spawn(disk.run(stop_grpc.clone()));
        health.set_serving(true).await;
        tracing::info!(%grpc_address, %admin_address, "nudged is serving");
        Ok(Self {
            grpc_address,
            admin_address,
            store,
            engine,
            threads,
            health,
            gauges,
            grpc,
            stop_grpc,
            admin,
            heartbeat,
            disk,
            stop_admin,
            readiness: shutdown,
            runtime,
            live: tokio::sync::Mutex::new(reload::Live::new(config, routed.credentials)),
            service,
            keys: key_ring,
            server,
            types,
            deny,
        })
    }

    /// Where callers reach it, with the port that the system picked when port 0 was asked for.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Answers when the outcome of a database commit is unknown: the process must exit and read at its next start what
    /// the database really holds.
    pub async fn fatal(&self) -> Arc<str> {
        self.store.fatal().await
    }

    /// Whether that is because the database file is damaged: another start does not help.
    pub fn is_damaged(&self) -> bool {
        self.store.is_damaged()
    }

    /// In order, see the module.
    pub async fn shutdown(self) {
        tracing::info!("shutting down");
        self.readiness.begin();
        self.health.set_serving(false).await;
        self.stop_grpc.cancel();
        let grpc = self.grpc;
        self.runtime
            .blocking(move || {
                for thread in grpc {
                    if thread.join().is_err() {
                        tracing::error!("a gRPC thread panicked");
                    }
                }
            })
            .await;
        if let Err(error) = self.disk.await {
            tracing::error!(%error, "the watch over the disk ended badly");
        }
        self.engine.shutdown().await;
        self.live.into_inner().drained().await;
        self.threads.shutdown().await;
        self.store.close(&self.runtime).await;
        self.stop_admin.cancel();
        for (name, task) in [("the admin server", self.admin), ("the heartbeat", self.heartbeat)] {
            if let Err(error) = task.await {
                tracing::error!(%error, "{name} ended badly");
            }
        }
        tracing::info!("stopped");
    }
}

/// Before the engine starts, so that nothing goes out.
async fn hold_after_restore(store: &OpenStore, runtime: &Runtime, name: &str) -> anyhow::Result<()> {
    match restore::begin(&*store.store(), runtime, name).await.context("holding everything after the restore")? {
        AfterRestore::Held { since, cancelled } => {
            tracing::warn!(name, %since, cancelled,
                "restored from a backup: what was open is cancelled, and nothing is sent before `nudged confirm-restore`");
            Ok(())
        }
        AfterRestore::Confirmed { at } => anyhow::bail!(
            "the restore {name:?} was confirmed at {at}; start without --after-restore, or give this one another name: \
             --after-restore=NAME"
        ),
    }
}

fn engine_settings(config: &Config) -> delivery::Settings {
    let from = &config.delivery;
    delivery::Settings {
        max_in_flight_targets: from.max_in_flight_targets,
        max_claim_targets: from.claim_targets,
        poll: from.poll,
        checkpoint: from.flush_interval,
        drain: from.drain,
        retention: Duration::from_secs(u64::from(config.database.retention_days) * 24 * 3600),
        apns: from.apns,
        fcm: from.fcm,
        retirement_guard: delivery::RetirementGuard {
            min: from.retirement_guard_min,
            percent: from.retirement_guard_percent,
        },
        max_expanded_targets: delivery::Settings::default().max_expanded_targets.min(from.max_open_targets.div_ceil(2)),
        room: RoomLimits {
            max_open_targets: from.max_open_targets,
            max_open_rows: from.max_open_rows,
            min_free_bytes: config.database.min_free_mib * MIB,
            max_bytes: config.database.max_mib * MIB,
        },
        ..delivery::Settings::default()
    }
}

const MIB: u64 = 1024 * 1024;

fn limits(config: &Config) -> anyhow::Result<ServerLimits> {
    let grpc = &config.grpc;
    Ok(ServerLimits {
        max_connections: grpc.max_connections,
        max_streams_per_connection: u32::try_from(grpc.max_streams_per_connection)
            .context("grpc.max_streams_per_connection is too large")?,
        max_concurrent_requests: grpc.max_concurrent_requests,
        max_watchers: grpc.max_watchers,
        max_deadline: grpc.request_timeout,
        drain: config.delivery.drain,
        ..ServerLimits::default()
    })
}

fn read_tls(tls: &GrpcTls) -> anyhow::Result<TlsSetup> {
    let read = |path: &std::path::Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    Ok(TlsSetup {
        cert_pem: read(&tls.cert_file)?,
        key_pem: tls.key.read()?.to_vec(),
        client_ca_pem: tls.client_ca_file.as_deref().map(read).transpose()?,
    })
}

/// What serves gRPC.
struct Served {
    address: SocketAddr,
    threads: Vec<ThreadHandle<()>>,
    heartbeats: Vec<Heartbeat>,
    /// To be looked at.
    runtimes: Vec<Handle>,
}

/// One listener, served by every gRPC thread's own runtime.
fn serve_grpc(
    runtime: &Runtime,
    grpc: &Grpc,
    server: &Arc<Server>,
    stop: &CancellationToken,
) -> anyhow::Result<Served> {
    let cannot = || format!("listening on {} (grpc.listen)", grpc.listen);
    let listener = std::net::TcpListener::bind(grpc.listen).with_context(cannot)?;
    listener.set_nonblocking(true).with_context(cannot)?;
    let address = listener.local_addr().with_context(cannot)?;
    let (mut threads, mut heartbeats, mut runtimes) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..grpc.threads {
        let name = format!("grpc-{number}");
        let heartbeat = Heartbeat::new(runtime, name.clone(), MAX_SILENCE);
        heartbeats.push(heartbeat.clone());
        let listener = listener.try_clone().with_context(cannot)?;
        let (server, stop) = (Arc::clone(server), stop.clone());
        let for_thread = runtime.clone();
        // What other threads woke goes first (tokio's default: when there is nothing else, or every 31 tasks): whom the store
        // has answered waits longest, and their connection takes up what they ask next in the same turn.
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        let tokio = builder.enable_all().global_queue_interval(1).build().context("starting a runtime")?;
        runtimes.push(tokio.handle().clone());
        let thread = runtime.thread(&name, move || {
            tokio.block_on(async move {
                // Joined by the runtime's end; it has no state of its own.
                let beating = for_thread.spawn(heartbeat.run(stop.clone()));
                let served = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => server.serve(listener, stop).await.map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                if let Err(error) = served {
                    tracing::error!(error, "a gRPC thread cannot serve");
                }
                beating.abort();
            });
        });
        threads.push(thread.context("starting a gRPC thread")?);
    }
    Ok(Served { address, threads, heartbeats, runtimes })
}
