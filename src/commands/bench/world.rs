//! The stage: a directory, fake providers, a seeded database, a server.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tonic::transport::{Channel, Endpoint};

use super::args::{Plan, Store};
use super::cluster::{self, Cluster};
use super::control::Control;
use super::people;
use super::process::Process;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppId, RouteId};
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::runtime::Runtime;
use crate::storage::Registry;
use crate::storage::seed::{Seed, SeedTopic};
use crate::storage::{postgres, sqlite};

/// As `nudged sandbox` names them.
pub const APP: &str = "ifriendspet";
const BUNDLE: &str = "com.ifriendspet.app";
const CREDENTIAL: &str = "default";

const START_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Pushes of watched people that the sandbox keeps.
const RECORD_LIMIT: usize = 100_000;

/// One server process.
pub struct Replica {
    pub process: Process,
    pub admin: Control,
    grpc: SocketAddr,
    name: String,
    environment: Vec<(String, String)>,
}

pub struct World {
    pub plan: Plan,
    pub runtime: Runtime,
    pub dir: PathBuf,
    pub sandbox_process: Process,
    pub sandbox: Control,
    pub replicas: Vec<Replica>,
    pub cluster: Option<Cluster>,
    /// Connections made, for they go round the replicas.
    connected: usize,
    is_temporary: bool,
}

impl World {
    pub async fn new(plan: Plan, runtime: &Runtime) -> anyhow::Result<Self> {
        let (dir, is_temporary) = match &plan.dir {
            Some(dir) => (dir.clone(), false),
            // Another user, as which the database then runs, may not come to the working directory.
            None if plan.store == Store::Postgres && cluster::is_root() => (temporary(&std::env::temp_dir()), true),
            None => (temporary(Path::new("")), true),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let guard = Directory(is_temporary.then(|| dir.clone()));
        let dir = std::path::absolute(&dir)?;
        let (sandbox_process, sandbox) = start_sandbox(&dir, &plan, runtime).await?;
        let cluster = match plan.store {
            Store::Sqlite => None,
            Store::Postgres => Some(Cluster::start(&dir.join("postgres"), runtime).await?),
        };
        let file = dir.join("bench.db");
        let url = cluster.as_ref().map_or_else(|| format!("sqlite://{}", file.display()), |it| it.url().to_owned());
        seed_database(&dir, &file, cluster.as_ref(), &plan, runtime).await?;
        let mut replicas = Vec::new();
        for at in 0..plan.replicas {
            let (grpc, admin) = (free_port()?, free_port()?);
            let mut environment = vec![
                ("NUDGED_DATABASE__URL".to_owned(), url.clone()),
                ("NUDGED_GRPC__LISTEN".to_owned(), grpc.to_string()),
                ("NUDGED_ADMIN__LISTEN".to_owned(), admin.to_string()),
            ];
            for setting in &plan.settings {
                let Some((key, value)) = setting.split_once('=') else { bail!("--set {setting}: write KEY=VALUE") };
                let name = format!("NUDGED_{}", key.trim().replace('.', "__").to_ascii_uppercase());
                environment.push((name, value.trim().to_owned()));
            }
            let name = format!("server-{at}");
            let process = start_server(&name, &dir, &environment)?;
            replicas.push(Replica { process, admin: Control::new(runtime.clone(), admin), grpc, name, environment });
        }
        guard.keep();
        let mut world = Self {
            plan,
            runtime: runtime.clone(),
            dir,
            sandbox_process,
            sandbox,
            replicas,
            cluster,
            connected: 0,
            is_temporary,
        };
        for _ in 0..world.replicas.len() {
            world.client().await?;
        }
        Ok(world)
    }

    /// A connection of its own to the next replica, as soon as that answers.
    pub async fn channel(&mut self) -> anyhow::Result<Channel> {
        let count = self.replicas.len();
        let replica = &mut self.replicas[self.connected % count];
        self.connected += 1;
        let endpoint = Endpoint::from_shared(format!("http://{}", replica.grpc))?.tcp_nodelay(true);
        let deadline = self.runtime.instant() + START_PATIENCE;
        loop {
            match endpoint.connect().await {
                Ok(channel) => return Ok(channel),
                Err(error) if self.runtime.instant() > deadline => {
                    return Err(error).context("the server does not answer");
                }
                Err(_) => {
                    replica.process.check()?;
                    self.runtime.sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    pub async fn client(&mut self) -> anyhow::Result<PushServiceClient<Channel>> {
        Ok(PushServiceClient::new(self.channel().await?))
    }

    /// Connections of the providers from all replicas would be counted by the sandbox; this is a replica's share.
    pub fn per_replica(&self, connections: u64) -> u64 {
        connections.div_ceil(self.replicas.len().max(1) as u64)
    }

    /// CPU of all server processes, in microseconds.
    pub fn servers_cpu_us(&self) -> anyhow::Result<u64> {
        self.replicas.iter().map(|replica| replica.process.cpu_us()).sum()
    }

    /// CPU of the database's own processes.
    pub fn database_cpu_us(&self) -> anyhow::Result<u64> {
        self.cluster.as_ref().map_or(Ok(0), Cluster::cpu_us)
    }

    /// CPU of each thread of the servers, by name.
    pub fn threads_us(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for replica in &self.replicas {
            for (name, us) in replica.process.threads_us() {
                *all.entry(name).or_default() += us;
            }
        }
        all
    }

    /// Private memory of the largest server process.
    pub fn rss_anon_kib(&self) -> u64 {
        self.replicas.iter().map(|replica| replica.process.rss_anon_kib()).max().unwrap_or(0)
    }

    /// The sum of a metric over labels and replicas.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for replica in &self.replicas {
            sum += replica.admin.metric(name).await?;
        }
        Ok(sum)
    }

    /// Fails when one of the processes has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.sandbox_process.check()?;
        self.replicas.iter_mut().try_for_each(|replica| replica.process.check())
    }

    /// SIGKILL to all of them, as a crash would.
    pub fn kill_servers(&mut self) -> anyhow::Result<()> {
        self.replicas.iter_mut().try_for_each(|replica| replica.process.kill())
    }

    pub fn start_servers(&mut self) -> anyhow::Result<()> {
        for replica in &mut self.replicas {
            replica.process = start_server(&replica.name, &self.dir, &replica.environment)?;
        }
        self.connected = 0;
        Ok(())
    }

    /// Stops everything in order, and removes a directory that is ours.
    pub async fn close(mut self) -> anyhow::Result<()> {
        for replica in &mut self.replicas {
            replica.process.stop(&self.runtime, STOP_PATIENCE).await?;
        }
        self.sandbox_process.stop(&self.runtime, STOP_PATIENCE).await?;
        if let Some(cluster) = self.cluster.take() {
            cluster.stop(&self.runtime, STOP_PATIENCE).await?;
        }
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The fields are dropped after this; who writes there must be gone before.
        let _ = self.kill_servers();
        let _ = self.sandbox_process.kill();
        drop(self.cluster.take());
        if self.is_temporary {
            drop(Directory(Some(self.dir.clone())));
        }
    }
}

/// Removes a directory of ours, unless kept.
struct Directory(Option<PathBuf>);

impl Directory {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

fn temporary(parent: &Path) -> PathBuf {
    parent.join(format!("nudged-bench-{}", std::process::id()))
}

fn start_server(name: &str, dir: &Path, environment: &[(String, String)]) -> anyhow::Result<Process> {
    let config = dir.join("nudged.toml").display().to_string();
    let environment: Vec<(&str, String)> =
        environment.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    Process::start(name, dir, &["serve".to_owned(), "--config".to_owned(), config], &environment)
}

async fn start_sandbox(dir: &Path, plan: &Plan, runtime: &Runtime) -> anyhow::Result<(Process, Control)> {
    let endpoints = dir.join("sandbox.json");
    let _ = std::fs::remove_file(&endpoints);
    let arguments = [
        "sandbox".to_owned(),
        "--tally".to_owned(),
        format!("--dir={}", dir.display()),
        format!("--app={APP}"),
        format!("--bundle={BUNDLE}"),
        format!("--keep-prefix={}", people::WATCHED_PREFIX),
        format!("--record-limit={RECORD_LIMIT}"),
        format!("--latency-ms={}", plan.provider_latency.as_millis()),
    ];
    let mut process = Process::start("sandbox", dir, &arguments, &[])?;
    let deadline = runtime.instant() + START_PATIENCE;
    loop {
        let text = std::fs::read_to_string(&endpoints).unwrap_or_default();
        if let Ok(value) = serde_json::from_str::<serde_json::Value>(&text) {
            let control = value["control"].as_str().and_then(|url| url.strip_prefix("http://")).unwrap_or_default();
            let address = control.parse().context("reading sandbox.json")?;
            return Ok((process, Control::new(runtime.clone(), address)));
        }
        if runtime.instant() > deadline {
            bail!("the fake providers do not start");
        }
        process.check()?;
        runtime.sleep(LOOK_EVERY).await;
    }
}

/// A port nobody listens on now. Another process may take it before us; then the server says so.
pub fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Routes as `serve` will find them.
async fn routes(store: &dyn Registry, runtime: &Runtime) -> anyhow::Result<(crate::domain::ids::AppKey, [RouteId; 2])> {
    let now = runtime.now();
    let app = store.ensure_app(&AppId::parse("app", APP).map_err(|wrong| anyhow::anyhow!("{wrong:?}"))?, now).await?;
    let spec = |platform, environment, bundle: &str| RouteSpec {
        app,
        platform,
        credential: CREDENTIAL.into(),
        environment,
        bundle: bundle.into(),
    };
    let specs = [spec(Platform::Apns, Environment::Sandbox, BUNDLE), spec(Platform::Fcm, Environment::None, "")];
    let routes = store.ensure_routes(&specs, now).await?;
    let [apns, fcm] = &routes[..] else { bail!("two routes were asked for") };
    Ok((app, [apns.id, fcm.id]))
}

async fn seed_database(
    dir: &Path,
    file: &Path,
    cluster: Option<&Cluster>,
    plan: &Plan,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let marker = dir.join("bench.seed");
    let what = format!("1: {:?} devices {} subscribers {}\n", plan.store, plan.devices, plan.subscribers);
    match std::fs::read_to_string(&marker) {
        Ok(text) if text == what => return Ok(()),
        Ok(text) => bail!("{} holds {}; give another --dir, or remove it", dir.display(), text.trim_end()),
        Err(_) => {}
    }
    eprintln!("writing {} devices …", plan.devices);
    let subscribers = plan.subscribers;
    let has = people::Topic::EVERY.map(|topic| move |number: u32| topic.has(number, subscribers));
    let topics: Vec<SeedTopic<'_>> = people::Topic::EVERY
        .iter()
        .zip(&has)
        .map(|(topic, has)| SeedTopic { name: topic.name(), has: has as &(dyn Fn(u32) -> bool + Sync) })
        .collect();
    let deny = Arc::new(DenyFeed::default());
    let seed = |app, [apns, fcm]: [RouteId; 2], topics| Seed {
        app,
        apns,
        fcm,
        topics,
        people: plan.devices,
        person: &people::seed_person,
    };
    let written = if let Some(cluster) = cluster {
        let settings = postgres::Settings::url(cluster.url());
        let store = postgres::PostgresStore::open(
            runtime.clone(),
            &settings,
            Arc::new(DenyFeed::shared(runtime.instant().into_std())),
        )
        .await?;
        let (app, routes) = routes(&store, runtime).await?;
        store.close().await;
        drop(store);
        postgres::seed(runtime, cluster.url(), &seed(app, routes, &topics), runtime.now()).await
    } else {
        let settings = sqlite::Settings::file(file);
        let for_store = runtime.clone();
        let store = runtime.blocking(move || sqlite::SqliteStore::open(for_store, &settings, deny)).await?;
        let (app, routes) = routes(&store, runtime).await?;
        runtime
            .blocking(move || {
                store.close();
                drop(store);
            })
            .await;
        // On this thread: nothing else has anything to do meanwhile.
        sqlite::seed(file, &seed(app, routes, &topics), runtime.now())
    };
    if let Err(error) = written {
        bail!("seeding the database: {error}");
    }
    std::fs::write(&marker, what)?;
    Ok(())
}
