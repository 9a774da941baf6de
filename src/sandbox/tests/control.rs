use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// One request with exactly these header lines; status and body.
async fn ask(sandbox: &Sandbox, method: &str, path: &str, headers: &str, body: &str) -> (u16, Value) {
    let mut stream = Runtime::production().connect(sandbox.control_addr()).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = patient(stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

const JSON: &str = "Host: localhost\r\nContent-Type: application/json\r\n";
const LOCAL: &str = "Host: 127.0.0.1:1\r\n";

#[tokio::test]
async fn web_pages_and_foreign_hosts_are_refused() {
    let sandbox = start(Options::default()).await;
    for (headers, expected) in [
        (LOCAL, 200),
        ("Host: localhost\r\n", 200),
        ("Host: [::1]:80\r\n", 200),
        ("Host: evil.example\r\n", 403),
        ("Host: localhost.evil.example\r\n", 403),
        ("Host: localhost\r\nHost: localhost\r\n", 403),
        ("", 403),
        ("Host: localhost\r\nOrigin: http://localhost\r\n", 403),
        ("Host: localhost\r\nOrigin: null\r\n", 403),
    ] {
        let (status, _) = ask(&sandbox, "GET", "/stats", headers, "").await;
        assert!(status == expected || (expected == 403 && status == 400), "{headers:?} gave {status}");
    }
    let faults = r#"{"action":{"type":"stall"}}"#;
    let headers = format!("{JSON}Origin: https://evil.example\r\n");
    assert_eq!(ask(&sandbox, "POST", "/faults", &headers, faults).await.0, 403);
    assert!(sandbox.faults().is_empty());
    sandbox.shutdown().await;
}

#[tokio::test]
async fn record_is_read_in_pages_and_cleared() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let mut client = Client::apns(&sandbox).await;
    for _ in 0..3 {
        client.send(alert(&jwt)).await.unwrap();
    }
    let (status, page) = ask(&sandbox, "GET", "/record?limit=2", LOCAL, "").await;
    assert_eq!(status, 200);
    assert_eq!(page["received"].as_array().unwrap().len(), 2);
    let push = &page["received"][0];
    assert_eq!((&push["token"], &push["platform"], &push["status"]), (&json!(TOKEN), &json!("apns"), &json!(200)));
    assert_eq!(push["body"]["aps"]["alert"]["body"], "새 글");
    let next = format!("/record?since={}", page["last_seq"]);
    let (_, page) = ask(&sandbox, "GET", &next, LOCAL, "").await;
    assert_eq!(page["received"].as_array().unwrap().len(), 1);
    let (_, stats) = ask(&sandbox, "GET", "/stats", LOCAL, "").await;
    assert_eq!((&stats["received"], &stats["apns"]["opened"]), (&json!(3), &json!(1)));

    assert_eq!(ask(&sandbox, "GET", "/record?limit=10001", LOCAL, "").await.0, 400);
    assert_eq!(ask(&sandbox, "GET", "/record?since=x", LOCAL, "").await.0, 400);
    assert_eq!(ask(&sandbox, "GET", "/record?unknown=1", LOCAL, "").await.0, 400);
    assert_eq!(ask(&sandbox, "DELETE", "/record", LOCAL, "").await.0, 204);
    assert_eq!(sandbox.received_count(), 0);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn faults_are_posted_listed_and_cleared() {
    let sandbox = start(Options::default()).await;
    for good in [
        r#"{"action":{"type":"status","status":503,"reason":"UNAVAILABLE","retry_after":"3"},"target":"fcm","times":2}"#,
        r#"{"action":{"type":"goaway","refuse":true},"token_prefix":"00","skip":3}"#,
        r#"{"action":{"type":"refuse_stream"},"probability":0.1,"seed":7}"#,
        r#"{"action":{"type":"garbage"}}"#,
    ] {
        assert_eq!(ask(&sandbox, "POST", "/faults", JSON, good).await, (204, Value::Null), "{good}");
    }
    let (_, list) = ask(&sandbox, "GET", "/faults", LOCAL, "").await;
    assert_eq!(list["faults"].as_array().unwrap().len(), 4);
    assert_eq!(list["faults"][1]["action"]["type"], "goaway");
    for bad in [
        r#"{"action":{"type":"stall"},"unknown":1}"#,
        r#"{"action":{"type":"stall","unknown":1}}"#,
        r#"{"action":{"type":"status","status":503,"unknown":1}}"#,
        r#"{"action":{"type":"dance"}}"#,
        r#"{"action":{"type":"stall"},"times":0}"#,
        "{}",
        "{",
    ] {
        let (status, _) = ask(&sandbox, "POST", "/faults", JSON, bad).await;
        assert!((400..500).contains(&status), "{bad} gave {status}");
    }
    let (status, _) = ask(&sandbox, "POST", "/faults", LOCAL, r#"{"action":{"type":"stall"}}"#).await;
    assert_eq!(status, 415, "without a JSON content type");
    let huge = format!(r#"{{"token":"{}","action":{{"type":"stall"}}}}"#, "a".repeat(64 * 1024));
    assert_eq!(ask(&sandbox, "POST", "/faults", JSON, &huge).await.0, 413);
    assert_eq!(sandbox.faults().len(), 4);
    assert_eq!(ask(&sandbox, "DELETE", "/faults", LOCAL, "").await.0, 204);
    assert!(sandbox.faults().is_empty());
    sandbox.shutdown().await;
}

#[tokio::test]
async fn token_states_are_posted() {
    let sandbox = start(Options::default()).await;
    let path = format!("/tokens/{TOKEN}");
    let state = r#"{"state":"unregistered","since":1700000000000}"#;
    assert_eq!(ask(&sandbox, "POST", &path, JSON, state).await.0, 204);
    let mut client = Client::apns(&sandbox).await;
    let answer = client.send(alert(&provider_token(sandbox.credentials(), 0))).await.unwrap();
    assert_eq!(answer.json(), json!({ "reason": "Unregistered", "timestamp": 1_700_000_000_000_i64 }));
    for bad in [r#"{"state":"gone"}"#, r#"{"state":"bad","since":1}"#, r#"{"state":"unregistered","when":1}"#] {
        assert_eq!(ask(&sandbox, "POST", &path, JSON, bad).await.0, 422, "{bad}");
    }
    // FCM tokens have a colon, which need not be escaped in a path, and may be escaped all the same.
    assert_eq!(ask(&sandbox, "POST", "/tokens/a%3Ab", JSON, r#"{"state":"bad"}"#).await.0, 204);
    assert!(sandbox.shared.token_state("a:b").is_some());

    access_token(&sandbox).await;
    assert_eq!(ask(&sandbox, "DELETE", "/access-tokens", LOCAL, "").await.0, 204);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn control_port_stays_on_loopback() {
    let options = Options { control_listen: ([0, 0, 0, 0], 0).into(), ..Options::default() };
    let refused = Sandbox::start(&Runtime::production(), options).await;
    assert!(matches!(refused, Err(SandboxError::Options(_))));
}
