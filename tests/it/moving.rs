//! From SQLite to Postgres with the real binary: a move that is killed in the middle and run again, and a server that goes
//! on where the other stopped.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    ExplainDeliveryRequest, ExplainDeliveryResponse, GetNotificationRequest, GetNotificationResponse,
    ListDeliveriesRequest, ListDevicesRequest, ListDevicesResponse, ListNotificationsRequest, ListOptInsRequest,
    ListOptInsResponse, NotifyEventRequest, SubscribeRequest, delivery, device,
};
use nudged::sandbox::{Action, Fault, TokenState};
use tonic::transport::Channel;

use super::postgres::Postgres;
use super::server::{APP, PATIENCE, World, binary, event, opt_in, register};

const USERS: usize = 30;
const HISTORY: usize = 12;

/// Runs the binary to its end; its exit code and all it said.
pub fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = command(arguments, environment);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

fn command(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = binary();
    command.args(arguments).envs(environment.iter().copied()).stdin(Stdio::null());
    command
}

/// What callers see that must be the same on either database.
#[derive(Debug, PartialEq)]
struct Seen {
    devices: Vec<ListDevicesResponse>,
    choices: Vec<ListOptInsResponse>,
    history: Vec<ExplainDeliveryResponse>,
    notifications: Vec<GetNotificationResponse>,
}

async fn see(client: &mut PushServiceClient<Channel>, history: &[String]) -> Seen {
    let mut seen = Seen { devices: Vec::new(), choices: Vec::new(), history: Vec::new(), notifications: Vec::new() };
    for user in 0..USERS {
        let (app_id, user_id) = (APP.to_owned(), format!("user-{user}"));
        let devices = ListDevicesRequest { app_id: app_id.clone(), user_id: user_id.clone(), ..Default::default() };
        seen.devices.push(client.list_devices(devices).await.unwrap().into_inner());
        let choices = ListOptInsRequest { app_id, user_id };
        seen.choices.push(client.list_opt_ins(choices).await.unwrap().into_inner());
    }
    for (number, id) in history.iter().enumerate() {
        let explain = ExplainDeliveryRequest {
            app_id: APP.into(),
            notification_id: id.clone(),
            user_id: format!("user-{number}"),
            ..Default::default()
        };
        seen.history.push(client.explain_delivery(explain).await.unwrap().into_inner());
        let get = GetNotificationRequest { app_id: APP.into(), notification_id: id.clone() };
        seen.notifications.push(client.get_notification(get).await.unwrap().into_inner());
    }
    seen
}

async fn deliveries(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<nudged::api::proto::Delivery> {
    let request = ListDeliveriesRequest {
        app_id: APP.into(),
        notification_id: id.to_owned(),
        page_size: 200,
        ..Default::default()
    };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}

/// Until every delivery has ended; in what.
async fn ended(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<nudged::api::proto::Delivery> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = deliveries(client, id).await;
        if !found.is_empty() && found.iter().all(|one| one.state() != delivery::State::Open) {
            return found;
        }
        assert!(Instant::now() < deadline, "{id} does not come to an end: {found:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn newest(client: &mut PushServiceClient<Channel>, page_token: &str) -> (Vec<String>, String) {
    let request = ListNotificationsRequest {
        app_id: APP.into(),
        page_size: 5,
        page_token: page_token.into(),
        ..Default::default()
    };
    let page = client.list_notifications(request).await.unwrap().into_inner();
    (page.notifications.into_iter().map(|one| one.notification_id).collect(), page.next_page_token)
}

fn token(user: usize) -> String {
    format!("{user:064x}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_moves_to_postgres_with_its_history_and_its_open_work() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    for user in 0..USERS {
        let name = format!("user-{user}");
        register(&mut client, &name, device::Platform::Apns, &token(user)).await;
        register(&mut client, &name, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, &name, true).await;
        let topic = r"author:choco\b".to_owned();
        let follow = SubscribeRequest { app_id: APP.into(), user_id: name.clone(), topic, ..Default::default() };
        client.subscribe(follow).await.unwrap();
        if user % 5 == 4 {
            opt_in(&mut client, &name, false).await;
        }
    }
    // One phone is gone, which makes a retired device and the platform's words.
    world.sandbox.set_token_state("fcm-token-0:APA91b", TokenState::Unregistered { since: None }).unwrap();
    let mut history = Vec::new();
    for number in 0..HISTORY {
        let name = format!("user-{number}");
        let accepted = client.notify_event(event(&format!("comment-{number}"), &[&name])).await.unwrap().into_inner();
        ended(&mut client, &accepted.notification_id).await;
        history.push(accepted.notification_id);
    }
    let seen = see(&mut client, &history).await;
    let (_, page_token) = newest(&mut client, "").await;
    let (second_page, _) = newest(&mut client, &page_token).await;
    assert!(!second_page.is_empty() && !page_token.is_empty());

    // Work that the providers do not answer, in flight when the server is killed.
    world.sandbox.add_fault(Fault::new(Action::Stall {}).times(1_000)).unwrap();
    let everyone = NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..event("notice", &[]) };
    let notice = client.notify_event(everyone).await.unwrap().into_inner().notification_id;
    let late = client.notify_event(event("late", &["user-1"])).await.unwrap().into_inner().notification_id;
    let deadline = Instant::now() + PATIENCE;
    let expected = 2 * USERS - 2 * (USERS / 5) - 1;
    while deliveries(&mut client, &notice).await.iter().filter(|one| !one.nudged_id.is_empty()).count() < expected {
        assert!(Instant::now() < deadline, "the notice is not expanded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut open = BTreeSet::new();
    for id in [&notice, &late] {
        let all = deliveries(&mut client, id).await;
        let waiting = all.into_iter().filter(|one| one.state() == delivery::State::Open);
        open.extend(waiting.map(|one| one.nudged_id));
    }
    assert!(open.len() > 2 * USERS / 3, "{open:?}");

    let postgres = Postgres::start();
    let (from, to) = (format!("sqlite://{}", world.database().display()), postgres.url());
    let migrate = ["migrate", "--from", &from, "--to", &to];
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(1) && said.contains("another process uses the database"), "{said}");
    server.kill();
    world.sandbox.clear_faults();

    // A dry run makes the schema and changes nothing else; a server may still take the source.
    let (code, said) = run(&[&migrate[..], &["--dry-run"]].concat(), &[]);
    assert!(code == Some(0) && said.contains("rows to move, 0 of them have arrived"), "{said}");
    // Held up at a table in the middle, and killed there.
    let locker = postgres.client().await;
    locker.batch_execute("BEGIN; LOCK TABLE opt_in IN SHARE MODE").await.unwrap();
    let mut child = command(&migrate, &[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let told = lines.find(|line| line.as_ref().unwrap().starts_with("notification: "));
    assert!(told.is_some(), "the tables before opt_in arrive");
    child.kill().unwrap();
    child.wait().unwrap();
    locker.batch_execute("ROLLBACK").await.unwrap();

    // Half of it is here and half there: neither is served, and nothing else may come in.
    let config = world.config.to_str().unwrap();
    let (code, said) = run(&["serve", "--config", config], &[]);
    assert!(code == Some(1) && said.contains("so it is not served any more"), "{said}");
    let (code, said) = run(&["serve", "--config", config], &[("NUDGED_DATABASE__URL", &to)]);
    assert!(code == Some(1) && said.contains("has not come to its end"), "{said}");
    let other = World::new().await;
    let (code, _) = run(&["migrate", "--config", other.config.to_str().unwrap()], &[]);
    assert_eq!(code, Some(0));
    let others = format!("sqlite://{}", other.database().display());
    let (code, said) = run(&["migrate", "--from", &others, "--to", &to], &[]);
    assert!(code == Some(1) && said.contains("another copy"), "{said}");

    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(0) && said.contains("going on: ") && said.contains("verified"), "{said}");
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(0) && said.contains("nothing to do"), "{said}");
    let (code, said) = run(&["serve", "--config", config], &[]);
    assert!(code == Some(1) && said.contains("was moved to Postgres"), "{said}");

    // The server goes on where the other was killed.
    let server = world.start_with(&[("NUDGED_DATABASE__URL", to.clone())]);
    let mut client = world.client().await;
    let mut went_out = BTreeSet::new();
    for id in [&notice, &late] {
        let all = ended(&mut client, id).await;
        let sent = all.iter().filter(|one| one.state() == delivery::State::Sent);
        went_out.extend(sent.map(|one| one.nudged_id.clone()));
    }
    assert_eq!(went_out, open, "the open work goes out, with the identities it had");
    let received: BTreeSet<String> = world.received().iter().filter_map(|push| push.nudged_id.clone()).collect();
    assert!(open.is_subset(&received));
    assert_eq!(see(&mut client, &history).await, seen);
    assert_eq!(newest(&mut client, &page_token).await.0, second_page, "a page token of the old database is good");

    let again = client.notify_event(event("comment-3", &["user-3"])).await.unwrap().into_inner();
    assert!(again.duplicate.unwrap() && again.notification_id == history[3], "idempotency keys came along");
    let new = client.notify_event(event("new", &["user-3"])).await.unwrap().into_inner().notification_id;
    assert!(new > late, "ids go on above the old ones");
    assert_eq!(ended(&mut client, &new).await.len(), 2);
    assert_eq!(
        register(&mut client, "user-3", device::Platform::Apns, &token(3)).await,
        seen.devices[3].devices[0].device_id
    );

    // A database in use takes nothing in.
    let (code, said) = run(&["migrate", "--from", &others, "--to", &to], &[]);
    assert!(code == Some(1) && said.contains("another copy"), "{said}");
    assert!(server.terminate().success());
    // Whoever wants the old database back must say so.
    let (code, said) = run(&["migrate", "--from", &from, "--release"], &[]);
    assert!(code == Some(0) && said.contains("may take it again"), "{said}");
    let server = world.start();
    let mut client = world.client().await;
    assert!(client.notify_event(event("comment-3", &["user-3"])).await.unwrap().into_inner().duplicate.unwrap());
    assert!(server.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_served_or_holds_rows_takes_nothing_in() {
    let world = World::new().await;
    let postgres = Postgres::start();
    let (from, to) = (format!("sqlite://{}", world.database().display()), postgres.url());
    let migrate = ["migrate", "--from", &from, "--to", &to];
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(1) && said.contains("the source cannot be opened"), "a missing file is not made: {said}");
    assert!(!world.database().exists());
    let config = world.config.to_str().unwrap();
    assert_eq!(run(&["migrate", "--config", config], &[]).0, Some(0));
    let server = world.start_with(&[("NUDGED_DATABASE__URL", to.clone())]);
    world.client().await;
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(1) && said.contains("not empty"), "{said}");
    assert!(server.terminate().success());
    // Even if the rows were gone: a server that was there a moment ago may be there still.
    let locker = postgres.client().await;
    locker.batch_execute("TRUNCATE app, route; UPDATE replica SET boot_id = 7").await.unwrap();
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(1) && said.contains("server(s) use the destination"), "{said}");
    locker.batch_execute("UPDATE replica SET boot_id = 0").await.unwrap();
    let (code, said) = run(&migrate, &[]);
    assert!(code == Some(0) && said.contains("verified"), "{said}");
}
