//! Logs and metrics: set up once per process; everyone else only uses the `tracing` and `metrics` facades.
//!
//! Metric names are constants in [`names`].

#[cfg(test)]
pub mod capture;
pub mod names;
pub mod traces;

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};
use crate::runtime::Runtime;

/// Libraries whose debug output shows headers and paths, which hold credentials and device tokens. They stay at `info`
/// unless the level names them.
const QUIET: [&str; 7] = ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tonic", "tower"];

/// Start-up of logs or metrics failed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("RUST_LOG is not a filter: {0}")]
    Filter(String),
    #[error("logging was set up before")]
    AlreadyLogging,
    #[error("the trace exporter was set up before")]
    AlreadyTracing,
    #[error("cannot set up the trace exporter: {0}")]
    Traces(String),
    #[error("cannot set up metrics")]
    Metrics(#[source] metrics_exporter_prometheus::BuildError),
}

/// Sends logs to standard error: text on a terminal, JSON otherwise, or as `log.format` says. `RUST_LOG`, when set,
/// replaces `log.level`. A panic is logged as an error.
pub fn init_logs(log: &Log) -> Result<(), TelemetryError> {
    let level = std::env::var("RUST_LOG").ok().filter(|level| !level.is_empty()).unwrap_or_else(|| log.level.clone());
    let filter = filter(&level)?;
    let terminal = std::io::stderr().is_terminal();
    let json = match log.format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        builder.with_ansi(terminal).try_init()
    };
    done.map_err(|_| TelemetryError::AlreadyLogging)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// What `/metrics` shows. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);

impl Metrics {
    /// Installs the process's recorder; a second call gives the first one's handle.
    pub fn install(runtime: &Runtime) -> Result<Self, TelemetryError> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = &*installed {
            return Ok(Self { handle: handle.clone() });
        }
        let handle = builder()?.install_recorder().map_err(TelemetryError::Metrics)?;
        describe(runtime);
        *installed = Some(handle.clone());
        Ok(Self { handle })
    }

    /// The Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds recorded histogram samples, which otherwise pile up until the next scrape. To be called every few seconds.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

fn builder() -> Result<PrometheusBuilder, TelemetryError> {
    let mut builder = PrometheusBuilder::new();
    for metric in names::ALL.iter().filter(|metric| metric.kind == names::Kind::Histogram) {
        let buckets =
            if metric.name.ends_with("_seconds") { names::SECONDS_BUCKETS } else { names::GROUP_SIZE_BUCKETS };
        builder = builder
            .set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)
            .map_err(TelemetryError::Metrics)?;
    }
    Ok(builder)
}

/// Help texts, and a zero for each counter without labels: a counter that appears only with its first increment hides
/// that increment from `rate()`.
fn describe(runtime: &Runtime) {
    for metric in names::ALL {
        match metric.kind {
            names::Kind::Counter => {
                metrics::describe_counter!(metric.name, metric.help);
                if metric.labels.is_empty() {
                    metrics::counter!(metric.name).absolute(0);
                }
            }
            names::Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            names::Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
    metrics::gauge!(names::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit an f64 exactly")]
    metrics::gauge!(names::PROCESS_START_TIME_SECONDS).set(runtime.now().secs() as f64);
}

fn filter(level: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(with_quiet_libraries(level)).map_err(|error| TelemetryError::Filter(error.to_string()))
}

fn with_quiet_libraries(level: &str) -> String {
    let mut directives = level.to_owned();
    let parts: Vec<&str> = level.split(',').map(str::trim).collect();
    let chatty = |part: &&str| part.eq_ignore_ascii_case("debug") || part.eq_ignore_ascii_case("trace");
    if parts.iter().any(chatty) {
        for library in QUIET {
            let named = |part: &&str| {
                part.strip_prefix(library).is_some_and(|rest| rest.starts_with('=') || rest.starts_with("::"))
            };
            if !parts.iter().any(named) {
                directives.push(',');
                directives.push_str(library);
                directives.push_str("=info");
            }
        }
    }
    directives
}

fn log_panic(info: &std::panic::PanicHookInfo<'_>) {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let message = text.unwrap_or("a panic without a text");
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    tracing::error!(location, thread, "panicked: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::UnixMs;

    #[tokio::test]
    async fn the_recorder_is_installed_once_and_renders_what_was_counted() {
        let runtime = Runtime::simulated(1, UnixMs(1_800_000_000_000));
        let metrics = Metrics::install(&runtime).expect("metrics");
        let again = Metrics::install(&runtime).expect("the same recorder");
        metrics::counter!(names::SENT, "platform" => "apns").increment(2);
        metrics::histogram!(names::SEND_SECONDS, "platform" => "apns").record(0.003);
        metrics.upkeep();
        let text = again.render();
        assert!(text.contains("# HELP nudged_sent_total Deliveries the platform took."), "{text}");
        assert!(text.contains("nudged_sent_total{platform=\"apns\"} "), "{text}");
        assert!(text.contains("nudged_send_seconds_bucket{platform=\"apns\",le=\"0.005\"} "), "{text}");
        assert!(text.contains("nudged_accepted_total "), "shown before the first event: {text}");
        assert!(text.contains("\nprocess_start_time_seconds 1"), "{text}");
        assert!(text.contains("nudged_build_info{version="), "{text}");
    }

    #[test]
    fn debugging_nudged_does_not_print_the_headers_libraries_see() {
        let directives = with_quiet_libraries("debug");
        assert!(directives.starts_with("debug,") && directives.contains(",h2=info"), "{directives}");
        let asked = with_quiet_libraries("debug,h2=trace");
        assert!(asked.contains("h2=trace") && !asked.contains("h2=info"), "{asked}");
        assert_eq!(with_quiet_libraries("info"), "info");
        assert_eq!(with_quiet_libraries("info,nudged=debug"), "info,nudged=debug");
        filter("debug").expect("a valid filter");
    }
}
