//! stand-in until the config branch is merged
pub mod names {
    pub const SENT: &str = "nudged_sent_total";
    pub const RETRIED: &str = "nudged_retried_total";
    pub const FAILED: &str = "nudged_failed_total";
    pub const SUPPRESSED: &str = "nudged_suppressed_total";
    pub const EXPIRED: &str = "nudged_expired_total";
    pub const CANCELLED: &str = "nudged_cancelled_total";
    pub const PLANNED: &str = "nudged_planned_targets_total";
    pub const SEND_SECONDS: &str = "nudged_send_seconds";
    pub const JOBS_OPEN: &str = "nudged_jobs_open";
    pub const TARGETS_OPEN: &str = "nudged_targets_open";
    pub const FANOUTS_OPEN: &str = "nudged_fanouts_open";
    pub const OLDEST_READY_SECONDS: &str = "nudged_oldest_ready_seconds";
    pub const PERMITS_FREE: &str = "nudged_permits_free";
    pub const DENY_ENTRIES: &str = "nudged_deny_entries";
    pub const SENDER_CONNECTIONS: &str = "nudged_sender_connections";
    pub const SENDER_IN_FLIGHT: &str = "nudged_sender_in_flight";
    pub const SENDER_QUEUED: &str = "nudged_sender_queued";
    pub const ROUTES_PAUSED: &str = "nudged_routes_paused";
}
