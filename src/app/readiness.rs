//! What must hold before requests can be served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::admin::Readiness;
use crate::storage::Registry as _;
use crate::storage::sqlite::SqliteStore;

pub struct DatabaseAnswers(pub Arc<SqliteStore>);

#[async_trait::async_trait]
impl Readiness for DatabaseAnswers {
    fn name(&self) -> &'static str {
        "database"
    }

    async fn check(&self) -> Result<(), String> {
        self.0.ping().await.map_err(|error| error.to_string())
    }
}

pub struct MigrationsFit(pub Arc<SqliteStore>);

#[async_trait::async_trait]
impl Readiness for MigrationsFit {
    fn name(&self) -> &'static str {
        "migrations"
    }

    async fn check(&self) -> Result<(), String> {
        match self.0.migrations_fit().await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the schema is not this version's".to_owned()),
            Err(error) => Err(error.to_string()),
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
