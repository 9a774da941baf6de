//! Times, durations, enum numbers, and `google.protobuf.Struct`.

use std::collections::{BTreeMap, HashMap};

use prost_types::value::Kind;
use prost_types::{Duration, ListValue, Struct, Timestamp, Value as ProtoValue};
use serde_json::Value;

use crate::domain::content::{Data, MAX_DATA_DEPTH, number};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;

/// Sub-millisecond digits are cut off.
pub fn read_time(violations: &mut Violations, field: &str, time: Option<Timestamp>) -> Option<UnixMs> {
    let Timestamp { seconds, nanos } = time?;
    let millis = seconds.checked_mul(1000).and_then(|ms| ms.checked_add(i64::from(nanos / 1_000_000)));
    match millis {
        Some(ms) if (0..1_000_000_000).contains(&nanos) && (0..=UnixMs::MAX.0).contains(&ms) => Some(UnixMs(ms)),
        _ => {
            violations.add(field, "is not a time between 1970 and 9999");
            None
        }
    }
}

#[must_use]
pub fn time(at: UnixMs) -> Timestamp {
    let nanos = i32::try_from(at.0.rem_euclid(1000)).expect("below 1 000") * 1_000_000;
    Timestamp { seconds: at.secs(), nanos }
}

/// In milliseconds, rounded up, so that a nanosecond is not nothing.
pub fn read_duration(violations: &mut Violations, field: &str, duration: Option<Duration>) -> Option<i64> {
    let Duration { seconds, nanos } = duration?;
    let same_sign = seconds == 0 || nanos == 0 || (seconds > 0) == (nanos > 0);
    let millis = seconds
        .checked_mul(1000)
        .and_then(|ms| ms.checked_add(i64::from(nanos.div_euclid(1_000_000) + i32::from(nanos % 1_000_000 != 0))));
    match millis {
        Some(ms) if same_sign && nanos.unsigned_abs() < 1_000_000_000 => Some(ms),
        _ => {
            violations.add(field, "is not a duration");
            None
        }
    }
}

/// `Some` of an enum's value; `None` for 0 (unspecified) and, with a violation, for a number this version does not
/// know.
pub fn read_enum<P: TryFrom<i32>, T>(
    violations: &mut Violations,
    field: &str,
    value: i32,
    known: impl FnOnce(P) -> Option<T>,
) -> Option<T> {
    let Ok(parsed) = P::try_from(value) else {
        violations.add(field, format!("{value} is not a known value"));
        return None;
    };
    known(parsed)
}

/// Keys in order, so that violations are named in the same order every time.
pub fn read_labels(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

/// Stops at the first level that is too deep, before any recursion goes on; prost's own limit is far above ours.
pub fn read_data(violations: &mut Violations, field: &str, data: Option<Struct>) -> Data {
    let mut problem = None;
    let data = object(data.unwrap_or_default(), 1, &mut problem);
    if let Some(problem) = problem {
        violations.add(field, problem);
    }
    data
}

fn object(data: Struct, depth: usize, problem: &mut Option<String>) -> Data {
    if depth > MAX_DATA_DEPTH {
        *problem = Some(format!("is nested deeper than {MAX_DATA_DEPTH}"));
        return Data::new();
    }
    data.fields.into_iter().map(|(key, item)| (key, value(item, depth, problem))).collect()
}

fn value(item: ProtoValue, depth: usize, problem: &mut Option<String>) -> Value {
    match item.kind {
        // An unset kind is what `null` becomes in clients that leave it out.
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => Value::Bool(flag),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::NumberValue(float)) => number(float).unwrap_or_else(|| {
            *problem = Some("must not contain NaN or an infinity".to_owned());
            Value::Null
        }),
        Some(Kind::StructValue(inner)) => Value::Object(object(inner, depth + 1, problem)),
        Some(Kind::ListValue(ListValue { values })) => {
            if depth + 1 > MAX_DATA_DEPTH {
                *problem = Some(format!("is nested deeper than {MAX_DATA_DEPTH}"));
                return Value::Null;
            }
            values.into_iter().map(|item| value(item, depth + 1, problem)).collect()
        }
    }
}

#[must_use]
pub fn data(data: &Data) -> Struct {
    Struct { fields: data.iter().map(|(key, item)| (key.clone(), proto_value(item))).collect() }
}

fn proto_value(item: &Value) -> ProtoValue {
    let kind = match item {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(ListValue { values: items.iter().map(proto_value).collect() }),
        Value::Object(map) => Kind::StructValue(data(map)),
    };
    ProtoValue { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nested(depth: usize) -> Struct {
        let mut item = ProtoValue { kind: Some(Kind::BoolValue(true)) };
        for _ in 1..depth {
            let fields = [("a".to_owned(), item)].into_iter().collect();
            item = ProtoValue { kind: Some(Kind::StructValue(Struct { fields })) };
        }
        Struct { fields: [("a".to_owned(), item)].into_iter().collect() }
    }

    #[test]
    fn data_reads_back_and_depth_is_cut_before_recursion() {
        let mut violations = Violations::default();
        let given = json!({"post": 42, "ratio": 0.5, "tags": ["a", null, {"b": true}]});
        let given = given.as_object().expect("an object");
        let read = read_data(&mut violations, "data", Some(data(given)));
        assert_eq!(&read, given);
        read_data(&mut violations, "data", Some(nested(MAX_DATA_DEPTH)));
        assert!(violations.is_empty());
        read_data(&mut violations, "data", Some(nested(MAX_DATA_DEPTH + 1)));
        assert!(violations.names("data"));
        let mut violations = Violations::default();
        read_data(&mut violations, "data", Some(nested(100)));
        assert_eq!(violations.into_inner().len(), 1);
    }

    #[test]
    fn nan_and_infinities_are_refused() {
        for float in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut violations = Violations::default();
            let fields = [("a".to_owned(), ProtoValue { kind: Some(Kind::NumberValue(float)) })].into_iter().collect();
            read_data(&mut violations, "data", Some(Struct { fields }));
            assert!(violations.names("data"));
        }
    }

    #[test]
    fn times_and_durations_hold_their_bounds() {
        let read = |seconds, nanos| {
            let mut violations = Violations::default();
            read_time(&mut violations, "t", Some(Timestamp { seconds, nanos }))
        };
        assert_eq!(read(0, 0), Some(UnixMs(0)));
        assert_eq!(read(-1, 0), None);
        assert_eq!(read(253_402_300_799, 999_999_999), Some(UnixMs::MAX));
        assert_eq!(read(253_402_300_800, 0), None);
        assert_eq!(read(1, 1_000_000_000), None);
        assert_eq!(read(1, -1), None);
        assert_eq!(read(i64::MAX, 0), None);
        // The seconds fit as milliseconds, and the rest does not.
        assert_eq!(read(i64::MAX / 1000, 999_999_999), None);
        assert_eq!(read(i64::MIN / 1000, i32::MIN), None);
        let read = |seconds, nanos| {
            let mut violations = Violations::default();
            read_duration(&mut violations, "t", Some(Duration { seconds, nanos }))
        };
        assert_eq!(read(1, 500_000_000), Some(1500));
        assert_eq!(read(0, 1), Some(1));
        assert_eq!(read(-1, 0), Some(-1000));
        assert_eq!(read(1, -1), None);
        assert_eq!(read(i64::MAX, 0), None);
        assert_eq!(read(i64::MAX / 1000, i32::MAX), None);
        assert_eq!(read(i64::MIN / 1000, i32::MIN), None);
        assert_eq!(time(UnixMs(1_500)), Timestamp { seconds: 1, nanos: 500_000_000 });
    }
}
