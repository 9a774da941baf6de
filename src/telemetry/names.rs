//! Every metric's name, kind, labels and meaning: the one place they are spelt.
//!
//! Labels come from closed sets (platform, lane, reason, a configured app or credential), never from ids or tokens.

/// How a metric moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One row of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

/// Makes a constant per metric and the table of all, so that neither can miss one.
macro_rules! metrics {
    ($(#[doc = $help:literal] $constant:ident = $kind:ident $name:literal [$($label:literal),*];)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// Every metric nudged exports.
        pub const ALL: &[Metric] = &[
            $(Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help.trim_ascii() },)*
        ];
    };
}

metrics! {
    /// Events accepted: durable and acknowledged; repeats of an idempotency key are not counted.
    ACCEPTED = Counter "nudged_accepted_total" [];
    /// Deliveries planned: one per person and device that passed the gates at planning.
    PLANNED = Counter "nudged_planned_targets_total" [];
    /// Deliveries the platform took.
    SENT = Counter "nudged_sent_total" ["platform"];
    /// Attempts that failed and will be repeated.
    RETRIED = Counter "nudged_retried_total" ["platform"];
    /// Deliveries given up on, by the reason the platform gave.
    FAILED = Counter "nudged_failed_total" ["platform", "reason"];
    /// Deliveries a gate forbade, by gate.
    SUPPRESSED = Counter "nudged_suppressed_total" ["reason"];
    /// Deliveries whose time to live ended first.
    EXPIRED = Counter "nudged_expired_total" [];
    /// Deliveries cancelled by the caller.
    CANCELLED = Counter "nudged_cancelled_total" [];
    /// Devices retired because their platform said the token is dead.
    RETIRED_DEVICES = Counter "nudged_retired_devices_total" ["platform"];
    /// Jobs that are not finished.
    JOBS_OPEN = Gauge "nudged_jobs_open" [];
    /// Deliveries that are not finished.
    TARGETS_OPEN = Gauge "nudged_targets_open" [];
    /// Large audiences still being expanded.
    FANOUTS_OPEN = Gauge "nudged_fanouts_open" [];
    /// 1 while no event is taken because open work or the disk is at its limit, by what is full.
    FULL = Gauge "nudged_full" ["reason"];
    /// What the file system of the SQLite database has free.
    DISK_FREE_BYTES = Gauge "nudged_disk_free_bytes" [];
    /// What the database holds: of SQLite pages in use, of Postgres (with database.max_mib only) the size on its disk.
    DATABASE_BYTES = Gauge "nudged_database_bytes" [];
    /// How long the oldest job that is due has waited, in seconds.
    OLDEST_READY_SECONDS = Gauge "nudged_oldest_ready_seconds" ["lane"];
    /// From hand-over to a provider connection to its answer, in seconds.
    SEND_SECONDS = Histogram "nudged_send_seconds" ["platform"];
    /// From a NotifyEvent request to its answer, in seconds.
    ACCEPT_SECONDS = Histogram "nudged_accept_seconds" [];
    /// Established provider connections.
    SENDER_CONNECTIONS = Gauge "nudged_sender_connections" ["platform"];
    /// Requests to a provider without an answer yet.
    SENDER_IN_FLIGHT = Gauge "nudged_sender_in_flight" ["platform"];
    /// Targets given to a sender and not handed to a connection yet.
    SENDER_QUEUED = Gauge "nudged_sender_queued" ["platform"];
    /// Entries of the deny feed: what was forbidden in the last minute.
    DENY_ENTRIES = Gauge "nudged_deny_entries" [];
    /// Events, or changes of devices and choices, that shared one transaction.
    WRITER_GROUP_SIZE = Histogram "nudged_writer_group_size" [];
    /// Requests that wait to be written to the database, in all queues.
    STORE_WAITING = Gauge "nudged_store_waiting" [];
    /// Permits to send that nobody holds.
    PERMITS_FREE = Gauge "nudged_permits_free" ["lane"];
    /// Routes paused because their credential is broken.
    ROUTES_PAUSED = Gauge "nudged_routes_paused" ["platform"];
    /// Routes that wait because their provider asked to slow down.
    ROUTES_SLOWED = Gauge "nudged_routes_slowed" ["platform"];
    /// Routes whose provider has answered nothing for two seconds although pushes are under way: they get little room.
    ROUTES_SILENT = Gauge "nudged_routes_silent" ["platform"];
    /// Dead tokens that were not retired, because so many die alike that the configuration is the likelier fault.
    RETIREMENTS_HELD = Counter "nudged_retirements_held_total" ["platform"];
    /// Answers that blame the platform's configuration for one kind of device (FCM: its APNs or web push credentials).
    UNREACHABLE_TARGETS = Counter "nudged_unreachable_targets_total" ["platform"];
    /// Devices left alone for a while because their platform asked for it or their token is in doubt.
    DEVICES_QUIET = Gauge "nudged_devices_quiet" [];
    /// Pauses that operators set.
    PAUSES = Gauge "nudged_pauses" [];
    /// Reloads of the configuration, by result: `applied` or `failed`.
    CONFIG_RELOADS = Counter "nudged_config_reloads_total" ["result"];
    /// 1 while the configuration in force is the one in the files; 0 after a reload that failed.
    CONFIG_CURRENT = Gauge "nudged_config_current" [];
    /// Whether the platform accepts the credential: 1, or 0 while its routes are paused.
    PROVIDER_UP = Gauge "nudged_provider_up" ["app", "platform", "credential"];
    /// Days until an APNs certificate ends; negative after it. Signing keys do not end.
    CERTIFICATE_DAYS_LEFT = Gauge "nudged_certificate_days_left" ["app", "credential"];
    /// Open WatchDeliveries streams.
    WATCHERS = Gauge "nudged_watchers" [];
    /// Messages written to watchers.
    WATCHER_MESSAGES = Counter "nudged_watcher_messages_total" [];
    /// Watchers ended because they did not read.
    WATCHERS_TOO_SLOW = Counter "nudged_watchers_too_slow_total" [];
    /// Rows of the history that retention has deleted; dropped partitions not counted.
    HISTORY_ROWS_DELETED = Counter "nudged_history_rows_deleted_total" ["table"];
    /// Partitions of the history that retention has dropped, on Postgres.
    HISTORY_PARTITIONS_DROPPED = Counter "nudged_history_partitions_dropped_total" ["table"];
    /// Days of history for which partitions are made ahead, on Postgres; below 1 rows go to the default partition.
    HISTORY_DAYS_AHEAD = Gauge "nudged_history_days_ahead" ["table"];
    /// Jumps of the wall clock of more than two seconds, by direction: `forward` or `back`.
    CLOCK_JUMPS = Counter "nudged_clock_jumps_total" ["direction"];
    /// Spans given to the trace collector, by result: `exported` or `failed`.
    SPANS = Counter "nudged_spans_total" ["result"];
    /// Tasks that have not ended, by the runtime that they run on: `engine`, `grpc` or `send`.
    TASKS = Gauge "nudged_tasks" ["runtime"];
    /// Always 1; the version is in the label.
    BUILD_INFO = Gauge "nudged_build_info" ["version"];
    /// When the process started, in seconds since 1970.
    PROCESS_START_TIME_SECONDS = Gauge "process_start_time_seconds" [];
}

/// Bucket bounds in seconds, for latencies from half a millisecond to the send timeout.
pub const SECONDS_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Bucket bounds for the writer's group size, up to its default limit.
pub const GROUP_SIZE_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// The table as Markdown, for the documentation.
#[must_use]
pub fn markdown() -> String {
    use std::fmt::Write as _;
    let mut text = String::from("| Metric | Kind | Labels | Meaning |\n|---|---|---|---|\n");
    for Metric { name, kind, labels, help } in ALL {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        writeln!(text, "| `{name}` | {kind} | {} | {help} |", labels.join(", ")).expect("a String takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_end_in_their_unit() {
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            let name = metric.name;
            assert!(name.starts_with("nudged_") || name.starts_with("process_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            let unit = name.ends_with("_seconds") || name.ends_with("_size");
            assert!(metric.kind != Kind::Histogram || unit, "{name} has no unit");
            assert!(metric.help.ends_with('.') && metric.help.len() > 10, "{name} says nothing");
            assert!(metric.labels.iter().all(|label| !label.contains("id") && !label.contains("token")), "{name}");
        }
    }

    #[test]
    fn buckets_ascend() {
        for buckets in [SECONDS_BUCKETS, GROUP_SIZE_BUCKETS] {
            assert!(buckets.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn the_documentation_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        let mut documented = std::fs::read_to_string(path).expect("docs/metrics.md");
        if std::env::var_os("NUDGED_WRITE_DOCS").is_some() {
            let start = documented.find("| Metric |").expect("docs/metrics.md has the table");
            let length = documented[start..].find("\n\n").map_or(documented.len() - start, |end| end + 1);
            documented.replace_range(start..start + length, &markdown());
            std::fs::write(path, &documented).expect("docs are writable");
        }
        assert!(documented.contains(&markdown()), "docs/metrics.md should hold (NUDGED_WRITE_DOCS=1):\n{}", markdown());
    }
}
