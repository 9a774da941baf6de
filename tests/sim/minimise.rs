//! Makes a red history small: what is left is what it takes.

use super::database::Place;
use super::history::{Act, Database, History, Setup};
use super::provider::Mood;
use super::run;

/// Runs at most; each is a few milliseconds.
const MAX_RUNS: u32 = 3_000;

/// The shortest history found that breaks a rule of the same name.
pub fn minimise(history: &History, rule: &str, place: Place) -> History {
    let mut search = Search { rule, place, runs: 0 };
    let mut best = history.clone();
    loop {
        let before = best.clone();
        search.drop_steps(&mut best);
        search.calm(&mut best);
        search.hurry(&mut best);
        if best == before || search.runs >= MAX_RUNS {
            return best;
        }
    }
}

struct Search<'a> {
    rule: &'a str,
    place: Place,
    runs: u32,
}

impl Search<'_> {
    fn is_red(&mut self, history: &History) -> bool {
        self.runs += 1;
        self.runs <= MAX_RUNS && run::run(history, self.place).violations.iter().any(|found| found.rule == self.rule)
    }

    /// Halves, quarters, … single steps.
    fn drop_steps(&mut self, best: &mut History) {
        let mut size = best.steps.len().div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while at < best.steps.len() {
                let mut shorter = best.clone();
                shorter.steps.drain(at..(at + size).min(best.steps.len()));
                if self.is_red(&shorter) {
                    *best = shorter;
                } else {
                    at += size;
                }
            }
            if size == 1 {
                return;
            }
            size = size.div_ceil(2);
        }
    }

    /// Without the disturbances that it does not take.
    fn calm(&mut self, best: &mut History) {
        let changes: [fn(&mut Setup); 7] = [
            |setup| setup.database = Database::default(),
            |setup| setup.mood = Mood::CALM,
            |setup| setup.reorder_one_in = 0,
            |setup| setup.stays_bad = false,
            |setup| setup.max_streams = 100,
            |setup| setup.with_token = false,
            |setup| setup.once = false,
        ];
        for change in changes {
            let mut calmer = best.clone();
            change(&mut calmer.setup);
            if calmer != *best && self.is_red(&calmer) {
                *best = calmer;
            }
        }
    }

    /// Without the waits that it does not take, and with fewer people.
    fn hurry(&mut self, best: &mut History) {
        for at in 0..best.steps.len() {
            let mut sooner = best.clone();
            sooner.steps[at].after_ms = 0;
            if sooner != *best && self.is_red(&sooner) {
                *best = sooner;
            }
            let Act::Notify { to: super::history::To::Users(users), .. } = &best.steps[at].act else { continue };
            for user in users.clone() {
                let mut fewer = best.clone();
                if let Act::Notify { to: super::history::To::Users(users), .. } = &mut fewer.steps[at].act
                    && users.len() > 1
                {
                    users.retain(|other| *other != user);
                }
                if fewer != *best && self.is_red(&fewer) {
                    *best = fewer;
                }
            }
        }
    }
}
