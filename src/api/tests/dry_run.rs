use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::Code;

use super::harness::*;
use crate::api::proto::*;
use crate::api::scopes::Scope;
use crate::domain::allow::AllowList;
use crate::domain::ids::{AppKey, RouteId, UserId};
use crate::domain::notification::{HandOff, HandedOver, Permit};
use crate::domain::platform::Lane;
use crate::storage::{Queue as _, Registry as _};

fn dry(event: NotifyEventRequest) -> NotifyEventRequest {
    NotifyEventRequest { dry_run: true, ..event }
}

async fn rehearse(client: &mut Client, event: NotifyEventRequest) -> Plan {
    let answer = client.notify_event(dry(event)).await.expect("rehearsed").into_inner();
    assert_eq!((answer.notification_id.as_str(), answer.duplicate), ("", None));
    answer.plan.expect("a plan")
}

fn suppressed(plan: &Plan) -> BTreeMap<&str, u64> {
    plan.suppressed.iter().map(|one| (one.reason.as_str(), one.count)).collect()
}

/// What became of a real event right after acceptance: reasons by (user, device), QUEUED as SEND.
async fn planned(client: &mut Client, id: &str) -> Vec<(String, String, String)> {
    let list = ListDeliveriesRequest {
        app_id: "pets".into(),
        notification_id: id.into(),
        page_size: 1_000,
        ..ListDeliveriesRequest::default()
    };
    let deliveries = client.list_deliveries(list).await.expect("listed").into_inner().deliveries;
    let told = |one: Delivery| {
        let reason = if one.reason == "QUEUED" { "SEND".to_owned() } else { one.reason };
        (one.user_id, one.device_id, reason)
    };
    let mut told: Vec<_> = deliveries.into_iter().map(told).collect();
    told.sort();
    told
}

#[tokio::test]
async fn a_dry_run_says_what_planning_then_does() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    for user in ["mina", "nabi", "sori", "actor"] {
        enrol(&mut client, user).await;
    }
    let tablet = client.register_device(phone("mina", "tablet")).await.expect("registered").into_inner();
    let tablet = tablet.device.expect("a device").device_id;
    let no = SetOptInRequest { device_id: tablet, ..choice("mina", false) };
    client.set_opt_in(no).await.expect("set");
    client.set_opt_in(choice("nabi", false)).await.expect("set");
    client.register_device(phone("bori", "never-asked")).await.expect("registered");
    let iphone =
        RegisterDeviceRequest { platform: device::Platform::Apns.into(), token: "aabb".into(), ..phone("sori", "") };
    client.register_device(iphone).await.expect("registered");
    let event = NotifyEventRequest {
        actor_id: "actor".into(),
        idempotency_key: "once".into(),
        ..comment(&["mina", "nabi", "sori", "actor", "bori", "stranger"])
    };

    let plan = rehearse(&mut client, event.clone()).await;
    assert_eq!((plan.people, plan.lane(), plan.partial), (6, lane::Value::Interactive, Some(false)));
    let expected = [("ACTOR", 1), ("DEVICE_OPTED_OUT", 1), ("NEVER_OPTED_IN", 1), ("NO_DEVICE", 1), ("OPTED_OUT", 1)];
    assert_eq!(suppressed(&plan), expected.into_iter().collect());
    let targets: Vec<_> = plan.targets.iter().map(|one| (one.platform(), one.apns_topic.as_str(), one.count)).collect();
    let expected = [(device::Platform::Apns, "com.example.pets", 1), (device::Platform::Fcm, "", 2)];
    assert_eq!(targets, expected);
    let mut samples: Vec<_> = plan.samples.into_iter().map(|one| (one.user_id, one.device_id, one.decision)).collect();
    samples.sort();

    // Nothing is left of it: not the stranger, not the key, no event.
    let list = ListNotificationsRequest { app_id: "pets".into(), ..Default::default() };
    assert!(client.list_notifications(list).await.expect("listed").into_inner().notifications.is_empty());
    assert_eq!(server.store.backlog(server.runtime.now()).await.expect("counted").jobs, 0);
    let app = server.store.ensure_app(&crate::domain::ids::AppId::trusted("pets"), server.runtime.now()).await;
    let named = crate::domain::notification::Audience {
        user_ids: vec![crate::domain::ids::UserId::trusted("stranger")],
        ..Default::default()
    };
    let resolved = server.store.resolve_audience(app.expect("an app"), &named, None).await.expect("resolved");
    assert_eq!(resolved.unknown.len(), 1);

    let accepted = client.notify_event(event.clone()).await.expect("accepted").into_inner();
    assert_eq!((accepted.duplicate, accepted.plan), (Some(false), None), "the key was free");
    assert_eq!(samples, planned(&mut client, &accepted.notification_id).await);
    rehearse(&mut client, event.clone()).await;
    let again = client.notify_event(event).await.expect("accepted").into_inner();
    assert_eq!((again.duplicate, again.notification_id), (Some(true), accepted.notification_id));
}

#[tokio::test]
async fn a_dry_run_is_refused_as_the_event_would_be() {
    let keys = vec![key("small", &["pets"], &[Scope::Notify, Scope::Register]), root_key("root")];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let mut client = server.client_with("nk_small").await;
    enrol(&mut client, "mina").await;
    let many: Vec<String> = (0..501).map(|at| format!("u{at}")).collect();
    let many = NotifyEventRequest { user_ids: many, ..comment(&[]) };
    let over = prost_types::Duration { seconds: 1, nanos: 0 };
    let bad = [
        (NotifyEventRequest { everyone: true, ..comment(&[]) }, Code::PermissionDenied),
        (many.clone(), Code::PermissionDenied),
        (NotifyEventRequest { max_audience: Some(1), ..comment(&["mina", "nabi"]) }, Code::FailedPrecondition),
        (NotifyEventRequest { device_ids: vec!["dev_000000000007".into()], ..comment(&[]) }, Code::NotFound),
        (NotifyEventRequest { content: None, ..comment(&["mina"]) }, Code::InvalidArgument),
        (NotifyEventRequest { idempotency_key: "x".repeat(257), ..comment(&["mina"]) }, Code::InvalidArgument),
        (
            NotifyEventRequest {
                event_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
                ttl: Some(over),
                ..comment(&["mina"])
            },
            Code::InvalidArgument,
        ),
    ];
    for (event, expected) in bad {
        assert_eq!(code(client.notify_event(dry(event.clone())).await), expected, "{event:?}");
        assert_eq!(code(client.notify_event(event.clone()).await), expected, "{event:?}");
    }
    // A repeat of a key whose TTL has ended is answered; a dry run has no first answer to give.
    assert_eq!(
        fields(
            client
                .notify_event(dry(NotifyEventRequest {
                    event_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
                    idempotency_key: "late".into(),
                    ..comment(&["mina"])
                }))
                .await
        ),
        ["event_at"]
    );
    // In a stream nobody expects it.
    let message = NotifyEventsRequest {
        sequence: 1,
        event: Some(dry(NotifyEventRequest { idempotency_key: "k".into(), ..comment(&["mina"]) })),
    };
    let mut answers = client.notify_events(tokio_stream::once(message)).await.expect("a stream").into_inner();
    let answer = answers.message().await.expect("an answer").expect("one").outcome.expect("an outcome");
    let notify_events_response::Outcome::Error(error) = answer else { panic!("refused") };
    assert_eq!(Code::from(error.code), Code::InvalidArgument);
    assert!(error.message.contains("dry_run"), "{}", error.message);

    let plan = rehearse(&mut client, comment(&["mina"])).await;
    assert_eq!((plan.people, plan.samples.len()), (1, 0), "what single people chose needs the scope read");
    let mut root = server.client_with("nk_root").await;
    let plan = rehearse(&mut root, many).await;
    assert_eq!((plan.people, plan.lane(), plan.samples.len()), (501, lane::Value::Bulk, 50));
    assert_eq!(suppressed(&plan), [("NO_DEVICE", 501)].into_iter().collect());
}

#[tokio::test]
async fn a_large_audience_is_counted_whole_and_sampled() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    for number in 0..620 {
        let user = format!("u{number}");
        if number % 3 == 0 {
            client.set_opt_in(choice(&user, number % 2 == 0)).await.expect("set");
        }
        client.register_device(phone(&user, &format!("t{number}"))).await.expect("registered");
        let follow = SubscribeRequest {
            app_id: "pets".into(),
            user_id: user,
            topic: "author:choco".into(),
            ..SubscribeRequest::default()
        };
        client.subscribe(follow).await.expect("subscribed");
    }
    let event = NotifyEventRequest { topics: vec!["author:choco".into()], ..comment(&["u3", "stranger"]) };
    let plan = rehearse(&mut client, event).await;
    assert_eq!((plan.people, plan.lane(), plan.partial), (621, lane::Value::Bulk, Some(false)));
    let expected = [("NEVER_OPTED_IN", 413), ("NO_DEVICE", 1), ("OPTED_OUT", 103)];
    assert_eq!(suppressed(&plan), expected.into_iter().collect());
    assert_eq!(plan.targets.iter().map(|one| one.count).sum::<u64>(), 104);
    assert_eq!(plan.samples.len(), 50);
    let everyone = rehearse(&mut client, NotifyEventRequest { everyone: true, ..comment(&[]) }).await;
    assert_eq!(everyone.people, 620);
}

/// Lets one person through, and takes no job.
struct Staging;

impl HandOff for Staging {
    fn try_permit(&self, _: RouteId, _: Lane, _: usize) -> Option<Permit> {
        None
    }

    fn allow_list(&self, _: AppKey) -> Option<Arc<AllowList>> {
        Some(Arc::new(AllowList { users: [UserId::trusted("mina")].into(), labels: Vec::new() }))
    }

    fn deliver(&self, _: HandedOver) {}

    fn wake_jobs(&self, _: RouteId, _: Lane) {}

    fn wake_fanout(&self) {}
}

#[tokio::test]
async fn a_dry_run_knows_the_allow_list() {
    let server = TestServer::with(Setup { hand_off: Arc::new(Staging), ..Setup::default() }).await;
    let mut client = server.client().await;
    for user in ["mina", "nabi"] {
        enrol(&mut client, user).await;
    }
    let plan = rehearse(&mut client, comment(&["mina", "nabi"])).await;
    assert_eq!(suppressed(&plan), [("NOT_ALLOWED_HERE", 1)].into_iter().collect());
    let mut samples: Vec<_> = plan.samples.into_iter().map(|one| (one.user_id, one.device_id, one.decision)).collect();
    samples.sort();
    let accepted = client.notify_event(comment(&["mina", "nabi"])).await.expect("accepted").into_inner();
    assert_eq!(samples, planned(&mut client, &accepted.notification_id).await);
}
