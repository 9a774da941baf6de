//! `nudged migrate`: brings the database's schema to this version, or everything from SQLite to Postgres.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use crate::app::database::{OpenStore, postgres_settings};
use crate::app::moving::{self, Move, Step};
use crate::config::Config;
use crate::runtime::Runtime;
use crate::storage::postgres;

/// How often a table that is being copied is spoken of.
const TELL_EVERY: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct MigrateArgs {
    /// The SQLite database to move to Postgres, as sqlite://PATH; without it only the schema is brought up to date
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// The empty Postgres database to move to; without it the configured one
    #[arg(long, value_name = "URL", requires = "from")]
    to: Option<String>,
    /// File with the password of --to
    #[arg(long, value_name = "FILE", requires = "to")]
    to_password_file: Option<PathBuf>,
    /// Look at both databases and say what would be moved; the schema of the destination is made
    #[arg(long, requires = "from")]
    dry_run: bool,
    /// Let servers take the SQLite database again after a move that was begun or finished; what they send then is sent by
    /// both
    #[arg(long, requires = "from", conflicts_with_all = ["to", "dry_run"])]
    release: bool,
}

pub async fn run(arguments: MigrateArgs, config: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let Some(from) = &arguments.from else { return schema(config, runtime).await };
    let source = from.strip_prefix("sqlite://").filter(|path| !path.is_empty());
    let source = Path::new(source.context("--from is the database to move: sqlite://PATH")?);
    if arguments.release {
        let released = moving::release(&runtime, source).await?;
        println!("{}", if released { "servers may take it again" } else { "it was not sealed: nothing to do" });
        return Ok(ExitCode::SUCCESS);
    }
    let destination = destination(&arguments, config)?;
    let moving = Move::prepare(&runtime, source, &destination).await?;
    if moving.is_done() {
        println!("everything has arrived already, {} rows: nothing to do", moving.arrived());
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.dry_run {
        for table in moving.tables().iter().filter(|table| table.rows > 0) {
            println!("{:20} {:>12} rows", table.name, table.rows);
        }
        let rows: u64 = moving.tables().iter().map(|table| table.rows).sum();
        println!("{rows} rows to move, {} of them have arrived", moving.arrived());
        return Ok(ExitCode::SUCCESS);
    }
    if moving.arrived() > 0 {
        println!("going on: {} rows have arrived", moving.arrived());
    }
    let mut told_at = runtime.instant();
    let clock = runtime.clone();
    let moved = moving
        .run(|step| match step {
            Step::Copied { table, rows, of } if rows >= of || clock.instant() - told_at >= TELL_EVERY => {
                told_at = clock.instant();
                println!("{table}: {rows} of {of} rows have arrived");
            }
            Step::Copied { .. } => {}
            Step::Verified { table, digest } => {
                println!("{table:20} {:>12} rows, the same on both sides ({digest})", digest.rows);
            }
        })
        .await?;
    #[expect(clippy::cast_precision_loss, reason = "a rate for a person")]
    let rate = moved.copied as f64 / moved.copying.as_secs_f64().max(0.001);
    println!(
        "done: {} rows are in Postgres, verified. {} copied in {:.1?} ({rate:.0} a second), compared in {:.1?}.",
        moved.rows, moved.copied, moved.copying, moved.verifying,
    );
    println!(
        "Set database.url to the Postgres database now. The SQLite file is kept, and no server takes it any more."
    );
    Ok(ExitCode::SUCCESS)
}

/// `serve` does the same at its start; this is for those who want it apart.
async fn schema(config: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = Config::load(config)?;
    let (store, _) = OpenStore::open(&runtime, &config.database).await?;
    store.close(&runtime).await;
    match &config.database.postgres {
        Some(_) => println!("the database has this version's schema"),
        None => println!("{} has this version's schema", config.database.path.display()),
    }
    Ok(ExitCode::SUCCESS)
}

fn destination(arguments: &MigrateArgs, config: Option<&Path>) -> anyhow::Result<postgres::Settings> {
    if let Some(to) = &arguments.to {
        anyhow::ensure!(
            to.starts_with("postgres://") || to.starts_with("postgresql://"),
            "--to is the database to move to: postgres://user@host/database"
        );
        let password_file = arguments.to_password_file.clone();
        return Ok(postgres::Settings { password_file, ..postgres::Settings::url(to) });
    }
    let config = Config::load(config)?;
    let postgres = config.database.postgres.as_ref();
    let postgres = postgres.context("database.url is not a Postgres database; give --to")?;
    Ok(postgres_settings(&config.database, postgres))
}
