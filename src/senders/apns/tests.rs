//! What goes over the wire to Apple, to the byte.

use std::borrow::Cow;

use serde_json::{Value, json};
use uuid::Uuid;

use super::auth::tests::p8;
use super::wire::{ApnsWire, MAX_PAYLOAD_BYTES, Prepared, prepare};
use super::{Auth, Settings, SettingsError};
use crate::domain::ids::{CollapseKey, DeviceId, UserKey};
use crate::domain::platform::DeviceToken;
use crate::domain::sending::{Priority, SendOptions};
use crate::domain::time::UnixMs;
use crate::senders::http2::Endpoint;
use crate::senders::http2::wire::{AuthState, Wire};
use crate::senders::suite::batch_of;
use crate::senders::{EncodeError, Encoded, Message, SendTarget};

const ID: &str = "0f1e2d3c-4b5a-8697-8877-665544332211";
const NOW: UnixMs = UnixMs(1_800_000_000_000);
const BUNDLE: &str = "com.ifriendspet.app";

fn options() -> SendOptions {
    SendOptions { priority: Priority::High, collapse_key: None, expires_at: UnixMs(1_800_000_060_500), push_id: true }
}

fn message() -> Message<'static> {
    Message {
        title: Some("초코님이 댓글을 남겼어요".to_owned()),
        body: Some("\"너무 귀여워요\" 🐶".to_owned()),
        ..Message::default()
    }
}

fn target() -> SendTarget {
    SendTarget {
        index: 0,
        user: UserKey(1),
        device: DeviceId(2),
        token: DeviceToken::trusted("00aaff"),
        nudged_id: ID.parse().expect("a UUID"),
        variant: 0,
    }
}

/// Headers by name, in no order, and the body.
fn request_of(prepared: Prepared, wire: &mut ApnsWire) -> (http::Request<()>, String) {
    let batch = batch_of(Encoded::new(prepared), vec![target()]);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(matches!(wire.poll_auth(NOW, &mut cx), AuthState::Ready));
    let (request, body) = wire.request(&batch, &batch.targets[0], NOW).expect("a request");
    (request, String::from_utf8(body.to_vec()).expect("UTF-8"))
}

fn certificate_wire() -> ApnsWire {
    ApnsWire::new(Endpoint::parse("https://api.push.apple.com").expect("a URL"), None)
}

fn body_of(message: &Message, options: &SendOptions) -> String {
    request_of(prepare(BUNDLE, message, options, false).expect("fits"), &mut certificate_wire()).1
}

#[test]
fn an_alert_to_the_byte() {
    let mut message = message();
    let data = json!({"post_id": 42, "score": 0.5, "tags": ["a"]}).as_object().expect("an object").clone();
    message.data = Cow::Owned(data);
    message.link = Some("ifriendspet://posts/42".to_owned());
    let expected = concat!(
        r#"{"aps":{"alert":{"title":"초코님이 댓글을 남겼어요","body":"\"너무 귀여워요\" 🐶"}},"#,
        r#""post_id":42,"score":0.5,"tags":["a"],"link":"ifriendspet://posts/42","#,
        r#""nudged_id":"0f1e2d3c-4b5a-8697-8877-665544332211"}"#
    );
    assert_eq!(body_of(&message, &options()), expected);
}

#[test]
fn everything_an_alert_can_have() {
    let message = Message {
        title: Some("t".to_owned()),
        subtitle: Some("s".to_owned()),
        body: Some("b".to_owned()),
        image: Some("https://img.test/1.jpg".to_owned()),
        link: None,
        sound: Some("bark.caf".to_owned()),
        badge: Some(3),
        category: Some("COMMENT".to_owned()),
        thread_id: Some("post-42".to_owned()),
        ..Message::default()
    };
    let body: Value = serde_json::from_str(&body_of(&message, &options())).expect("JSON");
    let expected = json!({
        "aps": {
            "alert": {"title": "t", "subtitle": "s", "body": "b"},
            "badge": 3, "sound": "bark.caf", "category": "COMMENT", "mutable-content": 1, "thread-id": "post-42"
        },
        "image": "https://img.test/1.jpg",
        "nudged_id": ID
    });
    assert_eq!(body, expected);
}

#[test]
fn headers_of_an_alert() {
    let mut wire = certificate_wire();
    let (request, _) = request_of(prepare(BUNDLE, &message(), &options(), false).expect("fits"), &mut wire);
    assert_eq!(request.method(), http::Method::POST);
    assert_eq!(request.uri(), "https://api.push.apple.com/3/device/00aaff");
    let headers = request.headers();
    for (name, value) in [
        ("apns-id", ID),
        ("apns-topic", BUNDLE),
        ("apns-push-type", "alert"),
        ("apns-priority", "10"),
        ("apns-expiration", "1800000060"),
        ("apns-collapse-id", ID),
    ] {
        assert_eq!(headers[name], value, "{name}");
    }
    assert_eq!(headers.len(), 6, "and no others");
    assert!(headers["apns-id"].is_sensitive() && headers["apns-collapse-id"].is_sensitive());
}

#[test]
fn a_callers_collapse_key_and_priority_are_used() {
    let collapse_key = CollapseKey::parse("k", "댓글:42").expect("a key");
    let options = SendOptions { priority: Priority::Normal, collapse_key: Some(collapse_key), ..options() };
    let (request, _) = request_of(prepare(BUNDLE, &message(), &options, false).expect("fits"), &mut certificate_wire());
    assert_eq!(request.headers()["apns-collapse-id"].as_bytes(), "댓글:42".as_bytes());
    assert_eq!(request.headers()["apns-priority"], "5");
    assert_eq!(request.headers()["apns-id"], ID);
}

#[test]
fn a_background_push_has_nothing_but_content_available() {
    let message = Message {
        silent: true,
        badge: Some(1),
        thread_id: Some("x".to_owned()),
        data: Cow::Owned(json!({"sync": true}).as_object().expect("an object").clone()),
        ..Message::default()
    };
    let (request, body) =
        request_of(prepare(BUNDLE, &message, &options(), false).expect("fits"), &mut certificate_wire());
    assert_eq!(body, format!(r#"{{"aps":{{"content-available":1}},"sync":true,"nudged_id":"{ID}"}}"#));
    assert_eq!(request.headers()["apns-push-type"], "background");
    assert_eq!(request.headers()["apns-priority"], "5", "10 would be an error");
}

#[test]
fn without_push_id_payloads_do_not_carry_it() {
    let options = SendOptions { push_id: false, ..options() };
    let (request, body) =
        request_of(prepare(BUNDLE, &message(), &options, false).expect("fits"), &mut certificate_wire());
    assert!(!body.contains("nudged_id"), "{body}");
    serde_json::from_str::<Value>(&body).expect("JSON");
    assert_eq!(request.headers()["apns-id"], ID);
}

#[test]
fn a_token_connection_carries_the_jwt() {
    let settings = settings();
    let checked = settings.check().expect("good");
    let mut wire = ApnsWire::new(checked.production, checked.tokens);
    assert!(wire.first_request_alone());
    let (request, _) = request_of(prepare(BUNDLE, &message(), &options(), true).expect("fits"), &mut wire);
    let authorization = &request.headers()["authorization"];
    assert!(authorization.is_sensitive());
    assert!(authorization.to_str().expect("ASCII").starts_with("bearer ey"));
}

#[test]
fn the_limit_is_in_bytes_with_the_id() {
    let empty = Message { body: Some(String::new()), ..Message::default() };
    let frame = body_of(&empty, &options()).len();
    let room = MAX_PAYLOAD_BYTES - frame;
    let hangul = "가".repeat(room / 3) + &"x".repeat(room % 3);
    let fits = Message { body: Some(hangul.clone()), ..Message::default() };
    assert_eq!(body_of(&fits, &options()).len(), 4096);
    let over = Message { body: Some(hangul + "x"), ..Message::default() };
    let error = prepare(BUNDLE, &over, &options(), false).err().expect("too large");
    assert_eq!(error, EncodeError::TooLarge { size: 4097, limit: 4096 });
    let bare = SendOptions { push_id: false, ..options() };
    assert!(prepare(BUNDLE, &over, &bare, false).is_ok(), "without the id there is room");
}

#[test]
fn reserved_keys_in_data_never_replace_ours() {
    let data = json!({"aps": {"alert": "forged"}, "nudged_id": "forged"}).as_object().expect("an object").clone();
    let body = body_of(&Message { data: Cow::Owned(data), ..message() }, &options());
    assert!(!body.contains("forged"), "{body}");
}

fn settings() -> Settings {
    let auth = Auth::Token { p8_pem: p8(), key_id: "ABC123DEFG".to_owned(), team_id: "DEF123GHIJ".to_owned() };
    Settings::new(auth, vec![BUNDLE.to_owned()])
}

#[test]
fn settings_say_what_is_wrong() {
    use crate::senders::Secret;
    settings().validate().expect("good");
    let token = |p8_pem: Secret, key_id: &str, team_id: &str| Settings {
        auth: Auth::Token { p8_pem, key_id: key_id.to_owned(), team_id: team_id.to_owned() },
        ..settings()
    };
    let error = |settings: Settings| settings.validate().expect_err("bad").to_string();
    assert!(
        error(token(Secret::new("-----BEGIN PRIVATE KEY-----"), "ABC123DEFG", "DEF123GHIJ")).starts_with("key_file: ")
    );
    assert!(error(token(p8(), "short", "DEF123GHIJ")).starts_with("key_id: "));
    assert!(error(token(p8(), "ABC123DEFG", "")).starts_with("team_id: "));
    assert!(error(Settings { topics: vec![], ..settings() }).starts_with("topic: "));
    assert!(error(Settings { topics: vec!["a b".to_owned()], ..settings() }).starts_with("topic: "));
    assert_eq!(error(Settings { endpoint: "http://example.com".to_owned(), ..settings() }), "endpoint");
    assert!(matches!(
        Settings { ca_pem: Some(b"nothing".to_vec()), ..settings() }.validate(),
        Err(SettingsError::Tls(_))
    ));
    let certificate = Auth::Certificate { cert_pem: b"x".to_vec(), key_pem: Secret::new("x") };
    assert!(matches!(Settings { auth: certificate, ..settings() }.validate(), Err(SettingsError::Tls(_))));
    let text = format!("{:?}", settings());
    assert!(text.contains("Secret(") && !text.contains("PRIVATE KEY"), "{text}");
}

#[test]
fn ids_are_lower_case_uuids() {
    let mut target = target();
    target.nudged_id = Uuid::from_u128(u128::MAX);
    let batch = batch_of(Encoded::new(prepare(BUNDLE, &message(), &options(), false).expect("fits")), vec![target]);
    let (request, _) = certificate_wire().request(&batch, &batch.targets[0], NOW).expect("a request");
    assert_eq!(request.headers()["apns-id"], "ffffffff-ffff-ffff-ffff-ffffffffffff");
}
