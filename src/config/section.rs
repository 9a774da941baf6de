//! Reading one table of the configuration key by key, gathering every problem instead of stopping at the first.
//!
//! serde's `deny_unknown_fields` would name one wrong key per start of the program. A [`Section`] goes on with the
//! default after each problem, remembers every key that was asked for, and at [`Section::finish`] names every key that
//! nobody asked for together with the nearest one that exists.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use figment::Figment;
use figment::value::{Dict, Num, Value};

use super::layers::{ENVIRONMENT_LAYER, File, Layers, variable_name};
use super::problem::{Origin, Problem, nearest};
use super::settings::{Setting, Settings};
use super::values::{SecretSource, SecretText};
use crate::planted;

/// The merged layers and what was found wrong with them so far.
pub(super) struct Reader {
    figment: Figment,
    values: Dict,
    file: Option<File>,
    stray: Vec<String>,
    found: RefCell<Found>,
}

/// What reading brought to light.
#[derive(Default)]
pub(super) struct Found {
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
    /// Every key that was asked for, as its environment variable.
    pub variables: BTreeSet<String>,
    /// … and with its value.
    pub settings: Settings,
}

impl Reader {
    pub fn new(file: Option<File>, layers: Layers) -> Self {
        let Layers { figment, values, stray, problems } = layers;
        Self { figment, values, file, stray, found: RefCell::new(Found { problems, ..Found::default() }) }
    }

    pub fn root(&self) -> Section<'_> {
        Section { reader: self, path: Vec::new(), values: self.values.clone(), known: Vec::new() }
    }

    /// Said once, even when two rules look at the same key.
    pub fn problem(&self, problem: Problem) {
        let problems = &mut self.found.borrow_mut().problems;
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    pub fn warning(&self, warning: Problem) {
        self.found.borrow_mut().warnings.push(warning);
    }

    /// Where the key at `path` was set.
    pub fn origin(&self, path: &[String]) -> Origin {
        let mut dict = Some(&self.values);
        let mut value: Option<&Value> = None;
        for segment in path {
            value = match value {
                Some(Value::Array(_, items)) => segment.parse().ok().and_then(|index: usize| items.get(index)),
                _ => dict.and_then(|dict| dict.get(segment)),
            };
            dict = value.and_then(Value::as_dict);
        }
        match value {
            None => Origin::Unset,
            Some(value) if self.is_environment(value) => match path {
                [first, ..] if first == "keys" => Origin::Environment(variable_name(&path[..1])),
                path => Origin::Environment(variable_name(path)),
            },
            Some(_) => match &self.file {
                Some(file) => Origin::File { path: file.path.clone(), line: file.line_of(path) },
                None => Origin::Unset,
            },
        }
    }

    /// Everything found, with the variables that look like ours but miss the double underscore.
    pub fn finish(self) -> Found {
        let mut found = self.found.into_inner();
        for name in self.stray {
            // Orchestrators set NUDGED_PORT and the like for a service of that name: only near misses are ours.
            if let Some(meant) = found.variables.iter().find(|known| known.replace("__", "_") == name) {
                found.problems.push(Problem {
                    key: String::new(),
                    origin: Origin::Environment(name),
                    wrong: "has a single underscore between section and key".to_owned(),
                    remedy: format!("call it {meant}"),
                });
            }
        }
        found
    }

    fn is_environment(&self, value: &Value) -> bool {
        self.figment.get_metadata(value.tag()).is_some_and(|metadata| metadata.name == ENVIRONMENT_LAYER)
    }
}

/// One table. Every method that reads a key marks it as known.
pub(super) struct Section<'r> {
    reader: &'r Reader,
    path: Vec<String>,
    values: Dict,
    known: Vec<&'static str>,
}

impl<'r> Section<'r> {
    /// A key's whole path, for messages.
    pub fn key(&self, key: &str) -> String {
        display(&self.path_of(key))
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The names in the table that `known` does not hold and that are tables: named parts beside plain keys.
    pub fn tables(&mut self, known: &[&str]) -> Vec<(String, Section<'r>)> {
        let names: Vec<String> = self
            .values
            .iter()
            .filter(|(name, value)| value.as_dict().is_some() && !known.contains(&name.as_str()))
            .map(|(name, _)| name.clone())
            .collect();
        names
            .into_iter()
            .map(|name| {
                let values = self.values.remove(&name).and_then(Value::into_dict).unwrap_or_default();
                let path = self.path_of(&name);
                (name, Section { reader: self.reader, path, values, known: Vec::new() })
            })
            .collect()
    }

    /// A table within; empty when it was not given.
    pub fn table(&mut self, key: &'static str) -> Section<'r> {
        self.known.push(key);
        let values = match self.values.get(key) {
            None => Dict::new(),
            Some(Value::Dict(_, dict)) => dict.clone(),
            Some(_) => {
                self.problem(key, "must be a table", &format!("write [{}] and its keys below", self.key(key)));
                Dict::new()
            }
        };
        Section { reader: self.reader, path: self.path_of(key), values, known: Vec::new() }
    }

    /// The tables of a list (`[[keys]]`).
    pub fn list_of_tables(&mut self, key: &'static str) -> Vec<Section<'r>> {
        self.mark(key);
        let list = self.path_of(key);
        let items = match self.values.get(key) {
            None => return Vec::new(),
            Some(Value::Array(_, items)) if items.iter().all(|item| item.as_dict().is_some()) => items.clone(),
            Some(_) => {
                let remedy = format!("write [[{key}]] once per entry; in the environment a TOML array of tables");
                self.problem(key, "must be a list of tables", &remedy);
                return Vec::new();
            }
        };
        let section = |(index, item): (usize, Value)| {
            let path = list.iter().cloned().chain([index.to_string()]).collect();
            Section { reader: self.reader, path, values: item.into_dict().unwrap_or_default(), known: Vec::new() }
        };
        items.into_iter().enumerate().map(section).collect()
    }

    pub fn text(&mut self, key: &'static str) -> Option<String> {
        self.mark(key);
        match self.values.get(key)? {
            Value::String(_, text) if text.is_empty() => {
                self.problem(key, "is empty", "give it a value or leave it out");
                None
            }
            Value::String(_, text) => Some(text.clone()),
            _ => {
                self.problem(key, "must be a text", "put it in quotes");
                None
            }
        }
    }

    /// A text that `parse` understands; its error says what is wrong.
    pub fn parsed<T>(
        &mut self,
        key: &'static str,
        remedy: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.problem(key, &wrong, remedy);
                None
            }
        }
    }

    /// One of a closed set of words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, default: T, choices: &[(&'static str, T)]) -> T {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let remedy = format!("use one of: {}", words.join(", "));
        let find = |text: &str| {
            let chosen = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
            chosen.ok_or_else(|| format!("`{text}` is not known"))
        };
        self.parsed(key, &remedy, find).unwrap_or(default)
    }

    pub fn flag(&mut self, key: &'static str, default: bool) -> bool {
        self.mark(key);
        match self.values.get(key) {
            None => return default,
            Some(Value::Bool(_, flag)) => return *flag,
            Some(value @ Value::String(_, text)) if self.reader.is_environment(value) => match text.as_str() {
                "true" => return true,
                "false" => return false,
                _ => {}
            },
            Some(_) => {}
        }
        self.problem(key, "must be true or false", "use true or false, without quotes");
        default
    }

    pub fn number(&mut self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        self.optional_number(key, range).unwrap_or(default)
    }

    pub fn count(&mut self, key: &'static str, default: usize, range: RangeInclusive<u64>) -> usize {
        self.optional_number(key, range).and_then(|number| usize::try_from(number).ok()).unwrap_or(default)
    }

    /// Whole seconds; the key's name ends in `_secs`.
    pub fn seconds(&mut self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> Duration {
        debug_assert!(key.ends_with("_secs"), "the unit is in the name");
        Duration::from_secs(self.number(key, default, range))
    }

    /// Whole milliseconds; the key's name ends in `_ms`.
    pub fn millis(&mut self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> Duration {
        debug_assert!(key.ends_with("_ms"), "the unit is in the name");
        Duration::from_millis(self.number(key, default, range))
    }

    pub fn optional_number(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        self.mark(key);
        let (low, high) = (range.start(), range.end());
        let number = match self.values.get(key)? {
            Value::Num(_, number) => whole(*number),
            value @ Value::String(_, text) if self.reader.is_environment(value) => text.parse::<i128>().ok(),
            _ => None,
        };
        match number {
            None => self.problem(key, "must be a whole number", &format!("use {low} to {high}, without quotes")),
            Some(number) => match u64::try_from(number) {
                Ok(number) if range.contains(&number) => return Some(number),
                _ => self.problem(key, &format!("{number} is out of range"), &format!("use {low} to {high}")),
            },
        }
        None
    }

    /// A list of texts; from the environment also separated by commas.
    pub fn list(&mut self, key: &'static str) -> Vec<String> {
        self.mark(key);
        let items = match self.values.get(key) {
            None => return Vec::new(),
            Some(Value::Array(_, items)) => {
                items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
            }
            Some(value @ Value::String(_, text)) if self.reader.is_environment(value) => {
                Some(text.split(',').map(|item| item.trim().to_owned()).collect())
            }
            Some(_) => None,
        };
        match items {
            Some(items) if items.iter().any(String::is_empty) => {
                self.problem(key, "holds an empty text", "leave it out");
                Vec::new()
            }
            Some(items) => items,
            None => {
                self.problem(key, "must be a list of texts", &format!("write {key} = [\"…\", \"…\"]"));
                Vec::new()
            }
        }
    }

    /// A list whose texts `parse` understands; those that it does not are problems and are left out. A key that must
    /// narrow something must not be given empty.
    pub fn items<T, C: FromIterator<T>>(
        &mut self,
        key: &'static str,
        remedy: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> C {
        let items = self.list(key);
        if items.is_empty() && matches!(self.values.get(key), Some(Value::Array(_, none)) if none.is_empty()) {
            self.problem(key, "names nothing", "name at least one, or leave it out");
        }
        let parsed = items.iter().filter_map(|item| match parse(item) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.problem(key, &wrong, remedy);
                None
            }
        });
        parsed.collect()
    }

    /// A path; relative ones start at the configuration file's directory, or, from the environment, at the working
    /// directory.
    pub fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let text = self.text(key)?;
        Some(self.resolve(key, &text))
    }

    pub fn resolve(&self, key: &str, text: &str) -> PathBuf {
        match (&self.reader.file, self.values.get(key)) {
            (Some(file), Some(value)) if !self.reader.is_environment(value) => file.directory().join(text),
            _ => PathBuf::from(text),
        }
    }

    /// `<key>` or `<key>_file`. The environment's beats the file's; both in one layer is a contradiction.
    pub fn secret(&mut self, key: &'static str, file_key: &'static str) -> Option<SecretSource> {
        let layer = |section: &Self, key| section.values.get(key).map(|value| section.reader.is_environment(value));
        let (inline_layer, file_layer) = (layer(self, key), layer(self, file_key));
        let inline = self.text(key).map(|text| SecretSource::Inline(SecretText::new(text)));
        let file = self.path(file_key).map(SecretSource::File);
        match (inline_layer, file_layer) {
            (Some(a), Some(b)) if a == b => {
                self.problem(key, &format!("is given twice, also as `{file_key}`"), "keep one of them");
                file.or(inline)
            }
            (Some(true), Some(_)) | (_, None) => inline,
            (_, Some(_)) => file,
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub fn problem(&self, key: &str, wrong: &str, remedy: &str) {
        self.reader.problem(self.about(key, wrong, remedy));
    }

    pub fn warning(&self, key: &str, wrong: &str, remedy: &str) {
        self.reader.warning(self.about(key, wrong, remedy));
    }

    /// A problem of the table itself, such as its name.
    pub fn about_itself(&self, wrong: &str, remedy: &str) {
        self.reader.problem(Problem {
            key: display(&self.path),
            origin: self.reader.origin(&self.path),
            wrong: wrong.to_owned(),
            remedy: remedy.to_owned(),
        });
    }

    /// A key without which the section means nothing.
    pub fn missing(&self, key: &str, why: &str) {
        let path = self.path_of(key);
        let remedy = if path[0] == "keys" {
            format!("add `{key} = …` to its table")
        } else {
            format!("add `{key} = …` to [{}], or set {}", display(&self.path), variable_name(&path))
        };
        self.reader.problem(Problem {
            key: display(&path),
            origin: Origin::Unset,
            wrong: format!("is missing: {why}"),
            remedy,
        });
    }

    /// Names every key nobody asked for.
    pub fn finish(self) {
        for (name, value) in &self.values {
            if self.known.contains(&name.as_str()) || planted::is("unknown-key-accepted") {
                continue;
            }
            let what = if value.as_dict().is_some() { "section" } else { "key" };
            let remedy = match nearest(name, self.known.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            self.problem(name, &format!("no such {what}"), &remedy);
        }
    }

    fn about(&self, key: &str, wrong: &str, remedy: &str) -> Problem {
        let path = self.path_of(key);
        Problem {
            origin: self.reader.origin(&path),
            key: display(&path),
            wrong: wrong.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    fn mark(&mut self, key: &'static str) {
        self.known.push(key);
        let path = self.path_of(key);
        let origin = self.reader.origin(&path);
        let mut found = self.reader.found.borrow_mut();
        found.variables.insert(variable_name(&path));
        // A list of tables is told by the keys of its tables.
        let value = self.values.get(key).cloned();
        let is_list =
            matches!(&value, Some(Value::Array(_, items)) if items.iter().any(|item| item.as_dict().is_some()));
        let name = display(&path);
        if !is_list && !found.settings.0.iter().any(|setting| setting.key == name) && path != ["keys"] {
            found.settings.0.push(Setting { key: name, path, value, origin });
        }
    }

    fn path_of(&self, key: &str) -> Vec<String> {
        self.path.iter().cloned().chain([key.to_owned()]).collect()
    }
}

fn whole(number: Num) -> Option<i128> {
    number.to_i128().or_else(|| number.to_u128().and_then(|number| i128::try_from(number).ok()))
}

/// `grpc.tls.key_file`, `keys[0].name`.
fn display(path: &[String]) -> String {
    let mut text = String::new();
    for segment in path {
        if segment.bytes().all(|byte| byte.is_ascii_digit()) && path[0] == "keys" {
            text.push('[');
            text.push_str(segment);
            text.push(']');
        } else {
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(segment);
        }
    }
    text
}
