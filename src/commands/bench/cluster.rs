//! A private Postgres server: its own directory, a free loopback port, a random password; gone at the end.
//!
//! It waits for the disk as a real one does (`fsync`, `synchronous_commit`), with more shared memory and longer
//! checkpoints than Postgres' defaults, which are for the smallest machines. The server's processes are children of
//! one we started, so their CPU can be read.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio_postgres::NoTls;

use super::process::{clock, of_parent};
use super::world::free_port;
use crate::runtime::Runtime;

/// Beside what is particular to this start.
pub const SETTINGS: &[&str] =
    &["shared_buffers=1GB", "max_wal_size=8GB", "checkpoint_timeout=15min", "max_connections=200"];
const ROLE: &str = "nudged";
const START_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub struct Cluster {
    postmaster: Child,
    url: String,
    version: String,
}

/// Who a process is when ours is root, which the server refuses to be.
#[derive(Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
}

pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

impl Cluster {
    /// Makes `directory`, or uses what an earlier run left in it.
    pub async fn start(directory: &Path, runtime: &Runtime) -> anyhow::Result<Self> {
        let programs = programs()?;
        let owner = if is_root() { Some(unprivileged()?) } else { None };
        let (data, password_file) = (directory.join("data"), directory.join("password"));
        if !data.join("PG_VERSION").exists() {
            fs::create_dir_all(directory)?;
            let password: [u8; 16] = runtime.secret_bytes();
            fs::write(&password_file, format!("{:032x}", u128::from_be_bytes(password)))?;
            if let Some(owner) = owner {
                for path in [directory, &password_file] {
                    std::os::unix::fs::chown(path, Some(owner.uid), Some(owner.gid))?;
                }
            }
            let mut command = Command::new(programs.join("initdb"));
            command
                .arg("-D")
                .arg(&data)
                .args(["-U", ROLE, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"])
                .arg(format!("--pwfile={}", password_file.display()));
            let output = run_as(&mut command, owner, directory).output().context("running initdb")?;
            if !output.status.success() {
                bail!("initdb failed: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        let password = fs::read_to_string(&password_file)?;
        let address = free_port()?;
        let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("server.log"))?;
        let mut command = Command::new(programs.join("postgres"));
        command.arg("-D").arg(&data).args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]);
        command.arg("-c").arg(format!("port={}", address.port()));
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let postmaster = run_as(&mut command, owner, directory).spawn().context("starting Postgres")?;
        let url = format!("postgres://{ROLE}:{password}@{address}/postgres?sslmode=disable");
        let mut cluster = Self { postmaster, url, version: String::new() };
        cluster.until_ready(address, runtime).await?;
        Ok(cluster)
    }

    async fn until_ready(&mut self, address: SocketAddr, runtime: &Runtime) -> anyhow::Result<()> {
        let deadline = runtime.instant() + START_PATIENCE;
        loop {
            if let Some(status) = self.postmaster.try_wait()? {
                bail!("Postgres ended at once ({status}); see its server.log");
            }
            match tokio_postgres::connect(&self.url, NoTls).await {
                Ok((client, connection)) => {
                    let driving = runtime.spawn(connection);
                    self.version = client.query_one("SHOW server_version", &[]).await?.get(0);
                    drop(client);
                    let _ = driving.await;
                    return Ok(());
                }
                Err(error) if runtime.instant() > deadline => {
                    return Err(error).with_context(|| format!("Postgres at {address} does not answer"));
                }
                Err(_) => runtime.sleep(LOOK_EVERY).await,
            }
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn version(&self) -> &str {
        self.version.split_whitespace().next().unwrap_or_default()
    }

    /// CPU of all its processes, ended ones included, in microseconds.
    pub fn cpu_us(&self) -> anyhow::Result<u64> {
        let postmaster = self.postmaster.id();
        // Read the children last: one that ends in between is then counted twice for a moment rather than lost.
        let ended = clock(&postmaster.to_string())?;
        let alive: u64 =
            of_parent(postmaster).iter().filter_map(|pid| clock(&pid.to_string()).ok()).map(|c| c.own).sum();
        Ok(ended.own + ended.children + alive)
    }

    /// An orderly end ("fast shutdown").
    pub async fn stop(mut self, runtime: &Runtime, patience: Duration) -> anyhow::Result<()> {
        signal("-INT", self.postmaster.id())?;
        let deadline = runtime.instant() + patience;
        while self.postmaster.try_wait()?.is_none() {
            if runtime.instant() > deadline {
                bail!("Postgres does not stop");
            }
            runtime.sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    /// At once: it says goodbye to nobody, and its processes end with it.
    fn drop(&mut self) {
        if matches!(self.postmaster.try_wait(), Ok(None)) {
            let _ = signal("-QUIT", self.postmaster.id());
            let _ = self.postmaster.wait();
        }
    }
}

fn signal(which: &str, pid: u32) -> anyhow::Result<()> {
    if !Command::new("kill").args([which, &pid.to_string()]).status()?.success() {
        bail!("cannot signal process {pid}");
    }
    Ok(())
}

fn run_as<'a>(command: &'a mut Command, owner: Option<Owner>, directory: &Path) -> &'a mut Command {
    command.current_dir(directory).env("HOME", directory);
    if let Some(owner) = owner {
        command.gid(owner.gid).uid(owner.uid);
    }
    command
}

/// Where `initdb` and `postgres` lie together: where Debian, Fedora and Homebrew put them, or in PATH. The newest wins.
fn programs() -> anyhow::Result<PathBuf> {
    let mut found = Vec::new();
    for (parent, after) in
        [("/usr/lib/postgresql", "bin"), ("/usr", "bin"), ("/opt/homebrew/opt", "bin"), ("/usr/local/opt", "bin")]
    {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        found.extend(entries.flatten().map(|entry| entry.path().join(after)));
    }
    let version = |path: &PathBuf| {
        let digits = path.to_string_lossy().chars().filter(char::is_ascii_digit).collect::<String>();
        digits.parse::<u32>().unwrap_or(0)
    };
    found.sort_by_key(|path| std::cmp::Reverse(version(path)));
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let complete = |path: &PathBuf| ["initdb", "postgres"].iter().all(|program| path.join(program).is_file());
    found.into_iter().find(complete).context("no Postgres server is installed (Debian: apt-get install postgresql)")
}

/// The user `postgres` of the system, else `nobody`.
fn unprivileged() -> anyhow::Result<Owner> {
    let users = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    let owner = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(Owner { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    };
    owner("postgres").or_else(|| owner("nobody")).context("there is no user that Postgres could run as")
}
