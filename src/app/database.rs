//! The one of two stores that `database.url` names.

use std::sync::Arc;

use crate::config::{Database, Postgres, Synchronous};
use crate::domain::deny::DenyFeed;
use crate::runtime::Runtime;
use crate::storage::postgres::{self, PostgresStore};
use crate::storage::sqlite::{self, SqliteStore};
use crate::storage::{BootId, Result, Store};

/// An open database.
#[derive(Clone)]
pub enum OpenStore {
    Sqlite(Arc<SqliteStore>),
    Postgres(Arc<PostgresStore>),
}

impl OpenStore {
    /// Opens what the configuration names, migrated. Its feed of "no"s is the one returned: with one process alone it
    /// is always complete, with replicas only as long as the database answers.
    pub async fn open(runtime: &Runtime, database: &Database) -> anyhow::Result<(Self, Arc<DenyFeed>)> {
        match &database.postgres {
            None => {
                let deny = Arc::new(DenyFeed::default());
                let settings = sqlite_settings(database);
                let (for_store, theirs) = (runtime.clone(), Arc::clone(&deny));
                let store = runtime.blocking(move || SqliteStore::open(for_store, &settings, theirs)).await?;
                Ok((Self::Sqlite(Arc::new(store)), deny))
            }
            Some(postgres) => {
                let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
                let settings = postgres_settings(database, postgres);
                let store = PostgresStore::open(runtime.clone(), &settings, Arc::clone(&deny)).await?;
                Ok((Self::Postgres(Arc::new(store)), deny))
            }
        }
    }

    pub fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Sqlite(store) => Arc::clone(store) as Arc<dyn Store>,
            Self::Postgres(store) => Arc::clone(store) as Arc<dyn Store>,
        }
    }

    /// What owns the leases of this start.
    pub fn boot_id(&self) -> BootId {
        match self {
            Self::Sqlite(store) => store.boot_id(),
            Self::Postgres(store) => store.boot_id(),
        }
    }

    /// Answers, with the reason, when this process may not go on with its database.
    pub async fn fatal(&self) -> Arc<str> {
        match self {
            Self::Sqlite(store) => store.fatal().await,
            Self::Postgres(store) => store.fatal().await,
        }
    }

    /// Whether the reason of [`OpenStore::fatal`] is a damaged file: a restart does not help.
    pub fn is_damaged(&self) -> bool {
        match self {
            Self::Sqlite(store) => store.is_damaged(),
            Self::Postgres(_) => false,
        }
    }

    /// Whether the last write found the disk full. Postgres says so itself to every call.
    pub async fn is_disk_full(&self) -> bool {
        match self {
            Self::Sqlite(store) => store.is_disk_full().await,
            Self::Postgres(_) => false,
        }
    }

    /// Requests that wait to be written.
    pub fn waiting(&self) -> usize {
        match self {
            Self::Sqlite(store) => store.waiting(),
            Self::Postgres(store) => store.waiting(),
        }
    }

    pub async fn size_bytes(&self) -> Result<u64> {
        match self {
            Self::Sqlite(store) => store.size_bytes().await,
            Self::Postgres(store) => store.size_bytes().await,
        }
    }

    pub async fn migrations_fit(&self) -> Result<bool> {
        match self {
            Self::Sqlite(store) => store.migrations_fit().await,
            Self::Postgres(store) => store.migrations_fit().await,
        }
    }

    /// Writes what is queued, gives back what is leased, and lets the database go.
    pub async fn close(&self, runtime: &Runtime) {
        match self {
            Self::Sqlite(store) => {
                let store = Arc::clone(store);
                runtime.blocking(move || store.close()).await;
            }
            Self::Postgres(store) => store.close().await,
        }
    }
}

/// The SQLite store's part of the configuration.
#[must_use]
pub fn sqlite_settings(database: &Database) -> sqlite::Settings {
    let mut settings = sqlite::Settings::file(&database.path);
    settings.synchronous = match database.synchronous {
        Synchronous::Full => sqlite::Synchronous::Full,
        Synchronous::Normal => sqlite::Synchronous::Normal,
    };
    settings.readers = database.readers;
    settings.cache_kib = u32::try_from(database.cache_mib * 1024).unwrap_or(u32::MAX);
    settings.group_max = database.group_max;
    settings.queue.max_requests = database.queue_max_requests;
    settings.queue.max_bytes = database.queue_max_mib * 1024 * 1024;
    settings
}

/// The Postgres store's.
#[must_use]
pub fn postgres_settings(database: &Database, postgres: &Postgres) -> postgres::Settings {
    /// Partitions that are kept, about: a statement may have to look at each.
    const PARTITIONS: u32 = 30;
    postgres::Settings {
        partition_days: database.retention_days.div_ceil(PARTITIONS),
        days_ahead: postgres.days_ahead,
        password_file: postgres.password_file.clone(),
        pool: postgres.pool,
        pack_format: postgres.pack_format,
        ..postgres::Settings::url(postgres.url.expose())
    }
}
