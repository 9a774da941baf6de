//! Files as rows: CSV and NDJSON become the same named values.
//!
//! Read line by line; a line is bounded, so a file of any size takes no more memory than its longest line.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use prost_types::Timestamp;
use serde_json::{Map, Value};

use crate::domain::violation::Violation;

/// The longest line, in bytes; a message takes no more.
const MAX_LINE_BYTES: u64 = 256 * 1024;
/// Numbers of more digits than this are milliseconds.
const MAX_SECONDS: i64 = 99_999_999_999;

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Format {
    Csv,
    Ndjson,
}

impl Format {
    pub fn of(file: &Path, given: Option<Self>) -> anyhow::Result<Self> {
        let extension = file.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
        match (given, extension.as_deref()) {
            (Some(given), _) => Ok(given),
            (None, Some("csv")) => Ok(Self::Csv),
            (None, Some("ndjson" | "jsonl" | "json")) => Ok(Self::Ndjson),
            (None, _) => anyhow::bail!("{} says not what it is: give --format csv or ndjson", file.display()),
        }
    }
}

/// A file and how to read it.
pub struct Table {
    pub file: PathBuf,
    pub format: Format,
    /// What a row may have.
    pub columns: &'static [&'static str],
    /// Of rows without their own.
    pub observed_at: Option<Timestamp>,
}

/// One row of the file, or what is wrong with it.
pub struct Line {
    pub number: u64,
    pub row: Result<Row, Vec<Violation>>,
}

/// Rows of a file, in order.
pub struct Lines {
    source: Source,
    columns: &'static [&'static str],
    observed_at: Option<Timestamp>,
    file: PathBuf,
}

/// Any bytes: a file, but for tests.
pub type Bytes = Box<dyn Read + Send>;

pub enum Source {
    Csv {
        reader: Box<csv::Reader<Bytes>>,
        record: csv::StringRecord,
        headers: Vec<String>,
        /// Of the row before; the header's at first.
        number: u64,
    },
    Ndjson {
        reader: BufReader<Bytes>,
        number: u64,
        line: Vec<u8>,
    },
}

impl Source {
    pub fn open(format: Format, bytes: Bytes, columns: &[&str]) -> anyhow::Result<Self> {
        if format == Format::Ndjson {
            let reader = BufReader::with_capacity(64 * 1024, bytes);
            return Ok(Self::Ndjson { reader, number: 0, line: Vec::new() });
        }
        let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(bytes);
        let headers: Vec<String> = reader.headers()?.iter().map(str::to_owned).collect();
        for name in &headers {
            anyhow::ensure!(columns.contains(&name.as_str()) || is_label(name, columns), "{}", unknown(name, columns));
        }
        Ok(Self::Csv { reader: Box::new(reader), record: csv::StringRecord::new(), headers, number: 1 })
    }
}

impl Table {
    /// Whether the file is there, and a CSV's columns are known.
    pub fn check(&self) -> anyhow::Result<()> {
        self.lines().map(|_| ())
    }

    pub fn lines(&self) -> anyhow::Result<Lines> {
        let reading = || format!("reading {}", self.file.display());
        let file = File::open(&self.file).with_context(reading)?;
        let source = Source::open(self.format, Box::new(file), self.columns).with_context(reading)?;
        Ok(Lines::of(source, self.columns, self.observed_at, self.file.clone()))
    }
}

impl Lines {
    pub fn of(source: Source, columns: &'static [&'static str], observed_at: Option<Timestamp>, file: PathBuf) -> Self {
        Self { source, columns, observed_at, file }
    }

    /// Leaves out the rows up to and with this line.
    pub fn skip_to(&mut self, number: u64) -> anyhow::Result<()> {
        let at = |line: &Self| match &line.source {
            Source::Csv { reader, number, .. } => reader.position().line().saturating_sub(1).max(*number),
            Source::Ndjson { number, .. } => *number,
        };
        while at(self) < number {
            if self.next()?.is_none() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// `None` at the end. `Err`: the file cannot be read.
    pub fn next(&mut self) -> anyhow::Result<Option<Line>> {
        let reading = || format!("reading {}", self.file.display());
        match &mut self.source {
            Source::Csv { reader, record, headers, number: before } => {
                // The reader counts line feeds, and some spreadsheets end lines without: every row is one line at least.
                let mut number = |position: Option<&csv::Position>| {
                    *before = position.map_or(0, csv::Position::line).max(*before + 1);
                    *before
                };
                match reader.read_record(record) {
                    Ok(false) => return Ok(None),
                    Ok(true) => {}
                    Err(error) => {
                        return match error.kind() {
                            csv::ErrorKind::Utf8 { .. } => {
                                let number = number(error.position());
                                Ok(Some(Line { number, row: wrong("line", "is not UTF-8") }))
                            }
                            _ => Err(error).with_context(reading),
                        };
                    }
                }
                let number = number(record.position());
                let row = if record.len() == headers.len() {
                    Ok(Row::of_record(headers, record, self.observed_at))
                } else {
                    wrong("line", format!("has {} values, the header has {}", record.len(), headers.len()))
                };
                Ok(Some(Line { number, row }))
            }
            Source::Ndjson { reader, number, line } => loop {
                line.clear();
                let read = reader.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', line).with_context(reading)?;
                if read == 0 {
                    return Ok(None);
                }
                *number += 1;
                let number = *number;
                if line.len() as u64 > MAX_LINE_BYTES && !line.ends_with(b"\n") {
                    while !line.ends_with(b"\n") {
                        line.clear();
                        let rest = reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', line);
                        if rest.with_context(reading)? == 0 {
                            break;
                        }
                    }
                    let row = wrong("line", format!("is longer than {MAX_LINE_BYTES} bytes"));
                    return Ok(Some(Line { number, row }));
                }
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(Line { number, row: Row::of_json(line, self.columns, self.observed_at) }));
            },
        }
    }
}

fn wrong<T>(field: &str, description: impl Into<String>) -> Result<T, Vec<Violation>> {
    Err(vec![Violation::new(field, description)])
}

fn is_label(name: &str, columns: &[&str]) -> bool {
    columns.contains(&"labels") && name.strip_prefix("labels.").is_some_and(|key| !key.is_empty())
}

fn unknown(name: &str, columns: &[&str]) -> String {
    let nearest = columns.iter().max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    format!("{name:?} is no column of this import; the nearest is {}", nearest.unwrap_or(&""))
}

/// RFC 3339 or with a blank instead of the T, or seconds or milliseconds since 1970.
pub fn parse_time(text: &str) -> anyhow::Result<Timestamp> {
    let text = text.trim();
    let at = if let Ok(number) = text.parse::<i64>() {
        if (0..=MAX_SECONDS).contains(&number) {
            jiff::Timestamp::from_second(number)?
        } else {
            jiff::Timestamp::from_millisecond(number)?
        }
    } else {
        text.parse::<jiff::Timestamp>()?
    };
    let nanos = at.subsec_nanosecond();
    // The protobuf type counts its parts of a second forward, jiff away from 1970.
    Ok(if nanos < 0 {
        Timestamp { seconds: at.as_second() - 1, nanos: nanos + 1_000_000_000 }
    } else {
        Timestamp { seconds: at.as_second(), nanos }
    })
}

/// Named values of one line, and what is found wrong while they are read.
pub struct Row {
    values: Map<String, Value>,
    observed_at: Option<Timestamp>,
    violations: Vec<Violation>,
}

impl Row {
    /// An empty cell is absent.
    fn of_record(headers: &[String], record: &csv::StringRecord, observed_at: Option<Timestamp>) -> Self {
        let mut values = Map::new();
        let mut violations = Vec::new();
        for (name, cell) in headers.iter().zip(record) {
            if name == "event_type" && cell.is_empty() {
                violations.push(Violation::new(name, "is empty; * is the master switch"));
            }
            if cell.is_empty() {
                continue;
            }
            match name.strip_prefix("labels.") {
                Some(key) => {
                    let labels = values.entry("labels").or_insert_with(|| Value::Object(Map::new()));
                    if let Value::Object(labels) = labels {
                        labels.insert(key.to_owned(), cell.into());
                    }
                }
                None => {
                    values.insert(name.clone(), cell.into());
                }
            }
        }
        Self { values, observed_at, violations }
    }

    fn of_json(line: &[u8], columns: &[&str], observed_at: Option<Timestamp>) -> Result<Self, Vec<Violation>> {
        let values: Map<String, Value> = match serde_json::from_slice(line) {
            Ok(values) => values,
            Err(error) => return wrong("line", format!("is no JSON object: error at column {}", error.column())),
        };
        let unknown = |name: &&String| !columns.contains(&name.as_str());
        let violations =
            values.keys().filter(unknown).map(|name| Violation::new(name, self::unknown(name, columns))).collect();
        Ok(Self { values, observed_at, violations })
    }

    /// What was taken, unless anything is wrong.
    pub fn finish<T>(self, taken: T) -> Result<T, Vec<Violation>> {
        if self.violations.is_empty() { Ok(taken) } else { Err(self.violations) }
    }

    fn wrong(&mut self, field: &str, description: impl Into<String>) {
        self.violations.push(Violation::new(field, description));
    }

    /// Empty when absent. Numbers are texts, too: ids often are.
    pub fn text(&mut self, field: &str) -> String {
        self.optional_text(field).unwrap_or_default()
    }

    pub fn optional_text(&mut self, field: &str) -> Option<String> {
        match self.values.remove(field) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text),
            Some(Value::Number(number)) => Some(number.to_string()),
            Some(Value::Bool(_) | Value::Array(_) | Value::Object(_)) => {
                self.wrong(field, "is not a text");
                None
            }
        }
    }

    pub fn flag(&mut self, field: &str) -> Option<bool> {
        let text = match self.values.remove(field)? {
            Value::Null => return None,
            Value::Bool(flag) => return Some(flag),
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.to_ascii_lowercase(),
            Value::Array(_) | Value::Object(_) => String::new(),
        };
        match text.as_str() {
            "true" | "t" | "yes" | "y" | "1" => Some(true),
            "false" | "f" | "no" | "n" | "0" => Some(false),
            _ => {
                self.wrong(field, "is neither true nor false");
                None
            }
        }
    }

    pub fn time(&mut self, field: &str) -> Option<Timestamp> {
        let text = self.optional_text(field)?;
        let read = parse_time(&text);
        if read.is_err() {
            self.wrong(field, "is no time such as 2026-11-24T09:00:00Z, nor seconds or milliseconds since 1970");
        }
        read.ok()
    }

    /// The row's own, else the file's.
    pub fn observed_at(&mut self) -> Option<Timestamp> {
        if self.values.contains_key("observed_at") { self.time("observed_at") } else { self.observed_at }
    }

    /// A value's short name, in any case; 0 when absent.
    pub fn choice<E: Into<i32>>(&mut self, field: &str, read: impl Fn(&str) -> Option<E>) -> i32 {
        let Some(text) = self.optional_text(field) else { return 0 };
        let read = read(&text.to_ascii_uppercase());
        if read.is_none() {
            self.wrong(field, "is not a known value");
        }
        read.map_or(0, Into::into)
    }

    /// An object, or the text of one.
    pub fn labels(&mut self, field: &str) -> std::collections::HashMap<String, String> {
        let labels = match self.values.remove(field) {
            None | Some(Value::Null) => return std::collections::HashMap::default(),
            Some(Value::String(text)) => serde_json::from_str(&text).ok(),
            Some(value) => serde_json::from_value(value).ok(),
        };
        labels.unwrap_or_else(|| {
            self.wrong(field, "is not an object of texts");
            std::collections::HashMap::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[&str] = &["user_id", "event_type", "opted_in", "labels", "observed_at"];

    fn lines(format: Format, text: &str) -> Vec<(u64, Result<Row, Vec<String>>)> {
        let mut open = open(format, text);
        let mut lines = Vec::new();
        while let Some(Line { number, row }) = open.next().unwrap() {
            lines.push((number, row.map_err(|wrong| wrong.into_iter().map(|one| one.to_string()).collect())));
        }
        lines
    }

    fn open(format: Format, text: &str) -> Lines {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows");
        std::fs::write(&file, text).unwrap();
        Table { file, format, columns: COLUMNS, observed_at: None }.lines().unwrap()
    }

    #[test]
    fn both_formats_say_the_same() {
        let csv = "user_id,opted_in,labels.team,observed_at\n17,yes,red,2026-11-24 09:00:00+09\n\"a\nb\",x,,\n";
        let json = "{\"user_id\":17,\"opted_in\":true,\"labels\":{\"team\":\"red\"},\"observed_at\":1795478400}\n\n\
                    {\"user_id\":\"a\\nb\",\"opted_in\":\"x\"}\n";
        let mut read: Vec<_> = Vec::new();
        for (format, text) in [(Format::Csv, csv), (Format::Ndjson, json)] {
            for (number, row) in lines(format, text) {
                let mut row = row.unwrap();
                let values = (row.text("user_id"), row.flag("opted_in"), row.labels("labels"), row.observed_at());
                read.push((number, values, row.finish(()).map_err(|wrong| wrong.len())));
            }
        }
        let labels = |of: &[(&str, &str)]| of.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let at = Some(Timestamp { seconds: 1_795_478_400, nanos: 0 });
        let first = ("17".to_owned(), Some(true), labels(&[("team", "red")]), at);
        let second = ("a\nb".to_owned(), None, labels(&[]), None);
        assert_eq!(read[0], (2, first.clone(), Ok(())));
        assert_eq!(read[1], (3, second.clone(), Err(1)));
        assert_eq!(read[2], (1, first, Ok(())));
        assert_eq!(read[3], (3, second, Err(1)));
    }

    #[test]
    fn lines_end_as_they_like() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["user_id", "a", "b", "c", ""].join(end);
            let numbers: Vec<u64> = lines(Format::Csv, &text).into_iter().map(|(number, _)| number).collect();
            assert_eq!(numbers, [2, 3, 4], "{end:?}");
            let mut rest = open(Format::Csv, &text);
            rest.skip_to(3).unwrap();
            assert_eq!(rest.next().unwrap().unwrap().number, 4, "{end:?}");
            assert!(rest.next().unwrap().is_none());
        }
    }

    #[test]
    fn a_bad_line_is_one_bad_line() {
        let text = "{\"user_id\":\"a\"}\n{broken\n[1]\n{\"usr_id\":\"b\"}\n{\"user_id\":\"c\"}";
        let read = lines(Format::Ndjson, text);
        assert_eq!(read.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert!(read[1].1.is_err() && read[2].1.is_err());
        let typo = read.into_iter().nth(3).unwrap().1.unwrap().finish(()).unwrap_err();
        assert!(typo[0].description.contains("the nearest is user_id"), "{typo:?}");

        let read = lines(Format::Csv, "user_id,event_type\na,*\nb\nc,\n");
        assert!(read[1].1.as_ref().err().unwrap()[0].contains("has 1 values, the header has 2"));
        let empty = read.into_iter().nth(2).unwrap().1.unwrap().finish(()).unwrap_err();
        assert_eq!(empty[0].field, "event_type");

        let long = format!("{{\"user_id\":\"{}\"}}\n{{\"user_id\":\"b\"}}\n", "x".repeat(600_000));
        let read = lines(Format::Ndjson, &long);
        assert!(read[0].1.is_err() && read[1].1.is_ok() && read.len() == 2);
    }

    #[test]
    fn a_column_nobody_knows_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.csv");
        std::fs::write(&file, "user_id,optedin\n").unwrap();
        let table = Table { file, format: Format::Csv, columns: COLUMNS, observed_at: None };
        assert!(format!("{:#}", table.check().unwrap_err()).contains("the nearest is opted_in"));
    }

    #[test]
    fn rows_before_a_line_are_left_out() {
        for (format, text, expected) in
            [(Format::Csv, "user_id\na\n\"b\nb\"\nc\nd\n", [5, 6]), (Format::Ndjson, "{}\n{}\n\n{}\n{}\n{}\n", [5, 6])]
        {
            let mut lines = open(format, text);
            lines.skip_to(4).unwrap();
            for number in expected {
                assert_eq!(lines.next().unwrap().unwrap().number, number, "{format:?}");
            }
            assert!(lines.next().unwrap().is_none());
        }
    }

    #[test]
    fn times_are_read_in_the_usual_ways() {
        let seconds = |text: &str| parse_time(text).map(|at| at.seconds).ok();
        assert_eq!(seconds("2026-11-24T00:00:00Z"), Some(1_795_478_400));
        assert_eq!(seconds("2026-11-24 09:00:00+09:00"), Some(1_795_478_400));
        assert_eq!(seconds("1795478400"), Some(1_795_478_400));
        assert_eq!(seconds("1795478400123"), Some(1_795_478_400));
        assert_eq!(parse_time("1969-12-31T23:59:59.5Z").unwrap(), Timestamp { seconds: -1, nanos: 500_000_000 });
        assert_eq!(seconds("yesterday"), None);
    }
}
