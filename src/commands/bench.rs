//! `nudged bench`: the whole pipeline against fake providers, as figures to compare.
//!
//! Three processes of this binary: the fake providers (they validate, and count identities), the server, and this one,
//! which drives it through gRPC and reads its CPU clock. Between the rows the *reference* runs: the cheapest client
//! there could be, bare `h2` with gathered writes, sending the same bytes to the same fake providers. What is reported
//! first is the ratio of the two, for it hardly depends on the machine.
//!
//! Every row checks what it measured: the providers accepted exactly the people that were to be reached, each once, and
//! the server recorded as much. A row that does not add up ends the run with an error.

mod args;
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

pub use args::BenchArgs;
pub use reference::ReferenceArgs;

use crate::runtime::Runtime;

/// Runs the rows asked for and prints them.
pub async fn run(args: BenchArgs, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let plan = args.plan()?;
    let json = plan.json.clone();
    let report = rows::run(plan, &runtime).await?;
    println!("{}", report.table());
    if let Some(path) = json {
        std::fs::write(&path, report.json())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The reference alone, in a process of its own: started by [`run`].
pub fn reference(args: &ReferenceArgs, runtime: &Runtime) -> anyhow::Result<ExitCode> {
    reference::run(args, runtime)?;
    Ok(ExitCode::SUCCESS)
}
