use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::domain::content::LocalizedText;
use crate::domain::ids::AppId;
use crate::domain::platform::Lane;
use crate::service::apps::{AppDirectory, AppLimits, AppSetup};

const NOW: UnixMs = UnixMs(1_795_521_600_000);

fn directory() -> AppDirectory {
    let setup = AppSetup {
        id: AppId::trusted("pets"),
        key: AppKey(1),
        allow_undeclared_types: false,
        limits: AppLimits::default(),
        credentials: Vec::new(),
        routes: Vec::new(),
    };
    AppDirectory::new(vec![setup], None)
}

fn event() -> NotifyEvent {
    NotifyEvent {
        event_type: "comment.created".to_owned(),
        idempotency_key: "k1".to_owned(),
        user_ids: vec!["choco".to_owned(), "mocha".to_owned()],
        topics: vec!["post:42".to_owned()],
        content: Some(Content { title: Some("새 댓글".to_owned()), ..Content::default() }),
        ..NotifyEvent::default()
    }
}

fn checked(input: NotifyEvent) -> Result<NewEvent> {
    let directory = directory();
    let app = directory.get("pets").expect("configured");
    let (_, mut event, given) = check(Call::new(app), input, NOW)?;
    complete(&mut event, &given, None, NOW)?;
    Ok(event)
}

fn hash_of(input: NotifyEvent) -> [u8; 32] {
    checked(input).expect("valid").idempotency.expect("a key").1
}

fn wrong_fields(input: NotifyEvent) -> Vec<String> {
    match checked(input) {
        Err(ServiceError::Invalid(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
        Err(other) => panic!("{other}"),
        Ok(_) => Vec::new(),
    }
}

fn mutations() -> Vec<NotifyEvent> {
    let base = event();
    let mut all = Vec::new();
    let mut changed = |change: &dyn Fn(&mut NotifyEvent)| {
        let mut event = base.clone();
        change(&mut event);
        all.push(event);
    };
    changed(&|e| e.event_type = "comment.deleted".to_owned());
    changed(&|e| e.user_ids.push("latte".to_owned()));
    changed(&|e| e.topics = vec!["post:43".to_owned()]);
    changed(&|e| e.topics.clear());
    changed(&|e| e.device_ids = vec![DeviceId(7).public()]);
    changed(&|e| e.everyone = true);
    changed(&|e| e.actor_id = "latte".to_owned());
    changed(&|e| e.subject = "post:42".to_owned());
    changed(&|e| {
        e.data.insert("post".to_owned(), json!(42));
    });
    changed(&|e| {
        e.data.insert("post".to_owned(), json!("42"));
    });
    changed(&|e| {
        e.data.insert("post".to_owned(), json!([42]));
    });
    changed(&|e| e.priority = Some(Priority::Normal));
    changed(&|e| e.ttl_ms = Some(1_000));
    changed(&|e| e.collapse_key = "c".to_owned());
    changed(&|e| e.event_at = Some(NOW));
    changed(&|e| e.not_before = Some(NOW));
    changed(&|e| {
        e.labels.insert("a".to_owned(), "b".to_owned());
    });
    changed(&|e| e.max_audience = Some(5));
    let contents: [&dyn Fn(&mut Content); 11] = [
        &|c| c.title = Some("x".to_owned()),
        &|c| c.subtitle = Some("x".to_owned()),
        &|c| c.body = Some("x".to_owned()),
        &|c| c.image = Some("https://x".to_owned()),
        &|c| c.link = Some("https://x".to_owned()),
        &|c| c.sound = Some("x".to_owned()),
        &|c| c.badge = Some(1),
        &|c| c.category = Some("x".to_owned()),
        &|c| c.thread_id = Some("x".to_owned()),
        &|c| {
            let texts = LocalizedText { title: Some("x".to_owned()), ..LocalizedText::default() };
            c.localized.insert("ko".to_owned(), texts);
        },
        &|c| {
            let texts = LocalizedText { body: Some("x".to_owned()), ..LocalizedText::default() };
            c.localized.insert("ko".to_owned(), texts);
        },
    ];
    for change in contents {
        changed(&|e| change(e.content.as_mut().expect("content")));
    }
    all
}

#[test]
fn any_changed_field_gives_another_hash() {
    let mut hashes: Vec<[u8; 32]> = mutations().into_iter().map(hash_of).collect();
    hashes.push(hash_of(event()));
    let count = hashes.len();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), count);
}

#[test]
fn spelling_out_a_default_changes_nothing() {
    let spelled = NotifyEvent {
        idempotency_key: "another key".to_owned(),
        priority: Some(Priority::High),
        ttl_ms: Some(DEFAULT_TTL_MS),
        ..event()
    };
    assert_eq!(hash_of(event()), hash_of(spelled));
}

fn json_value() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i32>().prop_map(serde_json::Value::from),
        "[a-z가-힣]{0,6}".prop_map(serde_json::Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            proptest::collection::vec(("k[a-z]{0,3}", inner), 0..4)
                .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// The same object with its keys inserted the other way round, all the way down.
fn reversed(value: &serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(map) => {
            serde_json::Value::Object(map.iter().rev().map(|(key, value)| (key.clone(), reversed(value))).collect())
        }
        serde_json::Value::Array(items) => items.iter().map(reversed).collect(),
        other => other.clone(),
    }
}

proptest! {
    #[test]
    fn order_and_repeats_change_nothing(
        users in proptest::collection::vec("[a-z]{1,5}", 1..20),
        topics in proptest::collection::vec("[a-z]{1,5}", 0..10),
        devices in proptest::collection::vec(1i64..1000, 0..10),
        data in proptest::collection::btree_map("k[a-z]{1,4}", json_value(), 0..5),
        rotate in 0usize..20,
    ) {
        let first = NotifyEvent {
            user_ids: users,
            topics,
            device_ids: devices.into_iter().map(|id| DeviceId(id).public()).collect(),
            data: data.into_iter().collect(),
            ..event()
        };
        let mut second = first.clone();
        for list in [&mut second.user_ids, &mut second.topics, &mut second.device_ids] {
            list.reverse();
            let by = rotate.min(list.len());
            list.rotate_left(by);
            list.extend(list.first().cloned());
        }
        second.topics.truncate(MAX_TOPICS);
        second.data = first.data.iter().rev().map(|(key, value)| (key.clone(), reversed(value))).collect();
        prop_assert_eq!(hash_of(first), hash_of(second));
    }
}

#[test]
fn repeated_ids_are_merged() {
    let input = NotifyEvent { user_ids: vec!["b".into(), "a".into(), "b".into()], ..event() };
    let users: Vec<String> = checked(input).expect("valid").audience.user_ids.iter().map(ToString::to_string).collect();
    assert_eq!(users, ["a", "b"]);
}

#[test]
fn the_ttl_runs_from_the_latest_of_event_time_and_not_before() {
    let hour = 3_600_000;
    let at = |ms: i64| Some(UnixMs(NOW.0 + ms));
    let expires = |input: NotifyEvent| checked(input).map(|event| event.expires_at.0 - NOW.0);
    assert_eq!(expires(event()).expect("valid"), DEFAULT_TTL_MS);
    assert_eq!(expires(NotifyEvent { ttl_ms: Some(hour), ..event() }).expect("valid"), hour);
    let past = NotifyEvent { ttl_ms: Some(3 * hour), event_at: at(-2 * hour), ..event() };
    assert_eq!(expires(past.clone()).expect("valid"), hour);
    let later = NotifyEvent { not_before: at(hour), ..past.clone() };
    assert_eq!(expires(later).expect("valid"), 4 * hour);
    let over = NotifyEvent { ttl_ms: Some(2 * hour), ..past.clone() };
    assert!(wrong_fields(over.clone()).is_empty(), "with a key it may be a repeat: the store knows");
    let among_others = NotifyEvent { max_audience: Some(0), ..over.clone() };
    assert_eq!(wrong_fields(among_others), ["max_audience", "ttl"]);
    let unkeyed = |input: NotifyEvent| NotifyEvent { idempotency_key: String::new(), ..input };
    assert_eq!(wrong_fields(unkeyed(over)), ["ttl"]);
    assert!(wrong_fields(unkeyed(NotifyEvent { ttl_ms: Some(2 * hour + 1), ..past })).is_empty());
    assert_eq!(wrong_fields(unkeyed(NotifyEvent { event_at: at(-24 * hour), ..event() })), ["event_at"]);
}

#[test]
fn each_limit_holds_at_the_boundary_and_not_one_past_it() {
    let names = |count: usize| (0..count).map(|at| format!("u{at}")).collect::<Vec<_>>();
    let devices = |count: i64| (1..=count).map(|id| DeviceId(id).public()).collect::<Vec<_>>();
    assert!(wrong_fields(NotifyEvent { user_ids: names(1000), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { user_ids: names(1001), ..event() }), ["user_ids"]);
    assert!(wrong_fields(NotifyEvent { topics: names(20), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { topics: names(21), ..event() }), ["topics"]);
    assert!(wrong_fields(NotifyEvent { device_ids: devices(1000), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { device_ids: devices(1001), ..event() }), ["device_ids"]);
    assert!(wrong_fields(NotifyEvent { event_type: "a".repeat(100), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { event_type: "a".repeat(101), ..event() }), ["event_type"]);
    assert!(wrong_fields(NotifyEvent { subject: "a".repeat(256), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { subject: "a".repeat(257), ..event() }), ["subject"]);
    assert!(wrong_fields(NotifyEvent { ttl_ms: Some(1), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { ttl_ms: Some(0), ..event() }), ["ttl"]);
    assert!(wrong_fields(NotifyEvent { ttl_ms: Some(MAX_TTL_MS), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { ttl_ms: Some(MAX_TTL_MS + 1), ..event() }), ["ttl"]);
    let ahead = |ms: i64| Some(UnixMs(NOW.0 + ms));
    assert!(wrong_fields(NotifyEvent { not_before: ahead(MAX_AHEAD_MS), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { not_before: ahead(MAX_AHEAD_MS + 1), ..event() }), ["not_before"]);
    assert_eq!(wrong_fields(NotifyEvent { event_at: ahead(MAX_AHEAD_MS + 1), ..event() }), ["event_at"]);
    assert!(wrong_fields(NotifyEvent { max_audience: Some(1), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { max_audience: Some(0), ..event() }), ["max_audience"]);
    let labels = |count: usize| names(count).into_iter().map(|name| (name, String::new())).collect::<BTreeMap<_, _>>();
    assert!(wrong_fields(NotifyEvent { labels: labels(32), ..event() }).is_empty());
    assert_eq!(wrong_fields(NotifyEvent { labels: labels(33), ..event() }), ["labels"]);
}

#[test]
fn every_wrong_field_is_named_at_once() {
    let input = NotifyEvent {
        event_type: "Comment".into(),
        idempotency_key: "k".repeat(257),
        user_ids: vec!["ok".into(), String::new(), "nul\0".into()],
        actor_id: "a".repeat(257),
        content: Some(Content { title: Some(String::new()), ..Content::default() }),
        collapse_key: "c".repeat(65),
        data: [("aps".to_owned(), json!(1))].into_iter().collect(),
        ..event()
    };
    let fields = wrong_fields(input);
    for field in [
        "event_type",
        "idempotency_key",
        "user_ids[1]",
        "user_ids[2]",
        "actor_id",
        "content.title",
        "collapse_key",
        "data.aps",
    ] {
        assert!(fields.iter().any(|named| named == field), "{field} in {fields:?}");
    }
    assert_eq!(fields.len(), 8);
}

#[test]
fn an_empty_audience_is_refused() {
    let input = NotifyEvent { user_ids: Vec::new(), topics: Vec::new(), ..event() };
    assert_eq!(wrong_fields(input), ["user_ids"]);
}

#[test]
fn a_silent_push_is_of_normal_priority_unless_told() {
    let silent = NotifyEvent { content: Some(Content::default()), ..event() };
    assert_eq!(checked(silent.clone()).expect("valid").priority, Priority::Normal);
    let told = NotifyEvent { priority: Some(Priority::High), ..silent };
    assert_eq!(checked(told).expect("valid").priority, Priority::High);
    assert_eq!(checked(event()).expect("valid").priority, Priority::High);
}

#[test]
fn an_undeclared_type_passes_only_while_none_is_declared() {
    let directory = directory();
    let app = directory.get("pets").expect("configured");
    let name = EventType::trusted("coment.created");
    assert_eq!(standing(app, &name, DeclaredType::default()).expect("nothing is declared"), None);
    let nearest = vec!["comment.created".to_owned()];
    let declared = DeclaredType { any_declared: true, current: None, nearest };
    match standing(app, &name, declared.clone()) {
        Err(ServiceError::UnknownEventType { nearest, .. }) => assert_eq!(nearest, ["comment.created"]),
        other => panic!("{other:?}"),
    }
    let known = DeclaredType { current: Some(TypeVersionId(7)), ..declared };
    assert_eq!(standing(app, &name, known).expect("declared"), Some(TypeVersionId(7)));
}

fn templates(definition: serde_json::Value) -> Templates {
    let definition = serde_json::from_value(definition).expect("a definition");
    Templates::compile("event_type", definition).unwrap_or_else(|violations| panic!("{violations:?}"))
}

fn completed(input: NotifyEvent, templates: &Templates) -> Result<NewEvent> {
    let directory = directory();
    let app = directory.get("pets").expect("configured");
    let (_, mut event, given) = check(Call::new(app), input, NOW)?;
    complete(&mut event, &given, Some((TypeVersionId(7), templates)), NOW)?;
    Ok(event)
}

#[test]
fn a_declared_type_fills_in_what_the_event_leaves_open() {
    let sale = templates(json!({
        "name": "comment.created", "purpose": "ADVERTISING", "priority": "NORMAL", "ttl": "2h", "on_maybe": "DROP",
        "collapse_key": "sale:{{ subject }}", "templates": [{"locale": "ko", "title": "{{ actor }} {{ data.x }}"}],
    }));
    let input = NotifyEvent { content: None, subject: "s1".into(), actor_id: "choco".into(), ..event() };
    let open = completed(input.clone(), &sale).expect("it brings its words");
    assert_eq!(open.type_version, Some(TypeVersionId(7)));
    assert!(!open.default_opt_in);
    assert_eq!((open.lane, open.priority), (Some(Lane::Bulk), Priority::Normal));
    assert_eq!(open.on_maybe, OnMaybe::Drop);
    assert_eq!(open.expires_at, UnixMs(NOW.0 + 2 * 3_600_000));
    assert_eq!(open.collapse_key.as_ref().map(CollapseKey::as_str), Some("sale:s1"));
    assert_eq!(open.body.actor.as_deref(), Some("choco"), "a template reads it");
    let told = NotifyEvent {
        priority: Some(Priority::High),
        ttl_ms: Some(60_000),
        collapse_key: "mine".into(),
        ..input.clone()
    };
    let told = completed(told, &sale).expect("valid");
    assert_eq!((told.priority, told.expires_at), (Priority::High, UnixMs(NOW.0 + 60_000)));
    assert_eq!(told.collapse_key.as_ref().map(CollapseKey::as_str), Some("mine"));
    assert_ne!(open.idempotency, told.idempotency);

    // The same call after another version was declared is the same request.
    let other = templates(json!({"name": "comment.created", "templates": [{"locale": "ko", "title": "x"}]}));
    let later = completed(input, &other).expect("valid");
    assert_eq!(later.idempotency, open.idempotency);
    assert_eq!(later.body.actor, None, "no template reads it");
    assert_eq!(later.priority, Priority::High);
}

#[test]
fn content_is_required_where_nothing_else_has_words() {
    let absent = NotifyEvent { content: None, ..event() };
    assert_eq!(wrong_fields(absent.clone()), ["content"]);
    let bare = templates(json!({"name": "comment.created"}));
    assert!(matches!(completed(absent.clone(), &bare), Err(ServiceError::Invalid(_))));
    let silent = templates(json!({"name": "comment.created", "templates": [{"link": "app://sync"}]}));
    assert_eq!(completed(absent, &silent).expect("a silent push").priority, Priority::Normal);
}

#[test]
fn the_types_ttl_may_have_ended_too() {
    let brief = templates(json!({"name": "a", "ttl": "1m", "templates": [{"title": "x"}]}));
    let old = NotifyEvent { event_at: Some(UnixMs(NOW.0 - 60_000)), idempotency_key: String::new(), ..event() };
    match completed(old.clone(), &brief) {
        Err(ServiceError::Invalid(violations)) => assert_eq!(violations[0].field, "event_at"),
        other => panic!("{other:?}"),
    }
    assert!(completed(NotifyEvent { event_at: Some(UnixMs(NOW.0 - 59_999)), ..old }, &brief).is_ok());
}
