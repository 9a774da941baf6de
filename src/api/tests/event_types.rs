use prost_types::{Struct, Value, value::Kind};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::harness::*;
use crate::api::proto::admin_service_client::AdminServiceClient;
use crate::api::proto::event_type::{Purpose, Template};
use crate::api::proto::*;
use crate::api::scopes::Scope;

type Admin = AdminServiceClient<Channel>;

fn template(locale: &str, title: &str) -> Template {
    Template { locale: locale.into(), title: Some(title.into()), ..Template::default() }
}

fn declared() -> EventType {
    EventType {
        name: "comment.created".into(),
        display_name: "댓글".into(),
        group: "내 글".into(),
        collapse_key: "comments:{{ subject }}".into(),
        ttl: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
        default_locale: "en".into(),
        templates: vec![
            template("ko", "{{ data.author|d('누군가')|josa('이/가') }} 댓글을 남겼어요"),
            template("en", "{{ data.author|d('Somebody') }} commented"),
        ],
        ..EventType::default()
    }
}

fn put(event_type: EventType) -> PutEventTypeRequest {
    PutEventTypeRequest { app_id: "pets".into(), event_type: Some(event_type) }
}

fn data(author: &str) -> Struct {
    let author = Value { kind: Some(Kind::StringValue(author.to_owned())) };
    Struct { fields: [("author".to_owned(), author)].into_iter().collect() }
}

async fn admin(server: &TestServer) -> Admin {
    AdminServiceClient::new(server.channel().await)
}

async fn admin_with(server: &TestServer, key: &str) -> AdminServiceClient<InterceptedService<Channel, Bearer>> {
    AdminServiceClient::with_interceptor(server.channel().await, Bearer::key(key))
}

#[tokio::test]
async fn a_type_is_declared_changed_listed_and_deleted() {
    let server = TestServer::start().await;
    let mut admin = admin(&server).await;
    let answer = admin.put_event_type(put(declared())).await.expect("declared").into_inner();
    assert_eq!(answer.changed, Some(true));
    let first = answer.event_type.expect("a type");
    assert_eq!((first.version, first.created_at.is_some()), (1, true));
    assert_eq!(EventType { version: 0, created_at: None, purpose: 0, on_maybe: 0, ..first.clone() }, declared());

    let again = admin.put_event_type(put(first.clone())).await.expect("the same").into_inner();
    assert_eq!((again.changed, again.event_type), (Some(false), Some(first.clone())), "what Get gives can be put");
    let other = EventType { display_name: "새 댓글".into(), ..declared() };
    let second = admin.put_event_type(put(other)).await.expect("declared").into_inner().event_type.expect("a type");
    assert_eq!(second.version, 2);

    let get = |version| GetEventTypeRequest { app_id: "pets".into(), name: "comment.created".into(), version };
    let got = async |admin: &mut Admin, version| {
        admin.get_event_type(get(version)).await.map(|answer| answer.into_inner().event_type.expect("a type"))
    };
    assert_eq!(got(&mut admin, None).await.expect("found"), second);
    assert_eq!(got(&mut admin, Some(1)).await.expect("found"), first);
    let missing = got(&mut admin, Some(9)).await.expect_err("no such version");
    assert_eq!((missing.code(), reason(&missing).as_str()), (Code::NotFound, "EVENT_TYPE_UNKNOWN"));

    for name in ["a", "z"] {
        admin.put_event_type(put(EventType { name: name.into(), ..declared() })).await.expect("declared");
    }
    let mut names = Vec::new();
    let mut list = ListEventTypesRequest { app_id: "pets".into(), page_size: 2, page_token: String::new() };
    loop {
        let page = admin.list_event_types(list.clone()).await.expect("listed").into_inner();
        names.extend(page.event_types.into_iter().map(|event_type| event_type.name));
        list.page_token = page.next_page_token;
        if list.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["a", "comment.created", "z"]);
    let forged = ListEventTypesRequest { page_token: "AAAA".into(), ..list };
    assert_eq!(fields(admin.list_event_types(forged).await), ["page_token"]);

    let delete = DeleteEventTypeRequest { app_id: "pets".into(), name: "comment.created".into() };
    for existed in [true, false] {
        let answer = admin.delete_event_type(delete.clone()).await.expect("deleted").into_inner();
        assert_eq!(answer.existed, Some(existed));
    }
    assert_eq!(code(got(&mut admin, None).await), Code::NotFound);
    let foreign = GetEventTypeRequest { app_id: "shop".into(), name: "a".into(), version: None };
    assert_eq!(code(admin.get_event_type(foreign).await), Code::NotFound);
}

#[tokio::test]
async fn every_wrong_field_and_template_is_named_and_nothing_is_stored() {
    let server = TestServer::start().await;
    let mut admin = admin(&server).await;
    let bad = EventType {
        name: "Comment".into(),
        purpose: 9,
        default_opt_in: Some(true),
        ttl: Some(prost_types::Duration { seconds: 29 * 86_400, nanos: 0 }),
        collapse_key: "{{".into(),
        default_locale: "ja".into(),
        templates: vec![
            template("ko", "{{ data.x|jossa('이/가') }}"),
            template("ko", "{{ name }}"),
            template("e n", "x"),
        ],
        ..EventType::default()
    };
    assert_eq!(
        fields(admin.put_event_type(put(bad)).await),
        [
            "event_type.purpose",
            "event_type.ttl",
            "event_type.name",
            "event_type.templates[1].locale",
            "event_type.templates[2].locale",
            "event_type.default_locale",
            "event_type.templates[0].title",
            "event_type.templates[1].title",
            "event_type.collapse_key",
        ]
    );
    let advertising = EventType { purpose: Purpose::Advertising.into(), default_opt_in: Some(true), ..declared() };
    assert_eq!(fields(admin.put_event_type(put(advertising)).await), ["event_type.default_opt_in"]);
    let absent = PutEventTypeRequest { app_id: "pets".into(), event_type: None };
    assert_eq!(fields(admin.put_event_type(absent).await), ["event_type"]);
    let list = ListEventTypesRequest { app_id: "pets".into(), ..Default::default() };
    assert!(admin.list_event_types(list).await.expect("listed").into_inner().event_types.is_empty());
}

#[tokio::test]
async fn declaring_a_type_takes_effect_at_once() {
    let server = TestServer::start().await;
    let (mut client, mut admin) = (server.client().await, admin(&server).await);
    enrol(&mut client, "choco").await;
    // The app has no declared types, which the server may remember for a moment.
    client.notify_event(comment(&["choco"])).await.expect("accepted");
    let bare = NotifyEventRequest { content: None, ..comment(&["choco"]) };
    assert_eq!(fields(client.notify_event(bare.clone()).await), ["content"]);
    admin.put_event_type(put(declared())).await.expect("declared");
    let accepted = client.notify_event(bare).await.expect("it brings its words").into_inner();
    let get = GetNotificationRequest { app_id: "pets".into(), notification_id: accepted.notification_id };
    let notification = client.get_notification(get).await.expect("found").into_inner().notification.expect("one");
    assert_eq!(notification.collapse_key, "comments:");
    let ttl = notification.expires_at.expect("a time").seconds - notification.accepted_at.expect("a time").seconds;
    assert_eq!(ttl, 3_600);
    let typo = NotifyEventRequest { event_type: "coment.created".into(), ..comment(&["choco"]) };
    let refused = client.notify_event(typo).await.expect_err("unknown");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "EVENT_TYPE_UNKNOWN"));
    assert!(refused.message().contains("did you mean comment.created"), "{}", refused.message());
}

#[tokio::test]
async fn a_preview_shows_every_language_and_stores_nothing() {
    let server = TestServer::start().await;
    let mut admin = admin(&server).await;
    let unstored = PreviewRequest {
        app_id: "pets".into(),
        event_type: Some(declared()),
        data: Some(data("콩")),
        ..Default::default()
    };
    let previews = admin.preview(unstored).await.expect("shown").into_inner().previews;
    let titles: Vec<_> = previews
        .iter()
        .map(|preview| {
            let title = preview.content.as_ref().and_then(|content| content.title.as_deref());
            (preview.locale.as_str(), preview.template_locale.as_str(), title.expect("a title"))
        })
        .collect();
    assert_eq!(titles, [("ko", "ko", "콩이 댓글을 남겼어요"), ("en", "en", "콩 commented")]);
    assert_eq!(previews[0].silent, Some(false));
    let named = PreviewRequest { app_id: "pets".into(), name: "comment.created".into(), ..Default::default() };
    assert_eq!(code(admin.preview(named.clone()).await), Code::NotFound, "it was only shown");

    admin.put_event_type(put(declared())).await.expect("declared");
    let asked = PreviewRequest {
        locales: vec!["ko-KR".into(), "ja".into(), String::new()],
        data: Some(data("초코")),
        content: Some(Content { body: Some("미리보기".into()), ..Content::default() }),
        subject: "post:42".into(),
        ..named.clone()
    };
    let previews = admin.preview(asked).await.expect("shown").into_inner().previews;
    let locales: Vec<_> = previews.iter().map(|preview| preview.template_locale.as_str()).collect();
    assert_eq!(locales, ["ko", "en", "en"]);
    let content = previews[0].content.as_ref().expect("content");
    assert_eq!(content.title.as_deref(), Some("초코가 댓글을 남겼어요"));
    assert_eq!(content.body.as_deref(), Some("미리보기"));
    assert_eq!(previews[0].collapse_key, "comments:post:42");

    let both = PreviewRequest { event_type: Some(declared()), ..named.clone() };
    assert_eq!(fields(admin.preview(both).await), ["event_type"]);
    let bad = PreviewRequest { locales: vec!["e n".into()], subject: "a\n".into(), name: String::new(), ..named };
    assert_eq!(fields(admin.preview(bad).await), ["name", "subject", "locales[0]"]);
}

#[tokio::test]
async fn a_key_without_admin_only_reads() {
    let keys = vec![key("reader", &["pets"], &[Scope::Read]), root_key("root")];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    admin_with(&server, "nk_root").await.put_event_type(put(declared())).await.expect("declared");
    let mut reader = admin_with(&server, "nk_reader").await;
    let refused = reader.put_event_type(put(declared())).await.expect_err("not allowed");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "SCOPE_MISSING"));
    let delete = DeleteEventTypeRequest { app_id: "pets".into(), name: "comment.created".into() };
    assert_eq!(code(reader.delete_event_type(delete).await), Code::PermissionDenied);
    let list = ListEventTypesRequest { app_id: "pets".into(), ..Default::default() };
    assert_eq!(reader.list_event_types(list).await.expect("listed").into_inner().event_types.len(), 1);
}
