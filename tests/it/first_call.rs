//! A stranger's first calls: a generic client that knows nothing but reflection, and what `serve` refuses.

use super::generic::Generic;
use super::server::{PATIENCE, World, binary};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_reflection_only_registers_opts_in_and_notifies() {
    let world = World::new().await;
    let _server = world.start();
    world.client().await;
    let generic = Generic::connect(&world.address).await;

    let registered = generic
        .call(
            "RegisterDevice",
            r#"{"app_id":"ifriendspet","user_id":"choco","platform":"APNS","token":"a1b2c3d4e5f60718","apns_environment":"SANDBOX","locale":"ko-KR"}"#,
        )
        .await;
    assert_eq!(registered["created"], true, "{registered}");
    assert!(registered["device"]["deviceId"].as_str().unwrap().starts_with("dev_"));
    let chosen = generic.call("SetOptIn", r#"{"app_id":"ifriendspet","user_id":"choco","opted_in":true}"#).await;
    assert_eq!(chosen["applied"], true, "{chosen}");
    let notified = generic
        .call(
            "NotifyEvent",
            r#"{"app_id":"ifriendspet","event_type":"comment.created","idempotency_key":"comment-42","user_ids":["choco"],
                "content":{"title":"New comment","localized":{"ko":{"title":"새 댓글","body":"보리: 너무 귀여워요!"}}},"data":{"post":42}}"#,
        )
        .await;
    assert_eq!(notified["duplicate"], false, "false prints: {notified}");

    assert!(world.sandbox.wait_for(1, PATIENCE).await, "the push arrives");
    let push = &world.received()[0];
    assert!(push.accepted, "{:?}", push.reason);
    let body = push.json();
    assert_eq!(body["aps"]["alert"]["title"], "새 댓글");
    assert_eq!(body["post"], 42, "an integer again");
    assert_eq!(body["nudged_id"].as_str(), push.apns_id.as_deref());
}

#[tokio::test]
async fn serve_refuses_to_listen_beyond_loopback_without_keys() {
    let dir = tempfile::tempdir().unwrap();
    let output =
        binary().arg("serve").current_dir(dir.path()).env("NUDGED_GRPC__LISTEN", "0.0.0.0:50051").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("grpc.listen") && text.contains("nudged key new"), "{text}");
    assert!(!dir.path().join("nudged.db").exists(), "nothing was begun");
}
