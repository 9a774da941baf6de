//! What the demo prints: times, people, words as they arrived, outcomes; and what it found wrong.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use crate::runtime::{Instant, Runtime};

pub struct Timeline {
    runtime: Runtime,
    begun: Instant,
    colour: bool,
    wrong: Vec<String>,
    seen: u32,
}

#[derive(Clone, Copy)]
pub enum Mark {
    /// A phone showed it.
    Shown,
    /// It was kept back, as it should be.
    KeptBack,
    /// It will be tried again.
    Again,
    /// It ended without a push.
    Gone,
}

impl Timeline {
    pub fn new(runtime: &Runtime) -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { runtime: runtime.clone(), begun: runtime.instant(), colour, wrong: Vec::new(), seen: 0 }
    }

    pub fn title(&self, text: &str) {
        println!("{}", self.paint("1", text));
    }

    /// What happens next.
    pub fn act(&self, text: &str) {
        println!("\n{} {}", self.time(), self.paint("1;36", text));
    }

    /// A fact.
    pub fn note(&self, text: &str) {
        println!("{}   {text}", self.time());
    }

    /// One delivery's outcome.
    pub fn delivery(&self, mark: Mark, who: &str, what: &str) {
        let (sign, colour) = match mark {
            Mark::Shown => ("✔", "32"),
            Mark::KeptBack => ("∅", "33"),
            Mark::Again => ("↻", "35"),
            Mark::Gone => ("✘", "31"),
        };
        println!("{}   {} {}  {what}", self.time(), self.paint(colour, sign), self.paint("1", who));
    }

    /// Counts as seen when it holds, and as wrong otherwise.
    pub fn expect(&mut self, holds: bool, what: &str) {
        if holds {
            self.seen += 1;
        } else {
            self.failed(what);
        }
    }

    pub fn failed(&mut self, what: &str) {
        println!("{}   {} {what}", self.time(), self.paint("1;31", "NOT AS TOLD:"));
        self.wrong.push(what.to_owned());
    }

    /// Success only if everything was as told.
    pub fn summary(&self) -> ExitCode {
        let seconds = (self.runtime.instant() - self.begun).as_secs_f64();
        println!();
        if self.wrong.is_empty() {
            println!("{} {} things checked, all as told, in {seconds:.1} s.", self.paint("1;32", "Done:"), self.seen);
            return ExitCode::SUCCESS;
        }
        println!("{} {} things were not as told:", self.paint("1;31", "Failed:"), self.wrong.len());
        for what in &self.wrong {
            println!("  - {what}");
        }
        ExitCode::FAILURE
    }

    fn time(&self) -> String {
        let seconds = (self.runtime.instant() - self.begun).as_secs_f64();
        self.paint("2", &format!("{seconds:6.2}s"))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
