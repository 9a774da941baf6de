use std::time::Duration;

use prost_types::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::harness::*;
use crate::api::limits::ServerLimits;
use crate::api::proto::*;
use crate::api::scopes::Scope;

const AT: Option<Timestamp> = Some(Timestamp { seconds: 1_700_000_000, nanos: 0 });

fn start(import_id: &str) -> ImportDevicesRequest {
    start_with(ImportStart { app_id: "pets".into(), import_id: import_id.into(), dry_run: false })
}

fn start_with(start: ImportStart) -> ImportDevicesRequest {
    ImportDevicesRequest { message: Some(import_devices_request::Message::Start(start)) }
}

fn item(sequence: u64, device: RegisterDeviceRequest) -> ImportDevicesRequest {
    let item = ImportedDevice { sequence, device: Some(device), created_at: None };
    ImportDevicesRequest { message: Some(import_devices_request::Message::Item(item)) }
}

fn old_phone(user: &str, token: &str) -> RegisterDeviceRequest {
    RegisterDeviceRequest { app_id: String::new(), observed_at: AT, ..phone(user, token) }
}

struct Open {
    sender: mpsc::Sender<ImportDevicesRequest>,
    answers: Streaming<ImportDevicesResponse>,
}

impl Open {
    async fn with(client: &mut Client, first: ImportDevicesRequest) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::channel(2_000);
        sender.send(first).await.expect("open");
        let answers = client.import_devices(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { sender, answers })
    }

    async fn answer(&mut self) -> Result<ImportProgress, Status> {
        self.answers.message().await.map(|answer| answer.expect("an answer").progress.expect("progress"))
    }

    async fn send(&self, items: impl IntoIterator<Item = ImportDevicesRequest>) {
        for item in items {
            self.sender.send(item).await.expect("open");
        }
    }

    /// Closes our side and reads to the end: everything refused, and the last answer.
    async fn finish(mut self) -> (Vec<import_progress::Refused>, ImportProgress) {
        drop(self.sender);
        let mut refused = Vec::new();
        loop {
            let answer = self.answers.message().await.expect("no error").expect("a last answer");
            let mut progress = answer.progress.expect("progress");
            assert!(progress.refused.len() <= 200);
            refused.append(&mut progress.refused);
            if progress.done == Some(true) {
                assert!(self.answers.message().await.expect("OK").is_none());
                return (refused, progress);
            }
        }
    }
}

async fn devices_of(client: &mut Client, user: &str) -> Vec<Device> {
    let list = ListDevicesRequest { app_id: "pets".into(), user_id: user.into(), ..Default::default() };
    client.list_devices(list).await.expect("listed").into_inner().devices
}

#[tokio::test]
async fn an_import_is_acknowledged_resumed_and_reported() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let mut open = Open::with(&mut client, start("move")).await.expect("open");
    assert_eq!(open.answer().await.expect("first").acknowledged_up_to, 0);
    open.send((1..=450).map(|at| item(at, old_phone(&format!("u{at}"), &format!("t{at}"))))).await;
    let mut seen = 0;
    while seen < 450 {
        let progress = open.answer().await.expect("progress");
        assert!(progress.acknowledged_up_to > seen && progress.acknowledged_up_to - seen <= 200);
        assert_eq!(progress.done, None);
        seen = progress.acknowledged_up_to;
    }
    // The connection breaks.
    drop(open);

    let mut open = Open::with(&mut client, start("move")).await.expect("open");
    assert_eq!(open.answer().await.expect("first").acknowledged_up_to, 450);
    let bad = RegisterDeviceRequest { user_id: String::new(), token: String::new(), ..old_phone("x", "x") };
    let timeless = RegisterDeviceRequest { observed_at: None, ..old_phone("u2", "t2") };
    let elsewhere = RegisterDeviceRequest { app_id: "shop".into(), ..old_phone("u2", "t2") };
    let unknown = RegisterDeviceRequest { device_id: "dev_000000000007".into(), ..old_phone("u2", "t2") };
    let younger = ImportedDevice {
        sequence: 8_000,
        device: Some(old_phone("u3", "t3")),
        created_at: Some(Timestamp { seconds: 1_700_000_001, nanos: 0 }),
    };
    open.send([
        // Sent again: harmless.
        item(449, old_phone("u449", "t449")),
        item(450, old_phone("u450", "t450")),
        item(700, bad),
        item(701, timeless),
        item(702, elsewhere),
        item(703, unknown),
        item(704, old_phone("u1", "another")),
        ImportDevicesRequest { message: Some(import_devices_request::Message::Item(younger)) },
        item(9_000, RegisterDeviceRequest { device_id: "?".into(), ..old_phone("u2", "t2") }),
    ])
    .await;
    let (refused, last) = open.finish().await;
    assert_eq!((last.applied, last.unchanged, last.refused_count, last.acknowledged_up_to), (1, 2, 6, 9_000));
    let told: Vec<(u64, &str, Vec<&str>)> = refused
        .iter()
        .map(|one| {
            let fields = one.violations.iter().map(|violation| violation.field.as_str()).collect();
            (one.sequence, one.reason.as_str(), fields)
        })
        .collect();
    let expected = vec![
        (700, "INVALID_REQUEST", vec!["user_id", "token"]),
        (701, "INVALID_REQUEST", vec!["observed_at"]),
        (702, "INVALID_REQUEST", vec!["app_id"]),
        (703, "DEVICE_NOT_FOUND", vec![]),
        (8_000, "INVALID_REQUEST", vec!["created_at"]),
        (9_000, "INVALID_REQUEST", vec!["device_id"]),
    ];
    assert_eq!(told, expected);
    let devices = devices_of(&mut client, "u1").await;
    assert_eq!(devices.len(), 2);
    assert_eq!((devices[0].observed_at, devices[0].created_at), (AT, AT));
    assert!(devices_of(&mut client, "u2").await.len() == 1);
}

#[tokio::test]
async fn a_slow_import_is_acknowledged_item_by_item() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let mut open = Open::with(&mut client, start("slow")).await.expect("open");
    open.answer().await.expect("first");
    for at in 1..=3 {
        open.send([item(at, old_phone("mina", &format!("t{at}")))]).await;
        assert_eq!(open.answer().await.expect("progress").acknowledged_up_to, at);
    }
}

#[tokio::test]
async fn a_dry_run_reports_and_leaves_nothing() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    client.register_device(phone("mina", "t1")).await.expect("registered");
    let dry = || start_with(ImportStart { app_id: "pets".into(), import_id: String::new(), dry_run: true });
    for _ in 0..2 {
        let open = Open::with(&mut client, dry()).await.expect("open");
        let bad = RegisterDeviceRequest { time_zone: "Mars/Base".into(), ..old_phone("bori", "t3") };
        let items = [item(1, old_phone("mina", "t1")), item(2, old_phone("nabi", "t2")), item(3, bad)];
        open.send(items).await;
        let (refused, last) = open.finish().await;
        assert_eq!((last.applied, last.unchanged, last.refused_count, last.acknowledged_up_to), (1, 1, 1, 3));
        assert_eq!(refused[0].violations[0].field, "time_zone");
    }
    assert!(devices_of(&mut client, "nabi").await.is_empty());
}

#[tokio::test]
async fn choices_and_subscriptions_come_the_same_way() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    client.set_opt_in(choice("nabi", false)).await.expect("live, and later");
    let begin = || ImportStart { app_id: "pets".into(), import_id: "move".into(), dry_run: false };
    let opt_in = |sequence, user: &str| {
        let choice = SetOptInRequest { app_id: String::new(), observed_at: AT, ..choice(user, true) };
        import_opt_ins_request::Message::Item(ImportedOptIn { sequence, opt_in: Some(choice) })
    };
    let messages = [import_opt_ins_request::Message::Start(begin()), opt_in(1, "mina"), opt_in(2, "nabi")];
    let messages = messages.map(|message| ImportOptInsRequest { message: Some(message) });
    let answers = client.import_opt_ins(tokio_stream::iter(messages)).await.expect("open").into_inner();
    let last = last_of(answers, |answer| answer.progress).await;
    assert_eq!((last.applied, last.unchanged, last.done), (1, 1, Some(true)));
    let list = |user: &str| ListOptInsRequest { app_id: "pets".into(), user_id: user.into() };
    let mina = client.list_opt_ins(list("mina")).await.expect("listed").into_inner().opt_ins;
    assert_eq!((mina[0].opted_in, mina[0].observed_at), (Some(true), AT));
    let nabi = client.list_opt_ins(list("nabi")).await.expect("listed").into_inner().opt_ins;
    assert_eq!(nabi[0].opted_in, Some(false), "what was said meanwhile stands");

    let follow = |sequence, topic: &str, active| {
        let subscription =
            SubscribeRequest { app_id: "pets".into(), user_id: "mina".into(), topic: topic.into(), observed_at: AT };
        let item = ImportedSubscription { sequence, subscription: Some(subscription), active };
        import_subscriptions_request::Message::Item(item)
    };
    let messages = [
        import_subscriptions_request::Message::Start(begin()),
        follow(1, "author:choco", None),
        follow(2, "author:bori", Some(true)),
        follow(3, "author:bori", Some(false)),
        follow(4, "", None),
    ];
    let messages = messages.map(|message| ImportSubscriptionsRequest { message: Some(message) });
    let answers = client.import_subscriptions(tokio_stream::iter(messages)).await.expect("open").into_inner();
    let last = last_of(answers, |answer| answer.progress).await;
    assert_eq!((last.applied, last.refused_count, last.acknowledged_up_to), (3, 1, 4));
    let list = ListSubscriptionsRequest { app_id: "pets".into(), user_id: "mina".into(), ..Default::default() };
    let topics = client.list_subscriptions(list).await.expect("listed").into_inner().subscriptions;
    assert_eq!(topics.len(), 1);
    assert_eq!((topics[0].topic.as_str(), topics[0].observed_at), ("author:choco", AT));
}

async fn last_of<T>(mut answers: Streaming<T>, progress: impl Fn(T) -> Option<ImportProgress>) -> ImportProgress {
    let mut last = ImportProgress::default();
    while let Some(answer) = answers.message().await.expect("no error") {
        last = progress(answer).expect("progress");
    }
    last
}

#[tokio::test]
async fn a_message_out_of_place_ends_the_import_after_what_came_before() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let nothing = ImportDevicesRequest { message: None };
    for first in [item(1, old_phone("mina", "t")), nothing.clone(), start(""), start(&"x".repeat(129))] {
        let mut open = Open::with(&mut client, first).await.expect("open");
        assert_eq!(open.answer().await.expect_err("refused").code(), Code::InvalidArgument);
        assert!(open.answers.message().await.is_ok_and(|more| more.is_none()), "and ends");
    }
    let elsewhere = start_with(ImportStart { app_id: "zoo".into(), import_id: "x".into(), dry_run: false });
    let mut open = Open::with(&mut client, elsewhere).await.expect("open");
    assert_eq!(open.answer().await.expect_err("refused").code(), Code::NotFound);
    for (number, wrong) in [item(5, old_phone("nabi", "n")), item(0, old_phone("nabi", "n")), start("again"), nothing]
        .into_iter()
        .enumerate()
    {
        let mut open = Open::with(&mut client, start(&format!("out-{number}"))).await.expect("open");
        open.answer().await.expect("first");
        open.send([item(5, old_phone("mina", "m")), wrong]).await;
        assert_eq!(open.answer().await.expect("what was fine").acknowledged_up_to, 5);
        assert_eq!(open.answer().await.expect_err("refused").code(), Code::InvalidArgument);
    }
    assert!(devices_of(&mut client, "nabi").await.is_empty());
}

#[tokio::test]
async fn a_shutdown_acknowledges_what_came_and_says_that_it_is_not_the_end() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let mut open = Open::with(&mut client, start("cut")).await.expect("open");
    open.answer().await.expect("first");
    open.send([item(1, old_phone("mina", "t"))]).await;
    assert_eq!(open.answer().await.expect("progress").acknowledged_up_to, 1);
    server.shutdown.cancel();
    let cut = open.answer().await.expect_err("not the end");
    assert_eq!((cut.code(), reason(&cut).as_str()), (Code::Unavailable, "SERVER_SHUTTING_DOWN"));
    server.stop().await.expect("stopped");
}

#[tokio::test]
async fn open_imports_are_bounded_and_their_keys_looked_up_anew() {
    let limits = ServerLimits { max_import_streams: 1, ..ServerLimits::default() };
    let keys = vec![key("mover", &["pets"], &[Scope::Register])];
    let server = TestServer::with(Setup { keys, limits, ..Setup::default() }).await;
    let mut client = server.client_with("nk_mover").await;
    let mut open = Open::with(&mut client, start("one")).await.expect("open");
    open.answer().await.expect("first");
    let Err(refused) = Open::with(&mut client, start("two")).await else { panic!("no room") };
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    server.keys.replace(vec![key("mover", &["pets"], &[Scope::Read])]);
    open.send([item(1, old_phone("mina", "t"))]).await;
    let refused = open.answer().await.expect_err("the key may not any more");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
    drop(open);
    server.keys.replace(vec![key("mover", &["pets"], &[Scope::Register])]);
    let mut again = loop {
        match Open::with(&mut client, start("one")).await {
            Ok(open) => break open,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted),
        }
        server.runtime.sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(again.answer().await.expect("first").acknowledged_up_to, 0, "nothing of it was written");
}
