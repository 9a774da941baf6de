//! The nudge daemon: a self-hosted push-notification service. `ARCHITECTURE.md` has the map; the binary is `main.rs`.

pub mod api;
pub mod domain;
pub mod runtime;
pub mod senders;
pub mod service;
pub mod storage;
