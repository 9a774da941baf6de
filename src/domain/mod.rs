//! Plain types and decisions. Knows neither tonic nor diesel nor reqwest, and never reads a clock.
pub mod time;
