use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Streaming};

use super::harness::*;
use crate::api::limits::ServerLimits;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::watch_deliveries_request::{Filter, Kind};
use crate::api::proto::watch_deliveries_response::{Event, Progress};
use crate::api::proto::*;
use crate::api::scopes::Scope;

/// Quick enough for a test.
fn limits() -> ServerLimits {
    ServerLimits {
        watch_poll: Duration::from_millis(10),
        watch_heartbeat: Duration::from_millis(50),
        ..ServerLimits::default()
    }
}

async fn server() -> TestServer {
    TestServer::with(Setup { limits: limits(), ..Setup::default() }).await
}

fn request(cursor: &str) -> WatchDeliveriesRequest {
    WatchDeliveriesRequest { app_id: "pets".into(), cursor: cursor.into(), filter: None }
}

async fn watch(client: &mut Client, request: WatchDeliveriesRequest) -> Streaming<WatchDeliveriesResponse> {
    client.watch_deliveries(request).await.expect("a stream").into_inner()
}

/// The next message of a stream that goes on.
async fn message(stream: &mut Streaming<WatchDeliveriesResponse>) -> (String, Event) {
    let message = stream.message().await.expect("no error").expect("not the end");
    (message.cursor, message.event.expect("an event"))
}

/// The next that is no sign of life.
async fn event(stream: &mut Streaming<WatchDeliveriesResponse>) -> (String, Event) {
    loop {
        match message(stream).await {
            (_, Event::Progress(_)) => {}
            event => return event,
        }
    }
}

fn delivery(event: &Event) -> &Delivery {
    match event {
        Event::Delivery(delivery) => delivery,
        other => panic!("a delivery, not {other:?}"),
    }
}

#[tokio::test]
async fn results_and_retirements_come_with_cursors_to_go_on_from() {
    let server = server().await;
    let mut client = server.client().await;
    let device = enrol(&mut client, "choco").await;
    let mut stream = watch(&mut client, request("")).await;
    let (begin, first) = message(&mut stream).await;
    assert_eq!(first, Event::Progress(Progress {}), "a cursor before anything has happened");

    // Nobody with consent: their result is there when the call is answered.
    let accepted = client.notify_event(comment(&["mocha"])).await.expect("accepted").into_inner();
    let (after_first, told) = event(&mut stream).await;
    let told = delivery(&told);
    assert_eq!((told.user_id.as_str(), told.reason.as_str()), ("mocha", "NO_DEVICE"));
    assert_eq!(
        (told.state(), told.notification_id.as_str()),
        (delivery::State::Suppressed, &*accepted.notification_id)
    );
    let unregister = UnregisterDeviceRequest { app_id: "pets".into(), device_id: device.clone(), ..Default::default() };
    client.unregister_device(unregister).await.expect("unregistered");
    let (after_second, told) = event(&mut stream).await;
    let Event::DeviceRetired(retired) = told else { panic!("{told:?}") };
    let expected = (device.as_str(), "choco", "UNREGISTERED");
    assert_eq!((retired.device_id.as_str(), retired.user_id.as_str(), retired.reason.as_str()), expected);
    assert!(retired.at.is_some());

    for (cursor, left) in [(&begin, 2), (&after_first, 1), (&after_second, 0)] {
        let mut again = watch(&mut client, request(cursor)).await;
        for _ in 0..left {
            event(&mut again).await;
        }
        let (quiet, first) = message(&mut again).await;
        assert_eq!(first, Event::Progress(Progress {}), "nothing twice");
        assert!(!quiet.is_empty());
    }
}

#[tokio::test]
async fn a_filter_is_obeyed_and_a_quiet_one_still_advances() {
    let server = server().await;
    let mut client = server.client().await;
    let (begin, _) = message(&mut watch(&mut client, request("")).await).await;
    let other = client.notify_event(comment(&["mocha"])).await.expect("accepted").into_inner().notification_id;
    let named = client.notify_event(comment(&["choco", "latte"])).await.expect("accepted").into_inner().notification_id;
    let with = |filter| WatchDeliveriesRequest { filter: Some(filter), ..request(&begin) };

    let filter = Filter { notification_id: named.clone(), user_id: "latte".into(), ..Filter::default() };
    let (_, told) = event(&mut watch(&mut client, with(filter)).await).await;
    assert_eq!((&*delivery(&told).user_id, &*delivery(&told).notification_id), ("latte", &*named));

    let filter = Filter { states: vec![delivery::State::Sent.into()], ..Filter::default() };
    let mut quiet = watch(&mut client, with(filter)).await;
    message(&mut quiet).await;
    let (advanced, told) = message(&mut quiet).await;
    assert_eq!(told, Event::Progress(Progress {}));
    let last = client.notify_event(comment(&["latte"])).await.expect("accepted").into_inner().notification_id;
    // With another filter the cursor does not go back.
    let (_, told) = event(&mut watch(&mut client, request(&advanced)).await).await;
    assert_eq!(delivery(&told).notification_id, last);

    let filter = Filter { kinds: vec![Kind::DeviceRetired.into()], ..Filter::default() };
    let mut devices = watch(&mut client, with(filter)).await;
    for _ in 0..3 {
        assert_eq!(message(&mut devices).await.1, Event::Progress(Progress {}));
    }
    let filter = Filter { notification_id: other, ..Filter::default() };
    let foreign = WatchDeliveriesRequest { app_id: "shop".into(), cursor: String::new(), filter: Some(filter) };
    let refused = client.watch_deliveries(foreign).await.expect_err("another app's notification");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "NOTIFICATION_NOT_FOUND"));
}

#[tokio::test]
async fn wrong_foreign_and_expired_cursors_are_told_apart() {
    let server = server().await;
    let mut client = server.client().await;
    let mut stream = watch(&mut client, request("")).await;
    let (cursor, _) = message(&mut stream).await;
    for garbage in ["x", "AAAA", &cursor[1..], &"A".repeat(101)] {
        assert_eq!(fields(client.watch_deliveries(request(garbage)).await), ["cursor"], "{garbage}");
    }
    let wrong = Filter { notification_id: "7".into(), kinds: vec![9, 0], states: vec![0], user_id: "a\nb".into() };
    let wrong = WatchDeliveriesRequest { cursor: "x".into(), filter: Some(wrong), app_id: "pets".into() };
    let expected = [
        "filter.kinds[0]",
        "filter.kinds[1]",
        "filter.states[0]",
        "filter.user_id",
        "filter.notification_id",
        "cursor",
    ];
    assert_eq!(fields(client.watch_deliveries(wrong).await), expected);

    let mut bytes = URL_SAFE_NO_PAD.decode(&cursor).expect("base64");
    bytes[12] ^= 1;
    let altered = URL_SAFE_NO_PAD.encode(bytes);
    let other_app = WatchDeliveriesRequest { app_id: "shop".into(), ..request(&cursor) };
    let elsewhere = self::server().await;
    let mut there = elsewhere.client().await;
    let refused = [
        client.watch_deliveries(request(&altered)).await,
        client.watch_deliveries(other_app).await,
        there.watch_deliveries(request(&cursor)).await,
    ];
    for refused in refused {
        let refused = refused.expect_err("foreign");
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::OutOfRange, "CURSOR_FOREIGN"));
    }

    client.notify_event(comment(&["mocha"])).await.expect("accepted");
    let (_, told) = event(&mut stream).await;
    assert_eq!(delivery(&told).user_id, "mocha");
    let now = server.runtime.now().plus(Duration::from_secs(1));
    crate::storage::Queue::retain(&*server.store, now, now).await.expect("deleted");
    let refused = client.watch_deliveries(request(&cursor)).await.expect_err("a result is gone");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::OutOfRange, "CURSOR_EXPIRED"));
    // Whoever has read it goes on.
    let (after, _) = message(&mut stream).await;
    watch(&mut client, request(&after)).await;
}

#[tokio::test]
async fn a_reader_that_reads_nothing_is_told_and_its_place_is_free() {
    let limits =
        ServerLimits { max_watchers: 1, watch_buffer: 4, watch_patience: Duration::from_millis(300), ..limits() };
    let server = TestServer::with(Setup { limits, ..Setup::default() }).await;
    let mut client = server.client().await;
    let (begin, _) = message(&mut watch(&mut client, request("")).await).await;
    let people: Vec<String> = (0..1_000).map(|number| format!("person-{number}")).collect();
    let people: Vec<&str> = people.iter().map(String::as_str).collect();
    for _ in 0..3 {
        client
            .notify_event(NotifyEventRequest { max_audience: Some(1_000), ..comment(&people[..500]) })
            .await
            .expect("accepted");
    }
    // What HTTP/2 holds is little, so the server notices.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).expect("an address");
    let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let mut slow = PushServiceClient::new(endpoint.connect().await.expect("a connection"));
    let mut stream = loop {
        // The first watcher's place is given back when its connection notices that it is gone.
        match slow.watch_deliveries(request(&begin)).await {
            Ok(stream) => break stream.into_inner(),
            Err(refused) => assert_eq!(reason(&refused), "TOO_MANY_STREAMS"),
        }
        server.runtime.sleep(Duration::from_millis(10)).await;
    };
    let refused = client.watch_deliveries(request("")).await.expect_err("one at a time");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    let deadline = server.runtime.instant() + Duration::from_secs(30);
    let mut next = loop {
        match client.watch_deliveries(request("")).await {
            Ok(stream) => break stream.into_inner(),
            Err(_) => assert!(server.runtime.instant() < deadline, "the place stays taken"),
        }
        server.runtime.sleep(Duration::from_millis(20)).await;
    };
    message(&mut next).await;
    // It reads at last: some results, and why there are no more.
    let (mut read, mut last) = (BTreeSet::new(), begin);
    let end = loop {
        match stream.message().await {
            Ok(Some(message)) => {
                if let Some(Event::Delivery(delivery)) = message.event {
                    read.insert((delivery.notification_id, delivery.user_id));
                }
                last = message.cursor;
            }
            Ok(None) => panic!("the end is told"),
            Err(status) => break status,
        }
    };
    assert_eq!((end.code(), reason(&end).as_str()), (Code::ResourceExhausted, "WATCHER_TOO_SLOW"));
    assert!(!read.is_empty() && read.len() < 1_500, "{} were on their way", read.len());
    // And nothing is lost to whoever goes on.
    drop(next);
    let mut stream = loop {
        match client.watch_deliveries(request(&last)).await {
            Ok(stream) => break stream.into_inner(),
            Err(_) => server.runtime.sleep(Duration::from_millis(10)).await,
        }
    };
    while read.len() < 1_500 {
        let (_, told) = event(&mut stream).await;
        let told = delivery(&told);
        assert!(read.insert((told.notification_id.clone(), told.user_id.clone())), "told twice");
    }
}

#[tokio::test]
async fn a_shutdown_ends_watchers_with_a_cursor_and_unavailable() {
    let server = server().await;
    let mut client = server.client().await;
    let mut stream = watch(&mut client, request("")).await;
    message(&mut stream).await;
    let runtime = server.runtime.clone();
    let begun = runtime.instant();
    let stopping = runtime.spawn(server.stop());
    let mut last = None;
    let end = loop {
        match stream.message().await {
            Ok(Some(message)) => last = message.event.map(|event| (message.cursor, event)),
            Ok(None) => panic!("nobody may take it for the end"),
            Err(status) => break status,
        }
    };
    assert_eq!((end.code(), reason(&end).as_str()), (Code::Unavailable, "SERVER_SHUTTING_DOWN"));
    let (cursor, event) = last.expect("where to go on");
    assert!(!cursor.is_empty());
    assert_eq!(event, Event::Progress(Progress {}));
    stopping.await.expect("no panic").expect("an orderly stop");
    assert!(runtime.instant() - begun < Duration::from_secs(10), "watchers hold nothing up");
}

#[tokio::test]
async fn a_deadline_and_a_lost_key_end_a_watcher() {
    let keys = vec![key("reader", &["pets"], &[Scope::Read]), key("writer", &["pets"], &[Scope::Notify])];
    let server = TestServer::with(Setup { keys, limits: limits(), ..Setup::default() }).await;
    let refused = server.client_with("nk_writer").await.watch_deliveries(request("")).await.expect_err("may not read");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
    let mut client = server.client_with("nk_reader").await;

    let mut timed = Request::new(request(""));
    timed.set_timeout(Duration::from_millis(400));
    let mut stream = client.watch_deliveries(timed).await.expect("a stream").into_inner();
    let end = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "the end is told"),
            Err(status) => break status,
        }
    };
    assert!(matches!(end.code(), Code::DeadlineExceeded | Code::Cancelled), "{end:?}");

    let mut stream = watch(&mut client, request("")).await;
    message(&mut stream).await;
    server.keys.replace(vec![root_key("new")]);
    let end = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "the end is told"),
            Err(status) => break status,
        }
    };
    assert_eq!((end.code(), reason(&end).as_str()), (Code::Unauthenticated, "CREDENTIAL_INVALID"));
}
