use std::collections::BTreeSet;

use prost_reflect::{DynamicMessage, MethodDescriptor, Value};
use tonic::{Code, Request};

use super::harness::*;
use super::raw::{Raw, call, methods, path};
use crate::api::auth::ApiKey;
use crate::api::proto::*;
use crate::api::scopes::{self, Scope};
use crate::domain::time::UnixMs;

/// A request of the method for an app; of a stream, its first message.
fn request_for(method: &MethodDescriptor, app: &str) -> DynamicMessage {
    let mut message = DynamicMessage::new(method.input());
    if method.input().get_field_by_name("app_id").is_some() {
        message.set_field_by_name("app_id", Value::String(app.to_owned()));
    } else if method.input().fields().len() > 0 {
        // One without fields is about every app.
        let first = |name: &&str| method.input().get_field_by_name(name).is_some();
        let name = ["event", "start"].into_iter().find(first).expect("a message that names the app");
        let field = method.input().get_field_by_name(name).expect("as just found");
        let mut part = DynamicMessage::new(field.kind().as_message().expect("a message").clone());
        part.set_field_by_name("app_id", Value::String(app.to_owned()));
        message.set_field_by_name(name, Value::Message(part));
    }
    message
}

#[test]
fn the_scope_table_names_every_method_and_no_other() {
    let described: BTreeSet<String> = methods().iter().map(path).collect();
    let listed: BTreeSet<String> = scopes::TABLE.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(described, listed);
    assert_eq!(listed.len(), scopes::TABLE.len(), "no path twice");
    for method in methods() {
        let streams = method.is_client_streaming() || method.is_server_streaming();
        assert_eq!(scopes::is_stream(&path(&method)), streams, "{}", path(&method));
    }
}

#[tokio::test]
async fn a_key_of_another_app_gets_nothing_from_any_method() {
    let all = &Scope::ALL;
    let keys = vec![key("pets", &["pets"], all), key("shop", &["shop"], all)];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let channel = server.channel().await;
    for method in methods() {
        for app in ["pets", "no-such-app"] {
            let answer = call(&channel, &method, &[request_for(&method, app)], Some("nk_shop")).await;
            assert_eq!(code(answer), Code::PermissionDenied, "{} for {app}", path(&method));
        }
    }
}

#[tokio::test]
async fn each_method_needs_its_scope_and_a_good_key() {
    let mut keys: Vec<ApiKey> = Scope::ALL
        .into_iter()
        .map(|scope| {
            let others: Vec<Scope> = Scope::ALL.into_iter().filter(|other| *other != scope).collect();
            key(&format!("without-{}", scope.name()), &["pets", "shop"], &others)
        })
        .collect();
    keys.push(ApiKey { expires_at: Some(UnixMs(1)), ..root_key("expired") });
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let channel = server.channel().await;
    for method in methods() {
        let (_, scope) = scopes::TABLE.iter().find(|(known, _)| *known == path(&method)).expect("listed");
        let request = [request_for(&method, "pets")];
        let without = format!("nk_without-{}", scope.name());
        let refused = call(&channel, &method, &request, Some(&without)).await.expect_err("no scope");
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
        let with = format!("nk_without-{}", if *scope == Scope::Admin { "operate" } else { "admin" });
        let answer = call(&channel, &method, &request, Some(&with)).await;
        assert!(matches!(code(answer), Code::Ok | Code::InvalidArgument), "{}", path(&method));
        for (bad, expected) in [
            (None, "CREDENTIAL_MISSING"),
            (Some("nk_nobody"), "CREDENTIAL_INVALID"),
            (Some("nk_expired"), "CREDENTIAL_EXPIRED"),
        ] {
            let refused = call(&channel, &method, &request, bad).await.expect_err("no good key");
            assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, expected));
        }
    }
}

#[tokio::test]
async fn the_app_is_implied_by_a_key_bound_to_one() {
    let all = &Scope::ALL;
    let keys = vec![key("one", &["pets"], all), key("two", &["pets", "shop"], all)];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let request = RegisterDeviceRequest { app_id: String::new(), ..phone("choco", "t") };
    let mut one = server.client_with("nk_one").await;
    one.register_device(request.clone()).await.expect("pets is meant");
    let mut two = server.client_with("nk_two").await;
    assert_eq!(fields(two.register_device(request).await), ["app_id"]);
    two.register_device(RegisterDeviceRequest { app_id: "shop".into(), ..phone("choco", "t") }).await.expect("named");
}

#[tokio::test]
async fn content_is_masked_without_its_scope() {
    let keys = vec![root_key("root"), key("reader", &["pets"], &[Scope::Read])];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let mut root = server.client_with("nk_root").await;
    let id = root.notify_event(comment(&["choco"])).await.expect("accepted").into_inner().notification_id;
    let mut reader = server.client_with("nk_reader").await;
    let get = GetNotificationRequest { app_id: "pets".into(), notification_id: id };
    let list = ListNotificationsRequest { app_id: "pets".into(), ..Default::default() };
    for (client, shown) in [(&mut root, true), (&mut reader, false)] {
        let got = client.get_notification(get.clone()).await.expect("found").into_inner().notification.expect("one");
        assert_eq!((got.content.is_some(), got.data.is_some()), (shown, shown));
        assert_eq!(got.event_type, "comment.created");
        let listed = client.list_notifications(list.clone()).await.expect("listed").into_inner().notifications;
        assert_eq!((listed[0].content.is_some(), listed[0].data.is_some()), (shown, shown));
    }
}

#[tokio::test]
async fn everyone_needs_the_scope_broadcast() {
    let keys =
        vec![key("small", &["pets"], &[Scope::Notify]), key("large", &["pets"], &[Scope::Notify, Scope::Broadcast])];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let event = NotifyEventRequest { everyone: true, ..comment(&[]) };
    let refused = server.client_with("nk_small").await.notify_event(event.clone()).await.expect_err("everyone");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
    server.client_with("nk_large").await.notify_event(event).await.expect("accepted");
    let many: Vec<String> = (0..501).map(|at| format!("u{at}")).collect();
    let event = NotifyEventRequest { user_ids: many, ..comment(&[]) };
    let refused = server.client_with("nk_small").await.notify_event(event.clone()).await.expect_err("501 people");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
    server.client_with("nk_large").await.notify_event(event).await.expect("accepted");
}

#[tokio::test]
async fn an_unknown_method_is_told_only_to_those_with_a_key() {
    let server = TestServer::with(Setup { keys: vec![root_key("root")], ..Setup::default() }).await;
    let channel = server.channel().await;
    let call = async |key: Option<&str>| {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.expect("connected");
        let mut request = Request::new(Vec::new());
        if let Some(key) = key {
            request.metadata_mut().insert("authorization", key.parse().expect("ASCII"));
        }
        let path = http::uri::PathAndQuery::from_static("/nudged.v1.PushService/Teleport");
        code(client.unary(request, path, Raw).await)
    };
    assert_eq!(call(Some("Bearer nk_root")).await, Code::Unimplemented);
    assert_eq!(call(None).await, Code::Unauthenticated);
}

#[tokio::test]
async fn keys_are_replaced_while_serving() {
    let server = TestServer::with(Setup { keys: vec![root_key("old")], ..Setup::default() }).await;
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    let mut old = server.client_with("nk_old").await;
    old.list_opt_ins(list.clone()).await.expect("allowed");
    server.keys.replace(vec![root_key("new")]);
    assert_eq!(code(old.list_opt_ins(list.clone()).await), Code::Unauthenticated);
    server.client_with("nk_new").await.list_opt_ins(list).await.expect("allowed");
}
