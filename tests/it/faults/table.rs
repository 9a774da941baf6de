//! The table of faults in docs/reliability.md, read: what the harness holds the server to is what is written there.

use std::collections::BTreeSet;

use nudged::api::proto::device::Platform;

const HEAD: &str = "| Fault | Platform | Delivery | Token | Route | Connection |";

/// What becomes of the delivery that met the fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// At the first attempt.
    Sent,
    /// At a later one, with the same identity.
    SentAgain,
    /// `DEAD REASON`.
    Dead(String),
    Expired,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token {
    Kept,
    Retired,
    /// To the platform's other environment.
    Moved,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    Works,
    /// Until a probe.
    Paused,
    /// Until the provider's time is over.
    Slowed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connection {
    Kept,
    Replaced,
    /// There never was one.
    None,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// See `script`.
    pub fault: String,
    pub platform: Platform,
    pub ending: Ending,
    pub token: Token,
    pub route: Route,
    pub connection: Connection,
}

/// Every row, those for both platforms twice.
pub fn read(page: &str) -> Vec<Row> {
    let table = page.split(HEAD).nth(1).expect("docs/reliability.md has the table of faults");
    let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let rows: Vec<Row> = lines.flat_map(row).collect();
    let distinct: BTreeSet<_> = rows.iter().map(|row| (&row.fault, row.platform)).collect();
    assert_eq!(distinct.len(), rows.len(), "a fault has one row");
    rows
}

fn row(line: &str) -> Vec<Row> {
    let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
    let [fault, platform, delivery, token, route, connection] = cells[..] else { panic!("six cells: {line}") };
    // Remarks may follow what is in code.
    let fault = fault.split('`').nth(1).unwrap_or_else(|| panic!("a fault in code: {line}"));
    let platforms: &[Platform] = match platform {
        "APNs" => &[Platform::Apns],
        "FCM" => &[Platform::Fcm],
        "both" => &[Platform::Apns, Platform::Fcm],
        other => panic!("{other}: {line}"),
    };
    let ending = match delivery {
        "SENT" => Ending::Sent,
        "SENT again" => Ending::SentAgain,
        "EXPIRED" => Ending::Expired,
        other => match other.strip_prefix("DEAD ") {
            Some(reason) => Ending::Dead(reason.to_owned()),
            None => panic!("{other}: {line}"),
        },
    };
    let token = match token {
        "kept" => Token::Kept,
        "retired" => Token::Retired,
        "moved" => Token::Moved,
        other => panic!("{other}: {line}"),
    };
    let route = match route {
        "works" => Route::Works,
        "paused" => Route::Paused,
        "slowed" => Route::Slowed,
        other => panic!("{other}: {line}"),
    };
    let connection = match connection {
        "kept" => Connection::Kept,
        "replaced" => Connection::Replaced,
        "none" => Connection::None,
        other => panic!("{other}: {line}"),
    };
    let of = |platform: &Platform| Row {
        fault: fault.to_owned(),
        platform: *platform,
        ending: ending.clone(),
        token,
        route,
        connection,
    };
    platforms.iter().map(of).collect()
}

#[test]
fn a_row_says_what_it_must() {
    let page = format!(
        "text\n{HEAD}\n|---|---|---|---|---|---|\n| `400 BadTopic` | APNs | DEAD REJECTED | kept | works | kept |\n\
         | `stall` (a remark) | both | SENT again | kept | works | kept |\n\nmore | `text` |"
    );
    let rows = read(&page);
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[0].fault.as_str(), &rows[0].ending), ("400 BadTopic", &Ending::Dead("REJECTED".to_owned())));
    assert_eq!((rows[2].fault.as_str(), rows[2].platform), ("stall", Platform::Fcm));
    assert!(std::panic::catch_unwind(|| row("| `x` | APNs | SENT | kept | works | somewhere |")).is_err());
}
