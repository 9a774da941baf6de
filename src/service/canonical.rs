//! The canonical form of a NotifyEvent, hashed for its idempotency key.
//!
//! Two requests that mean the same have the same hash: ids and keys are sorted and merged, the app is resolved, and
//! defaults are filled in where they do not depend on the time of the call (an absent `event_at` stays absent). The
//! idempotency key itself is left out, and so is `dry_run`: an event means the same whether or not it is rehearsed, and a
//! rehearsal hashes nothing. The first byte is the form's version: another form never matches by accident.

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::domain::content::{Content, Data, LocalizedText};
use crate::domain::ids::{AppId, CollapseKey, EventType, UserId};
use crate::domain::notification::{Audience, Body};
use crate::domain::sending::Priority;
use crate::domain::time::UnixMs;

/// The form's version.
pub const VERSION: u8 = 1;
/// Bytes hashed at once, at most; an event's form has some four hundred.
const GATHERED: usize = 1024;

/// Everything an event means.
pub struct CanonicalEvent<'a> {
    pub app: &'a AppId,
    pub event_type: &'a EventType,
    /// Sorted and distinct.
    pub audience: &'a Audience,
    pub actor: Option<&'a UserId>,
    pub body: &'a Body,
    pub priority: Priority,
    pub ttl_ms: i64,
    pub collapse_key: Option<&'a CollapseKey>,
    pub event_at: Option<UnixMs>,
    pub not_before: Option<UnixMs>,
    pub max_audience: Option<u32>,
}

/// SHA-256 of the canonical form.
#[must_use]
pub fn hash(event: &CanonicalEvent<'_>) -> [u8; 32] {
    let mut form = Form::new();
    form.number(i64::from(VERSION));
    form.text(event.app.as_str());
    form.text(event.event_type.as_str());
    form.list(&event.audience.user_ids, |form, id| form.text(id.as_str()));
    form.list(&event.audience.topics, |form, topic| form.text(topic.as_str()));
    form.list(&event.audience.device_ids, |form, id| form.number(id.0));
    form.number(i64::from(event.audience.everyone));
    form.optional_text(event.actor.map(UserId::as_str));
    form.optional_text(event.body.subject.as_deref());
    form.content(&event.body.content);
    form.object(&event.body.data);
    form.list(&event.body.labels, |form, (key, value)| {
        form.text(key);
        form.text(value);
    });
    form.number(match event.priority {
        Priority::High => 1,
        Priority::Normal => 2,
    });
    form.number(event.ttl_ms);
    form.optional_text(event.collapse_key.map(CollapseKey::as_str));
    form.optional_number(event.event_at.map(|at| at.0));
    form.optional_number(event.not_before.map(|at| at.0));
    form.optional_number(event.max_audience.map(i64::from));
    form.finish()
}

/// Every value is written with its kind or length before it, so that no two events run into each other.
struct Form {
    hash: Sha256,
    /// Not hashed yet: dozens of short pieces are hashed faster as one.
    gathered: Vec<u8>,
}

impl Form {
    fn new() -> Self {
        Self { hash: Sha256::new(), gathered: Vec::with_capacity(GATHERED) }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if self.gathered.len() + bytes.len() > GATHERED {
            self.hash.update(&self.gathered);
            self.gathered.clear();
            if bytes.len() > GATHERED {
                return self.hash.update(bytes);
            }
        }
        self.gathered.extend_from_slice(bytes);
    }

    fn finish(mut self) -> [u8; 32] {
        self.hash.update(&self.gathered);
        self.hash.finalize().into()
    }

    fn number(&mut self, value: i64) {
        self.bytes(&value.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.bytes(&(text.len() as u64).to_be_bytes());
        self.bytes(text.as_bytes());
    }

    fn optional_number(&mut self, value: Option<i64>) {
        self.bytes(&[u8::from(value.is_some())]);
        if let Some(value) = value {
            self.number(value);
        }
    }

    fn optional_text(&mut self, text: Option<&str>) {
        self.bytes(&[u8::from(text.is_some())]);
        if let Some(text) = text {
            self.text(text);
        }
    }

    fn list<T>(
        &mut self,
        items: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
        each: impl Fn(&mut Self, T),
    ) {
        let items = items.into_iter();
        self.bytes(&(items.len() as u64).to_be_bytes());
        for item in items {
            each(self, item);
        }
    }

    fn content(&mut self, content: &Content) {
        // Named in full, so that a new field cannot be forgotten here.
        let Content { title, subtitle, body, image, link, sound, badge, category, thread_id, localized } = content;
        for text in [title, subtitle, body, image, link, sound, category, thread_id] {
            self.optional_text(text.as_deref());
        }
        self.optional_number(badge.map(i64::from));
        self.list(localized, |form, (locale, texts)| {
            let LocalizedText { title, subtitle, body } = texts;
            form.text(locale);
            for text in [title, subtitle, body] {
                form.optional_text(text.as_deref());
            }
        });
    }

    fn object(&mut self, data: &Data) {
        let mut entries: Vec<_> = data.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| key.as_str());
        self.list(entries, |form, (key, value)| {
            form.text(key);
            form.value(value);
        });
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.bytes(&[0]),
            Value::Bool(value) => self.bytes(&[1, u8::from(*value)]),
            Value::Number(value) => {
                self.bytes(&[2]);
                self.text(&value.to_string());
            }
            Value::String(text) => {
                self.bytes(&[3]);
                self.text(text);
            }
            Value::Array(items) => {
                self.bytes(&[4]);
                self.list(items, Self::value);
            }
            Value::Object(map) => {
                self.bytes(&[5]);
                self.object(map);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Keys are stored with their hashes for days, so no version may gather them into another.
        #[test]
        fn pieces_are_hashed_as_one(sizes in prop::collection::vec(0..3 * GATHERED, 0..12)) {
            let pieces = sizes.iter().zip(1u8..).map(|(size, byte)| vec![byte; *size]).collect::<Vec<_>>();
            let mut form = Form::new();
            for piece in &pieces {
                form.bytes(piece);
                prop_assert!(form.gathered.len() <= GATHERED);
            }
            prop_assert_eq!(form.finish(), <[u8; 32]>::from(Sha256::digest(pieces.concat())));
        }
    }
}
