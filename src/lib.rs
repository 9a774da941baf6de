//! The nudge daemon: a self-hosted push-notification service. `ARCHITECTURE.md` has the map; the binary is `main.rs`.

pub mod api;
pub mod delivery;
pub mod commands;
pub mod domain;
pub mod render;
pub mod runtime;
pub mod senders;
pub mod service;
pub mod storage;
pub mod telemetry;
pub mod sandbox;
