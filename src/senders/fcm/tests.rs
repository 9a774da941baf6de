//! What goes over the wire to Google, to the byte.

use std::borrow::Cow;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use http::HeaderMap;
use serde_json::{Value, json};

use super::auth::tests::private_key_pem;
use super::auth::{AccessTokens, ServiceAccount, TokenEndpoint, TokenFuture, TokenReply};
use super::wire::{FcmWire, MAX_PAYLOAD_BYTES, Prepared, prepare};
use super::{Settings, SettingsError};
use crate::domain::ids::{CollapseKey, DeviceId, UserKey};
use crate::domain::platform::DeviceToken;
use crate::domain::sending::{Priority, SendOptions};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::senders::http2::Endpoint;
use crate::senders::http2::wire::{AuthState, Wire};
use crate::senders::suite::batch_of;
use crate::senders::{EncodeError, Encoded, Message, Secret, SendTarget};

const ID: &str = "0f1e2d3c-4b5a-8697-8877-665544332211";
const NOW: UnixMs = UnixMs(1_800_000_000_000);

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

fn prepared(message: &Message, options: &SendOptions) -> Prepared {
    prepare(message, options).expect("fits")
}

struct Fixed;

impl TokenEndpoint for Fixed {
    fn post(&self, _form: Vec<(&'static str, String)>) -> TokenFuture {
        let body = br#"{"access_token":"ya29.token","expires_in":3599}"#.to_vec();
        Box::pin(std::future::ready(Ok(TokenReply { status: 200, headers: HeaderMap::new(), body })))
    }
}

fn wire() -> FcmWire {
    let runtime = Runtime::simulated(1, NOW);
    let account = ServiceAccount::new("a@b".to_owned(), "kid".to_owned(), &private_key_pem()).expect("a key");
    let tokens = AccessTokens::new(runtime.clone(), Arc::new(account), Arc::new(Fixed));
    let endpoint = Endpoint::parse("https://fcm.googleapis.com").expect("a URL");
    FcmWire::new(runtime, &endpoint, "my-project", tokens).expect("a path")
}

async fn request_at(prepared: Prepared, expires_at: UnixMs, now: UnixMs) -> (http::Request<()>, String) {
    let target = SendTarget {
        index: 0,
        user: UserKey(1),
        device: DeviceId(2),
        token: DeviceToken::trusted("abc:APA91b-_x"),
        nudged_id: ID.parse().expect("a UUID"),
        variant: 0,
    };
    let mut batch = batch_of(Encoded::new(prepared), vec![target]);
    batch.expires_at = expires_at;
    let mut wire = wire();
    let ready = std::future::poll_fn(|cx| match wire.poll_auth(now, cx) {
        AuthState::Waiting => Poll::Pending,
        state => Poll::Ready(matches!(state, AuthState::Ready)),
    });
    assert!(ready.await);
    let (request, body) = wire.request(&batch, &batch.targets[0], now).expect("a request");
    (request, String::from_utf8(body.to_vec()).expect("UTF-8"))
}

async fn body_of(message: &Message<'_>, options: &SendOptions) -> String {
    request_at(prepared(message, options), options.expires_at, NOW).await.1
}

async fn json_of(message: &Message<'_>, options: &SendOptions) -> Value {
    serde_json::from_str(&body_of(message, options).await).expect("JSON")
}

#[tokio::test]
async fn an_alert_to_the_byte() {
    let mut message = message();
    let data = json!({"post_id": 42, "tags": ["a"], "name": "초코"}).as_object().expect("an object").clone();
    message.data = Cow::Owned(data);
    message.link = Some("ifriendspet://posts/42".to_owned());
    let expected = concat!(
        r#"{"message":{"token":"abc:APA91b-_x","#,
        r#""notification":{"title":"초코님이 댓글을 남겼어요","body":"\"너무 귀여워요\" 🐶"},"#,
        r#""data":{"post_id":"42","tags":"[\"a\"]","name":"초코","link":"ifriendspet://posts/42","#,
        r#""nudged_id":"0f1e2d3c-4b5a-8697-8877-665544332211"},"#,
        r#""android":{"priority":"HIGH","ttl":"60s","notification":{"tag":"0f1e2d3c-4b5a-8697-8877-665544332211"}},"#,
        r#""apns":{"headers":{"apns-priority":"10","apns-expiration":"1800000060","#,
        r#""apns-collapse-id":"0f1e2d3c-4b5a-8697-8877-665544332211"},"payload":{"aps":{}}}}}"#
    );
    assert_eq!(body_of(&message, &options()).await, expected);
}

#[tokio::test]
async fn everything_an_alert_can_have() {
    let message = Message {
        title: Some("t".to_owned()),
        subtitle: Some("s".to_owned()),
        body: Some("b".to_owned()),
        image: Some("https://img.test/1.jpg".to_owned()),
        sound: Some("bark".to_owned()),
        badge: Some(3),
        category: Some("COMMENT".to_owned()),
        thread_id: Some("post-42".to_owned()),
        ..Message::default()
    };
    let collapse_key = Some(CollapseKey::parse("k", "post:\"42\"").expect("a key"));
    let options = SendOptions { priority: Priority::Normal, collapse_key, ..options() };
    let expected = json!({"message": {
        "token": "abc:APA91b-_x",
        "notification": {"title": "t", "body": "b", "image": "https://img.test/1.jpg"},
        "data": {"image": "https://img.test/1.jpg", "nudged_id": ID},
        "android": {"priority": "NORMAL", "ttl": "60s", "notification": {
            "tag": "post:\"42\"", "sound": "bark", "click_action": "COMMENT", "notification_count": 3
        }},
        "apns": {
            "headers": {
                "apns-priority": "5", "apns-expiration": "1800000060", "apns-collapse-id": "post:\"42\""
            },
            "payload": {"aps": {
                "alert": {"title": "t", "subtitle": "s", "body": "b"},
                "badge": 3, "sound": "bark", "category": "COMMENT", "thread-id": "post-42", "mutable-content": 1
            }},
            "fcm_options": {"image": "https://img.test/1.jpg"}
        }
    }});
    assert_eq!(json_of(&message, &options).await, expected);
}

#[tokio::test]
async fn a_silent_message_is_data_only() {
    let data = json!({"sync": true}).as_object().expect("an object").clone();
    let message = Message { silent: true, badge: Some(1), data: Cow::Owned(data), ..Message::default() };
    let options = SendOptions { priority: Priority::Normal, ..options() };
    let expected = json!({"message": {
        "token": "abc:APA91b-_x",
        "data": {"sync": "true", "nudged_id": ID},
        "android": {"priority": "NORMAL", "ttl": "60s"},
        "apns": {
            "headers": {
                "apns-priority": "5", "apns-expiration": "1800000060", "apns-push-type": "background",
                "apns-collapse-id": ID
            },
            "payload": {"aps": {"content-available": 1}}
        }
    }});
    assert_eq!(json_of(&message, &options).await, expected);
}

#[tokio::test]
async fn without_push_id_data_does_not_carry_it() {
    let options = SendOptions { push_id: false, ..options() };
    let json = json_of(&message(), &options).await;
    assert_eq!(json["message"].get("data"), None, "and no empty object either");
    assert_eq!(json["message"]["android"]["notification"]["tag"], ID);
}

#[tokio::test]
async fn the_ttl_is_what_is_left_at_hand_over() {
    let ttl = |expires_at: i64, now: i64| async move {
        let body = request_at(prepared(&message(), &options()), UnixMs(expires_at), UnixMs(now)).await.1;
        let json: Value = serde_json::from_str(&body).expect("JSON");
        json["message"]["android"]["ttl"].as_str().expect("a ttl").to_owned()
    };
    let now = NOW.0;
    assert_eq!(ttl(now + 60_500, now).await, "60s");
    assert_eq!(ttl(now + 999, now).await, "0s");
    assert_eq!(ttl(now - 5, now).await, "0s");
    assert_eq!(ttl(now + 2_419_200_000, now).await, "2419200s");
    assert_eq!(ttl(now + 2_419_201_000, now).await, "2419200s", "FCM takes no more");
}

#[tokio::test]
async fn the_request_and_its_headers() {
    let (request, _) = request_at(prepared(&message(), &options()), UnixMs::MAX, NOW).await;
    assert_eq!(request.method(), http::Method::POST);
    assert_eq!(request.uri(), "https://fcm.googleapis.com/v1/projects/my-project/messages:send");
    assert_eq!(request.headers()["content-type"], "application/json");
    let authorization = &request.headers()["authorization"];
    assert!(authorization == "Bearer ya29.token" && authorization.is_sensitive());
    assert_eq!(request.headers().len(), 2);
}

#[test]
fn the_limit_counts_keys_and_values_in_bytes() {
    // title, body, tag and nudged_id with their values.
    let fixed = "title".len() + "t".len() + "body".len() + "tag".len() + 36 + "nudged_id".len() + 36;
    let room = MAX_PAYLOAD_BYTES - fixed;
    let hangul = "가".repeat(room / 3) + &"x".repeat(room % 3);
    let of = |body: String| Message { title: Some("t".to_owned()), body: Some(body), ..Message::default() };
    assert!(prepare(&of(hangul.clone()), &options()).is_ok());
    let error = prepare(&of(hangul + "x"), &options()).err().expect("too large");
    assert_eq!(error, EncodeError::TooLarge { size: 4097, limit: 4096 });
}

#[tokio::test]
async fn reserved_keys_in_data_never_replace_ours() {
    let data = json!({"nudged_id": "forged"}).as_object().expect("an object").clone();
    assert!(!body_of(&Message { data: Cow::Owned(data), ..message() }, &options()).await.contains("forged"));
}

fn key_file() -> Value {
    json!({
        "type": "service_account", "project_id": "my-project", "private_key_id": "kid",
        "private_key": private_key_pem(), "client_email": "a@my-project.iam.gserviceaccount.com",
        "token_uri": "https://oauth2.googleapis.com/token"
    })
}

#[test]
fn settings_say_what_is_wrong() {
    let settings = |file: &Value| Settings::new(Secret::new(file.to_string()));
    settings(&key_file()).validate().expect("good");
    let broken = |field: &str, value: Value| {
        let mut file = key_file();
        file[field] = value;
        settings(&file).validate().expect_err("bad").to_string()
    };
    assert!(broken("type", json!("authorized_user")).contains("`type`"));
    assert!(broken("project_id", json!("")).contains("`project_id` is missing"));
    assert!(broken("project_id", json!("a/b")).contains("`project_id`"));
    assert!(broken("private_key", json!("nonsense")).contains("`private_key`"));
    assert!(broken("token_uri", json!("http://example.com/token")).contains("`token_uri`"));
    assert!(matches!(Settings::new(Secret::new("{")).validate(), Err(SettingsError::NotJson)));
    let text = format!("{:?}", settings(&key_file()));
    assert!(text.contains("Secret(") && !text.contains("PRIVATE KEY"), "{text}");
}

#[test]
fn a_message_of_another_sender_is_refused() {
    let batch = batch_of(Encoded::new(7_u8), vec![]);
    let target = SendTarget {
        index: 0,
        user: UserKey(1),
        device: DeviceId(2),
        token: DeviceToken::trusted("t"),
        nudged_id: uuid::Uuid::nil(),
        variant: 0,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _guard = runtime.enter();
    let mut wire = wire();
    let _ = wire.poll_auth(NOW, &mut Context::from_waker(Waker::noop()));
    assert!(wire.request(&batch, &target, NOW).is_err());
}

#[tokio::test]
async fn a_message_has_exactly_one_target_and_one_android_block() {
    for silent in [false, true] {
        let json = json_of(&Message { silent, ..message() }, &options()).await;
        let message = json["message"].as_object().expect("a message");
        assert!(message.contains_key("token") && message.contains_key("android"));
        for other in ["fid", "topic", "condition", "android_v2"] {
            assert!(!message.contains_key(other), "{other}");
        }
        let data = message["data"].as_object().expect("data");
        assert!(data.values().all(Value::is_string), "FCM takes only strings");
    }
}
