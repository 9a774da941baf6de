//! A JSON body with holes, written once and filled per device in one go.

use std::fmt::Write;

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use uuid::fmt::Hyphenated;

/// What differs between devices. All of it is written inside a JSON string.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hole {
    Token,
    PushId,
    /// Whole seconds.
    TtlSecs,
}

/// The longest number a hole takes.
const MAX_TTL_DIGITS: usize = 7;

#[derive(Default)]
pub(super) struct Template {
    text: Vec<u8>,
    /// Where in `text`, ascending, and what.
    holes: Vec<(usize, Hole)>,
}

impl Template {
    pub(super) fn with_room(bytes: usize) -> Self {
        Self { text: Vec::with_capacity(bytes), holes: Vec::with_capacity(8) }
    }

    /// Without its holes.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// One without holes.
    pub(super) fn append(&mut self, other: &Self) -> &mut Self {
        debug_assert!(other.holes.is_empty(), "their places would be others");
        self.text.extend_from_slice(&other.text);
        self
    }

    pub(super) fn raw(&mut self, text: &str) -> &mut Self {
        self.text.extend_from_slice(text.as_bytes());
        self
    }

    pub(super) fn hole(&mut self, hole: Hole) -> &mut Self {
        self.holes.push((self.text.len(), hole));
        self
    }

    /// `value` as JSON. Only for what cannot fail: strings, numbers, maps with string keys.
    pub(super) fn json(&mut self, value: &(impl Serialize + ?Sized)) -> &mut Self {
        serde_json::to_writer(&mut self.text, value).expect("strings, numbers and maps of them serialize");
        self
    }

    pub(super) fn fill(&self, token: &str, push_id: &str, ttl_secs: u64) -> Bytes {
        let extra: usize = self
            .holes
            .iter()
            .map(|(_, hole)| match hole {
                Hole::Token => token.len(),
                Hole::PushId => Hyphenated::LENGTH,
                Hole::TtlSecs => MAX_TTL_DIGITS,
            })
            .sum();
        let mut body = BytesMut::with_capacity(self.text.len() + extra);
        let mut from = 0;
        for (at, hole) in &self.holes {
            body.extend_from_slice(&self.text[from..*at]);
            from = *at;
            match hole {
                Hole::Token => escape(&mut body, token),
                Hole::PushId => body.extend_from_slice(push_id.as_bytes()),
                Hole::TtlSecs => {
                    let _ = write!(body, "{ttl_secs}");
                }
            }
        }
        body.extend_from_slice(&self.text[from..]);
        body.freeze()
    }
}

/// Tokens are opaque; the usual ones need no escape.
fn escape(body: &mut BytesMut, text: &str) {
    if text.bytes().all(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
        body.extend_from_slice(text.as_bytes());
        return;
    }
    let quoted = serde_json::Value::from(text).to_string();
    body.extend_from_slice(&quoted.as_bytes()[1..quoted.len() - 1]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_in_place() {
        let mut template = Template::default();
        template.raw(r#"{"a":""#).hole(Hole::Token).raw(r#"","b":""#).hole(Hole::TtlSecs).raw(r#"s","c":"#);
        template.json("x\"y").raw(r#","d":""#).hole(Hole::PushId).raw(r#""}"#);
        let body = template.fill(r#"t"o\k"#, "ID", 60);
        let json: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(json, serde_json::json!({"a": "t\"o\\k", "b": "60s", "c": "x\"y", "d": "ID"}));
    }
}
