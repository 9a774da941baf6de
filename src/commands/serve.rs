//! `nudged serve`: runs until SIGTERM or SIGINT, then drains; a second signal cuts. SIGHUP, or a change of a
//! configuration file, reloads the configuration.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::app::watch::FileWatch;
use crate::runtime::Runtime;
use crate::telemetry::Metrics;
use crate::telemetry::traces::Traces;

#[derive(clap::Args)]
pub struct ServeArgs {
    /// The database comes from a backup: cancel what was open in it and send nothing, on any replica, before `nudged
    /// confirm-restore`. Each name acts once
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "restore", require_equals = true,
        value_parser = restore_name)]
    pub after_restore: Option<String>,
}

/// At most this many bytes.
const MAX_RESTORE_NAME_BYTES: usize = 64;

fn restore_name(text: &str) -> Result<String, String> {
    let fits =
        !text.is_empty() && text.len() <= MAX_RESTORE_NAME_BYTES && text.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err(format!("up to {MAX_RESTORE_NAME_BYTES} printable ASCII characters")) }
}

pub async fn run(arguments: ServeArgs, explicit: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = super::load_config(explicit)?;
    // What changes from here on is noticed.
    let mut watch = FileWatch::new(&runtime, config.files()).await;
    let metrics = Metrics::install(&runtime)?;
    let traces = Traces::start(&config.traces)?;
    // Before the start, so that none of them kills it.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
    let app = match &arguments.after_restore {
        None => App::start(runtime.clone(), &config, metrics).await?,
        Some(name) => App::start_after_restore(runtime.clone(), &config, metrics, name).await?,
    };
    loop {
        let why = tokio::select! {
            biased;
            reason = app.fatal() => {
                if app.is_damaged() {
                    tracing::error!(%reason, "exiting: restore a backup (docs/reliability.md); another start does not help");
                    return Ok(ExitCode::from(super::DAMAGED));
                }
                tracing::error!(%reason, "exiting, so that the next start reads what the database holds");
                return Ok(ExitCode::FAILURE);
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => "SIGHUP",
            () = watch.changed(&runtime) => "a file changed",
        };
        tracing::info!(why, "reloading the configuration");
        let files = app.reload(explicit).await;
        watch.set(&runtime, files).await;
    }
    tokio::select! {
        biased;
        () = app.shutdown() => {}
        _ = terminate.recv() => return Ok(cut()),
        _ = interrupt.recv() => return Ok(cut()),
    }
    if let Some(traces) = traces {
        tokio::task::block_in_place(|| traces.shutdown());
    }
    Ok(ExitCode::SUCCESS)
}

fn cut() -> ExitCode {
    tracing::warn!("a second signal: stopping at once; the next start takes up the work");
    ExitCode::FAILURE
}
