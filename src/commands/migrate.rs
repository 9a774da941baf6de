//! `nudged migrate`: brings the database's schema to this version.

use std::path::Path;
use std::process::ExitCode;

use crate::app::database::OpenStore;
use crate::config::Config;
use crate::runtime::Runtime;

/// `serve` does the same at its start; this is for those who want it apart.
pub async fn run(config: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = Config::load(config)?;
    let (store, _) = OpenStore::open(&runtime, &config.database).await?;
    store.close(&runtime).await;
    match &config.database.postgres {
        Some(_) => println!("the database has this version's schema"),
        None => println!("{} has this version's schema", config.database.path.display()),
    }
    Ok(ExitCode::SUCCESS)
}
