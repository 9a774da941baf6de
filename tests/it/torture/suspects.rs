//! Jobs that were claimed again and again without progress run alone, only what was alone in flight at three crashes is given
//! up, and nobody waits for ever for anybody.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use diesel::{Connection as _, RunQueryDsl as _, SqliteConnection, sql_query};
use nudged::api::proto::{SetOptInRequest, delivery, device};
use nudged::sandbox::{Action, Fault};

use super::super::load::deliveries;
use super::super::server::{APP, PATIENCE, World, event, opt_in, register};

const PEOPLE: u64 = 30;

/// From the first claim, at acceptance, to the fifth all are in flight together; at the next three crashes only the first is.
const CRASHES: u64 = 4 + 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_job_that_was_alone_at_three_crashes_is_given_up() {
    let world = World::new().await;
    let mut server = world.start();
    let mut client = world.client().await;
    world.sandbox.add_fault(Fault::new(Action::Stall {}).times(u32::MAX)).unwrap();
    let mut accepted = Vec::new();
    for (number, name) in ["first", "second", "third"].into_iter().enumerate() {
        register(&mut client, name, device::Platform::Apns, &format!("{number:064x}")).await;
        opt_in(&mut client, name, true).await;
        let answer = client.notify_event(event(name, &[name])).await.unwrap().into_inner();
        accepted.push(answer.notification_id);
    }
    // The first push of a connection is alone until its token is accepted, so only the first job's ever arrives.
    for crash in 1..=CRASHES {
        assert!(world.sandbox.wait_for(crash, PATIENCE).await, "it is tried again after crash {}", crash - 1);
        server.kill();
        server = world.start();
    }
    world.sandbox.clear_faults();
    let mut client = world.client().await;
    let deadline = Instant::now() + PATIENCE;
    let mut ends = Vec::new();
    for id in &accepted {
        loop {
            let found = deliveries(&mut client, id).await;
            if let [one] = &found[..]
                && one.state() != delivery::State::Open
            {
                ends.push((one.state(), one.reason.clone()));
                break;
            }
            assert!(Instant::now() < deadline, "{id} does not come to an end: {found:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let sent = || (delivery::State::Sent, "SENT".to_owned());
    assert_eq!(ends, [(delivery::State::Dead, "POISON".to_owned()), sent(), sent()]);
    assert!(server.terminate().success());
}

/// Suspect jobs wait until nothing else is in flight; what is in flight comes back to its gate meanwhile, and its gate is
/// kept by those who wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspect_job_and_one_that_is_gated_again_do_not_wait_for_each_other() {
    let world = World::new().await;
    // One push at a time: the others wait at their connection.
    let narrow =
        [("NUDGED_DELIVERY__MAX_STREAMS", "1".to_owned()), ("NUDGED_DELIVERY__MAX_CONNECTIONS", "1".to_owned())];
    let server = world.start_with(&narrow);
    let mut client = world.client().await;
    let name = |person: u64| format!("person-{person}");
    for person in 0..PEOPLE {
        register(&mut client, &name(person), device::Platform::Apns, &format!("{person:064x}")).await;
        opt_in(&mut client, &name(person), true).await;
    }
    world.sandbox.add_fault(Fault::new(Action::Stall {}).times(u32::MAX)).unwrap();
    let mut accepted = Vec::new();
    for person in 0..PEOPLE {
        let answer = client.notify_event(event(&format!("event-{person}"), &[&name(person)])).await.unwrap();
        accepted.push(answer.into_inner().notification_id);
    }
    server.kill();
    // What was handed over has a row from the next start on.
    let between = world.start_with(&narrow);
    drop(world.client().await);
    between.kill();
    // As after four crashes, for a third of them.
    let mut database = SqliteConnection::establish(world.database().to_str().unwrap()).unwrap();
    let suspects = sql_query("UPDATE job SET claims = 4 WHERE id % 3 = 0 OR first_user % 3 = 0").execute(&mut database);
    drop(database);
    let suspects = suspects.unwrap();
    assert!(suspects > 0, "there are jobs to suspect");
    world.sandbox.clear_faults();
    world.sandbox.clear();
    world.sandbox.add_fault(Fault::new(Action::Delay { ms: 100 }).times(10_000)).unwrap();
    let server = world.start_with(&narrow);
    let mut client = world.client().await;
    assert!(world.sandbox.wait_for(1, PATIENCE).await, "it is being sent");
    // Whoever waits at the connection fails the last check there, and is gated again; a "no" to something else stops nothing.
    for person in 0..PEOPLE {
        let no = SetOptInRequest {
            app_id: APP.into(),
            user_id: name(person),
            event_type: Some("content.new".into()),
            opted_in: Some(false),
            ..SetOptInRequest::default()
        };
        client.set_opt_in(no).await.unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reached: BTreeSet<String> = world.received().iter().map(|push| push.token.clone()).collect();
        if reached.len() as u64 == PEOPLE {
            break;
        }
        if Instant::now() >= deadline {
            let mut ends = Vec::new();
            for id in &accepted {
                ends.extend(deliveries(&mut client, id).await.into_iter().map(|one| (one.state(), one.reason)));
            }
            panic!("{suspects} suspects, {} of {PEOPLE} people reached: {ends:?}", reached.len());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(server.terminate().success());
}
