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
