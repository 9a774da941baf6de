//! The table of faults in docs/reliability.md and how its cells are played, whatever they are played on: `tests/sim` in
//! simulated time, `tests/it` against the real binary over real TLS.

pub mod cell;
pub mod script;
pub mod table;

use nudged::api::proto::device::Platform;

use cell::Cell;
use script::Moment;
use table::{Connection, Row};

/// `NUDGED_TEST_FAULT`: only the rows that contain it.
pub fn rows() -> Vec<Row> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reliability.md")).unwrap();
    table::read(&page)
}

pub fn chosen(rows: Vec<Row>) -> Vec<Row> {
    let only = std::env::var("NUDGED_TEST_FAULT").unwrap_or_default();
    rows.into_iter().filter(|row| row.fault.contains(&only)).collect()
}

/// Each row at each moment that it has: where there is no connection, it is the first one.
pub fn cells(rows: &[Row]) -> Vec<Cell> {
    let of = |row: &Row| match row.connection {
        Connection::None => vec![Moment::First],
        Connection::Kept | Connection::Replaced => vec![Moment::First, Moment::Mid, Moment::Draining],
    };
    let cells = rows.iter().flat_map(|row| of(row).into_iter().map(move |moment| (row.clone(), moment)));
    let cell = |(number, (row, moment))| Cell { number, app: format!("cell-{number:03}"), row, moment };
    cells.enumerate().map(cell).collect()
}

#[test]
fn the_table_has_every_fault() {
    let rows = rows();
    for platform in [Platform::Apns, Platform::Fcm] {
        let mut listed: Vec<String> =
            rows.iter().filter(|row| row.platform == platform).map(|row| row.fault.clone()).collect();
        let mut wanted = script::required(platform);
        listed.sort();
        wanted.sort();
        assert_eq!(listed, wanted, "{platform:?}: docs/reliability.md against tests/faults/script.rs");
    }
}
