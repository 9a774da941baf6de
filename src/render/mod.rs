//! From stored content and templates to the words of one language.
//!
//! A device's locale picks the longest prefix that the content has (`ko-KR`, then `ko`), and the same of the event
//! type's templates; see [`variant`] and [`Templates::entry_for`]. Inline content overrides the templates field by
//! field. So the number of variants of a notification is bounded by the languages it was written in, and each is built
//! once for all its devices.

mod check;
mod filters;
pub mod josa;
mod templates;
#[cfg(test)]
mod tests;
mod types;

pub use check::VARIABLES;
pub use templates::{FUEL, MAX_BODY_BYTES, MAX_TITLE_BYTES, Problem, Templates, Variables};
pub use types::Types;

use std::borrow::Cow;

use crate::domain::content::{Content, Message};
use crate::domain::ids::Locale;
use crate::domain::notification::Body;

/// Which texts a device gets. Equal variants of one notification are the same message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Variant<'a> {
    /// Which of the inline content's languages; `None`: its texts without one.
    pub inline: Option<&'a str>,
    /// Which of the type's templates; `None`: it has none.
    pub entry: Option<usize>,
}

/// A message, and what could not be rendered as written.
#[derive(Clone, PartialEq, Debug)]
pub struct Rendered<'a> {
    pub message: Message<'a>,
    /// Empty when all went well.
    pub problems: Vec<Problem>,
}

/// Which of the content's languages a locale gets; `None`: the texts without a language.
#[must_use]
pub fn variant<'a>(content: &'a Content, locale: Option<&Locale>) -> Option<&'a str> {
    if content.localized.is_empty() {
        return None;
    }
    let mut wanted = locale?.as_str();
    loop {
        // Tags compare without regard to case (RFC 5646 §2.1.1); there are at most a hundred.
        if let Some((name, _)) = content.localized.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)) {
            return Some(name);
        }
        wanted = &wanted[..wanted.rfind('-')?];
    }
}

/// The variant of a locale. `app_default`: the app's own default language.
#[must_use]
pub fn choose<'a>(
    content: &'a Content,
    templates: Option<&Templates>,
    locale: Option<&Locale>,
    app_default: Option<&Locale>,
) -> Variant<'a> {
    Variant {
        inline: variant(content, locale),
        entry: templates.and_then(|templates| templates.entry_for(locale, app_default)),
    }
}

/// Whether there is anything to show: by the content itself or by the type's templates.
#[must_use]
pub fn is_silent(content: &Content, templates: Option<&Templates>) -> bool {
    content.is_silent() && !templates.is_some_and(|templates| templates.definition().has_words())
}

/// The message of one variant of inline content, as [`variant`] named it.
#[must_use]
pub fn message<'a>(body: &'a Body, variant: Option<&str>) -> Message<'a> {
    let content = &body.content;
    let texts = variant.and_then(|name| content.localized.get(name));
    let pick = |localized: Option<&String>, plain: &Option<String>| localized.or(plain.as_ref()).cloned();
    Message {
        title: pick(texts.and_then(|t| t.title.as_ref()), &content.title),
        subtitle: pick(texts.and_then(|t| t.subtitle.as_ref()), &content.subtitle),
        body: pick(texts.and_then(|t| t.body.as_ref()), &content.body),
        image: content.image.clone(),
        link: content.link.clone(),
        sound: content.sound.clone(),
        badge: content.badge,
        category: content.category.clone(),
        thread_id: content.thread_id.clone(),
        data: Cow::Borrowed(&body.data),
        silent: content.is_silent(),
    }
}

/// The message of one variant, as [`choose`] named it: the inline content, and from the templates what it leaves out.
/// Never fails and never makes a visible notification silent.
#[must_use]
pub fn render<'a>(
    body: &'a Body,
    event_type: &str,
    templates: Option<&Templates>,
    variant: Variant<'_>,
    app_default: Option<&Locale>,
) -> Rendered<'a> {
    let mut message = message(body, variant.inline);
    let mut problems = Vec::new();
    let (Some(templates), Some(entry)) = (templates, variant.entry) else { return Rendered { message, problems } };
    message.silent = is_silent(&body.content, Some(templates));
    let variables = Variables::new(&body.data, body.actor.as_deref(), body.subject.as_deref(), event_type);
    if (message.title.is_none() || message.subtitle.is_none() || message.body.is_none())
        && let Some(words) = templates.words(entry, app_default, &variables, &mut problems)
    {
        fill(&mut message.title, words.title);
        fill(&mut message.subtitle, words.subtitle);
        fill(&mut message.body, words.body);
    }
    let extras = templates.extras(entry, app_default, &variables, &mut problems);
    fill(&mut message.image, extras.image);
    fill(&mut message.link, extras.link);
    fill(&mut message.sound, extras.sound);
    fill(&mut message.badge, extras.badge);
    fill(&mut message.category, extras.category);
    fill(&mut message.thread_id, extras.thread_id);
    Rendered { message, problems }
}

fn fill<T>(field: &mut Option<T>, other: Option<T>) {
    if field.is_none() {
        *field = other;
    }
}
