//! Nothing of one app is reached with a key of another, by any RPC that there is or will be.
//!
//! The service descriptor is walked: an RPC without a call in [`CALLS`] fails, and so does a field of a request whose name
//! is in none of the lists below, or an id that no call of its RPC tries. Two apps are furnished alike, same people, same
//! tokens, same names; every row and every answer is looked at, not only the status.

use std::collections::{BTreeMap, BTreeSet};

use diesel::connection::SimpleConnection as _;
use diesel::sql_types::Text;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection as _, QueryableByName, RunQueryDsl as _, sql_query};
use prost_reflect::{DynamicMessage, MessageDescriptor, MethodDescriptor};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::harness::*;
use super::raw::{call, methods, path};
use crate::api::auth::ApiKey;
use crate::api::scopes::{self, Scope};
use crate::domain::time::UnixMs;
use crate::service::page_token::PageScope;
use crate::storage::Registry as _;
use crate::storage::moving::{LEFT_BEHIND, Line};

/// What only the server makes and what is good for one app: in each RPC that takes one, another app's is tried.
const HANDLES: &[&str] = &["cursor", "device_id", "device_ids", "nudged_id", "notification_id", "page_token", "app_id"];

/// What callers name themselves, within their app, and what names nothing.
const PLAIN: &[&str] = &[
    "active",
    "actor_id",
    "all_apps",
    "apns_environment",
    "apns_topic",
    "app_version",
    "badge",
    "body",
    "category",
    "collapse_key",
    "created_at",
    "credential",
    "data",
    "default_locale",
    "default_opt_in",
    "died_before",
    "died_from",
    "display_name",
    "dry_run",
    "event_at",
    "event_type",
    "everyone",
    "evidence",
    "group",
    "idempotency_key",
    "image",
    "import_id",
    "installation_id",
    "kind",
    "kinds",
    "labels",
    "lane",
    "link",
    "locale",
    "locales",
    "localized",
    "max_audience",
    "name",
    "not_before",
    "observed_at",
    "on_maybe",
    "opted_in",
    "os_version",
    "page_size",
    "permission",
    "platform",
    "policy_version",
    "priority",
    "purpose",
    "reason",
    "reasons",
    "sequence",
    "sound",
    "source",
    "states",
    "subject",
    "subtitle",
    "thread_id",
    "time_zone",
    "title",
    "token",
    "topic",
    "topics",
    "ttl",
    "urgent",
    "user_id",
    "user_ids",
    "version",
];

/// In every text of `pets`: an answer to `shop` must not hold it.
const MARK: &str = "ONLY-PETS";

/// How a call for one's own app ends.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Own {
    Served,
    /// Concerns every app.
    Refused,
}

/// Calls of every RPC, those that take something away last. `$x` stands for the app's own or another app's handle;
/// `$app` is always the own app, `$own_…` the own handle.
fn calls() -> Vec<(&'static str, Own, Value)> {
    use Own::{Refused, Served};
    let at = "2026-01-01T00:00:00Z";
    let event = |extra: Value| {
        let mut event = json!({"app_id": "$app", "event_type": "comment.created", "content": {"title": "t"}});
        event.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        event
    };
    let import = |part: &str, of: Value| json!([{"start": {"app_id": "$app", "import_id": "move"}}, {"item": {"sequence": 99, part: of}}]);
    let device = json!({"user_id": "choco", "platform": "FCM", "token": "third", "observed_at": at});
    let with = |of: &Value, key: &str, value: &str| {
        let mut of = of.clone();
        of[key] = value.into();
        of
    };
    let choice = json!({"user_id": "choco", "opted_in": true, "observed_at": at});
    let topic = json!({"user_id": "choco", "topic": "news", "observed_at": at});
    vec![
        ("RegisterDevice", Served, json!({"app_id": "$app", "user_id": "choco", "platform": "FCM", "token": "second"})),
        (
            "RegisterDevice",
            Served,
            json!({"app_id": "$app", "user_id": "choco", "platform": "FCM", "token": "first", "device_id": "$device_id"}),
        ),
        ("ListDevices", Served, json!({"app_id": "$app", "user_id": "choco"})),
        (
            "ListDevices",
            Served,
            json!({"app_id": "$app", "user_id": "choco", "page_size": 1, "page_token": "$page_token"}),
        ),
        ("SetOptIn", Served, json!({"app_id": "$app", "user_id": "choco", "opted_in": true})),
        (
            "SetOptIn",
            Served,
            json!({"app_id": "$app", "user_id": "choco", "opted_in": true, "device_id": "$device_id"}),
        ),
        ("ListOptIns", Served, json!({"app_id": "$app", "user_id": "choco"})),
        ("Subscribe", Served, json!({"app_id": "$app", "user_id": "choco", "topic": "more"})),
        ("ListSubscriptions", Served, json!({"app_id": "$app", "user_id": "choco"})),
        (
            "ListSubscriptions",
            Served,
            json!({"app_id": "$app", "user_id": "choco", "page_size": 1, "page_token": "$page_token"}),
        ),
        ("ImportDevices", Served, import("device", with(&device, "app_id", "$app_id"))),
        ("ImportDevices", Served, import("device", with(&device, "device_id", "$device_id"))),
        ("ImportOptIns", Served, import("opt_in", with(&choice, "app_id", "$app_id"))),
        ("ImportOptIns", Served, import("opt_in", with(&choice, "device_id", "$device_id"))),
        ("ImportSubscriptions", Served, import("subscription", with(&topic, "app_id", "$app_id"))),
        ("NotifyEvent", Served, event(json!({"user_ids": ["choco"], "topics": ["news"]}))),
        ("NotifyEvent", Served, event(json!({"device_ids": ["$device_id"]}))),
        ("NotifyEvent", Served, event(json!({"user_ids": ["choco"], "event_type": "$event_type"}))),
        (
            "NotifyEvents",
            Served,
            json!({"sequence": 1, "event": event(json!({"device_ids": ["$device_id"], "idempotency_key": "streamed"}))}),
        ),
        ("GetNotification", Served, json!({"app_id": "$app", "notification_id": "$notification_id"})),
        ("ListNotifications", Served, json!({"app_id": "$app"})),
        ("ListNotifications", Served, json!({"app_id": "$app", "page_size": 1, "page_token": "$page_token"})),
        ("ListDeliveries", Served, json!({"app_id": "$app", "notification_id": "$notification_id"})),
        (
            "ListDeliveries",
            Served,
            json!({"app_id": "$app", "notification_id": "$own_notification_id", "page_size": 1, "page_token": "$page_token"}),
        ),
        ("WatchDeliveries", Served, json!({"app_id": "$app", "cursor": "$cursor"})),
        ("WatchDeliveries", Served, json!({"app_id": "$app", "filter": {"notification_id": "$notification_id"}})),
        (
            "ExplainDelivery",
            Served,
            json!({"app_id": "$app", "notification_id": "$notification_id", "user_id": "choco"}),
        ),
        ("ExplainDelivery", Served, json!({"app_id": "$app", "nudged_id": "$nudged_id"})),
        (
            "PutEventType",
            Served,
            json!({"app_id": "$app", "event_type": {"name": "comment.created", "templates": [{"title": "new"}]}}),
        ),
        ("GetEventType", Served, json!({"app_id": "$app", "name": "$event_type"})),
        ("ListEventTypes", Served, json!({"app_id": "$app"})),
        ("ListEventTypes", Served, json!({"app_id": "$app", "page_size": 1, "page_token": "$page_token"})),
        ("Preview", Served, json!({"app_id": "$app", "name": "$event_type"})),
        ("PauseDelivery", Served, json!({"app_id": "$app", "event_type": "comment.created"})),
        ("PauseDelivery", Refused, json!({"all_apps": true})),
        ("ListPauses", Served, json!({"app_id": "$app"})),
        ("ListPauses", Refused, json!({"all_apps": true})),
        ("GetProviderStatus", Served, json!({"app_id": "$app"})),
        ("ConfirmRetirements", Served, json!({"app_id": "$app", "platform": "FCM"})),
        ("RedriveDeliveries", Served, json!({"app_id": "$app", "notification_id": "$notification_id"})),
        ("RedriveDeliveries", Served, json!({"app_id": "$app", "nudged_id": "$nudged_id"})),
        ("RedriveDeliveries", Served, json!({"app_id": "$app", "page_token": "$page_token"})),
        ("ResumeDelivery", Served, json!({"app_id": "$app", "event_type": "comment.created"})),
        ("ResumeDelivery", Refused, json!({"all_apps": true})),
        ("ConfirmRestore", Refused, json!({})),
        ("DeleteEventType", Served, json!({"app_id": "$app", "name": "comment.created"})),
        ("CancelNotification", Served, json!({"app_id": "$app", "notification_id": "$notification_id"})),
        ("Unsubscribe", Served, json!({"app_id": "$app", "user_id": "choco", "topic": "news"})),
        ("UnregisterDevice", Served, json!({"app_id": "$app", "platform": "FCM", "token": "second"})),
        ("UnregisterDevice", Served, json!({"app_id": "$app", "device_id": "$device_id"})),
    ]
}

/// What an app's own server-made words are, by the placeholder without `$`; page tokens by their RPC.
struct Handles(BTreeMap<String, String>);

impl Handles {
    fn get(&self, rpc: &str, name: &str) -> &str {
        let key = if name == "page_token" { format!("{rpc}.page_token") } else { name.to_owned() };
        self.0.get(&key).unwrap_or_else(|| panic!("no handle {key}"))
    }

    /// Puts the handles into a call's messages: its own, and `other`'s for the placeholders under test.
    fn fill(&self, rpc: &str, other: &Self, value: &Value) -> Value {
        match value {
            Value::String(text) if text.starts_with('$') => {
                let name = &text[1..];
                match name.strip_prefix("own_") {
                    Some(own) => self.get(rpc, own).into(),
                    None if name == "app" => self.get(rpc, "app_id").into(),
                    None => other.get(rpc, name).into(),
                }
            }
            Value::Array(items) => items.iter().map(|item| self.fill(rpc, other, item)).collect(),
            Value::Object(map) => map
                .iter()
                .map(|(key, value)| (key.clone(), self.fill(rpc, other, value)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
            plain => plain.clone(),
        }
    }
}

fn tries_a_handle(value: &Value) -> bool {
    match value {
        Value::String(text) => text.starts_with('$') && text != "$app" && !text.starts_with("$own_"),
        Value::Array(items) => items.iter().any(tries_a_handle),
        Value::Object(map) => map.values().any(tries_a_handle),
        _ => false,
    }
}

fn messages(method: &MethodDescriptor, json: &Value) -> Vec<DynamicMessage> {
    let several = json.as_array().cloned().unwrap_or_else(|| vec![json.clone()]);
    several.into_iter().map(|one| DynamicMessage::deserialize(method.input(), one).expect("fits its message")).collect()
}

fn method(name: &str) -> MethodDescriptor {
    methods().into_iter().find(|method| method.name() == name).unwrap_or_else(|| panic!("there is no RPC {name}"))
}

/// Every leaf of a request with its path; messages that are not ours are leaves.
fn leaves(message: &MessageDescriptor, path: &str, found: &mut Vec<String>) {
    for field in message.fields() {
        let path = if path.is_empty() { field.name().to_owned() } else { format!("{path}.{}", field.name()) };
        match field.kind().as_message().filter(|inner| inner.package_name() == "nudged.v1" && !field.is_map()) {
            Some(inner) => leaves(inner, &path, found),
            None => found.push(path),
        }
    }
}

fn name_of(path: &str) -> &str {
    path.rsplit('.').next().expect("a path has a last part")
}

/// The paths at which a call has a placeholder that is tried, and `$app`.
fn tried(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::String(text) if text.starts_with('$') && !text.starts_with("$own_") => {
            found.insert(path.to_owned());
        }
        Value::Array(items) => items.iter().for_each(|item| tried(item, path, found)),
        Value::Object(map) => {
            for (key, value) in map {
                tried(value, &if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, found);
            }
        }
        _ => {}
    }
}

#[test]
fn every_rpc_has_calls_and_every_field_a_class() {
    let calls = calls();
    let described: BTreeSet<String> = methods().iter().map(|method| method.name().to_owned()).collect();
    let called: BTreeSet<String> = calls.iter().map(|(rpc, ..)| (*rpc).to_owned()).collect();
    assert_eq!(described, called, "an RPC without a call, or a call without an RPC");
    for method in methods() {
        let mut fields = Vec::new();
        leaves(&method.input(), "", &mut fields);
        let mut covered = BTreeSet::new();
        for (_, _, call) in calls.iter().filter(|(rpc, ..)| *rpc == method.name()) {
            tried(call, "", &mut covered);
        }
        for field in fields {
            let name = name_of(&field);
            let handle = HANDLES.contains(&name);
            assert!(handle || PLAIN.contains(&name), "{}: say of `{field}` what it can name", path(&method));
            assert!(!handle || covered.contains(&field), "{}: another app's `{field}` is not tried", path(&method));
        }
    }
}

/// Every row, of every table that is kept, as text.
fn rows(server: &TestServer) -> BTreeSet<String> {
    #[derive(QueryableByName)]
    struct Name {
        #[diesel(sql_type = Text)]
        name: String,
    }
    let path = server.database();
    let mut conn = SqliteConnection::establish(path.to_str().expect("UTF-8")).expect("the database");
    conn.batch_execute("PRAGMA query_only = ON").expect("a pragma");
    let tables = sql_query("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'");
    let tables: Vec<Name> = tables.load(&mut conn).expect("the schema");
    assert!(tables.len() > 20);
    let mut rows = BTreeSet::new();
    for Name { name } in tables.into_iter().filter(|table| !LEFT_BEHIND.contains(&table.name.as_str())) {
        let lines: Vec<Line> = sql_query(format!("SELECT * FROM {name}")).load(&mut conn).expect("rows");
        rows.extend(lines.iter().map(|line| format!("{name}\t{}", String::from_utf8_lossy(&line.0))));
    }
    rows
}

async fn ask(channel: &Channel, rpc: &str, json: Value) -> Value {
    let method = method(rpc);
    let answers = call(channel, &method, &messages(&method, &json), Some("nk_root")).await;
    let answers = answers.unwrap_or_else(|status| panic!("{rpc}: {status:?}"));
    let last =
        DynamicMessage::decode(method.output(), answers.last().expect("an answer").as_slice()).expect("readable");
    serde_json::to_value(&last).expect("JSON")
}

/// Fills an app with one of everything; `mark` is in all of its texts.
async fn furnish(server: &TestServer, channel: &Channel, app: &str, mark: &str) -> Handles {
    let mut handles = BTreeMap::from([("app_id".to_owned(), app.to_owned())]);
    let text =
        |value: &Value, field: &str| value[field].as_str().unwrap_or_else(|| panic!("{field} in {value}")).to_owned();
    let event_type = format!("only.{app}");
    for (name, title) in [("comment.created", mark), (&event_type, mark)] {
        let declared = json!({"name": name, "display_name": mark, "templates": [{"title": title, "body": mark}]});
        ask(channel, "PutEventType", json!({"app_id": app, "event_type": declared})).await;
    }
    handles.insert("event_type".to_owned(), event_type);
    let choice = json!({"app_id": app, "user_id": "choco", "opted_in": true, "evidence": mark, "policy_version": mark});
    ask(channel, "SetOptIn", choice).await;
    for token in ["first", "second"] {
        let device = json!({"app_id": app, "user_id": "choco", "platform": "FCM", "token": token,
            "installation_id": format!("{mark}-{token}"), "labels": {"of": mark}, "app_version": mark});
        let answer = ask(channel, "RegisterDevice", device).await;
        handles.insert("device_id".to_owned(), text(&answer["device"], "deviceId"));
        ask(channel, "Subscribe", json!({"app_id": app, "user_id": "choco", "topic": format!("{mark}:{token}")})).await;
        let event = json!({"app_id": app, "event_type": "comment.created", "user_ids": ["choco"], "subject": mark,
            "idempotency_key": token, "labels": {"of": mark}, "data": {"of": mark}, "content": {"title": mark}});
        let accepted = ask(channel, "NotifyEvent", event).await;
        assert_eq!(accepted["duplicate"], Value::Bool(false), "keys of events are the app's own");
        handles.insert("notification_id".to_owned(), text(&accepted, "notificationId"));
    }
    ask(channel, "Subscribe", json!({"app_id": app, "user_id": "choco", "topic": "news"})).await;
    ask(channel, "PauseDelivery", json!({"app_id": app, "event_type": "comment.paused", "reason": mark})).await;
    let item = json!({"sequence": 7, "subscription": {"user_id": "choco", "topic": "old", "observed_at": "2026-01-01T00:00:00Z"}, "active": true});
    let imported =
        ask(channel, "ImportSubscriptions", json!([{"start": {"app_id": app, "import_id": "move"}}, {"item": item}]))
            .await;
    assert_eq!(imported["progress"]["applied"], "1", "names of imports are the app's own: {imported}");

    let notification = handles["notification_id"].clone();
    let deliveries =
        ask(channel, "ListDeliveries", json!({"app_id": app, "notification_id": notification, "page_size": 1})).await;
    handles.insert("nudged_id".to_owned(), text(&deliveries["deliveries"][0], "nudgedId"));
    handles.insert("ListDeliveries.page_token".to_owned(), text(&deliveries, "nextPageToken"));
    for (rpc, of) in [
        ("ListDevices", json!({"app_id": app, "user_id": "choco", "page_size": 1})),
        ("ListSubscriptions", json!({"app_id": app, "user_id": "choco", "page_size": 1})),
        ("ListNotifications", json!({"app_id": app, "page_size": 1})),
        ("ListEventTypes", json!({"app_id": app, "page_size": 1})),
    ] {
        let page = ask(channel, rpc, of).await;
        handles.insert(format!("{rpc}.page_token"), text(&page, "nextPageToken"));
    }
    // A page of dead deliveries is ten thousand of them: this token is made as the service makes it.
    let key = server.store.ensure_app(&crate::domain::ids::AppId::trusted(app), UnixMs(0)).await.expect("an app");
    let mut scope = PageScope::new(server.store.identity(), "RedriveDeliveries", key);
    for parameter in [&b""[..], b"", b"", b"", &[0; 8], &[0; 8]] {
        scope = scope.with(parameter);
    }
    handles.insert("RedriveDeliveries.page_token".to_owned(), scope.issue([1]));
    let watched = ask(channel, "WatchDeliveries", json!({"app_id": app})).await;
    handles.insert("cursor".to_owned(), text(&watched, "cursor"));
    Handles(handles)
}

fn keys() -> Vec<ApiKey> {
    let all = &Scope::ALL;
    let mut keys = vec![root_key("root"), key("pets", &["pets"], all), key("shop", &["shop"], all)];
    keys.push(ApiKey { expires_at: Some(UnixMs(1)), ..root_key("expired") });
    keys.extend(Scope::ALL.into_iter().map(|scope| {
        let others: Vec<Scope> = Scope::ALL.into_iter().filter(|other| *other != scope).collect();
        ApiKey { apps: crate::api::auth::BoundApps::All, ..key(&format!("no-{}", scope.name()), &[], &others) }
    }));
    keys
}

fn told(status: &Status) -> Vec<u8> {
    let mut told = status.message().as_bytes().to_vec();
    told.extend(status.details());
    told
}

fn holds_the_mark(bytes: &[u8]) -> bool {
    bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes())
}

#[tokio::test]
async fn nothing_of_another_app_is_read_or_changed_by_any_rpc() {
    let server = TestServer::with(Setup { keys: keys(), ..Setup::default() }).await;
    let channel = server.channel().await;
    let pets = furnish(&server, &channel, "pets", MARK).await;
    let theirs = rows(&server);
    assert!(theirs.len() > 30, "{theirs:#?}");
    let shop = furnish(&server, &channel, "shop", "ONLY-SHOP").await;
    let furnished = rows(&server);

    for (rpc, _, json) in calls() {
        let method = method(rpc);
        // Another app's key, with its own ids and with the right ones; no key, and every one that is not enough.
        let (_, scope) = scopes::TABLE.iter().find(|(known, _)| *known == path(&method)).expect("listed");
        let without = format!("nk_no-{}", scope.name());
        let callers = [
            (Some("nk_pets"), Code::PermissionDenied),
            (Some(&*without), Code::PermissionDenied),
            (Some("nk_expired"), Code::Unauthenticated),
            (Some("nk_nobody"), Code::Unauthenticated),
            (None, Code::Unauthenticated),
        ];
        for (key, expected) in callers {
            for handles in [&pets, &shop] {
                let request = messages(&method, &shop.fill(rpc, handles, &json));
                let refused = call(&channel, &method, &request, key).await.expect_err(rpc);
                assert_eq!(refused.code(), expected, "{rpc} with {key:?}: {refused:?}");
                assert!(!holds_the_mark(&told(&refused)), "{rpc} with {key:?} tells: {refused:?}");
            }
        }
        if tries_a_handle(&json) {
            let request = messages(&method, &shop.fill(rpc, &pets, &json));
            let refused = call(&channel, &method, &request, Some("nk_shop")).await.expect_err(&json.to_string());
            let expected = match refused.code() {
                Code::NotFound => true,
                Code::InvalidArgument => {
                    json.to_string().contains("$page_token") || json.to_string().contains("$app_id")
                }
                Code::OutOfRange => json.to_string().contains("$cursor"),
                _ => false,
            };
            assert!(expected, "{rpc} with what is another app's: {refused:?}");
            assert!(!holds_the_mark(&told(&refused)), "{rpc} tells: {refused:?}");
        }
        // An import remembers how far it has read, also past an item that it refused.
        let position = |row: &&String| !row.starts_with("import_progress");
        let now = rows(&server);
        let changed: Vec<&String> = now.symmetric_difference(&furnished).filter(position).collect();
        assert!(changed.is_empty() && theirs.is_subset(&now), "{rpc} changed something: {changed:#?}");
    }

    // The same calls with the right key are served, so the refusals above were about whose it is; and serving them leaves
    // every row of the other app as it was, though names and tokens are the same.
    for (rpc, own, json) in calls() {
        let method = method(rpc);
        let request = messages(&method, &shop.fill(rpc, &shop, &json));
        let answer = call(&channel, &method, &request, Some("nk_shop")).await;
        match own {
            Own::Served => {
                let answers = answer.unwrap_or_else(|status| panic!("{rpc} {json}: {status:?}"));
                assert!(!answers.iter().any(|answer| holds_the_mark(answer)), "{rpc} tells of another app");
            }
            Own::Refused => assert_eq!(code(answer), Code::PermissionDenied, "{rpc} {json}"),
        }
        let left = rows(&server);
        let changed: Vec<&String> = theirs.difference(&left).collect();
        assert!(changed.is_empty(), "{rpc} changed another app's rows: {changed:#?}");
    }
}
