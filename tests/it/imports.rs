//! `nudged import` against the real server: a dry run, both sides killed in the middle, and everything there once.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use super::server::{PATIENCE, World, binary, event};
use super::tables::{count, counts};

const LINES: u64 = 30_000;
/// One in so many has no token; one in so many, another, a time that is none.
const NO_TOKEN: u64 = 701;
const NO_TIME: u64 = 1_009;

fn command(world: &World, arguments: &[&str]) -> std::process::Command {
    let mut command = binary();
    command.arg("import").args(arguments).args(["--address", &world.address]);
    command
}

fn run(world: &World, arguments: &[&str]) -> (Output, String) {
    let output = command(world, arguments).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!said.contains("panicked"), "{said}");
    (output, said)
}

fn begin(world: &World, arguments: &[&str]) -> Child {
    command(world, arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A CSV of phones; line 1 is the header.
fn phones(file: &Path) -> (u64, Vec<u64>) {
    let mut text = String::from("user_id,platform,token,locale,observed_at,created_at\n");
    let mut refused = Vec::new();
    for line in 2..LINES + 2 {
        let token = if line % NO_TOKEN == 0 { String::new() } else { format!("fcm-token-{line}") };
        let at = if line % NO_TIME == 0 { "soon" } else { "2025-03-01 09:00:00+09" };
        if token.is_empty() || at == "soon" {
            refused.push(line);
        }
        writeln!(text, "user-{line},gcm,{token},ko-KR,{at},2024-03-01T00:00:00Z").unwrap();
    }
    std::fs::write(file, text).unwrap();
    (LINES - refused.len() as u64, refused)
}

fn reported(file: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(file).unwrap();
    let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["line"].as_u64().unwrap();
    let mut lines: Vec<u64> = text.lines().map(line).collect();
    lines.sort_unstable();
    lines
}

/// Until the database has so many devices.
async fn arrived(world: &World, devices: u64) {
    let deadline = Instant::now() + PATIENCE;
    while count(&world.database(), "SELECT count(*) AS count FROM device") < devices {
        assert!(Instant::now() < deadline, "nothing arrives");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_survives_kill_9_of_both_sides() {
    let world = World::new().await;
    let mut server = world.start();
    world.client().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("phones.csv");
    let path = file.to_str().unwrap();
    let (good, refused) = phones(&file);

    let before = counts(&world.database());
    let (dry, said) = run(&world, &["devices", path, "--dry-run"]);
    assert_eq!(dry.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("{good} would be applied, 0 unchanged, {} refused", refused.len())), "{said}");
    assert_eq!(reported(&dir.path().join("phones.csv.dry-run.refused.ndjson")), refused);
    assert_eq!(counts(&world.database()), before, "a dry run writes nothing");

    // The command is killed in the middle.
    let mut killed = begin(&world, &["devices", path]);
    arrived(&world, LINES / 5).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    let at_kill = count(&world.database(), "SELECT count(*) AS count FROM device");
    assert!(at_kill < good, "it was in the middle: {at_kill}");

    // Then the server, under a command that goes on by itself.
    let going_on = begin(&world, &["devices", path]);
    arrived(&world, at_kill + LINES / 5).await;
    server.kill();
    let at_kill = count(&world.database(), "SELECT count(*) AS count FROM device");
    assert!(at_kill < good, "it was in the middle: {at_kill}");
    server = world.start();
    let output = going_on.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Going on after line") && said.contains("trying again"), "{said}");

    let report = dir.path().join("phones.csv.refused.ndjson");
    assert_eq!(reported(&report), refused, "every refused line once");
    let right = "SELECT count(*) AS count FROM device d JOIN app_user u ON u.id = d.user_key WHERE d.state = 1 \
                 AND CAST(d.token_sealed AS TEXT) = 'fcm-token-' || substr(u.external_id, 6) \
                 AND d.observed_at = 1740787200000 AND d.created_at = 1709251200000";
    assert_eq!(count(&world.database(), right), good, "every phone with its own person and times");
    assert_eq!(count(&world.database(), "SELECT count(*) AS count FROM device"), good);
    assert_eq!(count(&world.database(), "SELECT count(*) AS count FROM app_user"), good);

    // Once more changes nothing.
    let before = counts(&world.database());
    let (again, said) = run(&world, &["devices", path]);
    assert_eq!(again.status.code(), Some(1), "{said}");
    assert!(said.contains("Done: 0 applied"), "{said}");
    assert_eq!(reported(&report), refused);
    assert_eq!(counts(&world.database()), before);
    assert!(server.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_moved_in_is_reached() {
    let world = World::new().await;
    let _server = world.start();
    let mut client = world.client().await;
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let devices = write(
        "devices.ndjson",
        "{\"user_id\":17,\"platform\":\"FCM\",\"token\":\"fcm-token-of-17\",\"labels\":{\"team\":\"red\"}}\n\
         {\"user_id\":\"18\",\"platform\":\"APNS\",\"token\":\"a1b2c3d4\",\"observed_at\":\"2025-01-01T00:00:00Z\"}\n",
    );
    let (done, said) = run(&world, &["devices", &devices]);
    assert_eq!(done.status.code(), Some(1), "one line has no time: {said}");
    let (done, said) = run(&world, &["devices", &devices, "--observed-at", "2026-01-01T00:00:00Z"]);
    assert!(done.status.success() && said.contains("1 applied, 1 unchanged, 0 refused"), "{said}");
    let opt_ins = write("opt-ins.csv", "user_id,event_type,opted_in,source\n17,*,true,old system\n18,*,false,\n");
    let (done, said) = run(&world, &["opt-ins", &opt_ins, "--observed-at", "1767225600", "--import-id", "choices"]);
    assert!(done.status.success() && said.contains("2 applied"), "{said}");
    let follows = write("follows.csv", "user_id,topic\n17,author:choco\n18,author:choco\n");
    let (done, said) = run(&world, &["subscriptions", &follows, "--observed-at", "1767225600"]);
    assert!(done.status.success() && said.contains("2 applied"), "{said}");

    let mut news = event("news", &[]);
    news.topics = vec!["author:choco".into()];
    client.notify_event(news).await.unwrap();
    assert!(world.sandbox.wait_for(1, PATIENCE).await);
    let received = world.sandbox.received();
    assert_eq!((received.len(), received[0].token.as_str()), (1, "fcm-token-of-17"));

    let (wrong, said) = run(&world, &["opt-ins", &follows]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(said.contains("\"topic\" is no column of this import"), "{said}");
    let (wrong, said) = run(&world, &["opt-ins", &opt_ins, "--app", "zoo", "--observed-at", "1767225600"]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(said.contains("NotFound"), "{said}");
}
