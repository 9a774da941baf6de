//! What must hold before requests can be served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::database::OpenStore;
use crate::admin::Readiness;

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
