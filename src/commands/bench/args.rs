//! What is measured, and how large.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;

/// Measure the server against fake providers; bounded in time, needs nothing from outside.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Which table: the budget's rows, or how their costs grow with the installation
    #[arg(value_enum, default_value_t = Table::Budget)]
    table: Table,
    /// Where the server keeps its state. For Postgres a private server of its own is started (its programs must be
    /// installed)
    #[arg(long, value_enum, default_value_t = Store::Sqlite)]
    store: Store,
    /// Server processes on that database; more than one only on Postgres
    #[arg(long, default_value_t = 1)]
    replicas: u16,
    /// Registered devices, one a person; 90 % opted in, half APNs, half FCM. For `growth`: the largest installation
    #[arg(long)]
    devices: Option<u32>,
    /// Of them, subscribers of the topic that broadcasts go to; default: all
    #[arg(long)]
    subscribers: Option<u32>,
    /// Pushes of each row about single people; calls of each row about devices and choices
    #[arg(long)]
    pushes: Option<u32>,
    /// Bytes of the text of a push
    #[arg(long)]
    payload: Option<usize>,
    /// Idempotency keys of events for one person each
    #[arg(long, value_enum, default_value_t = Keys::Ascending)]
    keys: Keys,
    /// Milliseconds a provider takes to answer
    #[arg(long, default_value_t = 0)]
    provider_latency: u64,
    /// How often each row is measured
    #[arg(long)]
    repeats: Option<u32>,
    /// Only these rows, comma-separated: broadcast, apart, unary, stream, calls, latency, no, comment, restart, failing
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Small sizes, for continuous integration: about a minute
    #[arg(long)]
    quick: bool,
    /// Write everything measured as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables, as they are printed, to this file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Where the database, logs and credentials are; default: a new directory in the working directory, removed at the
    /// end. One that a run with the same devices left is used again
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Lines added to the server's configuration, e.g. `delivery.max_streams = 1000`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Table {
    /// The rows of the budget.
    Budget,
    /// A tenth, a hundredth … of the devices; 1, 1 000 and all subscribers; an empty queue and a full one.
    Growth,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Store {
    Sqlite,
    Postgres,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Keys {
    /// As those made of a comment's number: a new one lies beside the one before.
    Ascending,
    /// As UUIDs of version 4: anywhere.
    Scattered,
}

impl Keys {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ascending => "ascending",
            Self::Scattered => "scattered",
        }
    }
}

/// A group of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// A topic of all subscribers.
    Broadcast,
    /// Topics of people with devices of one platform.
    Apart,
    /// Events for one person each, one call each.
    Unary,
    /// … over one stream.
    Stream,
    /// `RegisterDevice` and `SetOptIn`.
    Calls,
    /// Acceptance and hand-over while idle.
    Latency,
    /// How fast a "no" holds.
    No,
    /// A comment while a broadcast runs.
    Comment,
    /// Memory with open work, and a start after SIGKILL.
    Restart,
    /// A broadcast with dead tokens. Last: it retires devices.
    Failing,
}

impl Group {
    const ALL: [(&'static str, Self); 10] = [
        ("broadcast", Self::Broadcast),
        ("apart", Self::Apart),
        ("unary", Self::Unary),
        ("stream", Self::Stream),
        ("calls", Self::Calls),
        ("latency", Self::Latency),
        ("no", Self::No),
        ("comment", Self::Comment),
        ("restart", Self::Restart),
        ("failing", Self::Failing),
    ];
}

/// [`BenchArgs`] with every default filled in.
#[derive(Clone)]
pub struct Plan {
    pub table: Table,
    pub store: Store,
    pub replicas: u16,
    pub devices: u32,
    pub subscribers: u32,
    pub pushes: u32,
    pub payload: usize,
    pub keys: Keys,
    pub provider_latency: Duration,
    pub repeats: u32,
    pub groups: Vec<Group>,
    pub json: Option<PathBuf>,
    pub markdown: Option<PathBuf>,
    pub dir: Option<PathBuf>,
    pub settings: Vec<String>,
    /// How long one row may take.
    pub patience: Duration,
    /// Deliveries of one figure of the growth table, at least.
    pub growth_pushes: u32,
}

impl BenchArgs {
    pub fn plan(self) -> anyhow::Result<Plan> {
        let (devices, pushes, repeats) = if self.quick { (20_000, 3_000, 1) } else { (1_000_000, 100_000, 3) };
        let devices = self.devices.unwrap_or(devices);
        if !(1_000..=100_000_000).contains(&devices) {
            bail!("--devices must be from 1000 to 100000000");
        }
        if !(1..=16).contains(&self.replicas) || (self.replicas > 1 && self.store == Store::Sqlite) {
            bail!("--replicas must be from 1 to 16, and 1 on SQLite: only one process can have its file");
        }
        let mut groups = Vec::new();
        for name in &self.rows {
            match Group::ALL.iter().find(|(known, _)| known == name) {
                Some((_, group)) => groups.push(*group),
                None => {
                    bail!("--rows: there is no `{name}`; there are {}", Group::ALL.map(|(name, _)| name).join(", "))
                }
            }
        }
        if groups.is_empty() {
            groups = Group::ALL.map(|(_, group)| group).to_vec();
        }
        Ok(Plan {
            table: self.table,
            store: self.store,
            replicas: self.replicas,
            devices,
            subscribers: self.subscribers.unwrap_or(devices).clamp(1, devices),
            pushes: self.pushes.unwrap_or(pushes).clamp(256, 10_000_000),
            payload: self.payload.unwrap_or(150).clamp(1, 3_000),
            keys: self.keys,
            provider_latency: Duration::from_millis(self.provider_latency),
            repeats: self.repeats.unwrap_or(repeats).clamp(1, 100),
            groups,
            json: self.json,
            markdown: self.markdown,
            dir: self.dir,
            settings: self.settings,
            patience: Duration::from_secs(if self.quick { 60 } else { 600 }),
            growth_pushes: if self.quick { 20_000 } else { 300_000 },
        })
    }
}

impl Plan {
    pub fn has(&self, group: Group) -> bool {
        self.groups.contains(&group)
    }
}
