use prost_types::value::Kind;
use prost_types::{Duration, Struct, Timestamp, Value};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::harness::*;
use crate::api::proto::*;

fn long(bytes: usize) -> String {
    "a".repeat(bytes)
}

#[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
fn from_now(server: &TestServer, secs: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds: server.runtime.now().secs() + secs, nanos: 0 })
}

#[tokio::test]
async fn every_wrong_field_of_a_registration_is_named_and_nothing_is_stored() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let request = RegisterDeviceRequest {
        app_id: "Pets".into(),
        user_id: long(257),
        platform: 99,
        token: String::new(),
        kind: 99,
        apns_environment: 99,
        installation_id: long(129),
        device_id: "dev_1".into(),
        locale: "ko_KR".into(),
        time_zone: "Asia/Soul".into(),
        app_version: long(129),
        os_version: "a\nb".into(),
        permission: 99,
        labels: [(long(129), String::new()), ("k".to_owned(), long(129))].into_iter().collect(),
        observed_at: from_now(&server, 600),
        ..RegisterDeviceRequest::default()
    };
    let mut named = fields(client.register_device(request).await);
    named.sort();
    assert_eq!(
        named,
        [
            "apns_environment",
            "app_id",
            "app_version",
            "device_id",
            "installation_id",
            "kind",
            "labels",
            "labels[\"k\"]",
            "locale",
            "observed_at",
            "os_version",
            "permission",
            "platform",
            "time_zone",
            "token",
            "user_id",
        ]
    );
    let nearly = RegisterDeviceRequest { locale: "ko_KR".into(), ..phone("choco", "t") };
    assert_eq!(fields(client.register_device(nearly).await), ["locale"]);
    let list = ListDevicesRequest { app_id: "pets".into(), user_id: "choco".into(), ..Default::default() };
    assert!(client.list_devices(list).await.expect("listed").into_inner().devices.is_empty());
}

#[tokio::test]
async fn registration_limits_hold_at_the_boundary_and_not_one_past_it() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let base = || phone("choco", "t");
    let fits = [
        RegisterDeviceRequest { user_id: long(256), ..base() },
        RegisterDeviceRequest { token: long(4096), ..base() },
        RegisterDeviceRequest { installation_id: long(128), ..base() },
        RegisterDeviceRequest { app_version: long(128), ..base() },
        RegisterDeviceRequest { os_version: long(128), ..base() },
        RegisterDeviceRequest { observed_at: from_now(&server, 290), ..base() },
        RegisterDeviceRequest { platform: device::Platform::Apns.into(), token: long(512), ..base() },
    ];
    for request in fits {
        client.register_device(request.clone()).await.unwrap_or_else(|status| panic!("{status:?}: {request:?}"));
    }
    let too_much = [
        (RegisterDeviceRequest { user_id: long(257), ..base() }, "user_id"),
        (RegisterDeviceRequest { user_id: String::new(), ..base() }, "user_id"),
        (RegisterDeviceRequest { token: long(4097), ..base() }, "token"),
        (RegisterDeviceRequest { platform: device::Platform::Apns.into(), token: long(514), ..base() }, "token"),
        (RegisterDeviceRequest { platform: device::Platform::Apns.into(), token: "xyz1".into(), ..base() }, "token"),
        (RegisterDeviceRequest { platform: 0, ..base() }, "platform"),
        (RegisterDeviceRequest { installation_id: long(129), ..base() }, "installation_id"),
        (RegisterDeviceRequest { credential: "other".into(), ..base() }, "credential"),
        (RegisterDeviceRequest { apns_topic: "com.example.pets".into(), ..base() }, "apns_topic"),
        (RegisterDeviceRequest { apns_environment: 1, ..base() }, "apns_environment"),
        (
            RegisterDeviceRequest { platform: 1, token: "ab".into(), apns_topic: "com.evil".into(), ..base() },
            "apns_topic",
        ),
        (
            RegisterDeviceRequest {
                platform: 1,
                token: "ab".into(),
                apns_topic: "com.example.pets.beta".into(),
                apns_environment: 2,
                ..base()
            },
            "apns_environment",
        ),
        (RegisterDeviceRequest { observed_at: from_now(&server, 310), ..base() }, "observed_at"),
        (RegisterDeviceRequest { observed_at: Some(Timestamp { seconds: -1, nanos: 0 }), ..base() }, "observed_at"),
    ];
    for (request, field) in too_much {
        assert_eq!(fields(client.register_device(request).await), [field]);
    }
    let labels = |count: usize| (0..count).map(|at| (format!("k{at}"), String::new())).collect();
    client.register_device(RegisterDeviceRequest { labels: labels(32), ..base() }).await.expect("32 labels");
    let refused = client.register_device(RegisterDeviceRequest { labels: labels(33), ..base() }).await;
    assert_eq!(fields(refused), ["labels"]);
}

#[tokio::test]
async fn choices_are_checked() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let base = || choice("choco", true);
    let fits = [
        SetOptInRequest { source: long(256), policy_version: long(256), evidence: long(4096), ..base() },
        SetOptInRequest { event_type: Some(long(100)), ..base() },
    ];
    for request in fits {
        client.set_opt_in(request).await.expect("fits");
    }
    let wrong = [
        (SetOptInRequest { event_type: Some(String::new()), ..base() }, "event_type"),
        (SetOptInRequest { event_type: Some(long(101)), ..base() }, "event_type"),
        (SetOptInRequest { opted_in: None, ..base() }, "opted_in"),
        (SetOptInRequest { source: long(257), ..base() }, "source"),
        (SetOptInRequest { policy_version: long(257), ..base() }, "policy_version"),
        (SetOptInRequest { evidence: long(4097), ..base() }, "evidence"),
        (SetOptInRequest { evidence: "a\0".into(), ..base() }, "evidence"),
        (SetOptInRequest { device_id: "x".into(), ..base() }, "device_id"),
        (SetOptInRequest { observed_at: from_now(&server, 310), ..base() }, "observed_at"),
    ];
    for (request, field) in wrong {
        assert_eq!(fields(client.set_opt_in(request).await), [field]);
    }
    let nobody = SetOptInRequest { app_id: "pets".into(), ..Default::default() };
    assert_eq!(fields(client.set_opt_in(nobody).await), ["user_id", "opted_in"]);
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    assert_eq!(client.list_opt_ins(list).await.expect("listed").into_inner().opt_ins.len(), 2, "the two that fit");
}

#[tokio::test]
async fn unregistering_needs_exactly_one_way_to_name_a_device() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let base = UnregisterDeviceRequest { app_id: "pets".into(), ..Default::default() };
    let wrong = [
        (base.clone(), "device_id"),
        (UnregisterDeviceRequest { device_id: "x".into(), ..base.clone() }, "device_id"),
        (UnregisterDeviceRequest { token: "t".into(), ..base.clone() }, "platform"),
        (UnregisterDeviceRequest { platform: 2, ..base.clone() }, "token"),
        (UnregisterDeviceRequest { platform: 7, token: "t".into(), ..base.clone() }, "platform"),
        (
            UnregisterDeviceRequest { device_id: "dev_000000000001".into(), platform: 2, token: "t".into(), ..base },
            "device_id",
        ),
    ];
    for (request, field) in wrong {
        assert_eq!(fields(client.unregister_device(request).await), [field]);
    }
}

#[tokio::test]
async fn events_are_checked_on_the_wire_too() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let base = || comment(&["choco"]);
    let number = |float| Value { kind: Some(Kind::NumberValue(float)) };
    let data = |key: &str, value| Some(Struct { fields: [(key.to_owned(), value)].into_iter().collect() });
    let title = |text: String| Some(Content { title: Some(text), ..Content::default() });
    let wrong = [
        (NotifyEventRequest { data: data("a", number(f64::NAN)), ..base() }, vec!["data"]),
        (NotifyEventRequest { data: data("nudged_id", number(1.0)), ..base() }, vec!["data.nudged_id"]),
        (NotifyEventRequest { content: None, ..base() }, vec!["content"]),
        (NotifyEventRequest { content: title(String::new()), ..base() }, vec!["content.title"]),
        (NotifyEventRequest { content: title(long(4097)), ..base() }, vec!["content.title"]),
        (NotifyEventRequest { priority: 9, ..base() }, vec!["priority"]),
        (NotifyEventRequest { ttl: Some(Duration { seconds: 0, nanos: 0 }), ..base() }, vec!["ttl"]),
        (NotifyEventRequest { ttl: Some(Duration { seconds: 28 * 86_400, nanos: 1 }), ..base() }, vec!["ttl"]),
        (NotifyEventRequest { ttl: Some(Duration { seconds: i64::MAX, nanos: 0 }), ..base() }, vec!["ttl"]),
        (
            NotifyEventRequest {
                ttl: Some(Duration { seconds: 60, nanos: 0 }),
                event_at: from_now(&server, -61),
                ..base()
            },
            vec!["ttl"],
        ),
        (NotifyEventRequest { event_at: from_now(&server, -86_401), ..base() }, vec!["event_at"]),
        (NotifyEventRequest { user_ids: Vec::new(), ..base() }, vec!["user_ids"]),
        (
            NotifyEventRequest { app_id: "P".into(), event_type: "X".into(), max_audience: Some(0), ..base() },
            vec!["app_id", "event_type", "max_audience"],
        ),
        (NotifyEventRequest { app_id: String::new(), ..base() }, vec!["app_id"]),
    ];
    for (request, named) in wrong {
        assert_eq!(fields(client.notify_event(request).await), named);
    }
    let list = ListNotificationsRequest { app_id: "pets".into(), ..Default::default() };
    assert!(client.list_notifications(list).await.expect("listed").into_inner().notifications.is_empty());
}

#[tokio::test]
async fn a_thousand_violations_still_fit_the_trailers() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let event = NotifyEventRequest { user_ids: vec![String::new(); 1_000], ..comment(&[]) };
    let status = client.notify_event(event).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let violations = status.get_details_bad_request().expect("details").field_violations;
    assert!(violations.len() > 20 && violations.len() < 1_000);
    assert!(violations.last().expect("one").description.ends_with("more"));
    assert!(status.details().len() < 6_000, "{}", status.details().len());
}

#[tokio::test]
async fn look_ups_are_checked() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let pets = || "pets".to_owned();
    let get = |id: &str| GetNotificationRequest { app_id: pets(), notification_id: id.into() };
    assert_eq!(fields(client.get_notification(get("")).await), ["notification_id"]);
    assert_eq!(fields(client.get_notification(get("x")).await), ["notification_id"]);
    let list =
        ListNotificationsRequest { app_id: pets(), event_type: "X".into(), page_size: -1, page_token: "zz".into() };
    assert_eq!(fields(client.list_notifications(list).await), ["event_type", "page_size", "page_token"]);
    let list = ListDeliveriesRequest {
        app_id: pets(),
        notification_id: "x".into(),
        states: vec![1, 0, 77],
        page_size: i32::MIN,
        ..Default::default()
    };
    assert_eq!(fields(client.list_deliveries(list).await), ["states[1]", "states[2]", "notification_id", "page_size"]);
    let explain = ExplainDeliveryRequest { app_id: pets(), ..Default::default() };
    assert_eq!(fields(client.explain_delivery(explain).await), ["notification_id", "user_id"]);
    let both = ExplainDeliveryRequest {
        app_id: pets(),
        notification_id: "x".into(),
        user_id: "u".into(),
        nudged_id: "y".into(),
    };
    assert_eq!(fields(client.explain_delivery(both).await), ["nudged_id", "notification_id", "user_id"]);
    let subscribe = SubscribeRequest { app_id: pets(), topic: long(257), ..Default::default() };
    assert_eq!(fields(client.subscribe(subscribe).await), ["user_id", "topic"]);
    let unsubscribe = UnsubscribeRequest { app_id: pets(), user_id: "u".into(), ..Default::default() };
    assert_eq!(fields(client.unsubscribe(unsubscribe).await), ["topic"]);
}

#[tokio::test]
async fn bytes_that_are_no_message_and_messages_too_large_are_the_callers_mistake() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 0..200 {
        value =
            Value { kind: Some(Kind::StructValue(Struct { fields: [("a".to_owned(), value)].into_iter().collect() })) };
    }
    let data = Some(Struct { fields: [("a".to_owned(), value)].into_iter().collect() });
    let status = client.notify_event(NotifyEventRequest { data, ..comment(&["choco"]) }).await.expect_err("too deep");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "UNREADABLE_MESSAGE"));
    let large = NotifyEventRequest { subject: long(256 * 1024), ..comment(&["choco"]) };
    assert_eq!(code(client.notify_event(large).await), Code::OutOfRange);
    let fits = NotifyEventRequest { subject: long(255 * 1024), ..comment(&["choco"]) };
    assert_eq!(fields(client.notify_event(fits).await), ["subject"], "read, then refused");
}
