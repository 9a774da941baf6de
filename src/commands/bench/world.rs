//! The stage: a directory, fake providers, a seeded database, a server.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tonic::transport::{Channel, Endpoint};

use super::args::Plan;
use super::control::Control;
use super::people;
use super::process::Process;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::AppId;
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::runtime::Runtime;
use crate::storage::Registry as _;
use crate::storage::sqlite::{Seed, Settings, SqliteStore, seed};

/// As `nudged sandbox` names them.
pub const APP: &str = "ifriendspet";
const BUNDLE: &str = "com.ifriendspet.app";
const CREDENTIAL: &str = "default";
/// What broadcasts go to.
pub const TOPIC: &str = "author:choco";

const START_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Pushes of watched people that the sandbox keeps.
const RECORD_LIMIT: usize = 100_000;

pub struct World {
    pub plan: Plan,
    pub runtime: Runtime,
    pub dir: PathBuf,
    pub sandbox_process: Process,
    pub sandbox: Control,
    pub server: Process,
    pub admin: Control,
    pub grpc: SocketAddr,
    environment: Vec<(String, String)>,
    is_temporary: bool,
}

impl World {
    pub async fn new(plan: Plan, runtime: &Runtime) -> anyhow::Result<Self> {
        let (dir, is_temporary) = match &plan.dir {
            Some(dir) => (dir.clone(), false),
            None => (PathBuf::from(format!("nudged-bench-{}", std::process::id())), true),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let dir = std::path::absolute(&dir)?;
        let (sandbox_process, sandbox) = start_sandbox(&dir, &plan, runtime).await?;
        let database = dir.join("bench.db");
        seed_database(&dir, &database, &plan, runtime).await?;
        let (grpc, admin) = (free_port()?, free_port()?);
        let mut environment = vec![
            ("NUDGED_DATABASE__URL".to_owned(), format!("sqlite://{}", database.display())),
            ("NUDGED_GRPC__LISTEN".to_owned(), grpc.to_string()),
            ("NUDGED_ADMIN__LISTEN".to_owned(), admin.to_string()),
        ];
        for setting in &plan.settings {
            let Some((key, value)) = setting.split_once('=') else { bail!("--set {setting}: write KEY=VALUE") };
            let name = format!("NUDGED_{}", key.trim().replace('.', "__").to_ascii_uppercase());
            environment.push((name, value.trim().to_owned()));
        }
        let server = start_server(&dir, &environment)?;
        let mut world = Self {
            plan,
            runtime: runtime.clone(),
            dir,
            sandbox_process,
            sandbox,
            server,
            admin: Control::new(runtime.clone(), admin),
            grpc,
            environment,
            is_temporary,
        };
        world.client().await?;
        Ok(world)
    }

    /// A connection of its own, as soon as the server answers.
    pub async fn channel(&mut self) -> anyhow::Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc))?.tcp_nodelay(true);
        let deadline = self.runtime.instant() + START_PATIENCE;
        loop {
            match endpoint.connect().await {
                Ok(channel) => return Ok(channel),
                Err(error) if self.runtime.instant() > deadline => {
                    return Err(error).context("the server does not answer");
                }
                Err(_) => {
                    self.server.check()?;
                    self.runtime.sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    pub async fn client(&mut self) -> anyhow::Result<PushServiceClient<Channel>> {
        Ok(PushServiceClient::new(self.channel().await?))
    }

    /// SIGKILL, as a crash would.
    pub fn kill_server(&mut self) -> anyhow::Result<()> {
        self.server.kill()
    }

    pub fn start_server(&mut self) -> anyhow::Result<()> {
        self.server = start_server(&self.dir, &self.environment)?;
        Ok(())
    }

    /// Stops everything in order, and removes a directory that is ours.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.server.stop(&self.runtime, STOP_PATIENCE).await?;
        self.sandbox_process.stop(&self.runtime, STOP_PATIENCE).await?;
        if self.is_temporary {
            std::fs::remove_dir_all(&self.dir).with_context(|| format!("removing {}", self.dir.display()))?;
        }
        Ok(())
    }
}

fn start_server(dir: &Path, environment: &[(String, String)]) -> anyhow::Result<Process> {
    let config = dir.join("nudged.toml").display().to_string();
    let environment: Vec<(&str, String)> =
        environment.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    Process::start("server", dir, &["serve".to_owned(), "--config".to_owned(), config], &environment)
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
fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

async fn seed_database(dir: &Path, database: &Path, plan: &Plan, runtime: &Runtime) -> anyhow::Result<()> {
    let marker = dir.join("bench.seed");
    let what = format!("devices {} subscribers {}\n", plan.devices, plan.subscribers);
    if std::fs::read_to_string(&marker).is_ok_and(|text| text == what) {
        return Ok(());
    }
    for name in ["bench.db", "bench.db-wal", "bench.db-shm"] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    eprintln!("writing {} devices …", plan.devices);
    let settings = Settings::file(database);
    let (for_store, deny) = (runtime.clone(), Arc::new(DenyFeed::default()));
    let store = runtime.blocking(move || SqliteStore::open(for_store, &settings, deny)).await?;
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
    let (apns, fcm) = (apns.id, fcm.id);
    let (database, people, subscribers) = (database.to_owned(), plan.devices, plan.subscribers);
    let written = runtime.blocking(move || {
        store.close();
        drop(store);
        let what = Seed { app, apns, fcm, topic: TOPIC, people, subscribers, person: &people::seed_person };
        seed(&database, &what, now)
    });
    if let Err(error) = written.await {
        bail!("seeding the database: {error}");
    }
    std::fs::write(&marker, what)?;
    Ok(())
}
