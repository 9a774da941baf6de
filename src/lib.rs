//! The nudge daemon: a self-hosted push-notification service. `ARCHITECTURE.md` has the map; the binary is `main.rs`.

pub mod admin;
pub mod api;
pub mod app;
pub mod commands;
pub mod config;
pub mod delivery;
pub mod domain;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod planted;
pub mod render;
pub mod runtime;
pub mod sandbox;
pub mod senders;
pub mod service;
pub mod storage;
pub mod telemetry;

/// So that the fuzz targets can tell what an input makes them hold.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzzing::memory::Counting = fuzzing::memory::Counting;
