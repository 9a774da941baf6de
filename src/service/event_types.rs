//! The event catalogue: declaring types, and seeing what they would send.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::content::{self, Content, Data};
use crate::domain::event_type::{Definition, LocaleTemplate, Ttl, TypeVersion};
use crate::domain::ids::{CollapseKey, EventType, Locale, TypeVersionId, UserId};
use crate::domain::notification::{Body, DEFAULT_TTL_MS};
use crate::domain::outcome::ResultCode;
use crate::domain::platform::{Platform, Route};
use crate::domain::sending::{Priority, SendOptions};
use crate::domain::violation::Violations;
use crate::render::{self, Problem, Templates, Variables};
use crate::senders::{EncodeError, Inspection, Message, Sender};

use super::apps::{App, DEFAULT_CREDENTIAL};
use super::events::MAX_SUBJECT_BYTES;
use super::page_token::PageScope;
use super::{Call, Result, Service, fields};

pub const DEFAULT_PAGE: usize = 50;
pub const MAX_PAGE: usize = 100;
/// Languages of one preview.
pub const MAX_PREVIEW_LOCALES: usize = 100;

/// What to preview, and with which event.
#[derive(Default)]
pub struct Preview {
    /// One that is not stored; else `name` and `version` say which.
    pub definition: Option<Definition>,
    pub name: String,
    pub version: Option<u32>,
    pub data: Data,
    pub actor_id: String,
    pub subject: String,
    pub content: Option<Content>,
    pub collapse_key: String,
    /// Of devices. Empty: those of the templates and of the inline content.
    pub locales: Vec<String>,
}

/// What a device would get.
pub struct Previewed {
    pub locale: Option<String>,
    /// The entry that its words are from.
    pub template_locale: Option<String>,
    pub message: Message<'static>,
    pub collapse_key: Option<CollapseKey>,
    pub problems: Vec<Problem>,
    pub payloads: Vec<Payload>,
}

/// The same for one platform.
#[derive(Clone, Debug)]
pub struct Payload {
    pub platform: Platform,
    /// JSON; empty when it cannot be sent.
    pub body: String,
    pub headers: Vec<(String, String)>,
    /// In bytes, as the platform counts.
    pub size: usize,
    /// Why it cannot be sent, and in words.
    pub refused: Option<(ResultCode, String)>,
}

impl Payload {
    /// What a sender makes of a message that is worth delivering for `ttl` more.
    pub(super) fn of(
        sender: &Arc<dyn Sender>,
        route: &Route,
        message: &Message,
        options: &SendOptions,
        ttl: Duration,
    ) -> Self {
        let encoded = sender.encode(route, message, options).and_then(|encoded| {
            let unreadable = || EncodeError::Invalid("this platform's payloads cannot be shown".to_owned());
            sender.inspect(&encoded, ttl).ok_or_else(unreadable)
        });
        Self::new(route.spec.platform, encoded)
    }

    fn new(platform: Platform, encoded: Result<Inspection, EncodeError>) -> Self {
        match encoded {
            Ok(Inspection { headers, body, size }) => Self { platform, body, headers, size, refused: None },
            Err(error) => {
                let detail = error.to_string();
                let (size, code) = match error {
                    EncodeError::TooLarge { size, .. } => (size, ResultCode::PayloadTooLarge),
                    EncodeError::Invalid(_) => (0, ResultCode::NotEncodable),
                };
                Self { platform, body: String::new(), headers: Vec::new(), size, refused: Some((code, detail)) }
            }
        }
    }
}

impl Service {
    /// The version that stands now, and whether this call made it.
    pub async fn put_event_type(
        &self,
        mut call: Call<'_>,
        definition: Option<Definition>,
    ) -> Result<(TypeVersion, bool)> {
        let templates = if let Some(definition) = definition {
            compile(&mut call.violations, definition)
        } else {
            call.violations.add("event_type", "is required");
            None
        };
        let app = call.checked()?;
        let templates = templates.expect("one that does not compile is a violation");
        let definition = Arc::new(templates.definition().clone());
        let now = self.runtime.now();
        let (version, changed) =
            self.store.put_event_type(app.key, definition, now).await.map_err(|error| self.refused(error))?;
        self.types.insert(version.id, Arc::new(templates));
        self.undeclared.forget(app.key);
        if changed {
            tracing::info!(app_id = %app.id, event_type = version.definition.name, version = version.version,
                "an event type was declared");
        }
        Ok((version, changed))
    }

    /// `version` `None`: the one that stands.
    pub async fn get_event_type(&self, mut call: Call<'_>, name: &str, version: Option<u32>) -> Result<TypeVersion> {
        let name = call.violations.take(EventType::parse("name", name));
        let app = call.checked()?;
        let name = name.expect("a missing name is a violation");
        self.store.get_event_type(app.key, &name, version).await.map_err(|error| self.refused(error))
    }

    /// By name; a page and the token of the next.
    pub async fn list_event_types(
        &self,
        mut call: Call<'_>,
        page_size: i32,
        page_token: &str,
    ) -> Result<(Vec<TypeVersion>, String)> {
        let violations = &mut call.violations;
        let limit = fields::page_size(violations, page_size, DEFAULT_PAGE, MAX_PAGE);
        let scope = call.app.as_ref().map(|app| PageScope::new(self.store.identity(), "ListEventTypes", app.key));
        let after = scope.as_ref().and_then(|scope| scope.read(violations, page_token)).map(|[version]| version);
        let app = call.checked()?;
        let scope = scope.expect("there is an app");
        let after = match after {
            None => None,
            // A token names the last version of its page: names are too long for one, and versions are for ever.
            Some(version) => {
                let last = self.store.type_definition(TypeVersionId(version)).await;
                Some(EventType::trusted(&last.map_err(|error| self.refused(error))?.name))
            }
        };
        let page = self.store.list_event_types(app.key, after, limit).await.map_err(|error| self.refused(error))?;
        let next = page.next.and(page.items.last()).map_or_else(String::new, |last| scope.issue([last.id.0]));
        Ok((page.items, next))
    }

    /// Whether it was declared.
    pub async fn delete_event_type(&self, mut call: Call<'_>, name: &str) -> Result<bool> {
        let name = call.violations.take(EventType::parse("name", name));
        let app = call.checked()?;
        let name = name.expect("a missing name is a violation");
        let now = self.runtime.now();
        let existed = self.store.delete_event_type(app.key, &name, now).await.map_err(|error| self.refused(error))?;
        if existed {
            tracing::info!(app_id = %app.id, event_type = %name, "an event type was deleted");
        }
        Ok(existed)
    }

    /// What devices would get, by language and platform. Sends and stores nothing.
    pub async fn preview(&self, mut call: Call<'_>, input: Preview) -> Result<Vec<Previewed>> {
        let violations = &mut call.violations;
        let unnamed = input.definition.is_none();
        let given = match input.definition {
            Some(definition) => compile(violations, definition),
            None => None,
        };
        let name = unnamed.then(|| violations.take(EventType::parse("name", &input.name))).flatten();
        let actor = fields::optional_user(violations, "actor_id", &input.actor_id);
        let subject = fields::optional_line(violations, "subject", input.subject, MAX_SUBJECT_BYTES);
        if !violations.names("data") {
            content::check_data("data", &input.data, violations);
        }
        let content = input.content.unwrap_or_default();
        content.check("content", violations);
        let collapse_key = (!input.collapse_key.is_empty())
            .then(|| violations.take(CollapseKey::parse("collapse_key", &input.collapse_key)))
            .flatten();
        let locales = locales(violations, &input.locales);
        let app = call.checked()?;

        let templates = if let Some(templates) = given {
            Arc::new(templates)
        } else {
            let name = name.expect("a missing name is a violation");
            let version = self.store.get_event_type(app.key, &name, input.version).await;
            self.templates(version.map_err(|error| self.refused(error))?.id).await?
        };
        let body = Body {
            content,
            data: input.data,
            subject,
            actor: actor.as_ref().map(UserId::to_string),
            ..Body::default()
        };
        let locales = if locales.is_empty() { known_locales(&body.content, &templates) } else { locales };
        Ok(locales
            .into_iter()
            .map(|locale| self.previewed(&app, &templates, &body, collapse_key.as_ref(), locale))
            .collect())
    }

    fn previewed(
        &self,
        app: &App,
        templates: &Templates,
        body: &Body,
        collapse_key: Option<&CollapseKey>,
        locale: Option<Locale>,
    ) -> Previewed {
        let definition = templates.definition();
        let app_default = self.types.default_locale(app.key);
        let variant = render::choose(&body.content, Some(templates), locale.as_ref(), app_default.as_ref());
        let rendered = render::render(body, &definition.name, Some(templates), variant, app_default.as_ref());
        let (message, mut problems) = (rendered.message, rendered.problems);
        let collapse_key = if let Some(key) = collapse_key {
            Some(key.clone())
        } else {
            let variables =
                Variables::new(&body.data, body.actor.as_deref(), body.subject.as_deref(), &definition.name);
            templates.collapse_key(&variables).unwrap_or_else(|problem| {
                problems.push(problem);
                None
            })
        };
        let default_priority = if message.silent { Priority::Normal } else { Priority::High };
        let ttl = definition.ttl.map_or(Duration::from_millis(DEFAULT_TTL_MS.unsigned_abs()), Ttl::duration);
        let options = SendOptions {
            priority: definition.priority.unwrap_or(default_priority),
            collapse_key: collapse_key.clone(),
            expires_at: self.runtime.now().plus(ttl),
            push_id: true,
        };
        Previewed {
            template_locale: variant.entry.map(|at| definition.templates[at].locale.clone()),
            locale: locale.map(|locale| locale.to_string()),
            payloads: self.payloads(app, &message, &options, ttl),
            message: message.into_owned(),
            collapse_key,
            problems,
        }
    }

    /// One for each platform that the app can send through, by the credential named `default` where there is one.
    fn payloads(&self, app: &App, message: &Message, options: &SendOptions, ttl: Duration) -> Vec<Payload> {
        let mut payloads = Vec::new();
        let sending = self.sending();
        for credentials in app.credentials.values() {
            let credential = credentials.get(DEFAULT_CREDENTIAL).or_else(|| credentials.values().next());
            let route = credential
                .and_then(|credential| credential.route(credential.default_environment, &credential.default_bundle));
            let Some((route, sender)) = route.and_then(|route| sending.senders.get(route)) else { continue };
            payloads.push(Payload::of(sender, route, message, options, ttl));
        }
        payloads
    }

    /// The compiled version, from memory or from the store.
    pub(super) async fn templates(&self, version: TypeVersionId) -> Result<Arc<Templates>> {
        let load = self.store.type_definition(version);
        self.types.get_or_load(version, load).await.map_err(|error| self.refused(error))
    }
}

fn compile(violations: &mut Violations, definition: Definition) -> Option<Templates> {
    match Templates::compile("event_type", definition) {
        Ok(templates) => Some(templates),
        Err(found) => {
            for violation in found {
                violations.add(violation.field, violation.description);
            }
            None
        }
    }
}

/// As the caller asked for them; an empty one is a device that told none.
fn locales(violations: &mut Violations, texts: &[String]) -> Vec<Option<Locale>> {
    if texts.len() > MAX_PREVIEW_LOCALES {
        violations.add("locales", format!("has {} entries, at most {MAX_PREVIEW_LOCALES} are allowed", texts.len()));
    }
    let parse = |(at, text): (usize, &String)| {
        if text.is_empty() { None } else { violations.take(Locale::parse(&format!("locales[{at}]"), text)) }
    };
    texts.iter().take(MAX_PREVIEW_LOCALES).enumerate().map(parse).collect()
}

/// One for each language there are words in; a device that told no language where there is none.
fn known_locales(content: &Content, templates: &Templates) -> Vec<Option<Locale>> {
    let of_type = templates.definition().templates.iter().map(|template: &LocaleTemplate| template.locale.as_str());
    let mut known: Vec<Option<Locale>> = Vec::new();
    for locale in of_type.chain(content.localized.keys().map(String::as_str)) {
        let locale = (!locale.is_empty()).then(|| Locale::trusted(locale));
        if known.len() < MAX_PREVIEW_LOCALES && !known.contains(&locale) {
            known.push(locale);
        }
    }
    if known.is_empty() {
        known.push(None);
    }
    known
}
