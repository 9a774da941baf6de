//! `nudged migrate`: brings the database's schema to this version.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use crate::app;
use crate::config::Config;
use crate::domain::deny::DenyFeed;
use crate::runtime::Runtime;

/// `serve` does the same at its start; this is for those who want it apart.
pub async fn run(config: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = Config::load(config)?;
    let store = app::open_store(&runtime, &config.database, &Arc::new(DenyFeed::default())).await?;
    runtime.blocking(move || store.close()).await;
    println!("{} has this version's schema", config.database.path.display());
    Ok(ExitCode::SUCCESS)
}
