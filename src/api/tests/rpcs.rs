use prost_types::Timestamp;
use tonic::Code;

use super::harness::*;
use crate::api::proto::delivery::State;
use crate::api::proto::*;

#[tokio::test]
async fn the_story_from_registration_to_cancellation() {
    let server = TestServer::start().await;
    let mut client = server.client().await;

    let request = RegisterDeviceRequest {
        app_id: "pets".into(),
        user_id: "choco".into(),
        platform: device::Platform::Apns.into(),
        token: "ABCD".into(),
        apns_environment: device::ApnsEnvironment::Sandbox.into(),
        locale: "ko-KR".into(),
        time_zone: "Asia/Seoul".into(),
        permission: device::Permission::Denied.into(),
        labels: [("tier".to_owned(), "gold".to_owned())].into_iter().collect(),
        ..RegisterDeviceRequest::default()
    };
    let answer = client.register_device(request.clone()).await.expect("registered").into_inner();
    assert_eq!(answer.created, Some(true));
    let device = answer.device.expect("a device");
    assert_eq!(device.apns_topic, "com.example.pets");
    assert_eq!(device.apns_environment(), device::ApnsEnvironment::Sandbox);
    assert_eq!(device.permission(), device::Permission::Denied);
    assert_eq!(device.labels["tier"], "gold");
    assert_eq!(device.active, Some(true));
    let again = client.register_device(request).await.expect("registered").into_inner();
    assert_eq!((again.created, again.device.expect("a device").device_id), (Some(false), device.device_id.clone()));

    let devices = ListDevicesRequest { app_id: "pets".into(), user_id: "choco".into(), ..Default::default() };
    let listed = client.list_devices(devices).await.expect("listed").into_inner();
    assert_eq!(listed.devices.len(), 1);
    assert_eq!(listed.next_page_token, "");

    let yes = SetOptInRequest { source: "sign-up".into(), policy_version: "1".into(), ..choice("choco", true) };
    let answer = client.set_opt_in(yes).await.expect("set").into_inner();
    assert_eq!(answer.applied, Some(true));
    assert_eq!(answer.opt_in.expect("a choice").source, "sign-up");
    let old = SetOptInRequest { observed_at: Some(Timestamp { seconds: 1_000, nanos: 0 }), ..choice("choco", false) };
    let answer = client.set_opt_in(old).await.expect("recorded").into_inner();
    assert_eq!(answer.applied, Some(false), "an older choice loses");
    assert_eq!(answer.opt_in.expect("a choice").opted_in, Some(true));
    let opt_ins = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    assert_eq!(client.list_opt_ins(opt_ins).await.expect("listed").into_inner().opt_ins.len(), 1);

    let topic = "author:mocha".to_owned();
    let subscribe =
        SubscribeRequest { app_id: "pets".into(), user_id: "choco".into(), topic: topic.clone(), observed_at: None };
    assert_eq!(client.subscribe(subscribe).await.expect("subscribed").into_inner().applied, Some(true));
    let list = ListSubscriptionsRequest { app_id: "pets".into(), user_id: "choco".into(), ..Default::default() };
    let topics = client.list_subscriptions(list.clone()).await.expect("listed").into_inner().subscriptions;
    assert_eq!(topics[0].topic, topic);

    let event = NotifyEventRequest {
        topics: vec![topic.clone()],
        idempotency_key: "k1".into(),
        labels: [("campaign".to_owned(), "x".to_owned())].into_iter().collect(),
        ..comment(&["choco"])
    };
    let accepted = client.notify_event(event.clone()).await.expect("accepted").into_inner();
    assert_eq!(accepted.duplicate, Some(false));
    let repeated = client.notify_event(event.clone()).await.expect("accepted").into_inner();
    assert_eq!((repeated.duplicate, &repeated.notification_id), (Some(true), &accepted.notification_id));
    let other = NotifyEventRequest { subject: "post:42".into(), ..event };
    let refused = client.notify_event(other).await.expect_err("another request");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::AlreadyExists, "IDEMPOTENCY_KEY_REUSED"));

    let id = accepted.notification_id;
    let get = GetNotificationRequest { app_id: "pets".into(), notification_id: id.clone() };
    let notification = client.get_notification(get.clone()).await.expect("found").into_inner().notification;
    let notification = notification.expect("a notification");
    assert_eq!(notification.people, Some(1));
    assert_eq!(notification.counts.expect("counts").open, Some(1));
    assert_eq!(notification.content.as_ref().expect("content").title.as_deref(), Some("새 댓글"));
    assert!(notification.data.as_ref().expect("data").fields.contains_key("post"));
    assert_eq!(notification.lane(), lane::Value::Interactive);
    assert_eq!(notification.priority(), priority::Value::High);
    assert_eq!(notification.labels["campaign"], "x");

    let list = ListNotificationsRequest { app_id: "pets".into(), ..Default::default() };
    let listed = client.list_notifications(list).await.expect("listed").into_inner().notifications;
    assert_eq!(listed.iter().map(|n| n.notification_id.as_str()).collect::<Vec<_>>(), [id.as_str()]);

    let deliveries = ListDeliveriesRequest { app_id: "pets".into(), notification_id: id.clone(), ..Default::default() };
    let listed = client.list_deliveries(deliveries).await.expect("listed").into_inner().deliveries;
    assert_eq!((listed.len(), listed[0].state(), listed[0].reason.as_str()), (1, State::Open, "QUEUED"));
    assert_eq!(listed[0].device_id, device.device_id);

    let explain =
        ExplainDeliveryRequest { app_id: "pets".into(), nudged_id: listed[0].nudged_id.clone(), ..Default::default() };
    let explained = client.explain_delivery(explain).await.expect("explained").into_inner();
    assert_eq!((explained.user_id.as_str(), &explained.notification_id), ("choco", &id));
    assert!(explained.summary.starts_with("Waiting: queued for choco's device"), "{}", explained.summary);

    let cancel = CancelNotificationRequest { app_id: "pets".into(), notification_id: id };
    assert_eq!(client.cancel_notification(cancel.clone()).await.expect("done").into_inner().cancelled, Some(true));
    assert_eq!(client.cancel_notification(cancel).await.expect("done").into_inner().cancelled, Some(false));
    let notification = client.get_notification(get).await.expect("found").into_inner().notification;
    assert!(notification.expect("a notification").cancelled_at.is_some());

    let unsubscribe = UnsubscribeRequest { app_id: "pets".into(), user_id: "choco".into(), topic, observed_at: None };
    assert_eq!(client.unsubscribe(unsubscribe).await.expect("done").into_inner().applied, Some(true));
    let unregister = UnregisterDeviceRequest {
        app_id: "pets".into(),
        platform: device::Platform::Apns.into(),
        token: "abcd".into(),
        ..Default::default()
    };
    assert_eq!(client.unregister_device(unregister.clone()).await.expect("done").into_inner().existed, Some(true));
    assert_eq!(client.unregister_device(unregister).await.expect("done").into_inner().existed, Some(false));
    server.stop().await.expect("stopped");
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let device = enrol(&mut client, "choco").await;

    let rotate = RegisterDeviceRequest { device_id: device.clone(), ..phone("mocha", "new") };
    let refused = client.register_device(rotate).await.expect_err("another user's");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "DEVICE_NOT_FOUND"));
    let unregister = UnregisterDeviceRequest {
        app_id: "pets".into(),
        user_id: "mocha".into(),
        device_id: device.clone(),
        ..Default::default()
    };
    assert_eq!(code(client.unregister_device(unregister).await), Code::NotFound);
    let on_device = SetOptInRequest { device_id: device, ..choice("mocha", false) };
    assert_eq!(code(client.set_opt_in(on_device).await), Code::NotFound);
    let get = GetNotificationRequest {
        app_id: "pets".into(),
        notification_id: "019b0000-0000-7000-8000-000000000000".into(),
    };
    let refused = client.get_notification(get).await.expect_err("not ours");
    assert_eq!(reason(&refused), "NOTIFICATION_NOT_FOUND");
    let explain = ExplainDeliveryRequest {
        app_id: "pets".into(),
        nudged_id: "019b0000-0000-8000-8000-000000000000".into(),
        ..Default::default()
    };
    let refused = client.explain_delivery(explain).await.expect_err("not ours");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "DELIVERY_NOT_FOUND"));
    let unknown = NotifyEventRequest { app_id: "zoo".into(), ..comment(&["choco"]) };
    let refused = client.notify_event(unknown).await.expect_err("no such app");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "APP_NOT_FOUND"));
}

#[tokio::test]
async fn a_platform_without_credential_and_too_large_an_audience_are_preconditions() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let request = RegisterDeviceRequest {
        app_id: "shop".into(),
        platform: device::Platform::Apns.into(),
        ..phone("choco", "abcd")
    };
    let refused = client.register_device(request).await.expect_err("shop has no APNs");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "PLATFORM_NOT_CONFIGURED"));

    enrol(&mut client, "choco").await;
    enrol(&mut client, "mocha").await;
    let event = NotifyEventRequest { max_audience: Some(1), ..comment(&["choco", "mocha", "choco"]) };
    let refused = client.notify_event(event.clone()).await.expect_err("two people");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "AUDIENCE_TOO_LARGE"));
    let two = NotifyEventRequest { max_audience: Some(2), ..event };
    client.notify_event(two).await.expect("a repeated id is one person");
}

#[tokio::test]
async fn the_app_may_be_left_out_with_a_default() {
    let server = TestServer::with(Setup { default_app: Some("pets"), ..Setup::default() }).await;
    let mut client = server.client().await;
    let request = RegisterDeviceRequest { app_id: String::new(), ..phone("choco", "t") };
    client.register_device(request).await.expect("registered");
    let list = ListDevicesRequest { app_id: "pets".into(), user_id: "choco".into(), ..Default::default() };
    assert_eq!(client.list_devices(list).await.expect("listed").into_inner().devices.len(), 1);
}
