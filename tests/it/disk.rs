//! Limits of open work and of the disk, a disk that is really full, a file that cannot be written or is damaged: what
//! callers are told, that nothing accepted is lost, and that it goes on when the cause is gone.

use std::collections::BTreeMap;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    CancelNotificationRequest, NotifyEventsRequest, PauseDeliveryRequest, ResumeDeliveryRequest, SetOptInRequest,
    UnregisterDeviceRequest, delivery, device, notify_events_response,
};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::load::deliveries;
use super::server::{APP, PATIENCE, Server, World, binary, event, opt_in, register};
use super::trouble::{ready, readyz};

const LOOK: Duration = Duration::from_millis(50);

/// The reason and what is full; every refusal says when to come again, in both ways.
fn full(status: &Status) -> (String, String) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(hint.is_some_and(|delay| delay > Duration::ZERO), "{status:?}");
    assert!(status.metadata().get("grpc-retry-pushback-ms").is_some(), "{status:?}");
    let info = status.get_details_error_info().expect("a reason");
    (info.reason, info.metadata.get("full").cloned().unwrap_or_default())
}

async fn person(client: &mut PushServiceClient<Channel>, name: &str, number: u64) -> String {
    let device = register(client, name, device::Platform::Apns, &format!("{number:064x}")).await;
    opt_in(client, name, true).await;
    device
}

/// Consent, devices and cancellations are taken, whatever is full.
async fn the_rest_is_served(client: &mut PushServiceClient<Channel>, notification: Option<&str>) {
    let device = person(client, "guest", 999).await;
    opt_in(client, "guest", false).await;
    let gone = UnregisterDeviceRequest {
        app_id: APP.into(),
        user_id: "guest".into(),
        device_id: device,
        ..UnregisterDeviceRequest::default()
    };
    assert!(client.unregister_device(gone).await.unwrap().into_inner().existed());
    if let Some(notification_id) = notification {
        let cancel = CancelNotificationRequest { app_id: APP.into(), notification_id: notification_id.into() };
        client.cancel_notification(cancel).await.unwrap();
    }
}

/// Events until one is refused; what was accepted before.
async fn fill(client: &mut PushServiceClient<Channel>, prefix: &str, most: usize) -> (Vec<String>, Status) {
    let mut accepted = Vec::new();
    loop {
        let key = format!("{prefix}-{}", accepted.len());
        match client.notify_event(event(&key, &["choco"])).await {
            Ok(answer) => accepted.push(answer.into_inner().notification_id),
            Err(status) => return (accepted, status),
        }
        assert!(accepted.len() < most, "nothing is ever full");
    }
}

/// Until every delivery of these is as it should be.
async fn all_sent(client: &mut PushServiceClient<Channel>, notifications: &[String]) {
    let deadline = Instant::now() + PATIENCE;
    for id in notifications {
        loop {
            let found = deliveries(client, id).await;
            if !found.is_empty() && found.iter().all(|one| one.state() == delivery::State::Sent) {
                break;
            }
            assert!(Instant::now() < deadline, "{id} is not sent: {found:?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn pause(admin: &mut AdminServiceClient<Channel>) {
    let held = PauseDeliveryRequest { app_id: APP.into(), reason: "a test".into(), ..PauseDeliveryRequest::default() };
    admin.pause_delivery(held).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_open_work_refuses_events_and_nothing_else() {
    for (key, value, full_of) in [("MAX_OPEN_TARGETS", "20", "open_targets"), ("MAX_OPEN_ROWS", "10", "open_rows")] {
        let world = World::new().await;
        let server = world.start_with(&[(&format!("NUDGED_DELIVERY__{key}"), value.to_owned())]);
        let mut client = world.client().await;
        let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
        person(&mut client, "choco", 1).await;
        // Twice as much as fits goes through as long as it goes out.
        for number in 0..2 * value.parse::<u32>().unwrap() {
            let answer = client.notify_event(event(&format!("through-{number}"), &["choco"])).await.unwrap();
            // Open until its outcome is written, which is some milliseconds after the provider had it.
            all_sent(&mut client, &[answer.into_inner().notification_id]).await;
        }
        pause(&mut admin).await;
        let (mut accepted, refused) = fill(&mut client, "open", 1_000).await;
        assert_eq!(full(&refused), ("OPEN_WORK_FULL".to_owned(), full_of.to_owned()));
        // What ends while the open work is counted is counted once more until the next count: then there is room again.
        let deadline = Instant::now() + PATIENCE;
        while world.metric(&format!("nudged_full{{reason=\"{full_of}\"}}")).await != Some(1.0) {
            assert!(Instant::now() < deadline, "the metric does not say so");
            tokio::time::sleep(LOOK).await;
            accepted.extend(fill(&mut client, &format!("open-{}", accepted.len()), 1_000).await.0);
        }
        assert!(accepted.len() + 3 >= value.parse::<usize>().unwrap() / 2, "refused after {}", accepted.len());
        // A stream is told for each of its events, and stays open.
        let stream = |number: u64| NotifyEventsRequest {
            sequence: number,
            event: Some(event(&format!("stream-{number}"), &["choco"])),
        };
        let mut answers = client.notify_events(tokio_stream::iter([stream(1), stream(2)])).await.unwrap().into_inner();
        for _ in 0..2 {
            let answer = answers.message().await.unwrap().expect("an answer each");
            let Some(notify_events_response::Outcome::Error(error)) = answer.outcome else { panic!("{answer:?}") };
            assert_eq!(error.code, Code::ResourceExhausted as i32);
        }
        let text = ready(&world, true).await;
        assert!(text.contains("no event is taken while more"), "{text}");
        the_rest_is_served(&mut client, accepted.last().map(String::as_str)).await;
        let resume = ResumeDeliveryRequest { app_id: APP.into(), ..ResumeDeliveryRequest::default() };
        admin.resume_delivery(resume).await.unwrap();
        all_sent(&mut client, &accepted[..accepted.len() - 1]).await;
        let deadline = Instant::now() + PATIENCE;
        let last = loop {
            match client.notify_event(event("last", &["choco"])).await {
                Ok(answer) => break answer.into_inner().notification_id,
                Err(status) => assert_eq!(full(&status).0, "OPEN_WORK_FULL"),
            }
            assert!(Instant::now() < deadline, "there is never room again");
            tokio::time::sleep(LOOK).await;
        };
        all_sent(&mut client, &[last]).await;
        assert!(server.terminate().success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_or_database_near_its_limit_refuses_events_and_nothing_else() {
    // No disk has so much free, no database is so small.
    for (key, value, full_of) in [("MIN_FREE_MIB", "900000000", "disk_free"), ("MAX_MIB", "1", "database_size")] {
        let world = World::new().await;
        let server = world.start();
        let mut client = world.client().await;
        person(&mut client, "choco", 1).await;
        if full_of == "database_size" {
            // The schema alone may fit into the limit.
            for _ in 0..600 {
                let choice = SetOptInRequest {
                    app_id: APP.into(),
                    user_id: "choco".into(),
                    opted_in: Some(true),
                    evidence: "x".repeat(4_096),
                    ..SetOptInRequest::default()
                };
                client.set_opt_in(choice).await.unwrap();
            }
        }
        assert!(server.terminate().success());
        let server = world.start_with(&[(&format!("NUDGED_DATABASE__{key}"), value.to_owned())]);
        let mut client = world.client().await;
        let (accepted, refused) = fill(&mut client, "full", 1).await;
        assert!(accepted.is_empty(), "it is known before the first call");
        assert_eq!(full(&refused), ("DATABASE_FULL".to_owned(), full_of.to_owned()));
        let text = ready(&world, true).await;
        assert!(text.contains("no event is taken while the"), "{text}");
        assert_eq!(world.metric(&format!("nudged_full{{reason=\"{full_of}\"}}")).await, Some(1.0));
        assert_eq!(world.metric("nudged_full{reason=\"disk_full\"}").await, Some(0.0));
        the_rest_is_served(&mut client, None).await;
        assert!(server.terminate().success());
    }
}

/// A file system of its own, of a size; unmounted when dropped.
struct Small {
    path: PathBuf,
}

impl Small {
    /// `None` where nothing can be mounted; says so past libtest, which keeps what a green test prints.
    fn mount(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(path)
            .stderr(Stdio::null())
            .status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(Self { path: path.to_owned() });
        }
        let test = std::thread::current().name().unwrap_or("a test of the disk").to_owned();
        let words = format!("{test}: SKIPPED: no file system can be mounted here (it takes root)\n");
        std::io::stderr().write_all(words.as_bytes()).unwrap();
        None
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let remount = Command::new("mount").args(["-o", &options]).arg(&self.path).status().unwrap();
        assert!(remount.success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn on(world: &World, database: &Path, more: &[(&str, &str)]) -> Server {
    let mut environment = vec![("NUDGED_DATABASE__URL", format!("sqlite://{}", database.display()))];
    environment.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
    world.start_with(&environment)
}

/// ENOSPC for real: refused in words, kept what was accepted, sent it, and went on once there was room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_nothing_and_work_goes_on_when_there_is_room() {
    let world = World::new().await;
    let Some(disk) = Small::mount(&world.config.with_file_name("small"), "6m") else { return };
    let database = disk.path.join("nudged.db");
    // Without a reserve, so that the disk itself is what ends it.
    let server = on(&world, &database, &[("NUDGED_DATABASE__MIN_FREE_MIB", "0")]);
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    person(&mut client, "choco", 1).await;
    pause(&mut admin).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Leaves some room for the log.
    std::fs::write(disk.path.join("ballast"), vec![0_u8; 2 << 20]).unwrap();
    let (accepted, refused) = fill(&mut client, "full", 100_000).await;
    assert_eq!(full(&refused), ("DATABASE_FULL".to_owned(), "disk_full".to_owned()));
    assert!(accepted.len() > 20, "{}", accepted.len());
    let text = readyz(&world);
    assert!(text.contains("the disk is full") || text.starts_with("HTTP/1.1 200"), "{text}");
    std::fs::remove_file(disk.path.join("ballast")).unwrap();
    disk.remount("size=256m");
    ready(&world, true).await;
    let resume = ResumeDeliveryRequest { app_id: APP.into(), ..ResumeDeliveryRequest::default() };
    let deadline = Instant::now() + PATIENCE;
    while admin.resume_delivery(resume.clone()).await.is_err() {
        assert!(Instant::now() < deadline, "nothing can be written");
        tokio::time::sleep(LOOK).await;
    }
    let deadline = Instant::now() + PATIENCE;
    let last = loop {
        match client.notify_event(event("last", &["choco"])).await {
            Ok(answer) => break answer.into_inner().notification_id,
            Err(status) => assert_eq!(full(&status).0, "DATABASE_FULL"),
        }
        assert!(Instant::now() < deadline, "there is never room again");
        tokio::time::sleep(LOOK).await;
    };
    assert!(world.sandbox.wait_for_accepted(accepted.len() as u64 + 1, PATIENCE).await, "all of it goes out");
    all_sent(&mut client, &[accepted[0].clone(), accepted[accepted.len() - 1].clone(), last]).await;
    no_identity_twice(&world);
    assert!(server.terminate().success());
}

fn no_identity_twice(world: &World) {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for push in world.received() {
        *seen.entry(push.nudged_id.clone().unwrap_or_default()).or_default() += 1;
    }
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
}

/// The reserve: events are refused before the disk is full, and the deliveries' results still fit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reserve_of_the_disk_is_left_to_results_and_consent() {
    let world = World::new().await;
    let Some(disk) = Small::mount(&world.config.with_file_name("small"), "24m") else { return };
    let database = disk.path.join("nudged.db");
    let server = on(&world, &database, &[("NUDGED_DATABASE__MIN_FREE_MIB", "12")]);
    let mut client = world.client().await;
    person(&mut client, "choco", 1).await;
    std::fs::write(disk.path.join("ballast"), vec![0_u8; 8 << 20]).unwrap();
    let (accepted, refused) = fill(&mut client, "near", 100_000).await;
    assert_eq!(full(&refused), ("DATABASE_FULL".to_owned(), "disk_free".to_owned()));
    the_rest_is_served(&mut client, None).await;
    assert!(world.sandbox.wait_for_accepted(accepted.len() as u64, PATIENCE).await, "all of it goes out");
    std::fs::remove_file(disk.path.join("ballast")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while client.notify_event(event("last", &["choco"])).await.is_err() {
        assert!(Instant::now() < deadline, "there is never room again");
        tokio::time::sleep(LOOK).await;
    }
    assert!(server.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_file_system_is_named_at_the_start() {
    let world = World::new().await;
    let Some(disk) = Small::mount(&world.config.with_file_name("small"), "24m") else { return };
    let database = disk.path.join("nudged.db");
    let server = on(&world, &database, &[("NUDGED_DATABASE__MIN_FREE_MIB", "0")]);
    let mut client = world.client().await;
    person(&mut client, "choco", 1).await;
    assert!(server.terminate().success());
    disk.remount("ro");
    let mut server = on(&world, &database, &[]);
    let status = tokio::task::block_in_place(|| server.exited());
    assert_eq!(status.code(), Some(1));
    assert!(world.log().contains("Read-only file system"), "{}", world.log());
    disk.remount("rw");
    let server = on(&world, &database, &[("NUDGED_DATABASE__MIN_FREE_MIB", "0")]);
    let mut client = world.client().await;
    client.notify_event(event("after", &["choco"])).await.unwrap();
    assert!(world.sandbox.wait_for_accepted(1, PATIENCE).await);
    assert!(server.terminate().success());
}

/// A write that fails for another reason than a full disk, at COMMIT: nobody knows what the file holds, so the process
/// exits, and the next one finds what was acknowledged. The limit of a file's size does it anywhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_write_stops_the_process_and_the_next_finds_everything() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    person(&mut client, "choco", 1).await;
    assert!(server.terminate().success());

    // Larger than the database with its schema, in blocks of 512 bytes; no signal, but an error of write(2).
    let blocks = (std::fs::metadata(world.database()).unwrap().len() + (600 << 10)) / 512;
    let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let mut server = world.start_by(&["sh", "-c", &limited, "sh"]);
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    pause(&mut admin).await;
    let mut accepted = Vec::new();
    let refused = loop {
        let key = format!("limit-{}", accepted.len());
        match client.notify_event(event(&key, &["choco"])).await {
            Ok(answer) => accepted.push((key, answer.into_inner().notification_id)),
            Err(status) => break status,
        }
        assert!(accepted.len() < 100_000, "the limit is never met");
    };
    // The process may be gone before its answer is.
    let is_cut = refused.code() == Code::Unknown && refused.message() == "transport error";
    assert!(refused.code() == Code::Unavailable || is_cut, "{refused:?}");
    assert!(accepted.len() > 20, "{}", accepted.len());
    let status = tokio::task::block_in_place(|| server.exited());
    assert_eq!(status.code(), Some(1));
    let log = world.log();
    assert!(log.contains("exiting, so that the next start reads what the database holds"), "{log}");

    let server = world.start();
    let mut client = world.client().await;
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    for (key, id) in &accepted {
        let again = client.notify_event(event(key, &["choco"])).await.unwrap().into_inner();
        assert!(again.duplicate() && again.notification_id == *id, "{key} is known");
    }
    let resume = ResumeDeliveryRequest { app_id: APP.into(), ..ResumeDeliveryRequest::default() };
    admin.resume_delivery(resume).await.unwrap();
    let ids: Vec<String> = accepted.into_iter().map(|(_, id)| id).collect();
    all_sent(&mut client, &ids).await;
    no_identity_twice(&world);
    assert!(server.terminate().success());
}

fn spoil(path: &Path, from: u64) {
    let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&vec![0xa5; usize::try_from(length.saturating_sub(from)).unwrap()]).unwrap();
}

/// One clear error, exit code 65, while it serves and at the next start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_database_stops_the_process() {
    const DAMAGED: Option<i32> = Some(65);
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    for number in 0..30 {
        person(&mut client, &format!("user-{number}"), number).await;
    }
    // Into the file itself: damage of the log looks like its torn end.
    assert!(server.terminate().success());
    let mut server = world.start();
    let mut client = world.client().await;
    spoil(&world.database(), 4096);
    let mut status: Option<ExitStatus> = None;
    let deadline = Instant::now() + PATIENCE;
    while status.is_none() {
        let choice = SetOptInRequest {
            app_id: APP.into(),
            user_id: "user-7".into(),
            opted_in: Some(false),
            ..SetOptInRequest::default()
        };
        let _ = client.set_opt_in(choice).await;
        let _ = client.notify_event(event("after", &["user-7", "user-9"])).await;
        status = server.has_exited();
        assert!(Instant::now() < deadline, "it goes on half-blind");
    }
    assert_eq!(status.and_then(|status| status.code()), DAMAGED, "{}", world.log());
    let log = world.log();
    assert!(log.contains("the database file is damaged") && log.contains("restore a backup"), "{log}");

    let check = binary().args(["serve", "--config"]).arg(&world.config).output().unwrap();
    assert_eq!(check.status.code(), DAMAGED);
    let words = String::from_utf8(check.stderr).unwrap();
    assert!(words.contains("is damaged") && words.contains("restore a backup"), "{words}");
}
