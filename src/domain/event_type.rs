//! What a declared event type says: its words by language, its defaults and its place on a settings screen.
//!
//! A definition is data: the stored JSON, a catalogue file's entry and, field by field, the API's message. [`check`]
//! is for what can be said without reading the templates' language; `render` compiles them and refuses the rest. Once
//! stored a version never changes, and a notification keeps the version it was accepted with.
//!
//! [`check`]: Definition::check

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::content::{MAX_LOCALES, MAX_TEXT_BYTES, MAX_URL_BYTES};
use super::ids::{EventType, Locale, TypeVersionId};
use super::notification::MAX_TTL_MS;
use super::platform::Lane;
use super::sending::Priority;
use super::time::UnixMs;
use super::violation::{Violation, Violations, text_rule};
use crate::planted;

/// Display name, in bytes.
pub const MAX_DISPLAY_NAME_BYTES: usize = 256;
/// Group, in bytes.
pub const MAX_GROUP_BYTES: usize = 100;
/// The template of a collapse key, sound, category, thread id or badge, in bytes; what it renders to has its own limit.
pub const MAX_OPTION_TEMPLATE_BYTES: usize = 512;
/// A whole definition as JSON, in bytes.
pub const MAX_DEFINITION_BYTES: usize = 64 * 1024;
/// Declared types of one app.
pub const MAX_EVENT_TYPES: usize = 1_000;

/// Why people are told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Purpose {
    /// Something that concerns the person: a comment, a reaction, a favourite's new content.
    #[default]
    Ordinary,
    /// Sent because the app wants something. Nobody gets it without having asked for it, and it waits in the BULK lane.
    Advertising,
}

/// What follows when a platform took the request and did not answer, so that the push may be on a screen by now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OnMaybe {
    /// Try again under the same identity: at least once to the platform. The default.
    #[default]
    Retry,
    /// Leave it, for what annoys twice. A crash of our own may still repeat it.
    Drop,
}

impl OnMaybe {
    /// The stored number.
    #[must_use]
    pub const fn code(self) -> i16 {
        match self {
            Self::Retry => 0,
            Self::Drop => 1,
        }
    }

    /// Reads [`OnMaybe::code`]; anything else means the default.
    #[must_use]
    pub const fn from_code(code: i16) -> Self {
        if code == 1 { Self::Drop } else { Self::Retry }
    }
}

/// How long a notification is worth delivering. Written as `90s`, `15m`, `24h` or `7d`: a whole number and a unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ttl(Duration);

impl Ttl {
    /// Whole milliseconds, above zero and at most 28 days.
    pub fn new(field: &str, ttl: Duration) -> Result<Self, Violation> {
        if ttl < Duration::from_millis(1) {
            return Err(Violation::new(field, "must be more than 0"));
        }
        if ttl > Duration::from_millis(MAX_TTL_MS.unsigned_abs()) {
            return Err(Violation::new(field, "must be at most 28 days"));
        }
        Ok(Self(Duration::from_millis(u64::try_from(ttl.as_millis()).expect("at most 28 days"))))
    }

    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }

    /// Reads the written form.
    pub fn parse(field: &str, text: &str) -> Result<Self, Violation> {
        let shape = || Violation::new(field, "must be a whole number and a unit: ms, s, m, h or d, such as 24h");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let count: u64 = text[..digits].parse().map_err(|_| shape())?;
        let unit_ms: u64 = match &text[digits..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(shape()),
        };
        Self::new(field, Duration::from_millis(count.saturating_mul(unit_ms)))
    }
}

impl fmt::Display for Ttl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        match [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")]
            .iter()
            .find(|(one, _)| ms.is_multiple_of(*one))
        {
            Some((one, unit)) => write!(f, "{}{unit}", ms / one),
            None => write!(f, "{ms}ms"),
        }
    }
}

impl Serialize for Ttl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse("ttl", &text).map_err(|violation| de::Error::custom(violation.description))
    }
}

/// The words of one language and what goes with them. Every field but `locale` is a template.
///
/// Words (title, subtitle, body) always come from one entry, so that languages never mix; of the rest, what an entry
/// leaves out comes from the default entry, so that a link need be written once only.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LocaleTemplate {
    /// BCP 47 tag. May be empty when it is the only entry: the words of every language.
    pub locale: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subtitle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Must render to an https URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sound: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<String>,
    /// Must render to a whole number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub badge: Option<String>,
}

impl LocaleTemplate {
    /// Whether it has anything to show.
    #[must_use]
    pub fn has_words(&self) -> bool {
        self.title.is_some() || self.subtitle.is_some() || self.body.is_some()
    }

    /// Its templates by field name.
    pub fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("title", &self.title),
            ("subtitle", &self.subtitle),
            ("body", &self.body),
            ("image", &self.image),
            ("link", &self.link),
            ("sound", &self.sound),
            ("category", &self.category),
            ("thread_id", &self.thread_id),
            ("badge", &self.badge),
        ]
        .into_iter()
        .filter_map(|(name, source)| source.as_deref().map(|source| (name, source)))
    }
}

/// A stored version. Never changes; a later one takes its place for events to come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TypeVersion {
    pub id: TypeVersionId,
    /// 1 for the first of this name; goes on counting after a deletion.
    pub version: u32,
    pub definition: Arc<Definition>,
    pub created_at: UnixMs,
}

/// What one version says.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Definition {
    /// An [`EventType`].
    pub name: String,
    /// For a settings screen, and what is shown when nothing else can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Gathers types on a settings screen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    pub purpose: Purpose,
    /// See [`Definition::default_opt_in`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_opt_in: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// `None`: by the size of the audience.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<Lane>,
    /// Goes through quiet hours.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub urgent: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Ttl>,
    /// A template; what it renders to is the collapse key of events that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collapse_key: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub on_maybe: OnMaybe,
    /// The entry for devices whose language has none; without it the first entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_locale: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<LocaleTemplate>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Definition {
    /// What counts while a user chose nothing for this type: yes for ordinary types unless the type says no, always no
    /// for advertising.
    #[must_use]
    pub fn default_opt_in(&self) -> bool {
        match self.purpose {
            Purpose::Ordinary => self.default_opt_in.unwrap_or(true),
            Purpose::Advertising => planted::is("advertising-default-on"),
        }
    }

    /// The lane of every audience; `None`: by its size.
    #[must_use]
    pub fn lane(&self) -> Option<Lane> {
        match self.purpose {
            Purpose::Ordinary => self.lane,
            Purpose::Advertising => Some(Lane::Bulk),
        }
    }

    /// Words for a screen: the display name, else the name.
    #[must_use]
    pub fn shown_name(&self) -> &str {
        self.display_name.as_deref().unwrap_or(&self.name)
    }

    /// The entry that languages without one get.
    #[must_use]
    pub fn default_entry(&self) -> Option<usize> {
        let named = self
            .default_locale
            .as_ref()
            .and_then(|wanted| self.templates.iter().position(|template| template.locale.eq_ignore_ascii_case(wanted)));
        named.or(if self.templates.is_empty() { None } else { Some(0) })
    }

    /// Whether any language has anything to show. Without, and without inline content, a push is silent.
    #[must_use]
    pub fn has_words(&self) -> bool {
        self.templates.iter().any(LocaleTemplate::has_words)
    }

    /// Adds a violation for every field that breaks a rule; paths start with `field`. What the templates say is not
    /// read here.
    pub fn check(&self, field: &str, violations: &mut Violations) {
        violations.take(EventType::parse(&format!("{field}.name"), &self.name));
        let plain = |text: &str| {
            if text.chars().any(char::is_control) { Err("must have no control characters") } else { Ok(()) }
        };
        if let Some(name) = &self.display_name {
            violations.take(text_rule(&format!("{field}.display_name"), name, MAX_DISPLAY_NAME_BYTES, plain));
        }
        if let Some(group) = &self.group {
            violations.take(text_rule(&format!("{field}.group"), group, MAX_GROUP_BYTES, plain));
        }
        if self.purpose == Purpose::Advertising {
            if self.default_opt_in == Some(true) {
                violations.add(format!("{field}.default_opt_in"), "must not be true for purpose ADVERTISING");
            }
            if self.lane == Some(Lane::Interactive) {
                violations.add(format!("{field}.lane"), "must not be INTERACTIVE for purpose ADVERTISING");
            }
            if self.urgent {
                violations.add(format!("{field}.urgent"), "must not be true for purpose ADVERTISING");
            }
        }
        if let Some(source) = &self.collapse_key {
            check_source(violations, format!("{field}.collapse_key"), source, MAX_OPTION_TEMPLATE_BYTES);
        }
        self.check_templates(field, violations);
        let size = serde_json::to_vec(self).map_or(usize::MAX, |bytes| bytes.len());
        if size > MAX_DEFINITION_BYTES {
            violations.add(field, format!("is {size} bytes as JSON, at most {MAX_DEFINITION_BYTES} are allowed"));
        }
    }

    fn check_templates(&self, field: &str, violations: &mut Violations) {
        if self.templates.len() > MAX_LOCALES {
            violations.add(format!("{field}.templates"), format!("has more than {MAX_LOCALES} languages"));
        }
        let with_words = self.has_words();
        for (at, template) in self.templates.iter().enumerate().take(MAX_LOCALES) {
            let path = format!("{field}.templates[{at}]");
            if template.locale.is_empty() {
                if self.templates.len() > 1 {
                    violations.add(format!("{path}.locale"), "may be left out of an only entry alone");
                }
            } else {
                violations.take(Locale::parse(&format!("{path}.locale"), &template.locale));
            }
            if self.templates[..at].iter().any(|other| other.locale.eq_ignore_ascii_case(&template.locale)) {
                violations.add(format!("{path}.locale"), format!("{:?} has an entry already", template.locale));
            }
            for (name, source) in template.fields() {
                let max = match name {
                    "title" | "subtitle" | "body" => MAX_TEXT_BYTES,
                    "image" | "link" => MAX_URL_BYTES,
                    _ => MAX_OPTION_TEMPLATE_BYTES,
                };
                check_source(violations, format!("{path}.{name}"), source, max);
            }
            // Otherwise the same event would be shown in one language and wake the app silently in another.
            if with_words && !template.has_words() {
                violations.add(path, "must have a title, a subtitle or a body, as other languages do");
            } else if !with_words && (template.image.is_some() || template.sound.is_some()) {
                violations.add(path, "image and sound need a title or a body to be shown with");
            }
        }
        if let Some(wanted) = &self.default_locale {
            let path = format!("{field}.default_locale");
            let known = self.templates.iter().any(|template| template.locale.eq_ignore_ascii_case(wanted));
            if violations.take(Locale::parse(&path, wanted)).is_some() && !known {
                violations.add(path, format!("{wanted:?} is not among the templates"));
            }
        }
    }
}

fn check_source(violations: &mut Violations, field: String, source: &str, max: usize) {
    if source.trim().is_empty() {
        violations.add(field, "must not be empty; leave it out instead");
    } else if source.len() > max {
        violations.add(field, format!("is {} bytes, at most {max} are allowed", source.len()));
    } else if source.contains('\0') {
        violations.add(field, "must not contain U+0000");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comment() -> Definition {
        let entry = |locale: &str, title: &str| LocaleTemplate {
            locale: locale.to_owned(),
            title: Some(title.to_owned()),
            ..LocaleTemplate::default()
        };
        Definition {
            name: "comment.created".into(),
            display_name: Some("댓글".into()),
            ttl: Some(Ttl::parse("ttl", "24h").expect("a day")),
            templates: vec![entry("ko", "새 댓글"), entry("en", "New comment")],
            ..Definition::default()
        }
    }

    fn fields(definition: &Definition) -> Vec<String> {
        let mut violations = Violations::default();
        definition.check("event_type", &mut violations);
        violations.into_inner().into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn every_offending_field_is_named() {
        assert!(fields(&comment()).is_empty());
        let mut bad = comment();
        bad.name = "Comment Created".into();
        bad.display_name = Some(String::new());
        bad.group = Some("g".repeat(101));
        bad.purpose = Purpose::Advertising;
        bad.default_opt_in = Some(true);
        bad.lane = Some(Lane::Interactive);
        bad.urgent = true;
        bad.collapse_key = Some("  ".into());
        bad.default_locale = Some("ja".into());
        bad.templates[1].locale = "KO".into();
        bad.templates[1].link = Some("l".repeat(2049));
        bad.templates.push(LocaleTemplate { locale: "fr_FR".into(), ..LocaleTemplate::default() });
        assert_eq!(
            fields(&bad),
            [
                "event_type.name",
                "event_type.display_name",
                "event_type.group",
                "event_type.default_opt_in",
                "event_type.lane",
                "event_type.urgent",
                "event_type.collapse_key",
                "event_type.templates[1].locale",
                "event_type.templates[1].link",
                "event_type.templates[2].locale",
                "event_type.templates[2]",
                "event_type.default_locale",
            ]
        );
    }

    #[test]
    fn limits_hold_at_the_boundary_and_break_one_past_it() {
        let with = |change: &dyn Fn(&mut Definition)| {
            let mut definition = comment();
            change(&mut definition);
            fields(&definition)
        };
        assert!(with(&|d| d.templates[0].title = Some("t".repeat(MAX_TEXT_BYTES))).is_empty());
        assert_eq!(
            with(&|d| d.templates[0].title = Some("t".repeat(MAX_TEXT_BYTES + 1))),
            ["event_type.templates[0].title"]
        );
        assert!(with(&|d| d.display_name = Some("n".repeat(MAX_DISPLAY_NAME_BYTES))).is_empty());
        assert_eq!(
            with(&|d| d.display_name = Some("n".repeat(MAX_DISPLAY_NAME_BYTES + 1))),
            ["event_type.display_name"]
        );
        let many = |count: usize| {
            with(&|d| {
                d.templates = (0..count)
                    .map(|at| LocaleTemplate {
                        locale: format!("x{at}"),
                        body: Some("b".into()),
                        ..LocaleTemplate::default()
                    })
                    .collect();
            })
        };
        assert!(many(MAX_LOCALES).is_empty());
        assert_eq!(many(MAX_LOCALES + 1), ["event_type.templates"]);
    }

    #[test]
    fn advertising_is_never_on_by_default_and_always_bulk() {
        let mut definition = comment();
        assert!(definition.default_opt_in());
        assert_eq!(definition.lane(), None);
        definition.purpose = Purpose::Advertising;
        assert!(!definition.default_opt_in());
        assert_eq!(definition.lane(), Some(Lane::Bulk));
    }

    #[test]
    fn a_definition_reads_back_from_its_json() {
        let definition = comment();
        let json = serde_json::to_string(&definition).expect("json");
        assert!(json.contains(r#""ttl":"1d""#), "{json}");
        assert_eq!(serde_json::from_str::<Definition>(&json).expect("reads"), definition);
        assert!(
            serde_json::from_str::<Definition>(r#"{"name":"a","titel":"x"}"#).is_err(),
            "unknown fields are refused"
        );
    }

    #[test]
    fn ttls_have_one_written_form() {
        for (text, form) in [("90s", "90s"), ("60s", "1m"), ("1500ms", "1500ms"), ("48h", "2d"), ("28d", "28d")] {
            assert_eq!(Ttl::parse("ttl", text).expect(text).to_string(), form);
        }
        for text in ["", "h", "1.5h", "0s", "29d", "24", "-1h", "99999999999999999d"] {
            assert!(Ttl::parse("ttl", text).is_err(), "{text}");
        }
    }
}
