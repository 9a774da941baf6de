//! The table of faults in docs/reliability.md, read: what the harnesses hold the server to is what is written there.

use std::collections::BTreeSet;
use std::fmt;

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

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sent => f.write_str("SENT"),
            Self::SentAgain => f.write_str("SENT again"),
            Self::Dead(reason) => write!(f, "DEAD {reason}"),
            Self::Expired => f.write_str("EXPIRED"),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kept => "kept",
            Self::Retired => "retired",
            Self::Moved => "moved",
        })
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Works => "works",
            Self::Paused => "paused",
            Self::Slowed => "slowed",
        })
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kept => "kept",
            Self::Replaced => "replaced",
            Self::None => "none",
        })
    }
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

impl Row {
    pub fn platform_name(&self) -> &'static str {
        if self.platform == Platform::Apns { "APNs" } else { "FCM" }
    }
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
    let ending = match delivery.strip_prefix("DEAD ") {
        Some(reason) => Ending::Dead(reason.to_owned()),
        None => read_as(&[Ending::Sent, Ending::SentAgain, Ending::Expired], delivery, line),
    };
    let token = read_as(&[Token::Kept, Token::Retired, Token::Moved], token, line);
    let route = read_as(&[Route::Works, Route::Paused, Route::Slowed], route, line);
    let connection = read_as(&[Connection::Kept, Connection::Replaced, Connection::None], connection, line);
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

/// The one that is printed so.
fn read_as<T: fmt::Display + Clone>(known: &[T], word: &str, line: &str) -> T {
    known.iter().find(|one| one.to_string() == word).cloned().unwrap_or_else(|| panic!("{word}: {line}"))
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
