use tonic::metadata::MetadataValue;
use tonic::{Code, Request};

use super::harness::*;
use crate::api::proto::admin_service_client::AdminServiceClient;
use crate::api::proto::*;
use crate::api::scopes::Scope;

fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer nk_{key}")).expect("ASCII");
    request.metadata_mut().insert("authorization", value);
    request
}

fn pause(app: &str, event_type: &str) -> PauseDeliveryRequest {
    PauseDeliveryRequest { app_id: app.into(), event_type: event_type.into(), ..PauseDeliveryRequest::default() }
}

#[tokio::test]
async fn what_concerns_every_app_needs_a_key_of_every_app() {
    let keys = vec![
        key("pets", &["pets"], &[Scope::Operate]),
        key("both", &["pets", "shop"], &[Scope::Operate]),
        key("reader", &["pets", "shop"], &[Scope::Read, Scope::Admin]),
    ];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let mut admin = AdminServiceClient::new(server.channel().await);
    let all = PauseDeliveryRequest { all_apps: true, reason: "outage".into(), ..PauseDeliveryRequest::default() };
    let refused = admin.pause_delivery(with_key(all.clone(), "pets")).await.expect_err("one app only");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "APP_NOT_ALLOWED"));
    let refused = admin.pause_delivery(with_key(pause("shop", ""), "pets")).await.expect_err("another app");
    assert_eq!(reason(&refused), "APP_NOT_ALLOWED");
    let refused = admin.pause_delivery(with_key(pause("pets", ""), "reader")).await.expect_err("no such scope");
    assert_eq!(reason(&refused), "SCOPE_MISSING");
    let changed = admin.pause_delivery(with_key(all, "both")).await.expect("bound to all").into_inner().changed;
    assert_eq!(changed, Some(true));
    admin.pause_delivery(with_key(pause("shop", "comment.created"), "both")).await.expect("of one app");

    // An app's list has what holds it, and no other app's.
    let list = |app: &str, all_apps, key: &str| with_key(ListPausesRequest { app_id: app.into(), all_apps }, key);
    let own = admin.list_pauses(list("", false, "pets")).await.expect("listed").into_inner().pauses;
    assert_eq!(own.len(), 1, "{own:?}");
    assert_eq!((own[0].all_apps, own[0].reason.as_str()), (Some(true), "outage"));
    let every = admin.list_pauses(list("", true, "both")).await.expect("listed").into_inner().pauses;
    assert_eq!(every.len(), 2);
    assert!(every.iter().any(|one| one.app_id == "shop" && one.event_type == "comment.created"));
    assert_eq!(code(admin.list_pauses(list("", true, "pets")).await), Code::PermissionDenied);
}

#[tokio::test]
async fn wrong_fields_are_named_and_hold_nothing() {
    let server = TestServer::start().await;
    let mut admin = AdminServiceClient::new(server.channel().await);
    let wrong = PauseDeliveryRequest {
        platform: 99,
        event_type: "no type!".into(),
        reason: "a\nb".into(),
        ..pause("pets", "")
    };
    let mut named = fields(admin.pause_delivery(wrong).await);
    named.sort();
    assert_eq!(named, ["event_type", "platform", "reason"]);
    let both = PauseDeliveryRequest { all_apps: true, reason: "r".repeat(257), ..pause("pets", "comment.created") };
    let mut named = fields(admin.pause_delivery(both).await);
    named.sort();
    assert_eq!(named, ["app_id", "event_type", "reason"]);
    assert_eq!(fields(admin.pause_delivery(pause("", "")).await), ["app_id"]);
    let resume = ResumeDeliveryRequest { app_id: "pets".into(), platform: 99, ..ResumeDeliveryRequest::default() };
    assert_eq!(fields(admin.resume_delivery(resume).await), ["platform"]);
    let all = ListPausesRequest { app_id: String::new(), all_apps: true };
    assert!(admin.list_pauses(all).await.expect("listed").into_inner().pauses.is_empty());
}
