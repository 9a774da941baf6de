//! What must not go out any more: retries of a paused type, what outlived its TTL behind a pause or a fault, an audience
//! whose notification was cancelled, a delivery that was in flight at every crash.

use std::time::{Duration, Instant};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    CancelNotificationRequest, Delivery, ListDeliveriesRequest, NotifyEventRequest, PauseDeliveryRequest,
    ResumeDeliveryRequest, device,
};
use nudged::sandbox::{Fault, Target};
use tonic::transport::Channel;

use super::postgres::Postgres;
use super::server::{APP, PATIENCE, World, event, opt_in, register};
use super::tables;

const TYPE: &str = "comment.created";

async fn deliveries(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<Delivery> {
    let request =
        ListDeliveriesRequest { app_id: APP.into(), notification_id: id.into(), ..ListDeliveriesRequest::default() };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}

/// Until every delivery has this reason.
async fn all_end(client: &mut PushServiceClient<Channel>, id: &str, count: usize, reason: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = deliveries(client, id).await;
        if found.len() == count && found.iter().all(|one| one.reason == reason) {
            return;
        }
        assert!(Instant::now() < deadline, "{count} {reason}: {found:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn notify(client: &mut PushServiceClient<Channel>, event: NotifyEventRequest) -> String {
    client.notify_event(event).await.unwrap().into_inner().notification_id
}

fn pause() -> PauseDeliveryRequest {
    PauseDeliveryRequest {
        app_id: APP.into(),
        event_type: TYPE.into(),
        reason: "a bad template".into(),
        ..PauseDeliveryRequest::default()
    }
}

fn resume() -> ResumeDeliveryRequest {
    ResumeDeliveryRequest { app_id: APP.into(), event_type: TYPE.into(), ..ResumeDeliveryRequest::default() }
}

fn accepted(world: &World) -> usize {
    world.sandbox.received().iter().filter(|push| push.accepted).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_of_a_paused_type_wait_too() {
    let world = World::new().await;
    let text = std::fs::read_to_string(&world.config).unwrap();
    let soon = "[delivery.fcm]\nserver_error_floor_secs = 1\ntransport_floor_secs = 1\nbase_secs = 1\ncap_secs = 1\n";
    std::fs::write(&world.config, format!("{text}\n{soon}")).unwrap();
    world.sandbox.add_fault(Fault::status(503, "UNAVAILABLE").on(Target::Fcm)).unwrap();
    let _server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    register(&mut client, "choco", device::Platform::Fcm, "fcm-token-1:APA91b").await;
    opt_in(&mut client, "choco", true).await;
    let id = notify(&mut client, event("one", &["choco"])).await;
    let deadline = Instant::now() + PATIENCE;
    while world.sandbox.received_count() == 0 {
        assert!(Instant::now() < deadline, "it is tried");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The retry is due a second or two later.
    admin.pause_delivery(pause()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((world.sandbox.received_count(), accepted(&world)), (1, 0), "the first attempt and no other");
    admin.resume_delivery(resume()).await.unwrap();
    all_end(&mut client, &id, 1, "SENT").await;
    assert_eq!(accepted(&world), 1);
    let identities: Vec<_> = world.received().iter().filter_map(|push| push.nudged_id.clone()).collect();
    assert!(identities.len() == 2 && identities[0] == identities[1], "a retry is the same notice: {identities:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pause_holds_ends_with_its_ttl() {
    held_past_the_ttl(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pause_holds_ends_with_its_ttl_on_postgres() {
    held_past_the_ttl(Some(Postgres::start())).await;
}

/// The whole app is paused: its routes, and audiences that are not worked out yet.
async fn held_past_the_ttl(postgres: Option<Postgres>) {
    let world = World::new().await;
    let database = postgres.as_ref().map(|postgres| ("NUDGED_DATABASE__URL", postgres.url()));
    let _server = world.start_with(&Vec::from_iter(database));
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    for user in ["choco", "mina"] {
        register(&mut client, user, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, user, true).await;
    }
    let all = PauseDeliveryRequest { event_type: String::new(), ..pause() };
    admin.pause_delivery(all).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let short = |event| NotifyEventRequest { ttl: Some(prost_types::Duration { seconds: 2, nanos: 0 }), ..event };
    let named = notify(&mut client, short(event("one", &["choco"]))).await;
    let everyone = NotifyEventRequest { everyone: true, user_ids: Vec::new(), ..event("all", &[]) };
    let everyone = notify(&mut client, short(everyone)).await;
    let waits = notify(&mut client, event("two", &["mina"])).await;
    all_end(&mut client, &named, 1, "EXPIRED").await;
    all_end(&mut client, &everyone, 2, "EXPIRED").await;
    assert_eq!(world.sandbox.received_count(), 0, "nobody hears of it");
    let resume = ResumeDeliveryRequest { app_id: APP.into(), ..ResumeDeliveryRequest::default() };
    admin.resume_delivery(resume).await.unwrap();
    all_end(&mut client, &waits, 1, "SENT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fault_holds_ends_with_its_ttl() {
    held_by_a_fault(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fault_holds_ends_with_its_ttl_on_postgres() {
    held_by_a_fault(Some(Postgres::start())).await;
}

/// The provider refuses the credential; what is probed with lives longer than what waits behind it.
async fn held_by_a_fault(postgres: Option<Postgres>) {
    const SHORT: usize = 20;
    let world = World::new().await;
    let refuse = Fault::status(403, "InvalidProviderToken").on(Target::Apns).times(100_000);
    world.sandbox.add_fault(refuse).unwrap();
    let database = postgres.as_ref().map(|postgres| ("NUDGED_DATABASE__URL", postgres.url()));
    let _server = world.start_with(&Vec::from_iter(database));
    let mut client = world.client().await;
    for (number, user) in ["choco", "mina"].into_iter().enumerate() {
        register(&mut client, user, device::Platform::Apns, &format!("{number:064x}")).await;
        opt_in(&mut client, user, true).await;
    }
    let waits = notify(&mut client, event("waits", &["mina"])).await;
    assert!(world.sandbox.wait_for(1, PATIENCE).await, "it is refused");
    let mut short = Vec::new();
    for number in 0..SHORT {
        let ttl = Some(prost_types::Duration { seconds: 2, nanos: 0 });
        let event = NotifyEventRequest { ttl, ..event(&format!("short-{number}"), &["choco"]) };
        short.push(notify(&mut client, event).await);
    }
    for id in &short {
        all_end(&mut client, id, 1, "EXPIRED").await;
    }
    let asked = world.sandbox.received_count();
    assert!(asked <= 6, "only probes are sent meanwhile: {asked}");
    world.sandbox.clear_faults();
    all_end(&mut client, &waits, 1, "SENT").await;
    let later = notify(&mut client, event("later", &["choco"])).await;
    all_end(&mut client, &later, 1, "SENT").await;
    assert_eq!(accepted(&world), 2);
}

/// What was put off for the fault is taken up when it is over; what an operator holds beside it must not be, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pause_holds_is_left_alone_after_a_fault() {
    let world = World::new().await;
    let refuse = Fault::status(403, "InvalidProviderToken").on(Target::Apns).times(100_000);
    world.sandbox.add_fault(refuse).unwrap();
    let _server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    register(&mut client, "choco", device::Platform::Apns, &format!("{:064x}", 1)).await;
    opt_in(&mut client, "choco", true).await;
    admin.pause_delivery(pause()).await.unwrap();
    let other = |name| NotifyEventRequest { event_type: "content.new".into(), ..event(name, &["choco"]) };
    let waits = notify(&mut client, other("waits")).await;
    assert!(world.sandbox.wait_for(1, PATIENCE).await, "it is refused");
    let held = notify(&mut client, event("held", &["choco"])).await;
    // Both have been looked at and put off.
    let put_off = "SELECT count(*) AS count FROM job WHERE due_at > ready_at";
    let deadline = Instant::now() + PATIENCE;
    while tables::count(&world.database(), put_off) < 2 {
        assert!(Instant::now() < deadline, "they are put off");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.sandbox.clear_faults();
    all_end(&mut client, &waits, 1, "SENT").await;
    let claimed = || tables::count(&world.database(), "SELECT max(fence) AS count FROM job");
    let before = claimed();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let claims = claimed() - before;
    assert!(claims <= 20, "looked at about once a second, not {claims} steps in four");
    admin.resume_delivery(resume()).await.unwrap();
    all_end(&mut client, &held, 1, "SENT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audience_is_not_worked_out_after_its_notification_was_cancelled() {
    let world = World::new().await;
    let _server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    for user in ["choco", "mina"] {
        register(&mut client, user, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, user, true).await;
    }
    admin.pause_delivery(pause()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let everyone = NotifyEventRequest { everyone: true, user_ids: Vec::new(), ..event("all", &[]) };
    let id = notify(&mut client, everyone).await;
    // Taken up and set aside, as it was before the cancellation.
    let deadline = Instant::now() + PATIENCE;
    while tables::count(&world.database(), "SELECT count(*) AS count FROM fanout WHERE owner <> 0") == 0 {
        assert!(Instant::now() < deadline, "nobody takes up the audience");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let cancel = CancelNotificationRequest { app_id: APP.into(), notification_id: id.clone() };
    client.cancel_notification(cancel).await.unwrap();
    admin.resume_delivery(resume()).await.unwrap();
    all_end(&mut client, &id, 2, "CANCELLED").await;
    assert_eq!(world.sandbox.received_count(), 0, "nobody hears of it");
}

/// Claimed eight times without a result, it is what brings the process down: it is given up, and the rest goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_in_flight_at_every_crash_is_given_up() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    register(&mut client, "choco", device::Platform::Fcm, "fcm-token-1:APA91b").await;
    opt_in(&mut client, "choco", true).await;
    admin.pause_delivery(pause()).await.unwrap();
    let poison = notify(&mut client, event("poison", &["choco"])).await;
    // What was handed over as it was accepted has a row once it waits for the end of the pause.
    let deadline = Instant::now() + PATIENCE;
    while tables::count(&world.database(), "SELECT count(*) AS count FROM job") == 0 {
        assert!(Instant::now() < deadline, "it does not come back from its gate");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.kill();
    assert_eq!(tables::execute(&world.database(), "UPDATE job SET claims = 8, due_at = ready_at"), 1);
    let _server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    admin.resume_delivery(resume()).await.unwrap();
    all_end(&mut client, &poison, 1, "POISON").await;
    let healthy = notify(&mut client, event("healthy", &["choco"])).await;
    all_end(&mut client, &healthy, 1, "SENT").await;
    assert_eq!(world.sandbox.received_count(), 1, "it was not tried once more");
}
