//! What templates can call. Every filter gives an answer for every value, so that a surprising event cannot make one
//! fail; where a value makes no sense the filter leaves it as it is or gives nothing. The one exception is a result too
//! long to be meant.

use std::borrow::Cow;
use std::fmt;

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::josa::{Particle, attach};

/// The longest text a filter makes, in bytes.
const MAX_RESULT_BYTES: usize = 64 * 1024;

/// The longest list or map that is shown whole, in bytes; `data` is never larger.
const MAX_SHOWN_BYTES: usize = 16 * 1024;

/// A name templates may use, with how many arguments it takes beside the value before the bar.
pub struct Signature {
    pub name: &'static str,
    pub least: usize,
    pub most: usize,
}

const fn takes(name: &'static str, least: usize, most: usize) -> Signature {
    Signature { name, least, most }
}

pub const FILTERS: &[Signature] = &[
    takes("josa", 1, 1),
    takes("particle", 1, 1),
    takes("default", 0, 1),
    takes("d", 0, 1),
    takes("upper", 0, 0),
    takes("lower", 0, 0),
    takes("capitalize", 0, 0),
    takes("trim", 0, 0),
    takes("replace", 2, 2),
    takes("truncate", 1, 2),
    takes("length", 0, 0),
    takes("count", 0, 0),
    takes("first", 0, 0),
    takes("last", 0, 0),
    takes("join", 0, 1),
    takes("int", 0, 0),
    takes("round", 0, 1),
    takes("thousands", 0, 1),
    takes("urlencode", 0, 0),
];

pub const TESTS: &[Signature] = &[
    takes("defined", 0, 0),
    takes("undefined", 0, 0),
    takes("none", 0, 0),
    takes("string", 0, 0),
    takes("number", 0, 0),
    takes("sequence", 0, 0),
    takes("mapping", 0, 0),
    takes("empty", 0, 0),
];

/// Gives an environment without anything of its own these filters and tests.
pub fn install(environment: &mut Environment<'_>) {
    environment.add_filter("josa", josa);
    environment.add_filter("particle", josa);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("upper", |value: &Value| text(value).to_uppercase());
    environment.add_filter("lower", |value: &Value| text(value).to_lowercase());
    environment.add_filter("capitalize", capitalize);
    environment.add_filter("trim", |value: &Value| text(value).trim().to_owned());
    environment.add_filter("replace", replace);
    environment.add_filter("truncate", truncate);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("first", first);
    environment.add_filter("last", last);
    environment.add_filter("join", join);
    environment.add_filter("int", int);
    environment.add_filter("round", round);
    environment.add_filter("thousands", thousands);
    environment.add_filter("urlencode", urlencode);
    environment.add_test("defined", |value: &Value| !value.is_undefined());
    environment.add_test("undefined", Value::is_undefined);
    environment.add_test("none", Value::is_none);
    environment.add_test("string", |value: &Value| value.kind() == ValueKind::String);
    environment.add_test("number", |value: &Value| value.kind() == ValueKind::Number);
    environment.add_test("sequence", |value: &Value| value.kind() == ValueKind::Seq);
    environment.add_test("mapping", |value: &Value| value.kind() == ValueKind::Map);
    environment.add_test("empty", is_empty);
}

/// A value as it is shown: what is missing or null is nothing, truth is `true` as in JSON, and a whole number has no
/// fraction, however it was computed.
pub fn text(value: &Value) -> Cow<'_, str> {
    if let Some(text) = value.as_str() {
        return Cow::Borrowed(text);
    }
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Cow::Borrowed(""),
        ValueKind::Bool => Cow::Borrowed(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if !value.is_integer() => match value.as_i64() {
            Some(whole) => Cow::Owned(whole.to_string()),
            None => Cow::Owned(value.to_string()),
        },
        _ => Cow::Owned(bounded(value)),
    }
}

/// Lists and maps: they can be far larger than what made them, and showing them takes no fuel before it is done.
fn bounded(value: &Value) -> String {
    struct Bounded(String);
    impl fmt::Write for Bounded {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            if self.0.len() + text.len() > MAX_SHOWN_BYTES {
                return Err(fmt::Error);
            }
            self.0.push_str(text);
            Ok(())
        }
    }
    let mut out = Bounded(String::new());
    if fmt::write(&mut out, format_args!("{value}")).is_err() {
        out.0.push('…');
    }
    out.0
}

fn is_empty(value: &Value) -> bool {
    value.is_undefined() || value.is_none() || value.len() == Some(0)
}

fn josa(value: &Value, particle: &Value) -> String {
    let word = text(value);
    match Particle::named(&text(particle)) {
        Some(particle) => attach(&word, &particle),
        None => word.into_owned(),
    }
}

/// Unlike Jinja's also for null and for an empty text: an event without a name has no name, however it says so.
fn default(value: &Value, other: Option<Value>) -> Value {
    if is_empty(value) { other.unwrap_or_else(|| Value::from("")) } else { value.clone() }
}

fn capitalize(value: &Value) -> String {
    let text = text(value);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars.as_str().chars()).collect(),
        None => String::new(),
    }
}

fn too_long() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("the result is longer than {MAX_RESULT_BYTES} bytes"))
}

fn replace(value: &Value, from: &Value, to: &Value) -> Result<String, Error> {
    let (whole, from, to) = (text(value), text(from), text(to));
    if from.is_empty() {
        return Ok(whole.into_owned());
    }
    let mut out = String::with_capacity(whole.len().min(MAX_RESULT_BYTES));
    for (at, part) in whole.split(&*from).enumerate() {
        if at > 0 {
            out.push_str(&to);
        }
        out.push_str(part);
        if out.len() > MAX_RESULT_BYTES {
            return Err(too_long());
        }
    }
    Ok(out)
}

/// At most so many characters, the mark for what was left out included.
fn truncate(value: &Value, most: &Value, end: Option<Value>) -> String {
    let whole = text(value);
    let Some(most) = most.as_usize() else { return whole.into_owned() };
    if whole.chars().nth(most).is_none() {
        return whole.into_owned();
    }
    let end = end.map_or_else(|| "…".to_owned(), |end| text(&end).into_owned());
    let kept: String = whole.chars().take(most.saturating_sub(end.chars().count())).collect();
    // A joiner or a variation selector at the cut belongs to what is gone.
    let kept = kept.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '\u{200D}' | '\u{FE0F}'));
    format!("{kept}{end}")
}

fn length(value: &Value) -> usize {
    match value.as_str() {
        Some(text) => text.chars().count(),
        None => value.len().unwrap_or(0),
    }
}

fn first(value: &Value) -> Value {
    match value.as_str() {
        Some(text) => text.chars().next().map_or(Value::UNDEFINED, Value::from),
        None => value.try_iter().ok().and_then(|mut items| items.next()).unwrap_or(Value::UNDEFINED),
    }
}

fn last(value: &Value) -> Value {
    match value.as_str() {
        Some(text) => text.chars().next_back().map_or(Value::UNDEFINED, Value::from),
        None => value.try_iter().ok().and_then(Iterator::last).unwrap_or(Value::UNDEFINED),
    }
}

fn join(value: &Value, between: Option<&Value>) -> Result<String, Error> {
    let between = between.map(text).unwrap_or_default();
    let (None, Ok(items)) = (value.as_str(), value.try_iter()) else { return Ok(text(value).into_owned()) };
    let mut out = String::new();
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.push_str(&between);
        }
        out.push_str(&text(&item));
        if out.len() > MAX_RESULT_BYTES {
            return Err(too_long());
        }
    }
    Ok(out)
}

fn as_float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.is_number() => f64::try_from(value.clone()).ok(),
        None => None,
    }
}

/// Floats that hold whole numbers, the largest that all fit.
const EXACT: f64 = 9_007_199_254_740_992.0;

#[expect(clippy::cast_possible_truncation, reason = "guarded by the bound of 2^53")]
fn whole(value: f64) -> Option<i64> {
    (value.abs() <= EXACT).then_some(value as i64)
}

/// A number without its fraction; 0 for what is none.
fn int(value: &Value) -> i64 {
    match value.as_i64() {
        Some(value) => value,
        None => as_float(value).and_then(whole).unwrap_or(0),
    }
}

/// Digits after the point: 0 (the default) to 6.
fn round(value: &Value, digits: Option<Value>) -> Value {
    let digits = digits.and_then(|digits| digits.as_usize()).unwrap_or(0).min(6);
    let Some(number) = as_float(value).filter(|_| value.as_i64().is_none()) else { return value.clone() };
    let scale = 10_f64.powi(i32::try_from(digits).unwrap_or(0));
    let rounded = (number * scale).round() / scale;
    match whole(rounded) {
        Some(whole) if digits == 0 => Value::from(whole),
        _ => Value::from(rounded),
    }
}

/// 1234567 as 1,234,567.
fn thousands(value: &Value, mark: Option<Value>) -> String {
    let plain = text(value);
    let (sign, rest) = plain.strip_prefix('-').map_or(("", &*plain), |rest| ("-", rest));
    let (digits, fraction) = rest.split_at(rest.find('.').unwrap_or(rest.len()));
    if digits.is_empty() || digits.len() > 40 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return plain.into_owned();
    }
    let mark = mark.map_or_else(|| ",".to_owned(), |mark| text(&mark).chars().take(4).collect());
    let mut out = String::with_capacity(plain.len() + digits.len() / 3);
    out.push_str(sign);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            out.push_str(&mark);
        }
        out.push(digit);
    }
    out.push_str(fraction);
    out
}

/// All but RFC 3986's unreserved characters as %XX (§2.3), for a value in a link.
fn urlencode(value: &Value) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let text = text(value);
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    out
}
