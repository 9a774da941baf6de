//! `nudged bench`: the whole pipeline against fake providers, as figures to compare.
//!
//! Processes of this binary: the fake providers (they validate, and count identities), the server or its replicas, and
//! this one, which drives them through gRPC and reads their CPU clocks; on Postgres also a server of that, of its own. Between the rows the *reference* runs: the cheapest client
//! there could be, bare `h2` with gathered writes, sending the same bytes to the same fake providers. What is reported
//! first is the ratio of the two, for it hardly depends on the machine.
//!
//! Every row checks what it measured: the providers accepted exactly the people that were to be reached, each once, and
//! the server recorded as much. A row that does not add up ends the run with an error.

mod args;
mod cluster;
mod control;
mod gather;
mod load;
mod people;
mod process;
mod reference;
mod report;
mod rows;
mod tls;
mod world;

use std::process::ExitCode;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

pub use args::BenchArgs;
pub use reference::ReferenceArgs;

use crate::runtime::Runtime;

/// Runs the rows asked for and prints them. SIGINT and SIGTERM end it, and with it every process it started.
pub async fn run(args: BenchArgs, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let plan = args.plan()?;
    let (json, markdown) = (plan.json.clone(), plan.markdown.clone());
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let report = tokio::select! {
        biased;
        _ = terminate.recv() => anyhow::bail!("stopped by SIGTERM"),
        _ = interrupt.recv() => anyhow::bail!("stopped by SIGINT"),
        report = rows::run(plan, &runtime) => report?,
    };
    println!("{}", report.table());
    if let Some(path) = json {
        std::fs::write(&path, report.json()).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = markdown {
        std::fs::write(&path, report.table()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The reference alone, in a process of its own: started by [`run`].
pub fn reference(args: &ReferenceArgs, runtime: &Runtime) -> anyhow::Result<ExitCode> {
    reference::run(args, runtime)?;
    Ok(ExitCode::SUCCESS)
}
