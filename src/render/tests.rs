use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::domain::content::LocalizedText;
use crate::domain::event_type::Definition;
use crate::domain::ids::TypeVersionId;

fn inline() -> Body {
    let text = |title: &str| LocalizedText { title: Some(title.to_owned()), ..LocalizedText::default() };
    let mut body = Body::default();
    body.content.title = Some("New comment".into());
    body.content.body = Some("Choco: cute!".into());
    body.content.localized.insert("ko".into(), text("새 댓글"));
    body.content.localized.insert("pt-BR".into(), text("Novo comentário"));
    body
}

fn title(locale: &str) -> Option<String> {
    let body = inline();
    let locale = Locale::trusted(locale);
    message(&body, variant(&body.content, Some(&locale))).title
}

#[test]
fn a_locale_falls_back_by_its_prefixes() {
    assert_eq!(title("ko-KR").as_deref(), Some("새 댓글"));
    assert_eq!(title("KO").as_deref(), Some("새 댓글"));
    assert_eq!(title("pt-br").as_deref(), Some("Novo comentário"));
    assert_eq!(title("pt").as_deref(), Some("New comment"), "a region is no language");
    assert_eq!(title("ja-JP").as_deref(), Some("New comment"));
    assert_eq!(variant(&inline().content, None), None);
}

#[test]
fn what_an_entry_leaves_out_comes_from_the_plain_texts() {
    let inline = inline();
    let message = message(&inline, Some("ko"));
    assert_eq!(message.body.as_deref(), Some("Choco: cute!"));
    assert!(!message.silent);
}

fn definition(json: Value) -> Definition {
    serde_json::from_value(json).expect("a definition")
}

fn comment() -> Definition {
    definition(json!({
        "name": "comment.created",
        "display_name": "댓글",
        "default_locale": "en",
        "collapse_key": "comments:{{ subject }}",
        "templates": [
            {
                "locale": "ko",
                "title": "{{ data.author.name|default('누군가')|josa('이/가') }} 댓글을 남겼어요",
                "body": "{{ data.text }}",
            },
            {
                "locale": "en",
                "title": "{{ data.author.name|default('Somebody') }} commented",
                "body": "{{ data.text|truncate(20) }}",
                "link": "ifriendspet://post/{{ data.post|urlencode }}",
                "image": "{{ data.picture }}",
                "thread_id": "{{ subject }}",
                "badge": "{{ data.unread }}",
            },
            { "locale": "ko-KP", "body": "{{ data.text }}" },
        ],
    }))
}

fn compile(definition: Definition) -> Templates {
    Templates::compile("event_type", definition).unwrap_or_else(|violations| panic!("{violations:?}"))
}

fn event(data: Value) -> Body {
    let Value::Object(data) = data else { panic!("an object") };
    Body { data, subject: Some("post:42".into()), ..Body::default() }
}

fn rendered(templates: &Templates, body: &Body, locale: &str) -> Rendered<'static> {
    let locale = Locale::trusted(locale);
    let variant = choose(&body.content, Some(templates), Some(&locale), None);
    let Rendered { message, problems } = render(body, "comment.created", Some(templates), variant, None);
    Rendered { message: message.into_owned(), problems }
}

fn errors(template: &str) -> Vec<String> {
    let made = Templates::compile(
        "event_type",
        definition(json!({"name": "a", "templates": [{"locale": "en", "body": template}]})),
    );
    match made {
        Ok(_) => Vec::new(),
        Err(violations) => violations
            .into_iter()
            .map(|violation| {
                assert_eq!(violation.field, "event_type.templates[0].body");
                violation.description
            })
            .collect(),
    }
}

#[test]
fn an_event_is_told_in_the_language_of_the_device() {
    let templates = compile(comment());
    let body = event(json!({
        "author": {"name": "초코"}, "text": "우리 집 강아지랑 똑같이 생겼어요! 너무 귀여워요", "post": "42/a b",
        "picture": "https://example.com/p.jpg", "unread": 3,
    }));
    let ko = rendered(&templates, &body, "ko-KR");
    assert_eq!(ko.problems, []);
    assert_eq!(ko.message.title.as_deref(), Some("초코가 댓글을 남겼어요"));
    assert_eq!(ko.message.body.as_deref(), Some("우리 집 강아지랑 똑같이 생겼어요! 너무 귀여워요"));
    assert_eq!(ko.message.link.as_deref(), Some("ifriendspet://post/42%2Fa%20b"), "from the default entry");
    assert_eq!(ko.message.image.as_deref(), Some("https://example.com/p.jpg"));
    assert_eq!(ko.message.thread_id.as_deref(), Some("post:42"));
    assert_eq!(ko.message.badge, Some(3));
    assert!(!ko.message.silent);
    let ja = rendered(&templates, &body, "ja-JP");
    assert_eq!(ja.message.title.as_deref(), Some("초코 commented"));
    assert_eq!(ja.message.body.as_deref(), Some("우리 집 강아지랑 똑같이 생겼어요!…"));
    let kp = rendered(&templates, &body, "ko-kp");
    assert_eq!(kp.message.title, None, "words never mix languages");
}

#[test]
fn what_an_event_leaves_out_renders_as_nothing() {
    let templates = compile(comment());
    let message = rendered(&templates, &event(json!({"text": null})), "ko");
    assert_eq!(message.problems, []);
    assert_eq!(message.message.title.as_deref(), Some("누군가가 댓글을 남겼어요"));
    assert_eq!(message.message.body, None);
    assert_eq!(message.message.link.as_deref(), Some("ifriendspet://post/"));
    assert_eq!(message.message.image, None);
    assert_eq!(message.message.badge, None);
}

#[test]
fn the_default_language_falls_in_its_order() {
    let ask = |definition: Definition, locale: Option<&str>, app: Option<&str>| {
        let templates = compile(definition);
        let (locale, app) = (locale.map(Locale::trusted), app.map(Locale::trusted));
        let at = templates.entry_for(locale.as_ref(), app.as_ref()).expect("it has entries");
        templates.definition().templates[at].locale.clone()
    };
    assert_eq!(ask(comment(), Some("ko-KR"), None), "ko");
    assert_eq!(ask(comment(), Some("ko-KP"), None), "ko-KP");
    assert_eq!(ask(comment(), Some("fr"), Some("ko-KR")), "en", "the type's default goes before the app's");
    assert_eq!(ask(comment(), None, None), "en");
    let plain = || Definition { default_locale: None, ..comment() };
    assert_eq!(ask(plain(), Some("fr"), Some("en-GB")), "en");
    assert_eq!(ask(plain(), Some("fr"), Some("de")), "ko", "the first");
    assert_eq!(ask(plain(), None, None), "ko");
}

#[test]
fn inline_content_overrides_field_by_field() {
    let templates = compile(comment());
    let mut body = event(json!({"author": {"name": "콩"}, "text": "hi"}));
    body.content.title = Some("공지".into());
    body.content.link = Some("https://example.com".into());
    body.content
        .localized
        .insert("en".into(), LocalizedText { title: Some("Notice".into()), ..LocalizedText::default() });
    let ko = rendered(&templates, &body, "ko").message;
    assert_eq!((ko.title.as_deref(), ko.body.as_deref()), (Some("공지"), Some("hi")));
    assert_eq!(ko.link.as_deref(), Some("https://example.com"));
    assert_eq!(ko.thread_id.as_deref(), Some("post:42"));
    assert_eq!(rendered(&templates, &body, "en-US").message.title.as_deref(), Some("Notice"));
}

#[test]
fn without_words_a_type_is_silent_and_otherwise_never() {
    let silent = compile(definition(json!({"name": "sync", "templates": [{"link": "app://{{ data.x }}"}]})));
    let message = rendered(&silent, &event(json!({"x": 1})), "ko").message;
    assert!(message.silent);
    assert_eq!(message.link.as_deref(), Some("app://1"));
    let shown = compile(definition(json!({
        "name": "a", "display_name": "소식", "templates": [{"locale": "ko", "body": "{{ data.text }}"}],
    })));
    let made = rendered(&shown, &event(json!({})), "ko");
    assert!(!made.message.silent);
    assert_eq!(made.message.title.as_deref(), Some("소식"), "the display name stands in");
    assert_eq!(made.problems.len(), 1);
}

#[test]
fn what_is_wrong_with_a_template_is_said_when_it_is_stored() {
    for (template, part) in [
        ("{{ data.name", "line 1: syntax error"),
        ("{{ data.name|jossa('이/가') }}", "filter `jossa` is unknown, did you mean `josa`?"),
        ("{% if data.a %}{{ data.b|uper }}{% endif %}", "did you mean `upper`?"),
        ("{{ data.name|josa('이/과') }}", "particle 이/과 is unknown"),
        ("{{ data.name|josa }}", "takes 1 arguments, not 0"),
        ("{{ data.name|josa(data.p) }}", "must be written out"),
        ("{{ data.name|replace('a') }}", "takes 2 arguments, not 1"),
        ("{{ data.name|truncate(length=3) }}", "plain arguments only"),
        ("{{ name }}", "variable `name` is unknown"),
        ("{{ user }}", "not per person"),
        ("{{ data.x is odd }}", "test `odd` is unknown"),
        ("{{ range(10) }}", "nothing to call"),
        ("{{ data.items() }}", "nothing to call"),
        ("{% include 'x' %}", "unknown statement include"),
        ("{% macro m() %}{% endmacro %}", "unknown statement macro"),
        ("{% extends 'x' %}", "unknown statement extends"),
        ("{% set x %}a{% endset %}", "needs a value"),
        ("{% set data = 1 %}", "cannot be given another value"),
        ("{% filter upper %}a{% endfilter %}", "not supported"),
        ("{% autoescape true %}a{% endautoescape %}", "not supported"),
        ("{% for a in data.l recursive %}{% endfor %}", "recursive"),
        ("{{ 1 / 0 }}", "fails when the event brings no data"),
        ("{{ data.count + 1 }}", "fails when the event brings no data"),
        ("{% for x in 5 %}{% endfor %}", "fails when the event brings no data"),
        ("{% if %}", "syntax error"),
        ("{{ 'a' * 1000000 }}", "out of fuel"),
    ] {
        let found = errors(template);
        assert_eq!(found.len(), 1, "{template}: {found:?}");
        assert!(found[0].contains(part), "{template}: {found:?}");
    }
    let two = errors("{{ a }}\n{{ b }}");
    assert!(two.len() == 2 && two[1].starts_with("line 2: "), "every error is told: {two:?}");
    for template in [
        "plain",
        "{{ data.a.b.c.d }}",
        "{{ data['a'][0].b }}",
        "{{ data.count|default(0) + 1 }}",
        "{% set name = data.name|d('someone') %}{{ name|josa('은/는') }} {{ name }}",
        "{% for pet in data.pets %}{{ pet.name }}{% if not loop.last %}, {% endif %}{% endfor %}",
        "{% if data.count is defined and data.count > 1 %}{{ data.count|thousands }} comments{% else %}a comment{% endif %}",
        "{{ actor }} {{ subject }} {{ event_type }} {{ locale }}",
        "{{ '{{' }} {% raw %}{{ x }}{% endraw %}{# note #}",
        "{{ 'yes' if data.x else 'no' }}",
        "{% with n = data.n|int %}{{ n }}{% endwith %}",
    ] {
        assert_eq!(errors(template), Vec::<String>::new(), "{template}");
    }
}

#[test]
fn every_field_with_a_bad_template_is_named() {
    let mut bad = comment();
    bad.name = String::new();
    bad.collapse_key = Some("{{ x }}".into());
    bad.templates[0].title = Some("{{".into());
    bad.templates[1].link = Some("{{ data.x|nope }}".into());
    let Err(violations) = Templates::compile("event_type", bad) else { panic!("it is refused") };
    let fields: Vec<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(
        fields,
        ["event_type.name", "event_type.templates[0].title", "event_type.templates[1].link", "event_type.collapse_key"]
    );
}

#[test]
fn what_only_data_can_break_falls_to_the_default_language_then_to_the_display_name() {
    let templates = compile(definition(json!({
        "name": "likes", "display_name": "좋아요", "default_locale": "en",
        "templates": [
            {"locale": "ko", "title": "{{ data.count|d(1) / 2 }}개", "body": "좋아요", "link": "x://{{ data.a|d(1) * 2 }}"},
            {"locale": "en", "title": "Likes: {{ data.total|d(1) / 2 }}", "link": "x://home"},
        ],
    })));
    let fine = rendered(&templates, &event(json!({"count": 4})), "ko");
    assert_eq!(fine.message.title.as_deref(), Some("2개"));
    let fallen = rendered(&templates, &event(json!({"count": "four", "total": 2, "a": {"k": 1}})), "ko");
    assert_eq!(fallen.message.title.as_deref(), Some("Likes: 1"));
    assert_eq!(fallen.message.body, None, "all words are of one language");
    assert_eq!(fallen.message.link.as_deref(), Some("x://home"));
    let fields: Vec<&str> = fallen.problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(fields, ["templates[0].title", "templates[0].link"]);
    let fallen = rendered(&templates, &event(json!({"count": "four", "total": "two"})), "ko");
    assert_eq!(fallen.message.title.as_deref(), Some("좋아요"));
    assert!(!fallen.message.silent);
}

#[test]
fn fuel_ends_what_does_not_end_soon() {
    let templates = compile(definition(json!({
        "name": "loop", "templates": [{"locale": "en", "title":
            "{% for a in data.l %}{% for b in data.l %}{% for c in data.l %}x{% endfor %}{% endfor %}{% endfor %}"}],
    })));
    assert_eq!(rendered(&templates, &event(json!({"l": [1, 2, 3]})), "en").message.title, Some("x".repeat(27)));
    let many: Vec<u32> = (0..500).collect();
    let fallen = rendered(&templates, &event(json!({"l": many})), "en");
    assert_eq!(fallen.message.title.as_deref(), Some("loop"));
    assert!(fallen.problems[0].detail.contains("out of fuel"), "{:?}", fallen.problems);
    let doubling = format!("{{% set a = data.s %}}{}{{{{ a }}}}", "{% set a = a ~ a %}".repeat(60));
    let templates = compile(definition(json!({"name": "d", "templates": [{"locale": "en", "body": doubling}]})));
    let fallen = rendered(&templates, &event(json!({"s": "0123456789"})), "en");
    assert!(fallen.problems[0].detail.contains("out of fuel"), "{:?}", fallen.problems);
    let growing = format!("{{{{ data.s{} }}}}", "|replace('a', data.s)".repeat(40));
    let templates = compile(definition(json!({"name": "r", "templates": [{"locale": "en", "body": growing}]})));
    assert_eq!(rendered(&templates, &event(json!({"s": "a".repeat(1000)})), "en").problems.len(), 1);
}

#[test]
fn a_list_of_lists_cannot_double_with_every_line() {
    let doubled = "{% set l = [data, data] %}".to_owned() + &"{% set l = [l, l] %}".repeat(40);
    for last in ["{{ l }}", "{{ l == l }}", "{{ l|join }}", "{{ l|truncate(1) }}"] {
        let errors = errors(&format!("{doubled}{last}"));
        assert!(errors.iter().any(|error| error.contains("`l` cannot be put into a list")), "{errors:?}");
    }
    assert!(!errors("{% for x in data.l %}{{ {'a': x} }}{% endfor %}").is_empty());
    // What the event brought can be listed, and names can be used otherwise.
    assert!(errors("{% set n = data.name %}{{ [data.a, data.b]|join(', ') }}{{ n in ['a', 'b'] }}").is_empty());
    let many = format!("{{% set l = [{}] %}}{{{{ l|truncate(3) }}}}{{{{ l }}}}", vec!["data"; 400].join(","));
    let templates = compile(definition(json!({"name": "a", "templates": [{"locale": "ko", "title": many}]})));
    let made = rendered(&templates, &event(json!({"text": "x".repeat(2_000)})), "ko");
    assert!(made.message.title.is_some_and(|title| title.len() <= MAX_TITLE_BYTES));
}

#[test]
fn what_comes_out_has_its_limits() {
    let templates = compile(comment());
    let body =
        event(json!({"author": {"name": "가".repeat(300)}, "text": "나".repeat(900), "picture": "http://x/y.jpg",
        "post": "p".repeat(2100), "unread": -1}));
    let made = rendered(&templates, &body, "ko");
    let (title, text) = (made.message.title.expect("a title"), made.message.body.expect("a body"));
    assert!(title.len() <= MAX_TITLE_BYTES && title.len() > MAX_TITLE_BYTES - 6 && title.ends_with("가…"), "{title}");
    assert!(text.len() <= MAX_BODY_BYTES && text.ends_with("나…"));
    assert_eq!((made.message.image, made.message.link, made.message.badge), (None, None, None));
    let fields: Vec<&str> = made.problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(fields, ["templates[1].image", "templates[1].link", "templates[1].badge"]);
}

#[test]
fn a_collapse_key_is_rendered_or_stands_by_its_hash() {
    let templates = compile(comment());
    let data = event(json!({})).data;
    let key = |subject: Option<&str>| {
        let variables = Variables::new(&data, None, subject, "comment.created");
        templates.collapse_key(&variables).expect("renders").expect("a key").as_str().to_owned()
    };
    assert_eq!(key(Some("post:42")), "comments:post:42");
    assert_eq!(key(Some(&"s".repeat(55))).len(), 64);
    let (one, other) = (key(Some(&"s".repeat(56))), key(Some(&"s".repeat(57))));
    assert!(one.len() == 64 && !one.contains(':') && one != other, "{one} {other}");
    assert_eq!(key(Some(&"s".repeat(56))), one, "the same text, the same key");
    let empty = compile(definition(json!({"name": "a", "collapse_key": "{{ data.x }}"})));
    let variables = Variables::new(&data, None, None, "a");
    assert_eq!(empty.collapse_key(&variables), Ok(None));
}

#[test]
fn a_type_tells_whether_it_reads_the_actor() {
    assert!(!compile(comment()).reads_actor());
    let reads = definition(
        json!({"name": "a", "templates": [{"locale": "en", "body": "{% if data.x %}{{ actor }}{% endif %}"}]}),
    );
    assert!(compile(reads).reads_actor());
}

#[test]
fn filters_do_what_they_are_documented_to() {
    let data = json!({"n": 1_234_567, "f": 2.5, "s": "  Choco  ", "l": ["a", "b", "c"], "e": "", "nul": null, "neg": -1234.5,
        "m": {"k": 1}, "t": true, "long": "가나다라마바사"});
    for (template, expected) in [
        ("{{ data.n|thousands }}", "1,234,567"),
        ("{{ data.n|thousands('.') }}", "1.234.567"),
        ("{{ data.neg|thousands }}", "-1,234.5"),
        ("{{ data.s|thousands }}", "Choco"),
        ("{{ data.f|round }}", "3"),
        ("{{ data.f|int }}", "2"),
        ("{{ data.s|int }}", "0"),
        ("{{ '12'|int + 1 }}", "13"),
        ("{{ (data.f|d(1) * 1.111)|round(2) }}", "2.78"),
        ("{{ data.s|trim|upper }}", "CHOCO"),
        ("{{ 'HI'|lower|capitalize }}", "Hi"),
        ("{{ data.l|join(', ') }}", "a, b, c"),
        ("{{ data.l|first }}{{ data.l|last }}{{ data.l|length }}", "ac3"),
        ("{{ data.long|first }}{{ data.long|last }}{{ data.long|count }}", "가사7"),
        ("{{ data.long|truncate(7) }}", "가나다라마바사"),
        ("{{ data.long|truncate(4) }}", "가나다…"),
        ("{{ data.long|truncate(4, '..') }}", "가나.."),
        ("{{ data.e|default('x') }}{{ data.nul|d('y') }}{{ data.none|d('z') }}", "xyz"),
        ("{{ data.long|replace('나', '너') }}", "가너다라마바사"),
        ("{{ 'a b&c/가'|urlencode }}", "a%20b%26c%2F%EA%B0%80"),
        ("{{ data.n|josa('을/를') }}", "1234567을"),
        (
            "{{ data.n is number }} {{ data.s is string }} {{ data.l is sequence }} {{ data.m is mapping }}",
            "true true true true",
        ),
        (
            "{{ data.x is undefined }} {{ data.n is defined }} {{ data.nul is none }} {{ data.e is empty }}",
            "true true true true",
        ),
        ("{{ data.nul }}{{ data.x }}|{{ data.t }}", "|true"),
        ("<{{ '<b>&' }}>", "<<b>&>"),
    ] {
        let templates = compile(definition(json!({"name": "a", "templates": [{"locale": "en", "body": template}]})));
        let made = rendered(&templates, &event(data.clone()), "en");
        assert_eq!((made.message.body.as_deref(), made.problems), (Some(expected), vec![]), "{template}");
    }
}

#[test]
fn the_cache_forgets_what_is_unused_for_longest() {
    let one = |name: &str| Arc::new(compile(definition(json!({"name": name}))));
    let weight = one("a").weight();
    let cache = Types::new(weight * 3, 100);
    for id in 1..=3 {
        cache.insert(TypeVersionId(id), one("a"));
    }
    assert!(cache.get(TypeVersionId(1)).is_some());
    cache.insert(TypeVersionId(4), one("d"));
    assert!(cache.get(TypeVersionId(2)).is_none(), "unused for longest");
    assert!([1, 3, 4].into_iter().all(|id| cache.get(TypeVersionId(id)).is_some()));
    let few = Types::new(usize::MAX, 2);
    for id in 1..=3 {
        few.insert(TypeVersionId(id), one("a"));
    }
    assert!(few.get(TypeVersionId(1)).is_none() && few.get(TypeVersionId(3)).is_some());
    let tiny = Types::new(weight - 1, 2);
    tiny.insert(TypeVersionId(1), one("a"));
    assert!(tiny.get(TypeVersionId(1)).is_none());
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map("[a-c]", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn piece() -> impl Strategy<Value = String> {
    let path = || {
        prop_oneof![Just("data.a"), Just("data.b.c"), Just("data.a[0]"), Just("subject"), Just("data.a[1:]"), Just("3")]
    };
    let filter = (0..filters::FILTERS.len()).prop_map(|at| {
        let signature = &filters::FILTERS[at];
        match (signature.name, signature.least) {
            ("josa" | "particle", _) => "|josa('와/과')".to_owned(),
            (name, 0) => format!("|{name}"),
            (name, 1) => format!("|{name}(data.b|d(3))"),
            (name, _) => format!("|{name}(data.a, data.b)"),
        }
    });
    let operator = prop_oneof![
        Just("~"),
        Just("+"),
        Just("*"),
        Just("/"),
        Just("=="),
        Just("<"),
        Just("in"),
        Just("%"),
        Just("**")
    ];
    prop_oneof![
        "[^{}#]{0,8}",
        (path(), filter.clone(), filter).prop_map(|(path, one, two)| format!("{{{{ {path}{one}{two} }}}}")),
        (path(), operator, path())
            .prop_map(|(left, op, right)| format!("{{% if data.go %}}{{{{ {left} {op} {right} }}}}{{% endif %}}")),
        path().prop_map(|path| format!("{{% for x in {path} %}}{{{{ x.a }}}}{{% endfor %}}")),
    ]
}

proptest! {
    /// Whatever a stored type and an event are, the notification is shown, within the limits.
    #[test]
    fn no_event_makes_a_stored_type_fail(
        pieces in proptest::collection::vec(piece(), 1..6), a in any_json(), b in any_json(), go: bool,
    ) {
        let template = pieces.concat();
        prop_assume!(!template.trim().is_empty() && !template.contains('\0'));
        let made = Templates::compile("t", definition(json!({
            "name": "a", "display_name": "이름", "templates": [{"locale": "ko", "title": template, "link": template}],
        })));
        // A template that fails without data is refused; every other one must hold.
        if let Ok(templates) = made {
            let made = rendered(&templates, &event(json!({"a": a, "b": b, "go": go})), "ko-KR");
            prop_assert!(!made.message.silent);
            let title = made.message.title.expect("always something to show");
            prop_assert!(!title.trim().is_empty() && title.len() <= MAX_TITLE_BYTES && !title.contains('\0'));
        }
    }

    #[test]
    fn any_source_is_read_without_panic(source: String) {
        let _ = Templates::compile("t", definition(json!({"name": "a", "templates": [{"locale": "ko", "title": source}]})));
    }
}
