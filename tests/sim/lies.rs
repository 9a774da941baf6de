//! Parts of the process that lie, each in a history made for it: what the engine itself gets wrong must be red, in every run, and
//! not only what is forged into the facts of a good one.

use super::database::Place;
use super::history::{Act, Database, History, Setup, Step, To};
use super::provider::Mood;
use super::rules::Rule;
use super::run::{self, Outcome};

/// What lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// Senders ask a feed of "no"s that nobody writes to.
    DeafSenders,
    /// A crash of the process takes with it what the database had answered: its log was never written.
    ForgetfulStore,
}

fn at(after_ms: u32, act: Act) -> Step {
    Step { after_ms, act }
}

fn setup(mood: Mood) -> Setup {
    Setup {
        max_streams: 1,
        max_in_flight_targets: 1_000,
        page_people: 100,
        request_timeout_ms: 15_000,
        reorder_one_in: 0,
        with_token: true,
        mood,
        database: Database::default(),
        stays_bad: true,
        once: false,
    }
}

fn event() -> Act {
    let to = To::Users(vec![0]);
    Act::Notify { tag: 1, event_type: 0, to, actor: None, ttl_secs: 60, collapses: false, is_keyed: true }
}

/// The history that shows it, where its database lies, and the rule that it breaks.
fn of(lie: Lie) -> (History, Place, Rule) {
    let yes = |yes| Act::OptIn { user: 0, event_type: None, token: None, yes };
    match lie {
        // One stream to a slow provider: pushes still wait when the "no" is said.
        Lie::DeafSenders => {
            // Even tokens: one platform, one connection.
            let register = |number: u8| at(20, Act::Register { user: 0, token: 2 * number, is_sandbox: false });
            let mut steps: Vec<Step> = (0..12).map(register).collect();
            steps.extend([at(100, yes(true)), at(500, event()), at(1_000, yes(false))]);
            let mood = Mood { slowest_ms: 2_500, streams: 1, ..Mood::CALM };
            (History { seed: 1, setup: setup(mood), steps }, Place::Memory, Rule::No)
        }
        // What was there before is in the database itself: a close in order leaves no log.
        Lie::ForgetfulStore => {
            let steps = vec![
                at(20, Act::Register { user: 0, token: 0, is_sandbox: false }),
                at(100, yes(true)),
                at(500, Act::Restart { down_ms: 100 }),
                at(500, event()),
                at(500, Act::Crash { down_ms: 100 }),
            ];
            (History { seed: 1, setup: setup(Mood::CALM), steps }, Place::File, Rule::Lost)
        }
    }
}

fn breaks(outcome: &Outcome, rule: Rule) -> bool {
    outcome.violations.iter().any(|violation| violation.rule == rule.name())
}

/// As part of a campaign, too.
pub fn assert_they_are_found_out() {
    assert_it_is_found_out(Lie::DeafSenders);
    assert_it_is_found_out(Lie::ForgetfulStore);
}

fn assert_it_is_found_out(lie: Lie) {
    super::database::prepare();
    let (history, place, rule) = of(lie);
    let honest = run::run(&history, place);
    assert!(!honest.is_red(), "without the lie: {:#?}", honest.violations);
    let lying = run::run_lying(&history, place, lie);
    assert!(breaks(&lying, rule), "nobody noticed: {:#?} {:#?}", lying.violations, lying.facts);
    assert_eq!(lying.fingerprint(), run::run_lying(&history, place, lie).fingerprint(), "every time alike");
}

#[test]
fn senders_that_hear_no_no_are_found_out() {
    assert_it_is_found_out(Lie::DeafSenders);
}

#[test]
fn a_store_that_forgets_what_it_answered_is_found_out() {
    assert_it_is_found_out(Lie::ForgetfulStore);
}
