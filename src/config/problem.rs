//! What is wrong with a configuration: where it was said, what is wrong, what to do.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// `line` counts from 1; absent when the problem is about the file as a whole.
    File { path: PathBuf, line: Option<usize> },
    /// The variable's name.
    Environment(String),
    /// Nobody set it: a missing key, or a default that does not fit the rest.
    Unset,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Unset => f.write_str("not set"),
        }
    }
}

/// One thing an operator has to look at. Never holds a secret's value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The key's path, e.g. `apps.ifriendspet.apns.key_file`; empty when it is about the whole file.
    pub key: String,
    pub origin: Origin,
    /// What is wrong, without a full stop.
    pub wrong: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key.is_empty(), &self.origin) {
            (true, origin) => write!(f, "{origin}: {}", self.wrong)?,
            (false, Origin::Unset) => write!(f, "{}: {}", self.key, self.wrong)?,
            (false, origin) => write!(f, "{} ({origin}): {}", self.key, self.wrong)?,
        }
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n    {}", self.remedy) }
    }
}

/// Every problem of a configuration, in the order of the sections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigErrors {
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        write!(f, "the configuration has {count} problem{}", if count == 1 { "" } else { "s" })?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// The candidate somebody most likely meant, when one is near enough.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
