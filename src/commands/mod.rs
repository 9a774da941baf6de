//! The command line: one file per subcommand.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

pub mod bench;
pub mod catalog;
pub mod check;
pub mod client;
pub mod config;
pub mod confirm_restore;
pub mod dead;
pub mod demo;
pub mod import;
pub mod key;
pub mod migrate;
pub mod sandbox;
pub mod serve;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;

use crate::config::{Config, ConfigErrors, Log};
use crate::runtime::Runtime;
use crate::storage::sqlite;
use crate::telemetry;

/// Wrong usage or configuration; also what clap answers.
const MISUSED: u8 = 2;
/// The exit code of a server whose database file is damaged: EX_DATAERR of sysexits. A supervisor need not start it again.
const DAMAGED: u8 = 65;

/// The nudge daemon: a self-hosted push-notification service that keeps what it accepts.
#[derive(clap::Parser)]
#[command(name = "nudged", version)]
pub struct Cli {
    /// Configuration file; without it nudged.toml in the working directory, if there is one
    #[arg(long, global = true, env = "NUDGED_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// Run the server
    Serve(serve::ServeArgs),
    /// Look for everything that is wrong with configuration, credentials and database
    Check(check::CheckArgs),
    /// The configuration in force, and every key there is
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Event types as a file: apply it to a running server, or export them
    #[command(subcommand)]
    Catalog(catalog::CatalogCommand),
    /// Move devices, choices or subscriptions in from a file
    #[command(subcommand)]
    Import(import::ImportCommand),
    /// Deliveries that a running server gave up on
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// API keys
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Play the whole story against fake providers: no setup, under a minute
    Demo(demo::DemoArgs),
    /// Bring the database's schema to this version, or move an SQLite database to Postgres
    Migrate(migrate::MigrateArgs),
    /// After `serve --after-restore`: what was said since the backup was told again, so send
    ConfirmRestore(confirm_restore::ConfirmRestoreArgs),
    /// Run fake APNs and FCM servers with ready-made credentials and configuration
    Sandbox(sandbox::SandboxArgs),
    /// Measure the server against fake providers
    Bench(bench::BenchArgs),
    /// The reference of `bench`, which starts it
    #[command(hide = true)]
    BenchReference(bench::ReferenceArgs),
}

/// Runs one command to its end.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { config: explicit, command } = cli;
    let runtime = Runtime::production();
    match command {
        Command::Serve(arguments) => block_on_half(serve::run(arguments, explicit.as_deref(), runtime)),
        Command::Demo(arguments) => block_on(demo::run(arguments, runtime)),
        Command::Migrate(arguments) => block_on(migrate::run(arguments, explicit.as_deref(), runtime)),
        Command::ConfirmRestore(arguments) => block_on(confirm_restore::run(arguments)),
        Command::Check(arguments) => check::run(&arguments, explicit.as_deref(), &runtime),
        Command::Dead(command) => block_on(dead::run(command)),
        Command::Config(command) => config::run(&command, explicit.as_deref()),
        Command::Catalog(command) => block_on(catalog::run(command)),
        Command::Import(command) => block_on(import::run(command, runtime)),
        Command::Key(key::KeyCommand::New(arguments)) => key::new(&arguments, &runtime),
        Command::Sandbox(arguments) => {
            telemetry::init_logs(&Log::default())?;
            block_on(sandbox::run(arguments)).map(|()| ExitCode::SUCCESS)
        }
        Command::Bench(arguments) => block_on(bench::run(arguments, runtime)),
        Command::BenchReference(arguments) => bench::reference(&arguments, &runtime),
    }
}

/// Runs a command's future on a runtime of its own.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    run_on(&mut tokio::runtime::Builder::new_multi_thread(), future)
}

/// A server's, on half of the cores: callers, platforms and SQLite have threads of their own, which do more than half of the
/// work; one for each core would hand tasks to and fro between them.
fn block_on_half<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    run_on(tokio::runtime::Builder::new_multi_thread().worker_threads((cores / 2).max(1)), future)
}

fn run_on<T>(
    builder: &mut tokio::runtime::Builder,
    future: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    builder.enable_all().build().context("starting the runtime")?.block_on(future)
}

/// For commands that run for long: the configuration, with logging started, warnings and the redacted configuration
/// logged.
pub fn load_config(explicit: Option<&Path>) -> anyhow::Result<Config> {
    let config = Config::load(explicit)?;
    telemetry::init_logs(&config.log)?;
    for warning in &config.warnings {
        tracing::warn!(key = warning.key, origin = %warning.origin, "{}; {}", warning.wrong, warning.remedy);
    }
    let file = config.file.as_ref().map_or_else(|| "none".to_owned(), |file| file.display().to_string());
    tracing::info!(file, "configuration loaded");
    tracing::debug!("{config:?}");
    Ok(config)
}

/// What a failed command exits with.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<ConfigErrors>() {
        ExitCode::from(MISUSED)
    } else if let Some(sqlite::OpenError::Damaged { .. }) = error.downcast_ref() {
        ExitCode::from(DAMAGED)
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_configuration_may_be_named_before_and_after_the_command() {
        for arguments in [["nudged", "--config", "x.toml", "check"], ["nudged", "check", "--config", "x.toml"]] {
            let cli = Cli::try_parse_from(arguments).expect("valid");
            assert_eq!(cli.config.as_deref(), Some(Path::new("x.toml")));
        }
    }
}
