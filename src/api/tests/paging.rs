use super::harness::*;
use crate::api::proto::*;

#[tokio::test]
async fn every_list_pages_to_its_end_without_gap_or_repeat() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    for at in 0..7 {
        client.register_device(phone("choco", &format!("t{at}"))).await.expect("registered");
        let subscribe = SubscribeRequest {
            app_id: "pets".into(),
            user_id: "choco".into(),
            topic: format!("post:{at}"),
            observed_at: None,
        };
        client.subscribe(subscribe).await.expect("subscribed");
        client.notify_event(comment(&["choco"])).await.expect("accepted");
    }
    client.set_opt_in(choice("choco", true)).await.expect("opted in");
    let id = client.notify_event(comment(&["choco"])).await.expect("accepted").into_inner().notification_id;

    let (mut devices, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListDevicesRequest {
            app_id: "pets".into(),
            user_id: "choco".into(),
            page_size: 3,
            page_token: token.clone(),
        };
        let page = client.list_devices(request).await.expect("a page").into_inner();
        assert!(page.devices.len() <= 3);
        devices.extend(page.devices.into_iter().map(|device| device.device_id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(devices.len(), 7);
    devices.sort();
    devices.dedup();
    assert_eq!(devices.len(), 7);

    let (mut topics, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListSubscriptionsRequest {
            app_id: "pets".into(),
            user_id: "choco".into(),
            page_size: 2,
            page_token: token.clone(),
        };
        let page = client.list_subscriptions(request).await.expect("a page").into_inner();
        topics.extend(page.subscriptions.into_iter().map(|subscription| subscription.topic));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(topics, (0..7).map(|at| format!("post:{at}")).collect::<Vec<_>>());

    let (mut notifications, mut token) = (Vec::new(), String::new());
    loop {
        let request =
            ListNotificationsRequest { app_id: "pets".into(), page_size: 3, page_token: token, ..Default::default() };
        let page = client.list_notifications(request).await.expect("a page").into_inner();
        notifications.extend(page.notifications.into_iter().map(|notification| notification.notification_id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(notifications.len(), 8);
    assert_eq!(notifications[0], id, "newest first");

    let (mut deliveries, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListDeliveriesRequest {
            app_id: "pets".into(),
            notification_id: id.clone(),
            states: vec![delivery::State::Open.into(), delivery::State::Sent.into()],
            page_size: 3,
            page_token: token,
            ..Default::default()
        };
        let page = client.list_deliveries(request).await.expect("a page").into_inner();
        deliveries.extend(page.deliveries.into_iter().map(|delivery| delivery.device_id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    deliveries.sort();
    assert_eq!(deliveries, devices);
}

#[tokio::test]
async fn a_token_is_refused_for_anything_but_its_own_list() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    for at in 0..2 {
        client.register_device(phone("choco", &format!("t{at}"))).await.expect("registered");
    }
    let request =
        ListDevicesRequest { app_id: "pets".into(), user_id: "choco".into(), page_size: 1, ..Default::default() };
    let token = client.list_devices(request.clone()).await.expect("a page").into_inner().next_page_token;
    assert!(!token.is_empty());
    let other_user = ListDevicesRequest { user_id: "mocha".into(), page_token: token.clone(), ..request.clone() };
    assert_eq!(fields(client.list_devices(other_user).await), ["page_token"]);
    let other_app = ListDevicesRequest { app_id: "shop".into(), page_token: token.clone(), ..request.clone() };
    assert_eq!(fields(client.list_devices(other_app).await), ["page_token"]);
    let other_rpc = ListSubscriptionsRequest {
        app_id: "pets".into(),
        user_id: "choco".into(),
        page_token: token.clone(),
        ..Default::default()
    };
    assert_eq!(fields(client.list_subscriptions(other_rpc).await), ["page_token"]);
    let larger = ListDevicesRequest { page_size: 1_000_000, page_token: token, ..request };
    assert_eq!(client.list_devices(larger).await.expect("cut to the most").into_inner().devices.len(), 1);
}

#[tokio::test]
async fn a_page_of_heavy_notifications_ends_early() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let localized = (0..60)
        .map(|at| {
            let locale =
                format!("a{}", char::from(b'a' + u8::try_from(at % 26).expect("small"))) + &format!("-{at:02}");
            (locale, content::Texts { body: Some("x".repeat(4_000)), ..Default::default() })
        })
        .collect();
    let content = Some(Content { title: Some("t".into()), localized, ..Default::default() });
    for _ in 0..20 {
        let event = NotifyEventRequest { content: content.clone(), ..comment(&["choco"]) };
        client.notify_event(event).await.expect("accepted");
    }
    let (mut seen, mut pages, mut token) = (0, 0, String::new());
    loop {
        let request =
            ListNotificationsRequest { app_id: "pets".into(), page_size: 200, page_token: token, ..Default::default() };
        let page = client.list_notifications(request).await.expect("below the client's 4 MiB").into_inner();
        seen += page.notifications.len();
        pages += 1;
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, 20);
    assert!(pages > 1);
}
