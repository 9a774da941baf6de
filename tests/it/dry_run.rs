//! A dry run beside the real thing: nothing stored, and then exactly what it said.

use nudged::api::proto::{NotifyEventRequest, Plan, device};
use serde_json::Value;

use super::server::{PATIENCE, World, binary, event, opt_in, register};
use super::tables::counts;

const CATALOGUE: &str = r#"
app = "ifriendspet"

[[event_types]]
name = "comment.created"
collapse_key = "comments:{{ subject }}"

[[event_types.templates]]
locale = "ko"
title = "{{ actor|josa('이/가') }} 댓글을 남겼어요"
link = "ifriendspet://{{ subject }}"
"#;

/// The JSON without what differs by device and by the second.
fn shared(json: &Value) -> Value {
    let mut json = json.clone();
    for path in ["/nudged_id", "/message/token", "/message/data/nudged_id", "/message/android/ttl"] {
        if let Some(value) = json.pointer_mut(path) {
            *value = Value::Null;
        }
    }
    if let Some(headers) = json.pointer_mut("/message/apns/headers") {
        *headers = Value::Null;
    }
    json
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_stores_nothing_and_the_event_then_does_what_it_said() {
    let world = World::new().await;
    let _server = world.start();
    let mut client = world.client().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.toml");
    std::fs::write(&file, CATALOGUE).unwrap();
    let apply = binary().args(["catalog", "apply"]).arg(&file).args(["--address", &world.address]).output().unwrap();
    assert!(apply.status.success());
    register(&mut client, "choco", device::Platform::Apns, "a1b2c3d4e5f60718").await;
    register(&mut client, "choco", device::Platform::Fcm, "fcm-token-of-choco").await;
    register(&mut client, "bori", device::Platform::Fcm, "fcm-token-of-bori").await;
    opt_in(&mut client, "choco", true).await;

    let told = NotifyEventRequest {
        content: None,
        actor_id: "mina".into(),
        subject: "post:42".into(),
        ..event("comment-1", &["choco", "bori", "stranger"])
    };
    let before = counts(&world.database());
    let dry = NotifyEventRequest { dry_run: true, ..told.clone() };
    let answer = client.notify_event(dry.clone()).await.unwrap().into_inner();
    assert_eq!(counts(&world.database()), before, "nothing is stored");
    assert_eq!(answer.notification_id, "");
    let plan: Plan = answer.plan.unwrap();
    assert_eq!(plan.people, 3);
    let suppressed: Vec<_> = plan.suppressed.iter().map(|one| (one.reason.as_str(), one.count)).collect();
    assert_eq!(suppressed, [("NEVER_OPTED_IN", 1), ("NO_DEVICE", 1)]);
    assert_eq!(plan.targets.iter().map(|one| one.count).sum::<u64>(), 2);

    let sent = client.notify_event(told).await.unwrap().into_inner();
    assert_eq!(sent.duplicate, Some(false), "the key was not reserved");
    assert!(world.sandbox.wait_for(2, PATIENCE).await);
    let received = world.sandbox.received();
    assert_eq!(received.len(), 2);
    for push in received {
        assert!(push.accepted);
        let platform = if push.token.starts_with("fcm") { device::Platform::Fcm } else { device::Platform::Apns };
        let sample = plan.samples.iter().find(|one| one.platform() == platform).expect("a sample of the platform");
        assert_eq!((sample.user_id.as_str(), sample.decision.as_str()), ("choco", "SEND"));
        assert_eq!(sample.locale, "ko");
        let rehearsed: Value = serde_json::from_str(&sample.payload).unwrap();
        assert_eq!(shared(&rehearsed), shared(&push.json()));
        assert!(sample.payload.contains("mina가 댓글을 남겼어요"), "{}", sample.payload);
        if platform == device::Platform::Apns {
            assert_eq!(sample.size_bytes as usize, push.body.len());
            assert_eq!(sample.headers["apns-collapse-id"], "comments:post:42");
        }
    }
    let whole: Vec<_> = plan.samples.iter().filter(|one| one.decision != "SEND").collect();
    assert_eq!(whole.len(), 2);

    // A payload that is too large for its platform is found before anything is sent.
    let long = NotifyEventRequest {
        content: Some(nudged::api::proto::Content { title: Some("가".repeat(1_365)), ..Default::default() }),
        ..dry
    };
    let plan = client.notify_event(long).await.unwrap().into_inner().plan.unwrap();
    let decisions: Vec<_> = plan.samples.iter().filter(|one| one.user_id == "choco").collect();
    assert!(decisions.iter().all(|one| one.decision == "PAYLOAD_TOO_LARGE"), "{decisions:?}");
}
