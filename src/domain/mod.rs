//! Plain types and decisions. Knows neither tonic nor diesel nor reqwest, and never reads a clock.

pub mod allow;
pub mod audience;
pub mod consent;
pub mod content;
pub mod deny;
pub mod device;
pub mod event_type;
pub mod identity;
pub mod ids;
pub mod notification;
pub mod outcome;
pub mod pacing;
pub mod pause;
pub mod plan;
pub mod platform;
pub mod provider;
pub mod retry;
pub mod room;
pub mod sending;
pub mod targets;
pub mod time;
pub mod violation;
pub mod watch;
