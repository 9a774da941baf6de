//! The layers of a configuration: the file, and the environment above it. Defaults lie below both, in the sections.
//!
//! Environment values stay text until a section asks for a number or a switch. Guessing their type (as figment's own
//! provider does) turns the key id `12E4567890` into an infinite float.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::problem::{Origin, Problem};

const FILE_LAYER: &str = "file";
pub(super) const ENVIRONMENT_LAYER: &str = "environment";
const PREFIX: &str = "NUDGED_";

/// The name of the environment variable that sets the key at `path`.
pub(super) fn variable_name(path: &[String]) -> String {
    let segments: Vec<String> = path.iter().map(|segment| segment.replace('-', "_").to_uppercase()).collect();
    format!("{PREFIX}{}", segments.join("__"))
}

/// The configuration file's path and text.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub path: PathBuf,
    pub text: String,
}

impl File {
    /// The file the operator named, else `nudged.toml` in the working directory if there is one.
    pub fn find(explicit: Option<&Path>) -> Result<Option<Self>, Problem> {
        let path = explicit.unwrap_or(Path::new(super::DEFAULT_FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(Self { path: path.to_owned(), text })),
            Err(error) if explicit.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Problem {
                key: String::new(),
                origin: Origin::File { path: path.to_owned(), line: None },
                wrong: format!("cannot read the configuration file: {error}"),
                remedy: "name an existing file with --config or NUDGED_CONFIG, or leave both out to use defaults \
                         and the environment"
                    .to_owned(),
            }),
        }
    }

    /// What relative paths in the file start from.
    pub fn directory(&self) -> PathBuf {
        self.path.parent().map(Path::to_owned).unwrap_or_default()
    }

    /// The line (from 1) on which the key at `path` stands, or the nearest thing above it.
    pub fn line_of(&self, path: &[String]) -> Option<usize> {
        let (table, _) = toml::de::DeTable::parse_recoverable(&self.text);
        let mut offset = None;
        let mut table = Some(table.get_ref());
        let mut array: Option<&toml::de::DeArray<'_>> = None;
        for segment in path {
            let value = if let Some(items) = array {
                let item = segment.parse().ok().and_then(|index: usize| items.get(index))?;
                offset = Some(item.span().start);
                item
            } else {
                let Some((key, value)) = table.and_then(|t| t.iter().find(|(k, _)| k.get_ref().as_ref() == segment))
                else {
                    break;
                };
                offset = Some(key.span().start);
                value
            };
            table = value.get_ref().as_table();
            array = value.get_ref().as_array();
        }
        offset.map(|offset| self.text[..offset].matches('\n').count() + 1)
    }

    fn parse(&self) -> Result<Dict, Problem> {
        self.text.parse::<toml::Table>().map(|table| table.into_iter().map(convert_entry).collect()).map_err(|error| {
            let line = error.span().map(|span| self.text[..span.start].matches('\n').count() + 1);
            Problem {
                key: String::new(),
                origin: Origin::File { path: self.path.clone(), line },
                wrong: format!("is not valid TOML: {}", error.message().replace('\n', ", ")),
                remedy: "correct the line; texts need quotes, tables look like [grpc]".to_owned(),
            }
        })
    }
}

/// File and environment merged, and the problems found on the way.
pub(super) struct Layers {
    pub figment: Figment,
    pub values: Dict,
    /// Variables with our prefix that name no section: `NUDGED_DATABASE_URL`, or another program's.
    pub stray: Vec<String>,
    pub problems: Vec<Problem>,
}

impl Layers {
    pub fn merge(file: Option<&File>, environment: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut problems = Vec::new();
        let from_file = file.map_or_else(Dict::new, |file| {
            file.parse().unwrap_or_else(|problem| {
                problems.push(problem);
                Dict::new()
            })
        });
        let mut from_environment = Environment { file: &from_file, dict: Dict::new(), stray: Vec::new(), problems };
        let mut variables: Vec<_> = environment.into_iter().collect();
        variables.sort();
        for (name, value) in variables {
            from_environment.add(&name, value);
        }
        let Environment { dict, stray, mut problems, .. } = from_environment;
        let figment = Figment::new()
            .merge(Layer { name: FILE_LAYER, dict: from_file.clone() })
            .merge(Layer { name: ENVIRONMENT_LAYER, dict });
        let values = match figment.find_value("") {
            Ok(value) => value.into_dict().unwrap_or_default(),
            Err(error) => {
                problems.push(Problem {
                    key: String::new(),
                    origin: Origin::Unset,
                    wrong: format!("file and environment cannot be merged: {error}"),
                    remedy: String::new(),
                });
                Dict::new()
            }
        };
        Self { figment, values, stray, problems }
    }
}

struct Layer {
    name: &'static str,
    dict: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.dict.clone()))
    }
}

struct Environment<'a> {
    file: &'a Dict,
    dict: Dict,
    stray: Vec<String>,
    problems: Vec<Problem>,
}

impl Environment<'_> {
    fn add(&mut self, name: &OsString, value: OsString) {
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { return };
        let name = format!("{PREFIX}{rest}");
        let segments: Vec<&str> = rest.split("__").collect();
        // The only list of tables there is: given whole, as a TOML array.
        if segments.len() < 2 && rest != "KEYS" {
            self.stray.push(name);
            return;
        }
        let Ok(value) = value.into_string() else {
            return self.problem(name, "is not valid UTF-8", "set it to a text");
        };
        if value.is_empty() {
            return self.problem(name, "is set but empty", "give it a value or unset it");
        }
        let mut segments: Vec<String> = segments.iter().map(|segment| segment.to_lowercase()).collect();
        self.restore_hyphens(&mut segments);
        if insert(&mut self.dict, &segments, convert_text(value)).is_err() {
            self.problem(name, "contradicts another variable that is a part of it or contains it", "keep one of them");
        }
    }

    fn problem(&mut self, name: String, wrong: &str, remedy: &str) {
        self.problems.push(Problem {
            key: String::new(),
            origin: Origin::Environment(name),
            wrong: wrong.to_owned(),
            remedy: remedy.to_owned(),
        });
    }

    /// A variable's name cannot hold the hyphen of an app called `my-app`: `my_app` finds it if the file names it.
    fn restore_hyphens(&self, segments: &mut [String]) {
        let mut dict = Some(self.file);
        for segment in segments {
            let Some(here) = dict else { return };
            if !here.contains_key(segment)
                && let Some(name) = here.keys().find(|name| name.replace('-', "_") == *segment)
            {
                segment.clone_from(name);
            }
            dict = here.get(segment).and_then(Value::as_dict);
        }
    }
}

fn insert(dict: &mut Dict, path: &[String], value: Value) -> Result<(), ()> {
    match path {
        [] => Err(()),
        [last] => match dict.insert(last.clone(), value) {
            None => Ok(()),
            Some(_) => Err(()),
        },
        [first, rest @ ..] => match dict.entry(first.clone()).or_insert_with(|| Value::from(Dict::new())) {
            Value::Dict(_, inner) => insert(inner, rest, value),
            _ => Err(()),
        },
    }
}

/// An environment value: a text, or a list written as TOML (`["a", "b"]`).
fn convert_text(text: String) -> Value {
    if text.trim_start().starts_with('[')
        && let Ok(mut table) = format!("value = {text}").parse::<toml::Table>()
        && let Some(value @ toml::Value::Array(_)) = table.remove("value")
    {
        return convert(value);
    }
    Value::from(text)
}

fn convert_entry((key, value): (String, toml::Value)) -> (String, Value) {
    (key, convert(value))
}

/// TOML's dates become texts; the keys that take one parse it.
fn convert(value: toml::Value) -> Value {
    match value {
        toml::Value::String(text) => Value::from(text),
        toml::Value::Integer(number) => Value::from(number),
        toml::Value::Float(number) => Value::from(number),
        toml::Value::Boolean(flag) => Value::from(flag),
        toml::Value::Datetime(at) => Value::from(at.to_string()),
        toml::Value::Array(items) => Value::from(items.into_iter().map(convert).collect::<Vec<_>>()),
        toml::Value::Table(table) => Value::from(table.into_iter().map(convert_entry).collect::<Dict>()),
    }
}
