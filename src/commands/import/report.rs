//! What was refused: one JSON object a line. Only as long as what is refused, and never in memory as a whole.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::api::proto::import_progress;
use crate::domain::violation::Violation;

/// One refused line.
#[derive(Serialize, Deserialize)]
pub struct Refused {
    line: u64,
    /// As the server would say.
    reason: String,
    violations: Vec<Wrong>,
}

#[derive(Serialize, Deserialize)]
struct Wrong {
    field: String,
    description: String,
}

impl Refused {
    /// By this command.
    pub fn here(line: u64, violations: Vec<Violation>) -> Self {
        let wrong = |Violation { field, description }| Wrong { field, description };
        Self { line, reason: "INVALID_REQUEST".to_owned(), violations: violations.into_iter().map(wrong).collect() }
    }

    pub fn by_server(refused: &import_progress::Refused) -> Self {
        let wrong = |violation: &import_progress::refused::Violation| Wrong {
            field: violation.field.clone(),
            description: violation.description.clone(),
        };
        let violations = refused.violations.iter().map(wrong).collect();
        Self { line: refused.sequence, reason: refused.reason.clone(), violations }
    }
}

/// Made with its first line; a report that would be empty is no file.
pub struct Report {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    /// Lines that are in it and may come again.
    known: HashSet<u64>,
}

impl Report {
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, known: HashSet::new() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_empty(&self) -> bool {
        self.file.is_none()
    }

    /// `resumed`: what the last run reported stays, and lines after `from` that are in it are not reported again.
    pub fn open(&mut self, from: u64, resumed: bool) -> anyhow::Result<()> {
        let doing = || format!("reading the report {}", self.path.display());
        if !self.path.exists() {
            return Ok(());
        }
        if !resumed {
            return std::fs::remove_file(&self.path).with_context(doing);
        }
        let mut reader = BufReader::new(File::open(&self.path).with_context(doing)?);
        let (mut whole, mut line) = (0_u64, Vec::new());
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).with_context(doing)?;
            // A last line without its end was cut off by a crash, and comes again.
            let Ok(refused) = serde_json::from_slice::<Refused>(&line) else { break };
            if !line.ends_with(b"\n") {
                break;
            }
            whole += read as u64;
            if refused.line > from {
                self.known.insert(refused.line);
            }
        }
        let mut file = OpenOptions::new().append(true).open(&self.path).with_context(doing)?;
        file.set_len(whole).with_context(doing)?;
        file.flush().with_context(doing)?;
        self.file = (whole > 0).then(|| BufWriter::new(file));
        Ok(())
    }

    pub fn add(&mut self, refused: &Refused) -> anyhow::Result<()> {
        if !self.known.insert(refused.line) {
            return Ok(());
        }
        let doing = || format!("writing the report {}", self.path.display());
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(BufWriter::new(File::create(&self.path).with_context(doing)?)),
        };
        serde_json::to_writer(&mut *file, refused).with_context(doing)?;
        file.write_all(b"\n").with_context(doing)
    }

    pub fn flush(&mut self) -> anyhow::Result<()> {
        match &mut self.file {
            Some(file) => file.flush().with_context(|| format!("writing the report {}", self.path.display())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: u64) -> Refused {
        Refused::here(line, vec![Violation::new("token", "must not be empty")])
    }

    fn lines(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str::<Refused>(line).unwrap().line).collect()
    }

    #[test]
    fn a_resumed_report_goes_on_without_repeats_and_a_fresh_one_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("refused.ndjson");
        let mut report = Report::new(path.clone());
        report.open(0, false).unwrap();
        assert!(report.is_empty() && !path.exists());
        for line in [3, 7, 9] {
            report.add(&refused(line)).unwrap();
        }
        report.flush().unwrap();
        drop(report);
        // The process was killed in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"line\":12,\"rea").unwrap();

        let mut report = Report::new(path.clone());
        report.open(5, true).unwrap();
        for line in [7, 9, 12] {
            report.add(&refused(line)).unwrap();
        }
        report.flush().unwrap();
        assert_eq!(lines(&path), [3, 7, 9, 12]);

        let mut report = Report::new(path.clone());
        report.open(0, false).unwrap();
        assert!(report.is_empty() && !path.exists());
    }
}
