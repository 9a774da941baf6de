//! The nudge daemon: a self-hosted push-notification service. `ARCHITECTURE.md` has the map; the binary is `main.rs`.

pub mod admin;
pub mod api;
pub mod commands;
pub mod config;
pub mod domain;
pub mod runtime;
pub mod senders;
pub mod storage;
pub mod telemetry;
