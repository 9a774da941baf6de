use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[tokio::test]
async fn good_assertion_is_exchanged() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::open(&sandbox, sandbox.token_endpoint(), false).await;
    let answer = client.send(exchange(&assertion(&sandbox, &json!({})))).await.unwrap();
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert_eq!((&body["expires_in"], &body["token_type"]), (&json!(3599), &json!("Bearer")));
    assert_eq!(sandbox.oauth_exchanges(), 1);

    let as_google_does = assertion(&sandbox, &json!({ "aud": "https://oauth2.googleapis.com/token" }));
    assert_eq!(client.send(exchange(&as_google_does)).await.unwrap().status, 200);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn http_1_is_spoken_too() {
    let sandbox = start(Options::default()).await;
    let mut stream = tls(&sandbox, sandbox.token_endpoint(), "http/1.1", false).await;
    let body = String::from_utf8(exchange(&assertion(&sandbox, &json!({}))).into_body().to_vec()).unwrap();
    let request = format!(
        "POST /token HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\nContent-Type: \
         application/x-www-form-urlencoded\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // The server may close without close_notify; what it said before counts.
    let _ = patient(stream.read_to_end(&mut answer)).await;
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn bad_assertions_are_refused() {
    let sandbox = start(Options::default()).await;
    let other = start(Options::default()).await;
    let mut client = Client::open(&sandbox, sandbox.token_endpoint(), false).await;
    let now = now_secs();
    let header = json!({ "alg": "RS256", "typ": "JWT", "kid": sandbox.credentials().private_key_id });
    let claims = json!({ "iss": sandbox.credentials().client_email, "aud": sandbox.token_endpoint(), "iat": now,
        "exp": now + 3600, "scope": "https://www.googleapis.com/auth/cloud-platform" });
    let cases = [
        (assertion(&sandbox, &json!({ "iss": "x@y" })), "invalid_grant"),
        (assertion(&sandbox, &json!({ "aud": "https://example.com/token" })), "invalid_grant"),
        (assertion(&sandbox, &json!({ "exp": now + 3700 })), "invalid_grant"),
        (assertion(&sandbox, &json!({ "iat": now - 7200, "exp": now - 3600 })), "invalid_grant"),
        (assertion(&sandbox, &json!({ "iat": now + 1000, "exp": now + 2000 })), "invalid_grant"),
        (assertion(&sandbox, &json!({ "scope": "https://www.googleapis.com/auth/drive" })), "invalid_scope"),
        (
            jws(&json!({ "alg": "RS256", "kid": "x" }), &claims, rs256(&sandbox.credentials().service_account_key_pem)),
            "invalid_grant",
        ),
        (jws(&header, &claims, rs256(&other.credentials().service_account_key_pem)), "invalid_grant"),
        ("nonsense".to_owned(), "invalid_grant"),
    ];
    for (assertion, error) in cases {
        let answer = client.send(exchange(&assertion)).await.unwrap();
        assert_eq!(answer.status, 400);
        assert_eq!(answer.json()["error"], error);
    }
    let mut request = exchange("x");
    *request.body_mut() = "grant_type=password&assertion=x".into();
    assert_eq!(client.send(request).await.unwrap().json()["error"], "unsupported_grant_type");
    let mut request = exchange("x");
    *request.method_mut() = http::Method::PUT;
    assert_eq!(client.send(request).await.unwrap().status, 405);
    assert_eq!(sandbox.oauth_exchanges(), 0);
    other.shutdown().await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn faults_reach_the_token_endpoint() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::open(&sandbox, sandbox.token_endpoint(), false).await;
    let good = assertion(&sandbox, &json!({}));
    sandbox.add_fault(Fault::status(503, "unavailable").on(Target::Oauth)).unwrap();
    sandbox.add_fault(Fault::new(Action::Garbage { status: 200 }).on(Target::Oauth)).unwrap();
    sandbox.add_fault(Fault::new(Action::Delay { ms: 20 }).on(Target::Oauth)).unwrap();
    let answer = client.send(exchange(&good)).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.json()["error"].clone()), (503, json!("unavailable")));
    assert!(client.send(exchange(&good)).await.unwrap().body.starts_with(b"<!DOCTYPE"));
    assert_eq!(sandbox.oauth_exchanges(), 0, "nothing was handed out");
    assert_eq!(client.send(exchange(&good)).await.unwrap().status, 200);
    sandbox.add_fault(Fault::new(Action::Stall {}).on(Target::Oauth)).unwrap();
    let stalled = client.start(exchange(&good)).await.unwrap();
    assert!(Runtime::production().timeout(Duration::from_millis(50), stalled).await.is_none());
    sandbox.shutdown().await;
}
