use super::*;

/// Sends one broken push on a connection of its own and gives status and reason.
async fn refused(sandbox: &Sandbox, jwt: &str, break_it: impl FnOnce(&mut Request<Bytes>)) -> (u16, String) {
    let mut client = Client::apns(sandbox).await;
    let mut request = alert(jwt);
    break_it(&mut request);
    client.send(request).await.unwrap().apns()
}

fn set(request: &mut Request<Bytes>, name: &'static str, value: &str) {
    request.headers_mut().insert(name, value.parse().unwrap());
}

#[tokio::test]
async fn valid_alert_is_accepted_and_recorded() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let mut client = Client::apns(&sandbox).await;
    let answer = client.send(alert(&jwt)).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.is_empty());
    assert_eq!(answer.headers["apns-id"], "123e4567-e89b-42d3-a456-426614174000");
    assert!(answer.headers.contains_key("apns-unique-id"), "the development host names the delivery log's entry");

    assert!(sandbox.wait_for(1, PATIENCE).await);
    let received = sandbox.received();
    let push = &received[0];
    assert_eq!((push.seq, push.connection, push.stream_ordinal, push.status), (1, 1, 1, 200));
    assert!(push.accepted);
    assert_eq!(push.platform, Platform::Apns);
    assert_eq!(push.token, TOKEN);
    assert_eq!(push.nudged_id.as_deref(), Some("n-1"));
    assert_eq!(push.apns_id.as_deref(), Some("123e4567-e89b-42d3-a456-426614174000"));
    assert_eq!(push.apns_topic.as_deref(), Some(TOPIC));
    assert_eq!(push.push_type.as_deref(), Some("alert"));
    assert_eq!(push.priority.as_deref(), Some("10"));
    assert_eq!(push.expiration.as_deref(), Some("0"));
    assert_eq!(push.auth, AuthKind::Jwt);
    assert_eq!(push.json()["aps"]["alert"]["title"], "초코");
    assert!(!format!("{push:?}").contains(TOKEN), "Debug shows no token");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn broken_pushes_get_apples_answers() {
    let sandbox = start(Options { extra_topics: vec!["com.example.other".to_owned()], ..Options::default() }).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let check = async |expected: (u16, &str), break_it: &dyn Fn(&mut Request<Bytes>)| {
        let got = refused(&sandbox, &jwt, break_it).await;
        assert_eq!((got.0, got.1.as_str()), expected);
    };
    let header =
        |name: &'static str, value: &'static str| move |request: &mut Request<Bytes>| set(request, name, value);
    let path = |path: &'static str| move |request: &mut Request<Bytes>| *request.uri_mut() = path.parse().unwrap();
    let body = |body: &'static str| move |request: &mut Request<Bytes>| *request.body_mut() = body.into();

    check((400, "BadMessageId"), &header("apns-id", "123E4567-E89B-42D3-A456-426614174000")).await;
    check((400, "BadMessageId"), &header("apns-id", "123e4567e89b42d3a456426614174000")).await;
    check((405, "MethodNotAllowed"), &|request| *request.method_mut() = http::Method::PUT).await;
    check((400, "MissingTopic"), &|request| drop(request.headers_mut().remove("apns-topic"))).await;
    check((400, "BadPriority"), &header("apns-priority", "7")).await;
    check((400, "BadExpirationDate"), &header("apns-expiration", "tomorrow")).await;
    check((400, "BadExpirationDate"), &header("apns-expiration", "-1")).await;
    check((400, "InvalidPushType"), &header("apns-push-type", "Alert")).await;
    check((404, "BadPath"), &path("https://localhost/3/devices/00")).await;
    check((400, "MissingDeviceToken"), &path("https://localhost/3/device/")).await;
    check((400, "BadDeviceToken"), &path("https://localhost/3/device/abc")).await;
    check((400, "BadDeviceToken"), &path("https://localhost/3/device/zz")).await;
    check((400, "TopicDisallowed"), &header("apns-topic", "com.example.unknown")).await;
    check((400, "BadTopic"), &header("apns-topic", "com.ifriendspet.app.voip")).await;
    check((200, ""), &header("apns-topic", "com.example.other")).await;
    check((400, "PayloadEmpty"), &body("")).await;
    check((400, "PayloadEmpty"), &body("{")).await;
    check((400, "PayloadEmpty"), &body("[]")).await;
    check((400, "PayloadEmpty"), &body(r#"{"alert":"x"}"#)).await;
    check((400, "InvalidPushType"), &body(r#"{"aps":{"mutable-content":1}}"#)).await;
    check((400, "DuplicateHeaders"), &|request| {
        request.headers_mut().append("apns-priority", "10".parse().unwrap());
    })
    .await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn limits_hold_at_the_boundary_and_one_past_it() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let sized = |bytes: usize| {
        let frame = r#"{"aps":{"alert":""}}"#;
        format!(r#"{{"aps":{{"alert":"{}"}}}}"#, "a".repeat(bytes - frame.len()))
    };
    for (bytes, voip, expected) in [(4096, false, 200), (4097, false, 413), (5120, true, 200), (5121, true, 413)] {
        let got = refused(&sandbox, &jwt, |request| {
            *request.body_mut() = sized(bytes).into();
            if voip {
                set(request, "apns-push-type", "voip");
                set(request, "apns-topic", "com.ifriendspet.app.voip");
            }
        })
        .await;
        assert_eq!(got.0, expected, "{bytes} bytes");
    }
    let huge = refused(&sandbox, &jwt, |request| *request.body_mut() = sized(1_000_000).into()).await;
    assert_eq!(huge, (413, "PayloadTooLarge".to_owned()), "answered although it was not read to its end");
    // 64 bytes are 21 Korean characters and one more byte; 22 are two bytes too many.
    for (id, expected) in [("가".repeat(21) + "a", 200), ("가".repeat(22), 400), ("a".repeat(65), 400)] {
        let got = refused(&sandbox, &jwt, |request| {
            let value = http::HeaderValue::from_bytes(id.as_bytes()).unwrap();
            request.headers_mut().insert("apns-collapse-id", value);
        })
        .await;
        assert_eq!(got.0, expected, "{} bytes", id.len());
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn background_pushes_are_silent_and_never_urgent() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let silent = r#"{"aps":{"content-available":1},"k":1}"#;
    for (priority, body, expected) in [
        (Some("5"), silent, (200, "")),
        (Some("1"), silent, (200, "")),
        (Some("10"), silent, (400, "BadPriority")),
        (None, silent, (400, "BadPriority")),
        (Some("5"), r#"{"aps":{"content-available":1,"sound":"default"}}"#, (400, "InvalidPushType")),
        (Some("5"), r#"{"aps":{}}"#, (400, "InvalidPushType")),
    ] {
        let got = refused(&sandbox, &jwt, |request| {
            set(request, "apns-push-type", "background");
            request.headers_mut().remove("apns-priority");
            if let Some(priority) = priority {
                set(request, "apns-priority", priority);
            }
            *request.body_mut() = body.into();
        })
        .await;
        assert_eq!((got.0, got.1.as_str()), expected);
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn provider_tokens_are_checked_to_the_letter() {
    let sandbox = start(Options::default()).await;
    let good = sandbox.credentials().clone();
    let sign = es256(&good.apns_key_pem);
    let iat = now_secs();
    let head = json!({ "alg": "ES256", "kid": good.key_id });
    let claims = json!({ "iss": good.team_id, "iat": iat });
    let other_key = start(Options::default()).await.credentials().apns_key_pem.clone();

    let with = |value: &Value, key: &str, to: Value| {
        let mut value = value.clone();
        value[key] = to;
        value
    };
    let invalid = [
        jws(&with(&head, "kid", json!("OTHERKEY01")), &claims, &sign),
        jws(&with(&head, "alg", json!("RS256")), &claims, &sign),
        jws(&with(&head, "typ", json!("JWT")), &claims, &sign),
        jws(&head, &with(&claims, "iss", json!("OTHERTEAM1")), &sign),
        jws(&head, &with(&claims, "exp", json!(iat + 60)), &sign),
        jws(&head, &with(&claims, "iat", json!(iat.to_string())), &sign),
        jws(&head, &with(&claims, "iat", json!(iat + 3600)), &sign),
        jws(&head, &claims, es256(&other_key)),
        jws(&head, &claims, |bytes| [sign(bytes), vec![0]].concat()),
        "not.a.token".to_owned(),
    ];
    for token in invalid {
        assert_eq!(refused(&sandbox, &token, |_| ()).await, (403, "InvalidProviderToken".to_owned()), "{token}");
    }
    let stale = provider_token(sandbox.credentials(), 3601);
    assert_eq!(refused(&sandbox, &stale, |_| ()).await, (403, "ExpiredProviderToken".to_owned()));
    let fresh_enough = provider_token(sandbox.credentials(), 3500);
    assert_eq!(refused(&sandbox, &fresh_enough, |_| ()).await.0, 200);
    for authorization in [None, Some("Basic abc"), Some("bearer")] {
        let got = refused(&sandbox, "", |request| {
            request.headers_mut().remove("authorization");
            if let Some(value) = authorization {
                set(request, "authorization", value);
            }
        })
        .await;
        assert_eq!(got, (403, "MissingProviderToken".to_owned()), "{authorization:?}");
    }

    let lenient = start(Options { lenient_jwt: true, ..Options::default() }).await;
    let token = jws(&with(&head, "typ", json!("JWT")), &claims, es256(&lenient.credentials().apns_key_pem));
    assert_eq!(refused(&lenient, &token, |_| ()).await.0, 200, "libraries that write typ may be let in");
    lenient.shutdown().await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn second_provider_token_within_20_minutes_is_too_many() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::apns(&sandbox).await;
    let (first, second) = (provider_token(sandbox.credentials(), 10), provider_token(sandbox.credentials(), 5));
    assert_eq!(client.send(alert(&first)).await.unwrap().status, 200);
    let answer = client.send(alert(&second)).await.unwrap();
    assert_eq!(answer.apns(), (429, "TooManyProviderTokenUpdates".to_owned()));
    assert_eq!(client.send(alert(&first)).await.unwrap().status, 200, "the first one stays good");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn expired_token_wedges_its_connection() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::apns(&sandbox).await;
    let expired = (403, "ExpiredProviderToken".to_owned());
    let stale = provider_token(sandbox.credentials(), 3700);
    assert_eq!(client.send(alert(&stale)).await.unwrap().apns(), expired);
    assert_eq!(client.send(alert(&stale)).await.unwrap().apns(), expired);
    let mut fresh = Client::apns(&sandbox).await;
    assert_eq!(fresh.send(alert(&provider_token(sandbox.credentials(), 0))).await.unwrap().status, 200);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn certificate_needs_no_token_and_brings_its_topics() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::open(&sandbox, sandbox.apns_endpoint(), true).await;
    let without_token = || {
        let mut request = alert("");
        request.headers_mut().remove("authorization");
        request
    };
    assert_eq!(client.send(without_token()).await.unwrap().status, 200);
    assert_eq!(sandbox.received()[0].auth, AuthKind::Certificate);

    let mut request = without_token();
    set(&mut request, "apns-topic", "com.example.unknown");
    assert_eq!(client.send(request).await.unwrap().apns(), (400, "TopicDisallowed".to_owned()));
    let mut request = without_token();
    request.headers_mut().remove("apns-topic");
    assert_eq!(client.send(request).await.unwrap().apns(), (400, "MissingTopic".to_owned()), "it lists several");
    let mut request = without_token();
    set(&mut request, "apns-push-type", "location");
    set(&mut request, "apns-topic", "com.ifriendspet.app.location-query");
    assert_eq!(client.send(request).await.unwrap().apns(), (400, "TopicDisallowed".to_owned()), "token only");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn token_states_are_told_as_apns_tells_them() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let mut client = Client::apns(&sandbox).await;
    let since = Some(crate::domain::time::UnixMs(1_700_000_000_123));
    for (state, status, reason, timestamp) in [
        (TokenState::Unregistered { since }, 410, "Unregistered", json!(1_700_000_000_123_i64)),
        (TokenState::Expired { since }, 410, "ExpiredToken", json!(1_700_000_000_123_i64)),
        (TokenState::Bad {}, 400, "BadDeviceToken", Value::Null),
        (TokenState::OtherApp {}, 400, "DeviceTokenNotForTopic", Value::Null),
        (TokenState::Valid {}, 200, "", Value::Null),
    ] {
        sandbox.set_token_state(&TOKEN.to_uppercase(), state).unwrap();
        let answer = client.send(alert(&jwt)).await.unwrap();
        assert_eq!(answer.apns(), (status, reason.to_owned()));
        assert_eq!(answer.json()["timestamp"], timestamp);
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn first_stream_is_alone_until_a_token_is_proven() {
    let sandbox = start(Options { max_concurrent_streams: 50, ..Options::default() }).await;
    let mut client = Client::apns(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Delay { ms: 50 })).unwrap();
    let bad = client.send(alert("a.b.c")).await.unwrap();
    assert_eq!(bad.status, 403);
    assert_eq!(client.send.current_max_send_streams(), 1, "a refused token proves nothing");

    let jwt = provider_token(sandbox.credentials(), 0);
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    // The new limit may arrive a moment after the answer; a further round trip brings it surely.
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    assert_eq!(client.send.current_max_send_streams(), 50);

    let free = start(Options { first_stream_alone: false, max_concurrent_streams: 50, ..Options::default() }).await;
    let mut client = Client::apns(&free).await;
    client.send(alert("a.b.c")).await.unwrap();
    assert_eq!(client.send.current_max_send_streams(), 50);
    free.shutdown().await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn impatient_client_is_refused_its_second_stream() {
    let sandbox = start(Options::default()).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let stream = tls(&sandbox, sandbox.apns_endpoint(), "h2", false).await;
    // Assumes a hundred streams before it has seen the server's settings.
    let (send, connection) = h2::client::Builder::new().initial_max_send_streams(100).handshake(stream).await.unwrap();
    let mut client = Client { send, connection: Runtime::production().spawn(connection) };
    sandbox.add_fault(Fault::new(Action::Delay { ms: 200 })).unwrap();
    let first = client.start(alert(&jwt)).await.unwrap();
    let second = client.start(alert(&jwt)).await.unwrap();
    assert_eq!(finish(second).await.unwrap_err().reason(), Some(h2::Reason::REFUSED_STREAM));
    assert_eq!(sandbox.connections().apns.refused_streams, 1);
    assert_eq!(finish(first).await.unwrap().status, 200);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn without_validation_everything_is_taken_and_bodies_can_be_left_out() {
    let options = Options { validate: false, record_bodies: false, ..Options::default() };
    let sandbox = start(options).await;
    let mut client = Client::apns(&sandbox).await;
    let mut request = alert("nonsense");
    *request.body_mut() = "nonsense".into();
    assert_eq!(client.send(request).await.unwrap().status, 200);
    let received = sandbox.received();
    assert!(received[0].body.is_empty());
    assert_eq!(received[0].token, TOKEN);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn record_keeps_the_newest_and_counts_what_it_dropped() {
    let sandbox = start(Options { record_limit: 3, ..Options::default() }).await;
    let jwt = provider_token(sandbox.credentials(), 0);
    let mut client = Client::apns(&sandbox).await;
    for _ in 0..5 {
        client.send(alert(&jwt)).await.unwrap();
    }
    let seqs: Vec<u64> = sandbox.received().iter().map(|push| push.seq).collect();
    assert_eq!(seqs, [3, 4, 5]);
    assert_eq!(sandbox.totals(), Totals { received: 5, accepted: 5, dropped: 2 });
    sandbox.clear();
    assert_eq!((sandbox.received_count(), sandbox.received().len()), (0, 0));
    client.send(alert(&jwt)).await.unwrap();
    assert_eq!(sandbox.received()[0].seq, 6, "sequence numbers are never used again");
    assert!(!sandbox.wait_for(2, Duration::from_millis(10)).await);
    let unlimited = Options { record_limit: 0, ..Options::default() };
    assert!(Sandbox::start(&Runtime::production(), unlimited).await.is_err());
    sandbox.shutdown().await;
}

#[tokio::test]
async fn connections_are_counted_and_shutdown_ends_them() {
    let sandbox = start(Options::default()).await;
    let mut client = Client::apns(&sandbox).await;
    client.send(alert(&provider_token(sandbox.credentials(), 0))).await.unwrap();
    let counts = sandbox.connections();
    assert_eq!((counts.apns.opened, counts.apns.open, counts.fcm.opened), (1, 1, 0));
    sandbox.shutdown().await;
    let _ = client.ended().await;
}
