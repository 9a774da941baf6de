//! What must hold before requests can be served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::database::OpenStore;
use crate::admin::Readiness;
use crate::domain::notification::HandOff;
use crate::domain::room::{Full, Room};

pub struct DatabaseAnswers(pub OpenStore);

#[async_trait::async_trait]
impl Readiness for DatabaseAnswers {
    fn name(&self) -> &'static str {
        "database"
    }

    async fn check(&self) -> Result<(), String> {
        self.0.store().ping().await.map_err(|error| words(&error))
    }
}

pub struct MigrationsFit(pub OpenStore);

#[async_trait::async_trait]
impl Readiness for MigrationsFit {
    fn name(&self) -> &'static str {
        "migrations"
    }

    async fn check(&self) -> Result<(), String> {
        match self.0.migrations_fit().await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the schema is not this version's".to_owned()),
            Err(error) => Err(words(&error)),
        }
    }
}

/// What is full is said, and is no failure: but for events everything is served. Only a disk that takes no write at all is.
pub struct RoomLeft(pub Arc<dyn HandOff>);

#[async_trait::async_trait]
impl Readiness for RoomLeft {
    fn name(&self) -> &'static str {
        "room"
    }

    async fn check(&self) -> Result<(), String> {
        match self.0.room().and_then(Room::full) {
            Some(full @ Full::DiskFull) => Err(full.words().to_owned()),
            _ => Ok(()),
        }
    }

    fn remark(&self) -> Option<String> {
        let full = self.0.room().and_then(Room::full)?;
        Some(format!("ok, but no event is taken while {}", full.words()))
    }
}

/// Fails once the shutdown has begun, so that a load balancer looks elsewhere.
#[derive(Clone, Default)]
pub struct Shutdown {
    begun: Arc<AtomicBool>,
}

impl Shutdown {
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }
}

#[async_trait::async_trait]
impl Readiness for Shutdown {
    fn name(&self) -> &'static str {
        "shutdown"
    }

    async fn check(&self) -> Result<(), String> {
        if self.begun.load(Ordering::Relaxed) { Err("shutting down".to_owned()) } else { Ok(()) }
    }
}

/// With its causes.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
