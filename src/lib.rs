//! The nudge daemon: a self-hosted push-notification service. `ARCHITECTURE.md` has the map; the binary is `main.rs`.

pub mod commands;
pub mod domain;
pub mod runtime;
pub mod sandbox;
pub mod senders;
