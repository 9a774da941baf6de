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

pub async fn run(explicit: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = super::load_config(explicit)?;
    // What changes from here on is noticed.
    let mut watch = FileWatch::new(&runtime, config.files()).await;
    let metrics = Metrics::install(&runtime)?;
    // Before the start, so that none of them kills it.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
    let app = App::start(runtime.clone(), &config, metrics).await?;
    loop {
        let why = tokio::select! {
            biased;
            reason = app.fatal() => {
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
        () = app.shutdown() => Ok(ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(cut()),
        _ = interrupt.recv() => Ok(cut()),
    }
}

fn cut() -> ExitCode {
    tracing::warn!("a second signal: stopping at once; the next start takes up the work");
    ExitCode::FAILURE
}
