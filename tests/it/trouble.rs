//! The database goes away while the real binary serves: callers are told when to come again, `/readyz` says so, and work
//! goes on by itself when it is back, or when another server takes its place.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nudged::api::proto::{ListOptInsRequest, NotifyEventRequest, delivery};
use nudged::sandbox::{Action, Fault};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::load::{Load, deliveries, people, settle};
use super::moving::run;
use super::postgres::Postgres;
use super::proxy::Proxy;
use super::server::{APP, PATIENCE, World, event};

/// A caller's default deadline.
const DEADLINE: Duration = Duration::from_secs(10);

/// The status line and the body of `/readyz`.
pub fn readyz(world: &World) -> String {
    let mut text = String::new();
    let Ok(mut stream) = std::net::TcpStream::connect(&world.admin) else { return text };
    let request = format!("GET /readyz HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", world.admin);
    stream.write_all(request.as_bytes()).unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

pub async fn ready(world: &World, wanted: bool) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = readyz(world);
        if text.starts_with(if wanted { "HTTP/1.1 200" } else { "HTTP/1.1 503" }) {
            return text;
        }
        assert!(Instant::now() < deadline, "/readyz does not come to {wanted}: {text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_told_when_to_come_again_while_postgres_is_away() {
    let mut postgres = Postgres::start();
    let world = World::new().await;
    let server = world.start_with(&[("NUDGED_DATABASE__URL", postgres.url())]);
    let mut client = world.client().await;
    people(std::slice::from_mut(&mut client)).await;
    ready(&world, true).await;
    // Accepted before, answered by no provider before Postgres went away.
    world.sandbox.add_fault(Fault::new(Action::Delay { ms: 2_000 }).times(2)).unwrap();
    let before = client.notify_event(event("before", &["user-1"])).await.unwrap().into_inner().notification_id;
    postgres.kill();
    for (number, call) in ["event", "look-up"].into_iter().enumerate() {
        let begun = Instant::now();
        let answer = if number == 0 {
            client.notify_event(event("while", &["user-2"])).await.map(|_| ())
        } else {
            let request = ListOptInsRequest { app_id: APP.into(), user_id: "user-1".into() };
            client.list_opt_ins(request).await.map(|_| ())
        };
        let status = answer.expect_err(call);
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
        assert!(hint.is_some_and(|delay| delay > Duration::ZERO), "{status:?}");
        assert!(begun.elapsed() < DEADLINE, "{call}: {:?}", begun.elapsed());
    }
    let text = ready(&world, false).await;
    assert!(text.contains("database"), "{text}");
    tokio::task::block_in_place(|| postgres.start_again());
    ready(&world, true).await;
    let after = client.notify_event(event("while", &["user-2"])).await.unwrap().into_inner().notification_id;
    let deadline = Instant::now() + PATIENCE;
    for id in [before, after] {
        loop {
            let found = deliveries(&mut client, &id).await;
            if found.len() == 2 && found.iter().all(|one| one.state() == delivery::State::Sent) {
                break;
            }
            assert!(Instant::now() < deadline, "work does not go on: {found:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert!(server.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_another_host_of_the_url_loses_nothing() {
    let mut primary = Postgres::start();
    let standby = primary.standby();
    let world = World::new().await;
    let url = format!("postgres://nudged@{},{}/postgres", standby.host(), primary.host());
    let control = primary.client().await;
    let standing = async |state: &str| {
        let deadline = Instant::now() + PATIENCE;
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = $1";
        while control.query_one(sql, &[&state]).await.unwrap().get::<_, i64>(0) == 0 {
            assert!(Instant::now() < deadline, "the standby does not become {state}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    standing("async").await;
    let config = world.config.to_str().unwrap();
    let check = || run(&["check", "--config", config], &[("NUDGED_DATABASE__URL", &url)]).1;
    let said = check();
    assert!(said.contains("replicate asynchronously") && said.contains("can lose acknowledged events"), "{said}");
    control.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.unwrap();
    control.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    standing("sync").await;
    let said = check();
    assert!(!said.contains("replicate asynchronously"), "{said}");

    let server = world.start_with(&[("NUDGED_DATABASE__URL", url.clone())]);
    let mut client = world.client().await;
    people(std::slice::from_mut(&mut client)).await;
    let load = Load::start(vec![world.address.clone()]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    primary.kill();
    let (at_failover, failed_at) = (load.acknowledged(), Instant::now());
    standby.client().await.batch_execute("SELECT pg_promote()").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while load.acknowledged() < at_failover + 100 {
        assert!(Instant::now() < deadline, "events are not accepted again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("accepting again {:.1?} after the primary was killed", failed_at.elapsed());
    let ledger = load.finish().await;
    let settled = settle(&world, &mut client, &ledger).await;
    println!("failed over with {at_failover} acknowledged: {settled}");
    ready(&world, true).await;
    assert!(server.terminate().success());
}

/// The proof of the "no" log is good for 600 ms; what a slow machine needs on top.
const PROOF: Duration = Duration::from_millis(600);
const SLACK: Duration = Duration::from_millis(600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_cut_off_from_postgres_hands_nothing_more_to_a_provider() {
    let postgres = Postgres::start();
    let proxy = Proxy::new(postgres.host()).await;
    let world = World::new().await;
    // A push at a time and platform, so that much is waiting in the sender when the network is cut.
    let server = world.start_with(&[
        ("NUDGED_DATABASE__URL", format!("postgres://nudged@127.0.0.1:{}/postgres", proxy.port)),
        ("NUDGED_DELIVERY__MAX_STREAMS", "1".to_owned()),
        ("NUDGED_DELIVERY__MAX_CONNECTIONS", "1".to_owned()),
    ]);
    let mut client = world.client().await;
    people(std::slice::from_mut(&mut client)).await;
    world.sandbox.add_fault(Fault::new(Action::Delay { ms: 100 }).times(10_000)).unwrap();
    let everyone = NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..event("notice", &[]) };
    let notice = client.notify_event(everyone).await.unwrap().into_inner().notification_id;
    assert!(world.sandbox.wait_for(6, PATIENCE).await, "it is being sent");
    proxy.cut();
    let cut_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    tokio::time::sleep(2 * (PROOF + SLACK)).await;
    let received = world.received();
    let last = received.iter().map(|push| Duration::from_millis(push.at.0.unsigned_abs())).max().unwrap();
    assert!(received.len() < 70, "much is left: {}", received.len());
    assert!(last < cut_at + PROOF + SLACK, "{:?} after the cut", last.saturating_sub(cut_at));
    println!("the last push left {:?} after the cut, {} of 80", last.saturating_sub(cut_at), received.len());
    world.sandbox.clear_faults();
    proxy.mend();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = deliveries(&mut client, &notice).await;
        if found.len() == 80 && found.iter().all(|one| one.state() == delivery::State::Sent) {
            break;
        }
        let open = found.iter().filter(|one| one.state() != delivery::State::Sent).take(3).collect::<Vec<_>>();
        let (listed, received) = (found.len(), world.received().len());
        assert!(Instant::now() < deadline, "work does not go on: {listed} listed, {received} received, {open:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(world.sandbox.wait_for(80, PATIENCE).await, "and the rest goes out");
    assert!(server.terminate().success());
}
