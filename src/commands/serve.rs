//! `nudged serve`: runs until SIGTERM or SIGINT, then drains; a second signal cuts.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::runtime::Runtime;
use crate::telemetry::Metrics;

pub async fn run(config: Option<&Path>, runtime: Runtime) -> anyhow::Result<ExitCode> {
    let config = super::load_config(config)?;
    let metrics = Metrics::install(&runtime)?;
    let app = App::start(runtime, &config, metrics).await?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::select! {
        biased;
        reason = app.fatal() => {
            tracing::error!(%reason, "exiting, so that the next start reads what the database holds");
            return Ok(ExitCode::FAILURE);
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
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
