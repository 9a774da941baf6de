//! From stored content to the words of one language.
//!
//! A device's locale picks the longest prefix that the content has: `ko-KR`, then `ko`, then the texts without a
//! language. What an entry leaves out comes from the latter. So the number of variants of a notification is bounded by
//! the languages it was written in, and each is built once for all its devices.

use crate::domain::content::{Content, Message};
use crate::domain::ids::Locale;
use crate::domain::notification::Body;

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

/// The message of one variant, as [`variant`] named it.
#[must_use]
pub fn message(body: &Body, variant: Option<&str>) -> Message {
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
        data: body.data.clone(),
        silent: content.is_silent(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::content::LocalizedText;

    fn body() -> Body {
        let text = |title: &str| LocalizedText { title: Some(title.to_owned()), ..LocalizedText::default() };
        let mut body = Body::default();
        body.content.title = Some("New comment".into());
        body.content.body = Some("Choco: cute!".into());
        body.content.localized.insert("ko".into(), text("새 댓글"));
        body.content.localized.insert("pt-BR".into(), text("Novo comentário"));
        body
    }

    fn title(locale: &str) -> Option<String> {
        let body = body();
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
        assert_eq!(variant(&body().content, None), None);
    }

    #[test]
    fn what_an_entry_leaves_out_comes_from_the_plain_texts() {
        let body = body();
        let message = message(&body, Some("ko"));
        assert_eq!(message.body.as_deref(), Some("Choco: cute!"));
        assert!(!message.silent);
    }
}
