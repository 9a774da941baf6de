//! A restored backup neither sends old work again nor undoes an opt-out: nothing goes out before the operator says that
//! what was said since the backup was told again. On both databases, with the real binary.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    Delivery, ListDeliveriesRequest, ListPausesRequest, ResumeDeliveryRequest, SetOptInRequest, delivery, device,
};
use nudged::sandbox::{Action, Fault};
use tonic::transport::Channel;

use super::moving::run;
use super::postgres::Postgres;
use super::server::{APP, PATIENCE, Server, World, event, free_port, opt_in, register};

/// Longer than anything that would go out needs: a pause is obeyed within a second.
const A_WHILE: Duration = Duration::from_millis(1_500);

type Client = PushServiceClient<Channel>;

/// Where everything is kept.
enum Store {
    Sqlite,
    Postgres(Box<Postgres>),
}

impl Store {
    fn environment(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Sqlite => Vec::new(),
            Self::Postgres(postgres) => vec![("NUDGED_DATABASE__URL", postgres.url_of("live"))],
        }
    }

    /// With no server running.
    async fn back_up(&self, world: &World) {
        match self {
            Self::Sqlite => copy(&world.database(), &world.database().with_extension("backup")),
            Self::Postgres(postgres) => copy_database(postgres, "live", "backup").await,
        }
    }

    async fn restore(&self, world: &World) {
        match self {
            Self::Sqlite => copy(&world.database().with_extension("backup"), &world.database()),
            Self::Postgres(postgres) => copy_database(postgres, "backup", "live").await,
        }
    }
}

/// The file and its log.
fn copy(from: &Path, to: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let with = |path: &Path| format!("{}{suffix}", path.display());
        let _ = std::fs::remove_file(with(to));
        if Path::new(&with(from)).exists() && suffix != "-shm" {
            std::fs::copy(with(from), with(to)).unwrap();
        }
    }
}

async fn copy_database(postgres: &Postgres, from: &str, to: &str) {
    let client = postgres.client().await;
    client.batch_execute(&format!("DROP DATABASE IF EXISTS {to} WITH (FORCE)")).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    // The sessions of a killed server end a moment later.
    while let Err(error) = client.batch_execute(&format!("CREATE DATABASE {to} TEMPLATE {from}")).await {
        assert!(Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn deliveries(client: &mut Client, id: &str) -> Vec<Delivery> {
    let request = ListDeliveriesRequest { app_id: APP.into(), notification_id: id.to_owned(), ..Default::default() };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}

async fn comes_to(client: &mut Client, id: &str, state: delivery::State) -> Delivery {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = deliveries(client, id).await;
        if let [one] = &found[..]
            && one.state() == state
        {
            return one.clone();
        }
        assert!(Instant::now() < deadline, "{id} does not come to be {state:?}: {found:?}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn notify(client: &mut Client, key: &str, user: &str) -> String {
    client.notify_event(event(key, &[user])).await.unwrap().into_inner().notification_id
}

/// How often each push was accepted by a provider.
fn accepted(world: &World) -> BTreeMap<String, usize> {
    let mut accepted = BTreeMap::new();
    for push in world.received().iter().filter(|push| push.accepted) {
        *accepted.entry(push.nudged_id.clone().unwrap()).or_default() += 1;
    }
    accepted
}

async fn an_old_backup_is_held(store: Store) {
    let world = World::new().await;
    let environment = store.environment();
    let server = world.start_with(&environment);
    let mut client = world.client().await;
    for (number, user) in ["choco", "bori"].into_iter().enumerate() {
        register(&mut client, user, device::Platform::Apns, &format!("{number:064x}")).await;
        opt_in(&mut client, user, true).await;
    }
    // In flight when the backup is made, and sent after it.
    world.sandbox.add_fault(Fault::new(Action::Stall {}).times(1_000)).unwrap();
    let old = notify(&mut client, "old", "choco").await;
    comes_to(&mut client, &old, delivery::State::Open).await;
    server.kill();
    store.back_up(&world).await;
    world.sandbox.clear_faults();
    let server = world.start_with(&environment);
    let mut client = world.client().await;
    let sent = comes_to(&mut client, &old, delivery::State::Sent).await;
    opt_in(&mut client, "choco", false).await;
    server.kill();
    let before = accepted(&world);
    assert_eq!(before[&sent.nudged_id], 1);

    store.restore(&world).await;
    let server = world.start_as(&["--after-restore"], &environment);
    let mut client = world.client().await;
    // On Postgres another replica is told nothing, and knows.
    let other: Option<(Server, Client)> = match &store {
        Store::Sqlite => None,
        Store::Postgres(_) => Some(another(&world, &environment).await),
    };
    let mut elsewhere = other.as_ref().map_or_else(|| client.clone(), |(_, client)| client.clone());
    let new = notify(&mut elsewhere, "new", "bori").await;
    let to_choco = notify(&mut client, "to-choco", "choco").await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    let list = ListPausesRequest { all_apps: true, ..Default::default() };
    let pauses = admin.list_pauses(list.clone()).await.unwrap().into_inner().pauses;
    assert!(pauses.len() == 1 && pauses[0].reason.contains("confirm-restore"), "{pauses:?}");
    let resume = ResumeDeliveryRequest { all_apps: true, ..Default::default() };
    assert!(!admin.resume_delivery(resume).await.unwrap().into_inner().changed(), "that is not how it ends");
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(accepted(&world), before, "nothing goes out");

    // It outlives a crash, and a start that is told nothing.
    server.kill();
    let server = world.start_with(&environment);
    let mut client = world.client().await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(accepted(&world), before, "still nothing");

    // What was said since the backup, told again.
    let replayed = SetOptInRequest {
        app_id: APP.into(),
        user_id: "choco".into(),
        opted_in: Some(false),
        ..SetOptInRequest::default()
    };
    assert!(client.set_opt_in(replayed).await.unwrap().into_inner().applied());
    let (code, said) = run(&["confirm-restore", "--address", &world.address], &[]);
    assert!(code == Some(0) && said.contains("confirmed: "), "{said}");
    let went = comes_to(&mut client, &new, delivery::State::Sent).await;
    let kept = comes_to(&mut client, &to_choco, delivery::State::Suppressed).await;
    assert_eq!(kept.reason, "OPTED_OUT", "the opt-out stands");
    comes_to(&mut client, &old, delivery::State::Cancelled).await;
    let mut expected = before;
    expected.insert(went.nudged_id, 1);
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(accepted(&world), expected, "and nothing of the old work");
    let (code, said) = run(&["confirm-restore", "--address", &world.address], &[]);
    assert!(code == Some(0) && said.contains("nothing was held"), "{said}");
    assert!(server.terminate().success());
    if let Some((other, _)) = other {
        assert!(other.terminate().success());
    }

    // The flag that was left in a unit file does not hold everything a second time, nor is it passed over in silence.
    let config = world.config.to_str().unwrap();
    let url: Vec<_> = environment.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let (code, said) = run(&["serve", "--after-restore", "--config", config], &url);
    assert!(code == Some(1) && said.contains("was confirmed at") && said.contains("--after-restore=NAME"), "{said}");
    let server = world.start_as(&["--after-restore=second"], &environment);
    world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    assert_eq!(admin.list_pauses(list).await.unwrap().into_inner().pauses.len(), 1);
    assert!(server.terminate().success());
}

async fn another(world: &World, environment: &[(&'static str, String)]) -> (Server, Client) {
    let (grpc, admin) = (free_port(), free_port());
    let mut environment = environment.to_vec();
    environment.push(("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")));
    environment.push(("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")));
    let server = world.start_with(&environment);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match PushServiceClient::connect(format!("http://127.0.0.1:{grpc}")).await {
            Ok(client) => return (server, client),
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_sqlite_backup_is_held_until_it_is_confirmed() {
    an_old_backup_is_held(Store::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_postgres_backup_is_held_until_it_is_confirmed() {
    let postgres = Postgres::start();
    postgres.client().await.batch_execute("CREATE DATABASE live").await.unwrap();
    an_old_backup_is_held(Store::Postgres(Box::new(postgres))).await;
}
