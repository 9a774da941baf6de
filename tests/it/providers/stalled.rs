//! A provider that takes pushes and answers none, with far more of them waiting than the engine has room for.

use super::*;

/// Room of a lane: four full jobs.
const LANE: usize = 2_000;
const PEOPLE: usize = 500;
/// Of each lane; together more than there is room for.
const EVENTS: usize = 6;
/// Nobody waits for the time-outs of what stalls.
const SEND_TIMEOUT: Duration = Duration::from_secs(45);
const PROMPT: Duration = Duration::from_secs(20);
const OTHER: &str = "other";

/// A second app, with a credential of its own.
fn add_other_app(world: &World) {
    let dir = world.config.parent().unwrap().display();
    let fcm = format!(
        "\n[apps.{OTHER}.fcm]\nservice_account_file = \"{dir}/service-account.json\"\nendpoint = \"{}\"\n\
         ca_file = \"{dir}/ca.pem\"\nrate_per_minute = 0\n",
        world.sandbox.fcm_endpoint()
    );
    let config = std::fs::read_to_string(&world.config).unwrap();
    std::fs::write(&world.config, config + &fcm).unwrap();
}

async fn android(client: &mut Client, app: &str, user: &str) {
    let request = RegisterDeviceRequest {
        app_id: app.into(),
        user_id: user.into(),
        platform: device::Platform::Fcm.into(),
        token: format!("fcm-token-{app}-{user}:APA91b"),
        ..RegisterDeviceRequest::default()
    };
    client.register_device(request).await.unwrap();
    let choice = SetOptInRequest {
        app_id: app.into(),
        user_id: user.into(),
        opted_in: Some(true),
        ..SetOptInRequest::default()
    };
    client.set_opt_in(choice).await.unwrap();
}

/// Waits until this person's delivery of a notification is sent.
async fn sent(client: &mut Client, app: &str, id: &str, user: &str, deadline: Instant) {
    loop {
        let request = ListDeliveriesRequest {
            app_id: app.into(),
            notification_id: id.into(),
            user_id: user.into(),
            ..ListDeliveriesRequest::default()
        };
        let found = client.list_deliveries(request).await.unwrap().into_inner().deliveries;
        if found.iter().any(|one| one.state() == delivery::State::Sent) {
            return;
        }
        assert!(Instant::now() < deadline, "it waits for Apple's time-outs: {found:?}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// By hand-over as it is accepted, and by a claim where it was held back.
async fn interactive(client: &mut Client, app: &str, key: &str, deadline: Instant) {
    let in_a_moment = Runtime::production().now().plus(Duration::from_millis(300));
    for (way, not_before) in [("handed", None), ("claimed", Some(in_a_moment))] {
        let not_before = not_before.map(|at| prost_types::Timestamp {
            seconds: at.0.div_euclid(1_000),
            nanos: i32::try_from(at.0.rem_euclid(1_000)).unwrap() * 1_000_000,
        });
        let event =
            NotifyEventRequest { app_id: app.into(), not_before, ..event(&format!("{app}-{key}-{way}"), &["android"]) };
        let id = client.notify_event(event).await.unwrap().into_inner().notification_id;
        sent(client, app, &id, "android", deadline).await;
    }
}

/// To everyone in the app: BULK.
async fn everyone(client: &mut Client, app: &str, key: &str) -> String {
    let event = NotifyEventRequest { app_id: app.into(), everyone: true, ..event(key, &[]) };
    client.notify_event(event).await.unwrap().into_inner().notification_id
}

async fn apple_holds(world: &World, targets: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let route = apns_route(world).await;
        if (route.queued + route.in_flight) as usize >= targets {
            return;
        }
        assert!(Instant::now() < deadline, "only so many are under way: {route:?}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_there_is_room_for_stalls_and_nobody_else_waits() {
    nobody_else_waits(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_there_is_room_for_stalls_and_nobody_else_waits_on_postgres() {
    let postgres = Postgres::start();
    nobody_else_waits(Some(postgres.url())).await;
}

async fn nobody_else_waits(database: Option<String>) {
    let world = World::new().await;
    add_other_app(&world);
    let mut environment = vec![
        ("NUDGED_DELIVERY__MAX_IN_FLIGHT_TARGETS", (2 * LANE).to_string()),
        ("NUDGED_DELIVERY__SEND_TIMEOUT_SECS", SEND_TIMEOUT.as_secs().to_string()),
    ];
    environment.extend(database.map(|url| ("NUDGED_DATABASE__URL", url)));
    let server = world.start_with(&environment);
    let mut client = world.client().await;
    let users = people(&mut client, PEOPLE).await;
    for app in [APP, OTHER] {
        android(&mut client, app, "android").await;
    }
    world.sandbox.add_fault(Fault::new(Action::Stall {}).on(Target::Apns).times(100_000)).unwrap();
    for number in 0..EVENTS {
        notify(&mut client, &format!("stalled-{number}"), &users).await;
    }
    let mut broadcasts = Vec::new();
    for number in 0..EVENTS {
        broadcasts.push(everyone(&mut client, APP, &format!("broadcast-{number}")).await);
    }
    // Whatever the engine takes of it: three quarters of both lanes.
    apple_holds(&world, 2 * LANE * 3 / 4).await;
    let deadline = Instant::now() + PROMPT;
    for app in [APP, OTHER] {
        interactive(&mut client, app, "during", deadline).await;
    }
    for id in &broadcasts {
        sent(&mut client, APP, id, "android", deadline).await;
    }
    let id = everyone(&mut client, OTHER, "broadcast").await;
    sent(&mut client, OTHER, &id, "android", deadline).await;
    let stalled = world.received().iter().filter(|push| push.reason.as_deref() == Some("stall")).count();
    assert!(stalled > 0);
    let held = apns_route(&world).await;
    assert!((held.queued + held.in_flight) as usize <= 2 * LANE * 3 / 4, "a bounded number: {held:?}");
    server.kill();
}
