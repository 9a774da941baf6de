//! A running server takes a new configuration: on SIGHUP, when a file is rewritten, and when Kubernetes swaps the link.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use nudged::api::auth::ApiKey;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{NotifyEventRequest, RegisterDeviceRequest, SetOptInRequest, delivery, device};
use nudged::sandbox::{Action, Fault};
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use super::load::deliveries;
use super::server::{APP, PATIENCE, World, binary, event, opt_in, register};

const KEY: &str = "nk_reload_test";

/// A `[[keys]]` entry for `KEY`.
fn key(apps: &str, scopes: &str) -> String {
    let hash = nudged::config::Sha256Digest(ApiKey::hash(KEY.as_bytes()));
    format!("\n[[keys]]\nname = \"backend\"\nsha256 = \"{hash}\"\napps = [{apps}]\nscopes = [{scopes}]\n")
}

fn keyed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {KEY}").parse().unwrap());
    request
}

/// Waits until `holds`, with the server given time to reload.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn code(client: &mut PushServiceClient<Channel>, request: Request<NotifyEventRequest>) -> Code {
    client.notify_event(request).await.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_applies_keys_apps_credentials_and_limits_and_refuses_what_is_wrong() {
    let world = World::new().await;
    let original = std::fs::read_to_string(&world.config).unwrap();
    let server = world.start();
    let mut client = world.client().await;
    register(&mut client, "choco", device::Platform::Apns, &format!("{:064x}", 1)).await;
    opt_in(&mut client, "choco", true).await;

    // Every problem in one line, and the old configuration stays.
    let bad = format!("{original}\n[apps.shop]\npush_idd = true\nmax_open_targets = \"x\"\n");
    std::fs::write(&world.config, bad).unwrap();
    server.hangup();
    eventually("the failure is counted", async || world.metric("nudged_config_current").await == Some(0.0)).await;
    let log = std::fs::read_to_string(world.config.with_file_name("server.log")).unwrap();
    let line = log.lines().find(|line| line.contains("cannot be reloaded")).expect("a line");
    assert!(line.contains("apps.shop.push_idd") && line.contains("apps.shop.max_open_targets"), "{line}");
    assert!(world.metric("nudged_config_reloads_total{result=\"failed\"}").await >= Some(1.0));
    assert_eq!(code(&mut client, Request::new(event("one", &["choco"]))).await, Code::Ok);
    assert!(world.sandbox.wait_for_accepted(1, PATIENCE).await);

    // Another app with a credential, keys, a limit, and something that takes a restart.
    let fcm = original.split("[apps.ifriendspet.fcm]").nth(1).unwrap();
    let good = format!(
        "{}\n[delivery]\nclaim_targets = 100\n[apps.shop]\nmax_events_per_second = 1\n[apps.shop.fcm]{fcm}{}",
        original,
        key("\"ifriendspet\", \"shop\"", "\"register\", \"notify\"")
    );
    std::fs::write(&world.config, good).unwrap();
    server.hangup();
    eventually("keys are asked for", async || {
        code(&mut client, Request::new(event("two", &["choco"]))).await == Code::Unauthenticated
    })
    .await;
    assert_eq!(world.metric("nudged_config_current").await, Some(1.0));
    let log = std::fs::read_to_string(world.config.with_file_name("server.log")).unwrap();
    let restart = log.lines().find(|line| line.contains("take effect at the next start")).expect("a line");
    assert!(restart.contains("delivery.claim_targets") && !restart.contains("max_events"), "{restart}");

    let register = RegisterDeviceRequest {
        app_id: "shop".into(),
        user_id: "bori".into(),
        platform: device::Platform::Fcm.into(),
        token: "fcm-token-shop:APA91b".into(),
        ..RegisterDeviceRequest::default()
    };
    client.register_device(keyed(register)).await.unwrap();
    let yes = SetOptInRequest {
        app_id: "shop".into(),
        user_id: "bori".into(),
        opted_in: Some(true),
        ..SetOptInRequest::default()
    };
    client.set_opt_in(keyed(yes)).await.unwrap();
    let shop = |name: &str| keyed(NotifyEventRequest { app_id: "shop".into(), ..event(name, &["bori"]) });
    client.notify_event(shop("three")).await.unwrap();
    assert!(world.sandbox.wait_for_accepted(2, PATIENCE).await, "the new app's route has workers");
    let mut refused = None;
    for number in 0..100 {
        // A slow machine may take a second for one.
        refused = client.notify_event(shop(&format!("four-{number}"))).await.err();
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("one a second");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.get_error_details().error_info().unwrap().reason, "EVENT_RATE_EXCEEDED");
    let pushback: u64 = refused.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(pushback)).await;
    client.notify_event(shop("five")).await.expect("after the time it said");

    // Without the app it is gone, and so is its route.
    std::fs::write(&world.config, format!("{original}{}", key(&format!("\"{APP}\""), "\"notify\""))).unwrap();
    server.hangup();
    eventually("the app is gone", async || code(&mut client, shop("six")).await == Code::PermissionDenied).await;
    assert_eq!(code(&mut client, keyed(event("seven", &["choco"]))).await, Code::Ok);

    // A file that lost its end, or itself, opens nothing.
    for text in [Some(&original), None] {
        let failed = world.metric("nudged_config_reloads_total{result=\"failed\"}").await;
        match text {
            Some(text) => std::fs::write(&world.config, text).unwrap(),
            None => std::fs::remove_file(&world.config).unwrap(),
        }
        server.hangup();
        eventually("it is refused", async || {
            world.metric("nudged_config_reloads_total{result=\"failed\"}").await > failed
        })
        .await;
        assert_eq!(code(&mut client, Request::new(event("eight", &["choco"]))).await, Code::Unauthenticated);
    }
    assert!(server.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_file_that_changes_is_read_again() {
    let world = World::new().await;
    let _server = world.start();
    let mut client = world.client().await;
    register(&mut client, "choco", device::Platform::Apns, &format!("{:064x}", 1)).await;
    opt_in(&mut client, "choco", true).await;
    let file = world.config.with_file_name("AuthKey_SANDBOX001.p8");
    let good = std::fs::read(&file).unwrap();
    let live = || binary().args(["check", "--live", "--config"]).arg(&world.config).output().unwrap();
    let output = live();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("apps.ifriendspet.apns: the platform takes the credential"), "{text}");
    assert!(text.contains("apps.ifriendspet.fcm: the platform takes the credential"), "{text}");

    std::fs::write(&file, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let output = live();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && text.contains("the platform refuses it: 403 InvalidProviderToken"), "{text}");
    eventually("the change is noticed", async || {
        world.metric("nudged_config_reloads_total{result=\"applied\"}").await >= Some(1.0)
    })
    .await;
    client.notify_event(event("one", &["choco"])).await.unwrap();
    eventually("Apple refuses the new key", async || {
        world.sandbox.received().iter().any(|push| push.reason.as_deref() == Some("InvalidProviderToken"))
    })
    .await;

    std::fs::write(&file, good).unwrap();
    assert!(world.sandbox.wait_for_accepted(1, PATIENCE).await, "with the right key it goes out, and nothing was lost");
}

/// Half of a PEM, as a disk that is full or a copy that was cut off leaves it: the credential before stays in force.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_credential_file_leaves_the_old_credential_in_force() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    register(&mut client, "choco", device::Platform::Apns, &format!("{:064x}", 1)).await;
    opt_in(&mut client, "choco", true).await;
    client.notify_event(event("before", &["choco"])).await.unwrap();
    assert!(world.sandbox.wait_for_accepted(1, PATIENCE).await);
    let file = world.config.with_file_name("AuthKey_SANDBOX001.p8");
    let good = std::fs::read(&file).unwrap();
    assert_eq!(world.metric("nudged_config_current").await, Some(1.0));

    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    eventually("the damage is told", async || world.metric("nudged_config_current").await == Some(0.0)).await;
    assert!(world.metric("nudged_config_reloads_total{result=\"failed\"}").await >= Some(1.0));
    let log = world.log();
    let line = log.lines().find(|line| line.contains("cannot be reloaded")).expect("a line");
    assert!(line.contains("the credential [apps.ifriendspet.apns]"), "it says which: {line}");
    let id = client.notify_event(event("meanwhile", &["choco"])).await.unwrap().into_inner().notification_id;
    assert!(world.sandbox.wait_for_accepted(2, PATIENCE).await, "accepted is delivered");
    sent(&mut client, &id).await;
    let received = world.sandbox.received();
    assert_eq!(received.len(), 2, "and nothing was refused");
    assert_eq!(received[0].connection, received[1].connection, "over the connection that was there");

    std::fs::write(&file, good).unwrap();
    eventually("it is whole again", async || world.metric("nudged_config_current").await == Some(1.0)).await;
    assert!(server.terminate().success());
}

/// Any other bytes are another credential: what was handed over ends where it is, with one request, and what comes next goes
/// over a connection of the new sender.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_in_flight_ends_on_the_old_connection_when_its_credential_is_replaced() {
    /// Longer than it takes to notice a change, on a machine that is busy, too.
    const DELAY_MS: u64 = 12_000;
    let world = World::new().await;
    let patient = |key: &str| (format!("NUDGED_DELIVERY__{key}"), "60".to_owned());
    let patient = [patient("SEND_TIMEOUT_SECS"), patient("DRAIN_SECS")];
    let environment: Vec<(&str, String)> = patient.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    let server = world.start_with(&environment);
    let mut client = world.client().await;
    for (user, token) in [("choco", 1), ("bori", 2)] {
        register(&mut client, user, device::Platform::Apns, &format!("{token:064x}")).await;
        opt_in(&mut client, user, true).await;
    }
    client.notify_event(event("before", &["choco"])).await.unwrap();
    assert!(world.sandbox.wait_for_accepted(1, PATIENCE).await, "the connection is there");
    let slow = Fault { token: Some(format!("{:064x}", 1)), ..Fault::new(Action::Delay { ms: DELAY_MS }) };
    world.sandbox.add_fault(slow).unwrap();
    let in_flight = client.notify_event(event("in flight", &["choco"])).await.unwrap().into_inner().notification_id;
    assert!(world.sandbox.wait_for(2, PATIENCE).await, "it is with the provider");

    let file = world.config.with_file_name("AuthKey_SANDBOX001.p8");
    let mut text = std::fs::read(&file).unwrap();
    text.push(b'\n');
    std::fs::write(&file, text).unwrap();
    eventually("the change is noticed", async || {
        world.metric("nudged_config_reloads_total{result=\"applied\"}").await >= Some(1.0)
    })
    .await;
    let next = client.notify_event(event("next", &["bori"])).await.unwrap().into_inner().notification_id;
    sent(&mut client, &next).await;
    let open = deliveries(&mut client, &in_flight).await;
    assert!(open.iter().all(|one| one.state() != delivery::State::Sent), "it is still in flight: {open:?}");
    sent(&mut client, &in_flight).await;

    let received = world.sandbox.received();
    let to = |token: u32| -> Vec<_> { received.iter().filter(|push| push.token == format!("{token:064x}")).collect() };
    let (old, new) = (to(1), to(2));
    assert_eq!((old.len(), new.len()), (2, 1), "one request each, beside the first");
    assert_eq!(old[0].connection, old[1].connection);
    assert_ne!(old[1].connection, new[0].connection, "the next push uses another connection");
    assert!(server.terminate().success());
}

/// Until all its deliveries are.
async fn sent(client: &mut PushServiceClient<Channel>, notification: &str) {
    eventually("it is sent", async || {
        let found = deliveries(client, notification).await;
        !found.is_empty() && found.iter().all(|one| one.state() == delivery::State::Sent)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swapped_link_is_a_new_configuration() {
    let world = World::new().await;
    let original = std::fs::read_to_string(&world.config).unwrap();
    let mounted = world.config.parent().unwrap().join("mounted");
    let version = |name: &str, text: &str| {
        std::fs::create_dir_all(mounted.join(name)).unwrap();
        std::fs::write(mounted.join(name).join("nudged.toml"), text).unwrap();
    };
    let swap = |name: &str| {
        symlink(name, mounted.join("..data_tmp")).unwrap();
        std::fs::rename(mounted.join("..data_tmp"), mounted.join("..data")).unwrap();
    };
    version("..v1", &original);
    version("..v2", &format!("{original}{}", key(&format!("\"{APP}\""), "\"notify\"")));
    swap("..v1");
    symlink(Path::new("..data/nudged.toml"), mounted.join("nudged.toml")).unwrap();
    let server = World::start_on(&mounted.join("nudged.toml"));
    let mut client = world.client().await;
    opt_in(&mut client, "choco", true).await;
    swap("..v2");
    eventually("the new keys hold", async || {
        code(&mut client, Request::new(event("one", &["choco"]))).await == Code::Unauthenticated
    })
    .await;
    assert_eq!(code(&mut client, keyed(event("two", &["choco"]))).await, Code::Ok);
    // Before the swap a request of the loop may have been taken; nothing else is expected of it.
    assert!(server.terminate().success());
}

#[tokio::test]
async fn config_print_and_reference_need_no_server() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("nudged.toml");
    std::fs::write(&config, "[grpc]\nthreads = 2\n[apps.shop.fcm]\nservice_account = \"hunter2\"\n").unwrap();
    let run = |arguments: &[&str]| {
        let output = binary().args(arguments).arg("--config").arg(&config).env("NUDGED_LOG__LEVEL", "warn").output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, printed) = run(&["config", "print"]);
    assert_eq!(status, Some(0));
    assert!(printed.contains("nudged.toml:2") && printed.contains("# NUDGED_LOG__LEVEL"), "{printed}");
    assert!(printed.contains("[redacted]") && !printed.contains("hunter2"), "{printed}");
    let (status, reference) = run(&["config", "reference"]);
    assert_eq!((status, reference.as_str()), (Some(0), include_str!("../../docs/nudged.toml")));
    std::fs::write(&config, "[grpc]\nthreds = 2\n").unwrap();
    assert_eq!(run(&["config", "print"]).0, Some(2), "what is wrong is said");
}
