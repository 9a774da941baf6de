//! Starts the real binary against an in-process sandbox, and stops or kills it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{Content, NotifyEventRequest, RegisterDeviceRequest, SetOptInRequest, device};
use nudged::runtime::Runtime;
use nudged::sandbox::{Options, Received, Sandbox};
use tempfile::TempDir;
use tonic::transport::Channel;

pub const APP: &str = "ifriendspet";

/// How long anything may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pushes that the sandbox keeps: more than any test makes.
const RECORD_LIMIT: usize = 4_000_000;
const SERVER_LOG: &str = "server.log";

pub struct World {
    /// Removed with everything in it at the end.
    _dir: TempDir,
    pub sandbox: Sandbox,
    pub address: String,
    /// Of `/metrics`.
    pub admin: String,
    /// What the sandbox wrote, and what the server is started with.
    pub config: PathBuf,
}

/// The running binary; killed with SIGKILL when dropped.
pub struct Server {
    child: Child,
}

impl World {
    pub async fn new() -> Self {
        Self::recording(RECORD_LIMIT).await
    }

    /// The providers remember so many pushes.
    pub async fn recording(record_limit: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (grpc, admin) = (free_port(), free_port());
        let options = Options {
            dir: Some(dir.path().to_owned()),
            grpc_listen: Some(format!("127.0.0.1:{grpc}").parse().unwrap()),
            admin_listen: Some(format!("127.0.0.1:{admin}").parse().unwrap()),
            record_limit,
            ..Options::default()
        };
        let sandbox = Sandbox::start(&Runtime::production(), options).await.unwrap();
        let config = dir.path().join("nudged.toml");
        let (address, admin) = (format!("http://127.0.0.1:{grpc}"), format!("127.0.0.1:{admin}"));
        Self { _dir: dir, sandbox, address, admin, config }
    }

    /// The server's database.
    pub fn database(&self) -> PathBuf {
        self.config.with_file_name("nudged.db")
    }

    pub fn start(&self) -> Server {
        self.start_with(&[])
    }

    /// With these environment variables: one of several processes on this configuration.
    pub fn start_with(&self, environment: &[(&str, String)]) -> Server {
        self.start_as(&[], environment)
    }

    /// With these flags.
    pub fn start_as(&self, flags: &[&str], environment: &[(&str, String)]) -> Server {
        Server { child: spawn(&[&["serve"], flags, &["--config"]].concat(), &self.config, environment) }
    }

    /// By a command that ends with running its arguments.
    pub fn start_by(&self, by: &[&str]) -> Server {
        let mut command = Command::new(by[0]);
        command.args(&by[1..]).arg(env!("CARGO_BIN_EXE_nudged"));
        Server { child: logged(command, &["serve", "--config"], &self.config).spawn().unwrap() }
    }

    /// What the server has logged so far: JSON, a line each.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.config.with_file_name(SERVER_LOG)).unwrap_or_default()
    }

    /// What the providers received, all of it.
    pub fn received(&self) -> Vec<Arc<Received>> {
        assert_eq!(self.sandbox.totals().dropped, 0, "the record has forgotten pushes: raise RECORD_LIMIT");
        self.sandbox.received()
    }

    /// With another file than the sandbox wrote.
    pub fn start_on(config: &Path) -> Server {
        Self::start_on_with(config, &[])
    }

    /// The same, with these environment variables.
    pub fn start_on_with(config: &Path, environment: &[(&str, String)]) -> Server {
        Server { child: spawn(&["serve", "--config"], config, environment) }
    }

    /// A value of `/metrics`: `name` with its labels as they are printed.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        metric(&self.admin, name).await
    }

    /// A client, as soon as the server answers.
    pub async fn client(&self) -> PushServiceClient<Channel> {
        client_of(&self.address).await
    }
}

impl Server {
    /// SIGKILL: nothing is flushed, nobody is told.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How it ended, when it has.
    pub fn has_exited(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for it to end by itself.
    pub fn exited(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.has_exited() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended by itself.
    pub fn is_running(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }

    /// SIGHUP: reload.
    pub fn hangup(&self) {
        assert!(Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status().unwrap().success());
    }

    /// SIGTERM, and the exit status after the drain.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.exited()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of the server there, as soon as it answers.
pub async fn client_of(address: &str) -> PushServiceClient<Channel> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match PushServiceClient::connect(address.to_owned()).await {
            Ok(client) => return client,
            Err(error) if Instant::now() > deadline => panic!("{address} does not answer: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A value of `/metrics` at an admin address.
pub async fn metric(admin: &str, name: &str) -> Option<f64> {
    let page = reqwest::get(format!("http://{admin}/metrics")).await.ok()?.text().await.ok()?;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

/// The one built with these tests; another build's by `NUDGED_TEST_BINARY`.
pub fn binary() -> Command {
    Command::new(std::env::var_os("NUDGED_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_nudged").into()))
}

fn spawn(arguments: &[&str], config: &Path, environment: &[(&str, String)]) -> Child {
    let mut command = command(arguments, config);
    command.envs(environment.iter().map(|(name, value)| (*name, value)));
    command.spawn().unwrap()
}

fn command(arguments: &[&str], config: &Path) -> Command {
    logged(binary(), arguments, config)
}

fn logged(mut command: Command, arguments: &[&str], config: &Path) -> Command {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(config.with_file_name(SERVER_LOG)).unwrap();
    command.args(arguments).arg(config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command
}

/// A port nobody listens on now and that the system does not give away: below the range of outgoing connections, and no
/// test of this process gets the same one.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    // Processes that were started together have neighbouring ids, and must not have neighbouring ports: one's server would
    // answer the other's clients.
    const APART: u32 = 257;
    let start = u16::try_from(std::process::id().wrapping_mul(APART) % u32::from(COUNT)).unwrap();
    for _ in 0..COUNT {
        let port = FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free");
}

pub async fn register(
    client: &mut PushServiceClient<Channel>,
    user: &str,
    platform: device::Platform,
    token: &str,
) -> String {
    let request = RegisterDeviceRequest {
        app_id: APP.into(),
        user_id: user.into(),
        platform: platform.into(),
        token: token.into(),
        locale: "ko-KR".into(),
        ..RegisterDeviceRequest::default()
    };
    client.register_device(request).await.unwrap().into_inner().device.unwrap().device_id
}

pub async fn opt_in(client: &mut PushServiceClient<Channel>, user: &str, opted_in: bool) {
    let request = SetOptInRequest {
        app_id: APP.into(),
        user_id: user.into(),
        opted_in: Some(opted_in),
        ..SetOptInRequest::default()
    };
    client.set_opt_in(request).await.unwrap();
}

pub fn event(key: &str, users: &[&str]) -> NotifyEventRequest {
    NotifyEventRequest {
        app_id: APP.into(),
        event_type: "comment.created".into(),
        idempotency_key: key.into(),
        user_ids: users.iter().map(|user| (*user).to_owned()).collect(),
        content: Some(Content {
            title: Some("새 댓글".into()),
            body: Some("보리: 너무 귀여워요!".into()),
            ..Content::default()
        }),
        ..NotifyEventRequest::default()
    }
}
