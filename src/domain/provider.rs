//! How a provider is doing, as an operator asks.

use super::ids::RouteId;
use super::platform::RouteSpec;
use super::time::UnixMs;

/// Whether a route is used now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RouteCondition {
    Working,
    /// The provider asked to slow down; nothing is sent until then.
    Slowed {
        until: UnixMs,
    },
    /// Nothing is burned; one probe at a time asks whether it works again.
    Paused {
        cause: &'static str,
        reason: String,
        since: UnixMs,
        next_probe: UnixMs,
    },
}

/// One route of this process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteStatus {
    pub route: RouteId,
    pub spec: RouteSpec,
    pub condition: RouteCondition,
    /// `None`: as fast as the provider takes it.
    pub rate_per_minute: Option<u32>,
    /// Of the credential.
    pub connections: u32,
    pub in_flight: u32,
    pub queued: u32,
}
