//! `[delivery]`: the engine's pace, and when each platform is tried again.

use std::time::Duration;

use super::section::Section;
use crate::domain::retry::RetryPolicy;

#[derive(Clone, Debug)]
pub struct Delivery {
    /// How long a shutdown waits for answers. Default 20 s.
    pub drain: Duration,
    /// Targets claimed and without a recorded outcome, over all routes. Default 20000.
    pub max_in_flight_targets: usize,
    /// Open deliveries of all apps beyond which no event is taken. Default 20 million.
    pub max_open_targets: u64,
    /// The same of jobs and fan-outs, the rows that open work takes. Default 10 million.
    pub max_open_rows: u64,
    /// How often the queue is looked at when nothing wakes the engine. Default 1 s.
    pub poll: Duration,
    /// Sending threads, each with its own connections. Default: half of the cores, at least one.
    pub sender_threads: usize,
    /// Connections per credential and sending thread; more than one are opened only under load. Default 4.
    pub max_connections: usize,
    /// Requests in flight on one connection, where the provider allows more. Default 400.
    pub max_streams: usize,
    /// Targets taken by one claim. Default 2000.
    pub claim_targets: usize,
    /// Outcomes are recorded at least this often while there are any. Default 150 ms.
    pub flush_interval: Duration,
    /// How long a provider may take to answer a push. Default 15 s; FCM's own limit is 10 s.
    pub send_timeout: Duration,
    /// Devices of a route retired for one reason before the guard against mass retirement steps in. Default 100.
    pub retirement_guard_min: u32,
    /// … when so many percent of the answers within ten minutes say the same. Default 50; 0 = never.
    pub retirement_guard_percent: u32,
    pub apns: RetryPolicy,
    pub fcm: RetryPolicy,
}

/// Apple: a 5xx may be retried after 15 minutes (protocol notes, §6); the TTL ends it, at the latest after a day.
const APNS: Defaults = Defaults {
    transport_floor: 1,
    throttled_floor: 60,
    server_error_floor: 15 * 60,
    base: 5,
    cap: 30 * 60,
    give_up_after: 24 * 60 * 60,
};

/// Google: at least 10 s before any retry, a minute after a 429 without a hint, and no more after 60 minutes.
const FCM: Defaults = Defaults {
    transport_floor: 10,
    throttled_floor: 60,
    server_error_floor: 10,
    base: 5,
    cap: 10 * 60,
    give_up_after: 60 * 60,
};

/// In seconds.
struct Defaults {
    transport_floor: u64,
    throttled_floor: u64,
    server_error_floor: u64,
    base: u64,
    cap: u64,
    give_up_after: u64,
}

impl Delivery {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let delivery = Self {
            drain: section.seconds("drain_secs", 20, 0..=600),
            max_in_flight_targets: section.count("max_in_flight_targets", 20_000, 1..=1_000_000),
            max_open_targets: section.number("max_open_targets", 20_000_000, 1..=1_000_000_000),
            max_open_rows: section.number("max_open_rows", 10_000_000, 1..=1_000_000_000),
            poll: section.millis("poll_ms", 1000, 10..=60_000),
            sender_threads: section.count("sender_threads", (cores / 2).max(1), 1..=256),
            max_connections: section.count("max_connections", 4, 1..=16),
            max_streams: section.count("max_streams", 400, 1..=1000),
            claim_targets: section.count("claim_targets", 2000, 1..=100_000),
            flush_interval: section.millis("flush_interval_ms", 150, 1..=10_000),
            send_timeout: section.seconds("send_timeout_secs", 15, 1..=600),
            retirement_guard_min: small(section.count("retirement_guard_min", 100, 0..=1_000_000)),
            retirement_guard_percent: small(section.count("retirement_guard_percent", 50, 0..=100)),
            apns: read_policy(section.table("apns"), &APNS),
            fcm: read_policy(section.table("fcm"), &FCM),
        };
        section.finish();
        delivery
    }
}

/// Within the range that was checked.
fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn read_policy(mut section: Section<'_>, default: &Defaults) -> RetryPolicy {
    const DAY: u64 = 24 * 60 * 60;
    let policy = RetryPolicy {
        transport_floor: section.seconds("transport_floor_secs", default.transport_floor, 0..=DAY),
        throttled_floor: section.seconds("throttled_floor_secs", default.throttled_floor, 0..=DAY),
        server_error_floor: section.seconds("server_error_floor_secs", default.server_error_floor, 0..=DAY),
        base: section.seconds("base_secs", default.base, 1..=DAY),
        cap: section.seconds("cap_secs", default.cap, 1..=DAY),
        give_up_after: section.seconds("give_up_after_secs", default.give_up_after, 0..=28 * DAY),
    };
    if policy.cap < policy.base {
        section.problem("cap_secs", "is shorter than base_secs", "make it at least base_secs");
    }
    section.finish();
    policy
}
