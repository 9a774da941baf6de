use super::*;

const FCM_TOKEN: &str = "cXyz-123:APA91bHun4MxP5egoKMwt2KZFBaFUH";

fn to_device(over: &Value) -> Value {
    let mut message = json!({
        "token": FCM_TOKEN,
        "notification": { "title": "초코", "body": "댓글" },
        "data": { "nudged_id": "n-2", "post": "42" },
        "android": { "priority": "HIGH", "ttl": "3600s", "notification": { "tag": "t-1" } },
    });
    for (key, value) in over.as_object().unwrap() {
        if value.is_null() {
            message.as_object_mut().unwrap().shift_remove(key);
        } else {
            message[key] = value.clone();
        }
    }
    json!({ "message": message })
}

fn error_code(answer: &Answer) -> Option<String> {
    let details = answer.json()["error"]["details"].as_array()?.clone();
    let of_type = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
    Some(details.iter().find(|detail| detail["@type"] == of_type)?["errorCode"].as_str()?.to_owned())
}

#[tokio::test]
async fn valid_message_is_accepted_and_recorded() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    let answer = client.send(fcm_send(&token, &to_device(&json!({})))).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.json()["name"].as_str().unwrap().starts_with("projects/ifriendspet/messages/"));
    let received = sandbox.received();
    let push = &received[0];
    assert_eq!((push.platform, push.auth, push.status, push.accepted), (Platform::Fcm, AuthKind::Bearer, 200, true));
    assert_eq!(push.token, FCM_TOKEN);
    assert_eq!(push.nudged_id.as_deref(), Some("n-2"));
    assert_eq!(push.priority.as_deref(), Some("HIGH"));
    assert_eq!(push.expiration.as_deref(), Some("3600s"));
    assert_eq!(push.collapse_id.as_deref(), Some("t-1"));

    let mut dry = to_device(&json!({}));
    dry["validateOnly"] = json!(true);
    let answer = client.send(fcm_send(&token, &dry)).await.unwrap();
    assert_eq!(answer.json()["name"], "projects/ifriendspet/messages/fake_message_id");
    assert!(sandbox.received()[1].validate_only);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn messages_fcm_takes() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    let accepted = [
        json!({ "token": null, "fid": "cQx1" }),
        json!({ "token": null, "topic": "author~choco.1%" }),
        json!({ "token": null, "condition": "'a' in topics && ('b' in topics || !('c' in topics))" }),
        json!({ "android": { "collapseKey": "k", "ttl": "0s", "directBootOk": true } }),
        json!({ "android": { "ttl": "2419200s" } }),
        json!({ "android": { "ttl": "3.5s", "priority": "normal" } }),
        json!({ "android": { "notification": {
            "color": "#aabbcc", "notification_count": "3", "event_time": "2026-11-24T03:00:00Z",
            "vibrate_timings": ["0.1s"], "visibility": "PUBLIC", "notificationPriority": "PRIORITY_HIGH",
            "light_settings": { "color": { "red": 0.5 }, "light_on_duration": "1s", "light_off_duration": "1s" },
            "title_loc_key": "t", "title_loc_args": ["a"],
        } } }),
        json!({ "android": null, "androidV2": { "remoteNotification": { "notification": { "id": 7 } } } }),
        json!({ "apns": { "headers": { "apns-priority": "5" }, "payload": { "aps": { "content-available": 1 }, "x": [1] } } }),
        json!({ "webpush": { "headers": { "TTL": "1" }, "notification": { "any": { "thing": 1 } }, "fcm_options": { "link": "https://x" } } }),
        json!({ "fcm_options": { "analytics_label": "a-b_c" }, "name": null }),
    ];
    for over in accepted {
        let answer = client.send(fcm_send(&token, &to_device(&over))).await.unwrap();
        assert_eq!(answer.status, 200, "{over} {:?}", answer.body);
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn bad_fields_are_named() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    let refused = [
        (json!({ "fid": "cQx1" }), "message"),
        (json!({ "token": null }), "message"),
        (json!({ "token": null, "topic": "/topics/a" }), "message.topic"),
        (json!({ "token": null, "topic": "a".repeat(901) }), "message.topic"),
        (json!({ "token": null, "condition": "'a' in topics &&" }), "message.condition"),
        (
            json!({ "token": null, "condition": "'a' in topics||'a' in topics||'a' in topics||'a' in topics||'a' in topics||'a' in topics" }),
            "message.condition",
        ),
        (json!({ "token": 5 }), "message.token"),
        (json!({ "tokn": "x" }), "message"),
        (json!({ "data": { "n": 5 } }), "message.data[0].value"),
        (json!({ "data": { "n": { "a": "b" } } }), "message.data[0].value"),
        (json!({ "data": { "from": "x" } }), "message.data"),
        (json!({ "data": { "message_type": "x" } }), "message.data"),
        (json!({ "data": { "google.c.a": "x" } }), "message.data"),
        (json!({ "data": { "gcm.notification.x": "x" } }), "message.data"),
        (json!({ "android": { "data": { "gcm": "x" } } }), "message.android.data"),
        (json!({ "android": { "ttl": "3600" } }), "message.android.ttl"),
        (json!({ "android": { "ttl": 3600 } }), "message.android.ttl"),
        (json!({ "android": { "ttl": "-1s" } }), "message.android.ttl"),
        (json!({ "android": { "ttl": "2419201s" } }), "message.android.ttl"),
        (json!({ "android": { "ttl": "2419200.5s" } }), "message.android.ttl"),
        (json!({ "android": { "priority": "Urgent" } }), "message.android.priority"),
        (json!({ "android": { "collapse_key": 1 } }), "message.android.collapse_key"),
        (json!({ "android": { "notification": { "tag": 1 } } }), "message.android.notification.tag"),
        (json!({ "android": { "notification": { "color": "red" } } }), "message.android.notification.color"),
        (json!({ "android": { "notification": { "id": 1 } } }), "message.android.notification"),
        (
            json!({ "android": { "notification": { "body_loc_args": ["a"] } } }),
            "message.android.notification.body_loc_args",
        ),
        (json!({ "android": { "collapse_key": "a", "collapseKey": "b" } }), "message.android.collapse_key"),
        (json!({ "android_v2": { "ttl": "1s" } }), "message.android_v2"),
        (json!({ "webpush": { "fcm_options": { "link": "http://x" } } }), "message.webpush.fcm_options.link"),
        (json!({ "apns": { "headers": { "apns-priority": 10 } } }), "message.apns.headers[0].value"),
        (json!({ "apns": { "payload": { "aps": 1 } } }), "message.apns.payload.aps"),
        (
            json!({ "notification": null, "apns": { "headers": { "apns-priority": "10" }, "payload": { "aps": { "content-available": 1 } } } }),
            "message.apns.headers",
        ),
        (json!({ "fcm_options": { "analytics_label": "a b" } }), "message.fcm_options.analytics_label"),
    ];
    for (over, field) in refused {
        let answer = client.send(fcm_send(&token, &to_device(&over))).await.unwrap();
        assert_eq!(answer.status, 400, "{over}");
        let error = answer.json()["error"].clone();
        assert_eq!(error["status"], "INVALID_ARGUMENT");
        assert_eq!(error_code(&answer), None, "{over}");
        assert_eq!(error["details"][0]["@type"], "type.googleapis.com/google.rpc.BadRequest");
        assert_eq!(error["details"][0]["fieldViolations"][0]["field"], field, "{over}");
    }
    let mut request = fcm_send(&token, &json!({}));
    *request.body_mut() = "{".into();
    assert_eq!(client.send(request).await.unwrap().json()["error"]["status"], "INVALID_ARGUMENT");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn payload_limits_hold_at_the_boundary_and_one_past_it() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    for (target, limit) in [("token", 4096), ("topic", 2048)] {
        for (bytes, expected) in [(limit, 200), (limit + 1, 400)] {
            let body = json!({ "message": { target: "abc", "data": { "k": "v".repeat(bytes - 1) } } });
            assert_eq!(client.send(fcm_send(&token, &body)).await.unwrap().status, expected, "{target} {bytes}");
        }
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn only_its_own_unexpired_access_tokens_count() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    for authorization in ["", "Bearer nonsense", "bearer", &format!("Basic {token}")] {
        let mut request = fcm_send(&token, &to_device(&json!({})));
        request.headers_mut().insert("authorization", authorization.parse().unwrap());
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status, 401, "{authorization}");
        assert_eq!(answer.json()["error"]["status"], "UNAUTHENTICATED");
        assert_eq!(error_code(&answer), None);
    }
    assert_eq!(client.send(fcm_send(&token, &to_device(&json!({})))).await.unwrap().status, 200);
    sandbox.revoke_access_tokens();
    assert_eq!(client.send(fcm_send(&token, &to_device(&json!({})))).await.unwrap().status, 401);

    let short = start(Options { access_token_ttl: Duration::ZERO, ..Options::default() }).await;
    let token = access_token(&short).await;
    let mut client = Client::fcm(&short).await;
    assert_eq!(client.send(fcm_send(&token, &to_device(&json!({})))).await.unwrap().status, 401, "expired");
    short.shutdown().await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn wrong_project_and_wrong_address_are_not_found() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    let mut request = fcm_send(&token, &to_device(&json!({})));
    *request.uri_mut() = "https://localhost/v1/projects/another/messages:send".parse().unwrap();
    let answer = client.send(request).await.unwrap();
    assert_eq!((answer.status.as_u16(), error_code(&answer)), (404, None));
    assert_eq!(answer.json()["error"]["status"], "NOT_FOUND");
    let mut request = fcm_send(&token, &to_device(&json!({})));
    *request.uri_mut() = "https://localhost/batch".parse().unwrap();
    let answer = client.send(request).await.unwrap();
    assert_eq!(answer.status, 404);
    assert!(answer.body.starts_with(b"<!DOCTYPE html>"), "no Google service lives there");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn token_states_are_told_as_fcm_tells_them() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    for (state, status, code) in [
        (TokenState::Unregistered { since: None }, 404, Some("UNREGISTERED")),
        (TokenState::Bad {}, 400, Some("INVALID_ARGUMENT")),
        (TokenState::OtherApp {}, 403, Some("SENDER_ID_MISMATCH")),
        (TokenState::Valid {}, 200, None),
    ] {
        sandbox.set_token_state(FCM_TOKEN, state).unwrap();
        let answer = client.send(fcm_send(&token, &to_device(&json!({})))).await.unwrap();
        assert_eq!((answer.status.as_u16(), error_code(&answer).as_deref()), (status, code));
    }
    let answer = client.send(fcm_send(&token, &to_device(&json!({ "token": "with space" })))).await.unwrap();
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("registration token"));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn faults_have_googles_error_shape() {
    let sandbox = start(Options::default()).await;
    let token = access_token(&sandbox).await;
    let mut client = Client::fcm(&sandbox).await;
    let push = || fcm_send(&token, &to_device(&json!({})));
    sandbox.add_fault(Fault::status(503, "UNAVAILABLE").on(Target::Fcm)).unwrap();
    let answer = client.send(push()).await.unwrap();
    assert_eq!((answer.status.as_u16(), error_code(&answer).as_deref()), (503, Some("UNAVAILABLE")));
    assert_eq!(answer.json()["error"]["status"], "UNAVAILABLE");

    sandbox.add_fault(Fault::status(429, "")).unwrap();
    let answer = client.send(push()).await.unwrap();
    assert_eq!((answer.status.as_u16(), error_code(&answer)), (429, None));

    sandbox.add_fault(Fault::new(Action::RefuseStream {})).unwrap();
    assert_eq!(client.send(push()).await.unwrap_err().reason(), Some(h2::Reason::REFUSED_STREAM));
    sandbox.add_fault(Fault::new(Action::Goaway { refuse: true, close: false, reason: None }).on(Target::Fcm)).unwrap();
    assert!(client.send(push()).await.unwrap_err().is_go_away());
    sandbox.shutdown().await;
}
