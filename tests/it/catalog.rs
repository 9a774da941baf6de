//! `nudged catalog` against the real server, and what the declared words come to on a phone.

use std::process::Output;

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::{NotifyEventRequest, PreviewRequest, device};
use prost_types::{Struct, Value, value::Kind};

use super::server::{APP, PATIENCE, World, binary, event, opt_in, register};

const CATALOGUE: &str = r#"
app = "ifriendspet"

[[event_types]]
name = "comment.created"
display_name = "댓글"
group = "내 글"
collapse_key = "comments:{{ subject }}"
default_locale = "en"

[[event_types.templates]]
locale = "ko"
title = "{{ data.author|default('누군가')|josa('이/가') }} 댓글을 남겼어요"
body = "{{ data.text|truncate(40) }}"

[[event_types.templates]]
locale = "en"
title = "{{ data.author|default('Somebody') }} commented"
body = "{{ data.text }}"
link = "ifriendspet://post/{{ data.post|urlencode }}"
image = "https://img.example.com/{{ data.post }}.jpg"
"#;

fn catalog(world: &World, arguments: &[&str]) -> Output {
    let output = binary().arg("catalog").args(arguments).args(["--address", &world.address]).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
    output
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn data(entries: &[(&str, &str)]) -> Struct {
    let field =
        |(key, value): &(&str, &str)| ((*key).to_owned(), Value { kind: Some(Kind::StringValue((*value).to_owned())) });
    Struct { fields: entries.iter().map(field).collect() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_catalogue_is_applied_and_its_words_reach_the_phones() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, CATALOGUE).unwrap();

    let dry = catalog(&world, &["apply", path, "--dry-run"]);
    assert!(dry.status.success() && text(&dry).contains("+ comment.created"), "{}", text(&dry));
    assert!(text(&dry).contains("Dry run"), "{}", text(&dry));
    let first = catalog(&world, &["apply", path]);
    assert!(first.status.success() && text(&first).contains("1 declared, 0 unchanged"), "{}", text(&first));
    let again = catalog(&world, &["apply", path]);
    assert!(again.status.success() && text(&again).contains("0 declared, 1 unchanged"), "{}", text(&again));

    let exported = dir.path().join("export.json");
    let export = catalog(&world, &["export", exported.to_str().unwrap(), "--app", APP]);
    assert!(export.status.success(), "{}", text(&export));
    let same = catalog(&world, &["apply", exported.to_str().unwrap()]);
    assert!(text(&same).contains("0 declared, 1 unchanged"), "{}", text(&same));

    register(&mut client, "choco", device::Platform::Apns, "a1b2c3d4e5f60718").await;
    register(&mut client, "choco", device::Platform::Fcm, "fcm-token-of-choco").await;
    opt_in(&mut client, "choco", true).await;
    let told = NotifyEventRequest {
        content: None,
        subject: "post:42".into(),
        data: Some(data(&[("author", "콩"), ("text", "너무 귀여워요!"), ("post", "42")])),
        ..event("comment-1", &["choco"])
    };
    client.notify_event(told.clone()).await.unwrap();
    assert!(world.sandbox.wait_for(2, PATIENCE).await, "both phones get it");
    let received = world.received();
    assert!(received.iter().all(|push| push.accepted));
    let bodies: Vec<serde_json::Value> = received.iter().map(|push| push.json()).collect();
    let apns = bodies.iter().find(|body| body.get("aps").is_some()).expect("one by APNs");
    assert_eq!(apns["aps"]["alert"]["title"], "콩이 댓글을 남겼어요");
    assert_eq!(apns["aps"]["alert"]["body"], "너무 귀여워요!");
    assert_eq!(apns["aps"]["mutable-content"], 1);
    assert_eq!(
        (&apns["link"], &apns["image"]),
        (&"ifriendspet://post/42".into(), &"https://img.example.com/42.jpg".into())
    );
    let fcm = &bodies.iter().find(|body| body.get("message").is_some()).expect("one by FCM")["message"];
    assert_eq!(fcm["notification"]["title"], "콩이 댓글을 남겼어요");
    assert_eq!(fcm["notification"]["image"], "https://img.example.com/42.jpg");
    assert_eq!(fcm["data"]["link"], "ifriendspet://post/42");
    assert_eq!(fcm["android"]["notification"]["tag"], "comments:post:42");

    // Another process reads the version from the database.
    server.kill();
    let _server = world.start();
    let mut client = world.client().await;
    client.notify_event(NotifyEventRequest { idempotency_key: "comment-2".into(), ..told.clone() }).await.unwrap();
    assert!(world.sandbox.wait_for(4, PATIENCE).await, "both phones get it");
    let received = world.received();
    assert!(received.iter().all(|push| push.json().to_string().contains("콩이 댓글을 남겼어요")));

    // A preview shows the very payloads that were sent, but for the device.
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    let preview = PreviewRequest {
        app_id: APP.into(),
        name: "comment.created".into(),
        data: told.data.clone(),
        subject: told.subject.clone(),
        locales: vec!["ko-KR".into()],
        ..PreviewRequest::default()
    };
    let previews = admin.preview(preview).await.unwrap().into_inner().previews;
    let shown = |platform: device::Platform| {
        let payload = previews[0].payloads.iter().find(|payload| payload.platform() == platform).expect("a payload");
        assert_eq!(payload.reason, "");
        (payload.clone(), serde_json::from_str::<serde_json::Value>(&payload.body).unwrap())
    };
    let (payload, body) = shown(device::Platform::Apns);
    assert_eq!(payload.size_bytes as usize, apns.to_string().len());
    assert_eq!(payload.headers["apns-collapse-id"], "comments:post:42");
    assert!(!payload.headers.contains_key("authorization"));
    assert_eq!(without(&body, &["/nudged_id"]), without(apns, &["/nudged_id"]));
    let (_, body) = shown(device::Platform::Fcm);
    assert_eq!(body["message"]["token"], "DEVICE_TOKEN");
    let by_device = ["/token", "/data/nudged_id", "/android/ttl", "/apns/headers/apns-expiration"];
    assert_eq!(without(&body["message"], &by_device), without(fcm, &by_device));
}

/// The JSON with the values at these paths emptied.
fn without(json: &serde_json::Value, paths: &[&str]) -> serde_json::Value {
    let mut json = json.clone();
    for path in paths {
        *json.pointer_mut(path).unwrap_or_else(|| panic!("{path}")) = serde_json::Value::Null;
    }
    json
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_catalogue_is_refused_whole_and_pruning_is_asked_for() {
    let world = World::new().await;
    let _server = world.start();
    world.client().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, CATALOGUE.to_owned() + "[[event_types]]\nname = \"old\"\n").unwrap();
    assert!(catalog(&world, &["apply", path]).status.success());

    std::fs::write(&file, CATALOGUE.replace("|josa('이/가')", "|jossa('이/가')").replace("\"댓글\"", "\"새 댓글\""))
        .unwrap();
    let bad = catalog(&world, &["apply", path]);
    assert_eq!(bad.status.code(), Some(2));
    let said = text(&bad);
    assert!(said.contains("event_types[0].templates[0].title: line 1: filter `jossa` is unknown"), "{said}");

    std::fs::write(&file, CATALOGUE.replace("\"댓글\"", "\"새 댓글\"")).unwrap();
    let kept = catalog(&world, &["apply", path]);
    assert!(text(&kept).contains("display_name: \"댓글\" → \"새 댓글\""), "{}", text(&kept));
    assert!(text(&kept).contains("old is not in the file and stays"), "{}", text(&kept));
    let pruned = catalog(&world, &["apply", path, "--prune"]);
    assert!(text(&pruned).contains("- old") && text(&pruned).contains("1 deleted"), "{}", text(&pruned));
    let export = catalog(&world, &["export", "--app", APP]);
    assert!(text(&export).contains("새 댓글") && !text(&export).contains("\"old\""), "{}", text(&export));
}
