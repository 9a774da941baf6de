//! What an operator sees of a running server: the trace of a call in its log, one line per broadcast, and what the
//! platforms say of each credential.

use std::io::{Read as _, Write as _};
use std::time::Instant;

use nudged::api::proto::{NotifyEventRequest, device};

use super::server::{APP, PATIENCE, World, event, opt_in, register};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_and_metrics_tell_of_calls_broadcasts_and_credentials() {
    let world = World::new().await;
    let _server =
        world.start_with(&[("NUDGED_LOG__LEVEL", "info,nudged::api=debug".to_owned()), ("RUST_LOG", String::new())]);
    let mut client = world.client().await;
    for user in ["choco", "bori", "nabi"] {
        register(&mut client, user, device::Platform::Apns, &format!("{:0>64}", hex(user))).await;
        opt_in(&mut client, user, user != "nabi").await;
    }

    let mut traced = tonic::Request::new(event("comment-1", &["choco"]));
    traced.metadata_mut().insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01").parse().unwrap());
    let one = client.notify_event(traced).await.unwrap().into_inner().notification_id;
    let everyone = NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..event("notice-1", &[]) };
    let all = client.notify_event(everyone).await.unwrap().into_inner().notification_id;

    let accepted = line(&world, "an event was accepted", &one).await;
    assert!(accepted.to_string().contains(TRACE), "{accepted}");
    let untraced = line(&world, "an event was accepted", &all).await;
    assert!(!untraced.to_string().contains("trace_id"), "{untraced}");
    let finished = line(&world, "a broadcast is finished", &all).await;
    assert_eq!((&finished["sent"], &finished["suppressed"], &finished["dead"]), (&2.into(), &1.into(), &0.into()));
    assert!(finished["expanded_ms"].is_number() && finished["finished_ms"].is_number(), "{finished}");

    let metrics = metrics(&world.admin);
    let up = format!(r#"nudged_provider_up{{app="{APP}",platform="apns",credential="default"}} 1"#);
    assert!(metrics.contains(&up), "{metrics}");
    assert!(!metrics.contains("nudged_certificate_days_left{"), "a signing key does not end");
    for runtime in ["engine", "grpc", "send"] {
        let tasks = world.metric(&format!(r#"nudged_tasks{{runtime="{runtime}"}}"#)).await;
        assert!(tasks >= Some(1.0), "{runtime}: {tasks:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificates_days_are_counted_also_of_one_that_replaces_it() {
    const MS_PER_DAY: f64 = 86_400_000.0;
    let world = World::new().await;
    let pem = |year| {
        let mut params = rcgen::CertificateParams::new(vec!["push".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 12, 31);
        let key = rcgen::KeyPair::generate().unwrap();
        format!("{}{}", params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let file = world.config.with_file_name("apns.pem");
    std::fs::write(&file, pem(2099)).unwrap();
    let text = std::fs::read_to_string(&world.config).unwrap();
    let is_of_the_key = |line: &&str| ["key_file", "key_id", "team_id"].iter().any(|key| line.starts_with(key));
    let lines: Vec<&str> = text.lines().filter(|line| !is_of_the_key(line)).collect();
    let section = format!("[apps.{APP}.apns]");
    let text =
        lines.join("\n").replace(&section, &format!("{section}\ncert_file = {file:?}\ncert_key_file = {file:?}"));
    std::fs::write(&world.config, text).unwrap();
    let _server = world.start();
    drop(world.client().await);
    let shown = async |ends_at_ms: f64| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now_ms = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
            let days =
                world.metric(&format!(r#"nudged_certificate_days_left{{app="{APP}",credential="default"}}"#)).await;
            #[expect(clippy::cast_precision_loss, reason = "days are compared")]
            let expected = (ends_at_ms - now_ms as f64) / MS_PER_DAY;
            if days.is_some_and(|days| (days - expected).abs() < 0.01) {
                return;
            }
            assert!(Instant::now() < deadline, "{days:?} days and not {expected}");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    shown(4_102_358_400_000.0).await;
    std::fs::write(&file, pem(2090)).unwrap();
    shown(3_818_361_600_000.0).await;
}

/// The log's line with this message and notification, as soon as it is there.
async fn line(world: &World, message: &str, notification: &str) -> serde_json::Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = world.log();
        let found = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find(|line| line["message"] == message && line["notification_id"] == notification);
        if let Some(found) = found {
            return found;
        }
        assert!(Instant::now() < deadline, "no {message:?} of {notification}:\n{log}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn metrics(address: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .write_all(format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn hex(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}
