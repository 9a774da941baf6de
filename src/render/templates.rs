//! An event type's templates, compiled: what is checked when a type is stored and run when a notification is sent.
//!
//! **What is refused at once.** Syntax errors; unknown filters, tests, particles and variables; wrong numbers of
//! arguments; calls, includes, macros and recursion (`check` has the list); and a template that fails when the event
//! brings no data at all, so that a missing key is always harmless. What is missing renders as nothing, at any depth.
//!
//! **What only data can break** (a text divided by two, a loop over a number, [`FUEL`] used up) never loses the
//! notification: words that fail are taken from the default language's entry, then the type's display name stands for
//! them; any other field is taken from the default entry, then left out. A text over its limit is cut and ends in `…`.
//! Whatever happened is told with the message (`Problem`), for the log and for previews.
//!
//! Texts are plain: nothing is escaped, leading and trailing blanks go, and a field that renders to nothing is absent.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

use super::check::{check, describe};
use super::filters;
use crate::domain::content::{Data, MAX_OPTION_BYTES, MAX_URL_BYTES};
use crate::domain::event_type::{Definition, LocaleTemplate};
use crate::domain::ids::{CollapseKey, Locale};
use crate::domain::violation::{Violation, Violations};

/// What one template may spend: an instruction costs 1, and so do 64 bytes written or made on the way. A text of a
/// hundred bytes with five placeholders takes some 20.
pub const FUEL: u64 = 4_000;
/// A rendered title or subtitle, in bytes. With the body this leaves a kilobyte of the platforms' four for data.
pub const MAX_TITLE_BYTES: usize = 512;
/// A rendered body, in bytes.
pub const MAX_BODY_BYTES: usize = 2_048;
/// The largest badge.
const MAX_BADGE: u32 = 99_999;

/// What a template can read of an event. Cheap to clone; `data` is read once, however many templates use it.
#[derive(Clone, Debug)]
pub struct Variables<'a> {
    data: Value,
    actor: Option<&'a str>,
    subject: Option<&'a str>,
    event_type: &'a str,
}

impl<'a> Variables<'a> {
    /// `data`: the event's, as `data.*`. `actor`: the caller's id of who caused it.
    #[must_use]
    pub fn new(data: &Data, actor: Option<&'a str>, subject: Option<&'a str>, event_type: &'a str) -> Self {
        Self { data: object(data), actor, subject, event_type }
    }
}

/// A field that could not be rendered as written, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// As in the definition: `templates[0].title`, `collapse_key`.
    pub field: String,
    pub detail: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.detail)
    }
}

/// A compiled version of an event type. Immutable; shared by everything that is sent with it.
pub struct Templates {
    definition: Definition,
    engine: Environment<'static>,
    entries: Vec<Entry>,
    collapse_key: Option<Text>,
    reads_actor: bool,
    told: AtomicBool,
}

#[derive(Default)]
struct Entry {
    title: Option<Text>,
    subtitle: Option<Text>,
    body: Option<Text>,
    image: Option<Text>,
    link: Option<Text>,
    sound: Option<Text>,
    category: Option<Text>,
    thread_id: Option<Text>,
    badge: Option<Text>,
}

/// One field's template.
enum Text {
    /// Nothing to fill in.
    Plain(String),
    /// By its name in the engine, which is its field's path.
    Template(String),
}

/// Title, subtitle and body of one language.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Words {
    pub title: Option<String>,
    pub subtitle: Option<String>,
    pub body: Option<String>,
}

/// What goes with the words.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extras {
    pub image: Option<String>,
    pub link: Option<String>,
    pub sound: Option<String>,
    pub category: Option<String>,
    pub thread_id: Option<String>,
    pub badge: Option<u32>,
}

fn engine() -> Environment<'static> {
    let mut engine = Environment::empty();
    engine.set_undefined_behavior(UndefinedBehavior::Chainable);
    engine.set_auto_escape_callback(|_| AutoEscape::None);
    engine.set_fuel(Some(FUEL));
    engine.set_formatter(|out, _, value| Ok(out.write_str(&filters::text(value))?));
    filters::install(&mut engine);
    engine
}

impl Templates {
    /// Checks the definition and compiles its templates; every offending field is named, with paths from `field`.
    pub fn compile(field: &str, definition: Definition) -> Result<Self, Vec<Violation>> {
        let mut violations = Violations::default();
        definition.check(field, &mut violations);
        let mut made = Self {
            entries: Vec::with_capacity(definition.templates.len()),
            definition,
            engine: engine(),
            collapse_key: None,
            reads_actor: false,
            told: AtomicBool::new(false),
        };
        let sources = std::mem::take(&mut made.definition.templates);
        for (at, source) in sources.iter().enumerate() {
            let entry = made.entry(field, at, source, &mut violations);
            made.entries.push(entry);
        }
        made.definition.templates = sources;
        if let Some(source) = made.definition.collapse_key.clone() {
            made.collapse_key = made.text(field, "collapse_key".to_owned(), &source, &mut violations);
        }
        violations.finish()?;
        Ok(made)
    }

    /// A version that was checked when it was stored. Should this version of ours refuse it all the same, it keeps its
    /// rules and is shown by its display name: what was accepted is kept.
    #[must_use]
    pub fn stored(definition: Definition) -> Self {
        match Self::compile("event_type", definition.clone()) {
            Ok(templates) => templates,
            Err(violations) => {
                tracing::error!(
                    event_type = definition.name,
                    ?violations,
                    "a stored event type is not understood; its notifications show its display name"
                );
                Self::standing_in(definition)
            }
        }
    }

    /// Shows the display name in every language, or nothing where the type shows nothing.
    #[must_use]
    pub fn standing_in(mut definition: Definition) -> Self {
        let title = definition.has_words().then(|| definition.shown_name().to_owned());
        definition.default_locale = None;
        definition.templates = vec![LocaleTemplate { title: title.clone(), ..LocaleTemplate::default() }];
        let entry = Entry { title: title.map(Text::Plain), ..Entry::default() };
        Self {
            definition,
            engine: engine(),
            entries: vec![entry],
            collapse_key: None,
            reads_actor: false,
            told: AtomicBool::new(false),
        }
    }

    fn entry(&mut self, field: &str, at: usize, source: &LocaleTemplate, violations: &mut Violations) -> Entry {
        let mut entry = Entry::default();
        for (name, source) in source.fields() {
            let text = self.text(field, format!("templates[{at}].{name}"), source, violations);
            match name {
                "title" => entry.title = text,
                "subtitle" => entry.subtitle = text,
                "body" => entry.body = text,
                "image" => entry.image = text,
                "link" => entry.link = text,
                "sound" => entry.sound = text,
                "category" => entry.category = text,
                "thread_id" => entry.thread_id = text,
                _ => entry.badge = text,
            }
        }
        entry
    }

    /// `path`: of the template within the definition.
    fn text(&mut self, field: &str, path: String, source: &str, violations: &mut Violations) -> Option<Text> {
        let facts = match check(source) {
            Ok(facts) => facts,
            Err(errors) => {
                for error in errors {
                    violations.add(format!("{field}.{path}"), error);
                }
                return None;
            }
        };
        if !facts.dynamic {
            return Some(Text::Plain(source.trim().to_owned()));
        }
        self.reads_actor |= facts.reads.contains("actor");
        if let Err(error) = self.engine.add_template_owned(path.clone(), source.to_owned()) {
            violations.add(format!("{field}.{path}"), describe(&error));
            return None;
        }
        let nothing = Variables::new(&Data::new(), None, None, &self.definition.name);
        match self.run(&path, &context(&nothing, None)) {
            Ok(_) => Some(Text::Template(path)),
            Err(problem) => {
                violations.add(
                    format!("{field}.{path}"),
                    format!("fails when the event brings no data, where it should show something: {}", problem.detail),
                );
                None
            }
        }
    }

    #[must_use]
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Whether a template reads `actor`: only then it is kept with the notification.
    #[must_use]
    pub fn reads_actor(&self) -> bool {
        self.reads_actor
    }

    /// Says what could not be rendered: the first time as a warning, then for those who debug. A type that fails fails
    /// with every event.
    pub fn report(&self, problems: &[Problem]) {
        for problem in problems {
            let event_type = &self.definition.name;
            if self.told.swap(true, Ordering::Relaxed) {
                tracing::debug!(event_type, %problem, "a template failed with an event's data");
            } else {
                tracing::warn!(event_type, %problem,
                    "a template failed with an event's data; the notification shows what stands in for it");
            }
        }
    }

    /// Its weight in a cache, in bytes: that of the sources and what they become, roughly.
    #[must_use]
    pub fn weight(&self) -> usize {
        let sources: usize =
            self.definition.templates.iter().flat_map(LocaleTemplate::fields).map(|(_, source)| source.len()).sum();
        2_048 + 8 * sources
    }

    /// The entry for a device's language: the longest prefix of the locale that has one (`ko-KR`, then `ko`), then the
    /// type's default language, then the app's by its prefixes, then the first entry. `None` without entries.
    #[must_use]
    pub fn entry_for(&self, locale: Option<&Locale>, app_default: Option<&Locale>) -> Option<usize> {
        locale.and_then(|locale| self.by_prefix(locale.as_str())).or_else(|| self.default_for(app_default))
    }

    fn default_for(&self, app_default: Option<&Locale>) -> Option<usize> {
        if self.definition.default_locale.is_none()
            && let Some(found) = app_default.and_then(|locale| self.by_prefix(locale.as_str()))
        {
            return Some(found);
        }
        self.definition.default_entry()
    }

    fn by_prefix(&self, locale: &str) -> Option<usize> {
        let mut wanted = locale;
        loop {
            // Tags compare without regard to case (RFC 5646 §2.1.1).
            let found = self.definition.templates.iter().position(|entry| entry.locale.eq_ignore_ascii_case(wanted));
            if found.is_some() {
                return found;
            }
            wanted = &wanted[..wanted.rfind('-')?];
        }
    }

    /// The words of an entry, with the falls described above. `None`: the type has none.
    pub fn words(
        &self,
        entry: usize,
        app_default: Option<&Locale>,
        variables: &Variables<'_>,
        problems: &mut Vec<Problem>,
    ) -> Option<Words> {
        if !self.definition.has_words() {
            return None;
        }
        for at in self.chain(entry, app_default) {
            match self.words_of(at, variables) {
                Ok(words) if words != Words::default() => return Some(words),
                Ok(_) => problems.push(Problem {
                    field: format!("templates[{at}]"),
                    detail: "title, subtitle and body rendered to nothing".to_owned(),
                }),
                Err(problem) => problems.push(problem),
            }
        }
        Some(Words { title: Some(self.definition.shown_name().to_owned()), ..Words::default() })
    }

    /// The entry, then the default one.
    fn chain(&self, entry: usize, app_default: Option<&Locale>) -> impl Iterator<Item = usize> + use<> {
        let default = self.default_for(app_default).filter(|default| *default != entry);
        std::iter::once(entry).chain(default)
    }

    fn words_of(&self, at: usize, variables: &Variables<'_>) -> Result<Words, Problem> {
        let entry = &self.entries[at];
        let context = self.context_of(at, variables);
        let shown = |text: &Option<Text>, max: usize| match text {
            None => Ok(None),
            Some(text) => self.render(text, &context).map(|text| text.map(|text| cut(text, max))),
        };
        Ok(Words {
            title: shown(&entry.title, MAX_TITLE_BYTES)?,
            subtitle: shown(&entry.subtitle, MAX_TITLE_BYTES)?,
            body: shown(&entry.body, MAX_BODY_BYTES)?,
        })
    }

    fn context_of(&self, at: usize, variables: &Variables<'_>) -> Value {
        context(variables, self.definition.templates.get(at).map(|entry| entry.locale.as_str()))
    }

    /// All but the words: each field from the entry, else from the default one.
    pub fn extras(
        &self,
        entry: usize,
        app_default: Option<&Locale>,
        variables: &Variables<'_>,
        problems: &mut Vec<Problem>,
    ) -> Extras {
        let chain: Vec<(usize, Value)> =
            self.chain(entry, app_default).map(|at| (at, self.context_of(at, variables))).collect();
        let mut pick = |name: &str, of: fn(&Entry) -> Option<&Text>, rule: &dyn Fn(&str) -> Result<(), String>| {
            for (at, context) in &chain {
                let Some(text) = of(&self.entries[*at]) else { continue };
                let checked = self.render(text, context).and_then(|value| match value {
                    Some(value) => rule(&value)
                        .map(|()| Some(value))
                        .map_err(|detail| Problem { field: format!("templates[{at}].{name}"), detail }),
                    None => Ok(None),
                });
                match checked {
                    Ok(value) => return value,
                    Err(problem) => problems.push(problem),
                }
            }
            None
        };
        let option = |value: &str| fits(value, MAX_OPTION_BYTES);
        let badge = |value: &str| match value.parse::<u32>() {
            Ok(badge) if badge <= MAX_BADGE => Ok(()),
            _ => Err(format!("rendered to no number of 0 to {MAX_BADGE}")),
        };
        Extras {
            image: pick("image", |entry| entry.image.as_ref(), &|value| {
                fits(value, MAX_URL_BYTES)?;
                if value.starts_with("https://") { Ok(()) } else { Err("rendered to no https URL".to_owned()) }
            }),
            link: pick("link", |entry| entry.link.as_ref(), &|value| fits(value, MAX_URL_BYTES)),
            sound: pick("sound", |entry| entry.sound.as_ref(), &option),
            category: pick("category", |entry| entry.category.as_ref(), &option),
            thread_id: pick("thread_id", |entry| entry.thread_id.as_ref(), &option),
            badge: pick("badge", |entry| entry.badge.as_ref(), &badge).and_then(|badge| badge.parse().ok()),
        }
    }

    /// The collapse key of an event that names none. One over the limit, or with control characters, is replaced by its
    /// SHA-256, which is as good an identity. `Ok(None)`: every notification stands alone.
    pub fn collapse_key(&self, variables: &Variables<'_>) -> Result<Option<CollapseKey>, Problem> {
        let Some(text) = &self.collapse_key else { return Ok(None) };
        let Some(rendered) = self.render(text, &context(variables, None))? else { return Ok(None) };
        Ok(Some(CollapseKey::parse("collapse_key", &rendered).unwrap_or_else(|_| {
            use std::fmt::Write as _;

            use sha2::Digest as _;
            let digest = sha2::Sha256::digest(rendered.as_bytes());
            let mut hex = String::with_capacity(CollapseKey::MAX_BYTES);
            for byte in digest {
                let _ = write!(hex, "{byte:02x}");
            }
            CollapseKey::trusted(&hex)
        })))
    }

    /// `Ok(None)`: it came to nothing.
    fn render(&self, text: &Text, context: &Value) -> Result<Option<String>, Problem> {
        let rendered = match text {
            Text::Plain(text) => text.clone(),
            Text::Template(name) => self.run(name, context)?,
        };
        let kept = rendered.trim();
        Ok(match kept.len() {
            0 => None,
            length if length == rendered.len() => Some(rendered),
            _ => Some(kept.to_owned()),
        })
    }

    fn run(&self, name: &str, context: &Value) -> Result<String, Problem> {
        let rendered = self.engine.get_template(name).and_then(|template| template.render(context.clone()));
        match rendered {
            Ok(text) if text.contains('\0') => Ok(text.replace('\0', "")),
            Ok(text) => Ok(text),
            Err(error) => Err(Problem { field: name.to_owned(), detail: describe(&error) }),
        }
    }
}

fn context(variables: &Variables<'_>, locale: Option<&str>) -> Value {
    let text = |text: Option<&str>| text.map_or(Value::UNDEFINED, Value::from);
    Value::from_pairs([
        ("data", variables.data.clone()),
        ("actor", text(variables.actor)),
        ("subject", text(variables.subject)),
        ("event_type", Value::from(variables.event_type)),
        ("locale", text(locale)),
    ])
}

/// JSON as the engine's values; no deeper than `data` may be.
fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => Value::from(value),
            (None, Some(value), _) => Value::from(value),
            (None, None, Some(value)) => Value::from(value),
            (None, None, None) => Value::from(number.to_string()),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value).collect(),
        serde_json::Value::Object(map) => object(map),
    }
}

fn object(map: &Data) -> Value {
    Value::from_pairs(map.iter().map(|(key, json)| (key.as_str(), value(json))))
}

fn fits(value: &str, max: usize) -> Result<(), String> {
    if value.len() > max {
        return Err(format!("rendered to {} bytes, at most {max} are allowed", value.len()));
    }
    if value.chars().any(char::is_control) {
        return Err("rendered to something with control characters".to_owned());
    }
    Ok(())
}

/// At most `max` bytes, ending in `…` where something was left out, at the boundary of a character.
fn cut(mut text: String, max: usize) -> String {
    const MARK: &str = "…";
    if text.len() <= max {
        return text;
    }
    let mut end = max - MARK.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    // A joiner at the cut belongs to what is gone.
    text.truncate(text.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '\u{200D}' | '\u{FE0F}')).len());
    text.push_str(MARK);
    text
}
