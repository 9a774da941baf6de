//! A Postgres server of a test's own, which it may kill.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::server::{PATIENCE, free_port};

const MISSING: &str = "no Postgres server programs found in PATH or /usr/lib/postgresql: run `make test`, which installs \
     them on Debian as root, or install the package postgresql";

/// How a server dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// Only the postmaster is killed; the sessions notice, and may end what they do.
    Postmaster,
    /// Every process at once.
    All,
    /// One session is killed; the postmaster ends all others and recovers by itself.
    Session,
}

/// Killed, with everything in it, at the end.
pub struct Postgres {
    dir: TempDir,
    programs: PathBuf,
    port: u16,
    child: Child,
}

impl Postgres {
    pub fn start() -> Self {
        let programs = programs().expect(MISSING);
        // The server's user must be able to walk into it.
        let dir = tempfile::Builder::new().prefix("nudged-postgres.").tempdir_in("/tmp").unwrap();
        if is_root() {
            assert!(Command::new("chown").arg("postgres").arg(dir.path()).status().unwrap().success());
        }
        let mut initdb = as_server(&programs.join("initdb"), dir.path());
        initdb.arg("-D").arg(dir.path().join("data")).args(["-U", "nudged", "--auth=trust", "--encoding=UTF8"]);
        let made = initdb.args(["--locale=C", "--no-sync"]).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let child = spawn(&programs, dir.path(), port);
        let server = Self { dir, programs, port, child };
        server.wait();
        server
    }

    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// Of another database on it.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://nudged@127.0.0.1:{}/{database}", self.port)
    }

    /// A session of the test's own.
    pub async fn client(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// `None` while it does not answer.
    pub async fn try_client(&self) -> Option<tokio_postgres::Client> {
        let (client, connection) = tokio_postgres::connect(&self.url(), tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// SIGKILL to some of its processes; a server that is gone starts again after `away`.
    pub fn die(&mut self, death: Death, away: Duration) {
        let mut processes = children(self.child.id());
        match death {
            Death::Session => {
                // The newest process serves somebody; the first ones are the server's own.
                processes.drain(..processes.len().saturating_sub(1));
                sigkill(&processes);
                self.wait();
                return;
            }
            Death::Postmaster => {}
            Death::All => sigkill(&processes),
        }
        self.kill_and_restart(away);
    }

    /// SIGKILL, as a machine that loses its process, and a start that recovers from its log.
    pub fn kill_and_restart(&mut self, away: Duration) {
        self.kill();
        std::thread::sleep(away);
        self.start_again();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn start_again(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.child = spawn(&self.programs, self.dir.path(), self.port);
            // The old server's processes may still hold its memory; the new one refuses then.
            std::thread::sleep(Duration::from_millis(300));
            if self.child.try_wait().unwrap().is_none() {
                break;
            }
            assert!(Instant::now() < deadline, "Postgres does not start again");
        }
        self.wait();
    }

    /// A server that follows this one, a moment behind: a hot standby.
    pub fn standby(&self) -> Self {
        let dir = tempfile::Builder::new().prefix("nudged-postgres.").tempdir_in("/tmp").unwrap();
        if is_root() {
            assert!(Command::new("chown").arg("postgres").arg(dir.path()).status().unwrap().success());
        }
        let mut copy = as_server(&self.programs.join("pg_basebackup"), dir.path());
        copy.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", "nudged", "-R", "-X", "stream"]);
        copy.args(["--checkpoint=fast", "--no-sync", "-D"]).arg(dir.path().join("data"));
        let made = copy.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let child = spawn(&self.programs, dir.path(), port);
        let standby = Self { dir, programs: self.programs.clone(), port, child };
        standby.wait();
        standby
    }

    /// Host and port, for a URL of several.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        let ready = || {
            let mut command = Command::new(self.programs.join("pg_isready"));
            command.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
            command.status().unwrap().success()
        };
        while !ready() {
            assert!(Instant::now() < deadline, "Postgres does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(programs: &Path, dir: &Path, port: u16) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("server.log")).unwrap();
    let mut command = as_server(&programs.join("postgres"), dir);
    command.arg("-D").arg(dir.join("data")).args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1"]);
    // A killed process loses nothing that it wrote: the kernel has it.
    command.args(["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=200"]);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

/// Ascending by their start.
fn children(parent: u32) -> Vec<u32> {
    let mut found: Vec<(u64, u32)> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // After the name, which may hold anything: state, parent, and as the twentieth the start.
            let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            (fields.get(1)?.parse::<u32>().ok()? == parent).then_some((fields.get(19)?.parse().ok()?, pid))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, pid)| pid).collect()
}

fn sigkill(processes: &[u32]) {
    if !processes.is_empty() {
        let processes = processes.iter().map(u32::to_string);
        // One that has ended by itself is no failure.
        let _ = Command::new("kill").arg("-KILL").args(processes).stderr(Stdio::null()).status();
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// The server refuses to run as root. `setpriv` becomes the program, so the child is the server itself.
fn as_server(program: &Path, dir: &Path) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    command.current_dir(dir);
    command
}

/// The newest installed server's.
fn programs() -> Option<PathBuf> {
    let has = |dir: &PathBuf| dir.join("initdb").exists() && dir.join("postgres").exists();
    let mut debian: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(has)
        .collect();
    debian.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    debian.pop().or_else(|| std::env::split_paths(&path).find(has))
}
