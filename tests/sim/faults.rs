//! Every fault × platform × moment × store in simulated time: each cell ends as the table in docs/reliability.md says, which
//! is read here. Nothing that is waited for is shortened: the vendors' quarters of an hour pass in no time.
//!
//! The providers are the sandbox's, over pipes; what TLS and sockets do is shown by `tests/it`, with the same cells. On
//! Postgres, too, for a real server has no other time than its own. Each cell is a world of its own and decided by a seed.

#[path = "../faults/mod.rs"]
mod play;
mod stage;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nudged::runtime::Runtime;

use self::play::cell::{Cell, Found};
use self::play::script::Moment;
use self::play::table::{Connection, Ending, Route, Row, Token};
use self::stage::Place;
use crate::database;
use crate::number;

/// Everything is played with it unless `NUDGED_TEST_FAULT_SEED` says another.
const SEED: u64 = 1;

fn seed() -> u64 {
    number("NUDGED_TEST_FAULT_SEED").unwrap_or(SEED)
}

/// A panic anywhere in it is a finding.
fn run(cell: &Cell, place: Place) -> Found {
    let played = catch_unwind(AssertUnwindSafe(|| stage::run(cell, place, seed())));
    played.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
        Found { wrong: vec![text.to_owned()], ..Found::default() }
    })
}

/// All cells on all stores, on all cores.
fn run_all(cells: &[Cell]) -> Vec<(usize, Place, Found)> {
    database::prepare();
    stage::prepare();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(cell) = cells.get(at / Place::ALL.len()) else { break };
                    let place = Place::ALL[at % Place::ALL.len()];
                    let one = run(cell, place);
                    found.lock().unwrap().push((cell.number, place, one));
                }
            });
        }
    });
    found.into_inner().unwrap()
}

/// `NUDGED_TEST_FAULT='REFUSED_STREAM'` plays the rows that contain it.
#[test]
fn every_fault_ends_as_the_table_says() {
    let clock = Runtime::production();
    let begun = clock.now_us();
    let rows = play::chosen(play::rows());
    let cells = play::cells(&rows);
    let found = run_all(&cells);
    let (text, wrong) = report(&rows, &cells, &found);
    let took = (clock.now_us() - begun) / 1_000_000;
    println!("{text}{} cells in {took} s (seed {}), {} not as the table says", found.len(), seed(), wrong.len());
    if std::env::var("NUDGED_TEST_FAULT").unwrap_or_default().is_empty() {
        println!("scripts/ledger.sh faults 'seed {} in simulated time' '{} cells' 'none'", seed(), found.len());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A line for each row: its words, and how long its cells took in simulated seconds. And what is not as it must be.
fn report(rows: &[Row], cells: &[Cell], found: &[(usize, Place, Found)]) -> (String, Vec<String>) {
    let by_cell: BTreeMap<_, _> = found.iter().map(|(number, place, found)| ((*number, *place), found)).collect();
    let mut text = format!("Seconds {:?} at {:?}\n", Place::ALL, [Moment::First, Moment::Mid, Moment::Draining]);
    let mut wrong = Vec::new();
    for row in rows {
        let of_row: Vec<&Cell> = cells.iter().filter(|cell| cell.row == *row).collect();
        let moments = if row.connection == Connection::None { 1 } else { 3 };
        let mut times = String::new();
        let mut played = 0;
        for place in Place::ALL {
            times.push_str(" |");
            for cell in &of_row {
                let Some(found) = by_cell.get(&(cell.number, place)) else { continue };
                played += 1;
                let mark = if found.wrong.is_empty() { "" } else { "!" };
                write!(times, " {:.1}{mark}", found.took.as_secs_f64()).unwrap();
                if !found.wrong.is_empty() {
                    wrong.push(format!("{cell} on {place:?}: {found}"));
                }
            }
        }
        if played != moments * Place::ALL.len() {
            wrong.push(format!("{} `{}` was played {played} times", row.platform_name(), row.fault));
        }
        let Row { fault, ending, token, route, connection, .. } = row;
        let platform = row.platform_name();
        writeln!(text, "{platform} `{fault}`: {ending} | {token} | {route} | {connection}{times}").unwrap();
    }
    (text, wrong)
}

/// One wrong word in any column of the table, and only it is found.
#[test]
fn a_wrong_word_in_the_table_is_found() {
    database::prepare();
    stage::prepare();
    let rows = play::rows();
    let row = |fault: &str| rows.iter().find(|row| row.fault == fault).cloned().expect("it has a row");
    let refused = row("REFUSED_STREAM");
    let forged = [
        ("delivery: SENT again instead of SENT (", Row { ending: Ending::Sent, ..refused.clone() }),
        ("token: retired instead of kept", Row { token: Token::Kept, ..row("404 UNREGISTERED") }),
        ("route: paused instead of works", Row { route: Route::Works, ..row("403 BadCertificate") }),
        ("connection: kept instead of replaced", Row { connection: Connection::Replaced, ..refused.clone() }),
    ];
    for (finding, row) in forged {
        let cell = play::cells(&[row]).remove(1);
        assert_eq!(cell.moment, Moment::Mid);
        let found = run(&cell, Place::Memory);
        assert!(matches!(&found.wrong[..], [only] if only.starts_with(finding)), "{cell}: {found}");
    }
    // A row that nobody knows how to play, and one that was not played.
    let unknown = Row { fault: "the dog ate it".to_owned(), ..refused.clone() };
    let found = run(&play::cells(&[unknown])[0], Place::Memory);
    assert_eq!(found.wrong, ["the dog ate it: no such fault"]);
    let (_, wrong) = report(&[refused], &[], &[]);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
}

/// What a seed decides is decided by nothing else.
#[test]
fn a_seed_decides_a_cell() {
    database::prepare();
    stage::prepare();
    let rows = play::rows();
    let cells = play::cells(&rows.into_iter().filter(|row| row.fault == "connection cut").collect::<Vec<_>>());
    for cell in &cells {
        let [first, second] = [(); 2].map(|()| run(cell, Place::Memory));
        assert_eq!(first.took, second.took, "{cell}");
    }
}
