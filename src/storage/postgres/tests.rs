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
        Settings { pool: 4, server_clock: false, days_ahead: 0, pack_people: false, ..Settings::url(&self.url) }
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
    /// On a thread of its own: a runtime cannot be entered twice. Whatever a test did, nobody is packed wrongly in the end.
    fn drop(&mut self) {
        let (admin, name, url) = (self.admin.clone(), self.name.clone(), self.url.clone());
        let drop = move || {
            let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio.block_on(async {
                let wrong = wrongly_packed(&url).await;
                let mut conn = connect::Target::parse(&admin, None).unwrap().connect().await.unwrap();
                let _ = conn.batch_execute("SET statement_timeout = 0").await;
                let _ = conn.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
                wrong
            })
        };
        let wrong = Runtime::production().thread("drop-database", drop).unwrap().join();
        if !std::thread::panicking() {
            assert_eq!(wrong.unwrap(), [0_i64; 0], "something else is packed than their rows say");
        }
    }
}

/// Of a database that was migrated, and is small enough to look at everybody.
async fn wrongly_packed(url: &str) -> Vec<i64> {
    const FEW: i64 = 5_000;
    let Ok(mut conn) = connect::Target::parse(url, None).unwrap().connect().await else { return Vec::new() };
    let people = constant!(
        diesel::sql_types::BigInt; "SELECT count(*) FROM (SELECT 1 FROM app_user LIMIT $1 + 0) AS few",
        diesel::sql_types::BigInt => FEW,
    );
    let people: i64 = people.get_result(&mut conn).await.unwrap_or(FEW);
    if people < FEW { repack::differing(&mut conn).await.unwrap().0 } else { Vec::new() }
}

async fn open() -> Fixture {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let boot = store.boot_id();
    Fixture { store, deny, boot, kept: Box::new(database) }
}

store_conformance!(open().await);

mod dead;
mod gathering;
mod handed;
mod packing;
mod partitions;
mod people;
mod plans;
mod proxy;
mod replicas;
mod trouble;
mod watchers;
