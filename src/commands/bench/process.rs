//! A child process of this binary: its CPU clock, its memory, its end.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::runtime::Runtime;

/// Linux counts in hundredths of a second on every machine that matters (`USER_HZ`).
const TICK_US: u64 = 10_000;

/// A running child; killed when dropped.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// `nudged <arguments>`, logging into `directory`.
    pub fn start(
        name: &str,
        directory: &Path,
        arguments: &[String],
        environment: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let log_path = directory.join(format!("{name}.log"));
        let log = OpenOptions::new().create(true).append(true).open(&log_path)?;
        let child = Command::new(std::env::current_exe().context("finding this program")?)
            .args(arguments)
            .envs(environment.iter().map(|(key, value)| (*key, value)))
            .env_remove("NUDGED_CONFIG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting the {name}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// User and system time since its start, in microseconds; to 10 ms.
    pub fn cpu_us(&self) -> anyhow::Result<u64> {
        cpu_us(&self.child.id().to_string())
    }

    /// CPU of each thread alive, by name, in microseconds; threads of one name together.
    pub fn threads_us(&self) -> BTreeMap<String, u64> {
        let mut threads = BTreeMap::new();
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.child.id())) else { return threads };
        for task in tasks.flatten() {
            let path = task.path();
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            let ran = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
            let ns: u64 = ran.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
            *threads.entry(name.trim().to_owned()).or_default() += ns / 1000;
        }
        threads
    }

    /// Private memory in KiB.
    pub fn rss_anon_kib(&self) -> u64 {
        rss_anon_kib(self.child.id())
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// An error when it has ended by itself.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("the {} ended early ({status}); see {}.log", self.name, self.name),
            None => Ok(()),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the orderly end.
    pub async fn stop(&mut self, runtime: &Runtime, patience: Duration) -> anyhow::Result<()> {
        let pid = self.child.id().to_string();
        if !Command::new("kill").args(["-TERM", &pid]).status()?.success() {
            bail!("cannot stop the {}", self.name);
        }
        let deadline = runtime.instant() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                if status.success() {
                    return Ok(());
                }
                bail!("the {} did not stop in order ({status})", self.name);
            }
            if runtime.instant() > deadline {
                bail!("the {} does not stop", self.name);
            }
            runtime.sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Private memory of a process in KiB; 0 when it is gone.
pub fn rss_anon_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// CPU of a process in microseconds, to 10 ms.
#[derive(Clone, Copy)]
pub struct Clock {
    pub own: u64,
    /// Of its children that have ended.
    pub children: u64,
}

/// User and system time of a process (a number, or `self`).
pub fn clock(pid: &str) -> anyhow::Result<Clock> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading a process clock")?;
    match (field(&stat, 11), field(&stat, 12), field(&stat, 13), field(&stat, 14)) {
        (Some(user), Some(system), Some(childrens_user), Some(childrens_system)) => {
            Ok(Clock { own: (user + system) * TICK_US, children: (childrens_user + childrens_system) * TICK_US })
        }
        _ => bail!("/proc/{pid}/stat has another form"),
    }
}

/// Its own user and system time, in microseconds.
pub fn cpu_us(pid: &str) -> anyhow::Result<u64> {
    Ok(clock(pid)?.own)
}

/// The living children of a process.
pub fn of_parent(parent: u32) -> Vec<u32> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        field(&stat, 1) == Some(u64::from(parent))
    };
    all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// A number behind the name, which stands in parentheses and may hold anything.
fn field(stat: &str, at: usize) -> Option<u64> {
    stat.rsplit(')').next()?.split_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_clock_and_children_are_found() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let children = of_parent(std::process::id());
        assert!(children.contains(&child.id()), "{children:?}");
        assert!(clock("self").is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!of_parent(std::process::id()).contains(&child.id()));
    }
}
