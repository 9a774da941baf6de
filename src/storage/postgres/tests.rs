//! The shared suite on a real server, each case in a database of its own.

use diesel_async::SimpleAsyncConnection as _;

use super::query::RunQuery as _;
use super::statement::constant;
use super::*;
use crate::domain::ids::{JobId, NotificationId};
use crate::domain::notification::NewEvent;
use crate::storage::conformance::Fixture;
use crate::storage::{ClaimRequest, Claimed, JobUpdate, PageWrite, Queue as _, Registry as _};
use crate::store_conformance;

/// A database that is dropped at the end.
pub(super) struct Database {
    pub url: String,
    admin: String,
    name: String,
}

const MISSING: &str = "NUDGED_TEST_POSTGRES_URL is not set: run `make test`, which starts a private PostgreSQL server, or \
     set it to postgres://user:password@host/database of one where databases may be made";

impl Database {
    pub async fn new() -> Self {
        let admin = std::env::var("NUDGED_TEST_POSTGRES_URL").expect(MISSING);
        let runtime = Runtime::production();
        let name = format!("nudged_test_{:016x}", runtime.random_u64());
        let mut conn = connect::Target::parse(&admin, None).unwrap().connect().await.unwrap();
        conn.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let (base, query) = admin.split_once('?').unwrap_or((&admin, ""));
        let (server, _) = base.rsplit_once('/').expect("a URL with a database");
        let url = format!("{server}/{name}?{query}");
        Self { url, admin, name }
    }

    pub fn settings(&self) -> Settings {
        Settings { pool: 4, server_clock: false, days_ahead: 0, ..Settings::url(&self.url) }
    }

    pub async fn open(&self) -> (Arc<PostgresStore>, Arc<DenyFeed>) {
        self.open_with(&self.settings()).await.unwrap()
    }

    pub async fn open_with(&self, settings: &Settings) -> Result<(Arc<PostgresStore>, Arc<DenyFeed>), OpenError> {
        let runtime = Runtime::production();
        let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
        let store = PostgresStore::open(runtime, settings, Arc::clone(&deny)).await?;
        Ok((Arc::new(store), deny))
    }

    /// The store's only way to the server is the proxy.
    pub async fn open_behind_a_proxy(&self) -> (Arc<PostgresStore>, Arc<DenyFeed>, Arc<proxy::Proxy>) {
        let (credentials, rest) = self.url.split_once('@').expect("a URL with a user");
        let (server, path) = rest.split_once('/').expect("a URL with a database");
        let proxy = proxy::Proxy::new(server.to_owned()).await;
        let url = format!("{credentials}@127.0.0.1:{}/{path}", proxy.port);
        let runtime = Runtime::production();
        let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
        let settings = Settings { url, ..self.settings() };
        let store = PostgresStore::open(runtime, &settings, Arc::clone(&deny)).await.unwrap();
        (Arc::new(store), deny, proxy)
    }

    pub async fn connect(&self) -> AsyncPgConnection {
        connect::Target::parse(&self.url, None).unwrap().connect().await.unwrap()
    }
}

impl Drop for Database {
    /// On a thread of its own: a runtime cannot be entered twice.
    fn drop(&mut self) {
        let (admin, name) = (self.admin.clone(), self.name.clone());
        let drop = move || {
            let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio.block_on(async {
                let mut conn = connect::Target::parse(&admin, None).unwrap().connect().await.unwrap();
                let _ = conn.batch_execute("SET statement_timeout = 0").await;
                let _ = conn.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
            });
        };
        let _ = Runtime::production().thread("drop-database", drop).unwrap().join();
    }
}

async fn open() -> Fixture {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let boot = store.boot_id();
    Fixture { store, deny, boot, kept: Box::new(database) }
}

store_conformance!(open().await);

mod gathering;
mod packing;
mod partitions;
mod plans;
mod proxy;
mod replicas;
mod trouble;
mod watchers;
