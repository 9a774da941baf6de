//! Moving a database up: everything in an SQLite file goes to an empty Postgres database, ids and all.
//!
//! The parts both sides agree on. A row is its line in Postgres' COPY text format, made by [`Line`] on the way out; the
//! server prints the same line for what it stored, so a table's [`Digest`] must be equal on both sides. Tables are read
//! in the order of their primary key, and the source is sealed before its first row is read, so "the first n rows" means
//! the same rows in every run: that is all a resumed move has to know.
//!
//! The seal is a row in the table `secret` of either side ([`Seal`] and [`Arrival`]). A sealed source is not served any
//! more: its open work would be sent twice. A destination is not served before everything has arrived.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// The row of `secret` that either side keeps, in JSON. It is never copied.
pub const SEAL: &str = "move";

/// Tables that describe a database, not what is kept in it. Cursors of watchers are the source's own, so its watermarks
/// stay.
pub const LEFT_BEHIND: &[&str] = &["replica", "watermark", "__diesel_schema_migrations"];

/// The column that numbers transactions, which mean nothing in another database: what is moved is older than all of them.
const TRANSACTION: &str = "xid";

/// The column that repeats what other tables say: each database packs its own.
const REACH: &str = "reach";

/// Why a database cannot be moved, or was not.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    #[error("reading the source failed: {reason}")]
    Source { reason: String },
    #[error("writing to the destination failed: {reason}")]
    Destination { reason: String },
    #[error("{replicas} server(s) use the destination; stop them until everything has arrived")]
    DestinationServed { replicas: i64 },
    #[error("another move into the destination is under way")]
    DestinationBusy,
    #[error("the destination is not empty: there are rows in its table {table}; give it an empty database")]
    DestinationNotEmpty { table: String },
    #[error("the destination holds a part of another copy; give it an empty database")]
    OtherCopy,
    #[error("the source was moved to another database already, at {at}")]
    MovedElsewhere { at: String },
    #[error("the table {table} differs between the two databases: {detail}")]
    Schema { table: String, detail: String },
    #[error("{table} is not the same on both sides: {source_rows} rows in the source, {destination_rows} in the destination{}",
        if source_rows == destination_rows { ", with other contents" } else { "" })]
    Different { table: String, source_rows: u64, destination_rows: u64 },
}

/// What the source remembers of its move.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Seal {
    /// Names the copy: random, the same on both sides.
    pub copy: String,
    /// Milliseconds since 1970.
    pub since: i64,
    /// Everything has arrived.
    pub done: bool,
}

/// What the destination remembers of it.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Arrival {
    pub copy: String,
    pub since: i64,
    pub done: bool,
    /// Rows that have arrived, by table; written in one transaction with them.
    pub rows: BTreeMap<String, u64>,
}

/// A table of the source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    pub name: String,
    /// In the order they are read and written.
    pub columns: Vec<String>,
    /// The primary key: the order of the rows.
    pub key: Vec<String>,
    pub rows: u64,
}

impl Table {
    #[must_use]
    pub fn column_list(&self) -> String {
        quoted(&self.columns)
    }

    /// What the source gives for [`Table::column_list`].
    #[must_use]
    pub fn values(&self) -> String {
        self.column_list().replace(&format!("\"{TRANSACTION}\""), "0").replace(&format!("\"{REACH}\""), "NULL")
    }

    #[must_use]
    pub fn key_list(&self) -> String {
        quoted(&self.key)
    }

    /// Which rows go: all but the seal.
    #[must_use]
    pub fn condition(&self) -> String {
        if self.name == "secret" { format!("WHERE name <> '{SEAL}'") } else { String::new() }
    }
}

fn quoted(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    quoted.join(", ")
}

/// One row in COPY's text format, with its line feed.
#[derive(Default)]
pub struct Line(pub Vec<u8>);

impl Line {
    pub fn null(&mut self) {
        self.separate();
        self.0.extend(b"\\N");
    }

    pub fn integer(&mut self, value: i64) {
        self.separate();
        self.0.extend(value.to_string().as_bytes());
    }

    pub fn text(&mut self, value: &str) {
        self.separate();
        for byte in value.bytes() {
            let escaped = match byte {
                b'\\' => b'\\',
                b'\t' => b't',
                b'\n' => b'n',
                b'\r' => b'r',
                0x08 => b'b',
                0x0b => b'v',
                0x0c => b'f',
                other => {
                    self.0.push(other);
                    continue;
                }
            };
            self.0.extend([b'\\', escaped]);
        }
    }

    pub fn bytes(&mut self, value: &[u8]) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        self.separate();
        self.0.extend(b"\\\\x");
        for byte in value {
            self.0.extend([HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }

    pub fn end(&mut self) {
        self.0.push(b'\n');
    }

    fn separate(&mut self) {
        if !self.0.is_empty() {
            self.0.push(b'\t');
        }
    }
}

/// What a table holds, whatever the order of its rows: how many, and the sum of their hashes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digest {
    pub rows: u64,
    sum: u128,
}

impl Digest {
    /// `line` as [`Line`] makes it, with its line feed.
    pub fn add(&mut self, line: &[u8]) {
        let hash: [u8; 32] = Sha256::digest(line).into();
        let (head, _) = hash.split_at(16);
        let head: [u8; 16] = head.try_into().expect("half of it");
        self.sum = self.sum.wrapping_add(u128::from_le_bytes(head));
        self.rows += 1;
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_what_postgres_prints() {
        let mut line = Line::default();
        line.integer(-7);
        line.null();
        line.text("a\tb\\c\nd\re");
        line.bytes(&[0, 0xab, 0xff]);
        line.text("");
        line.end();
        assert_eq!(line.0, b"-7\t\\N\ta\\tb\\\\c\\nd\\re\t\\\\x00abff\t\n");
    }

    #[test]
    fn a_digest_knows_rows_and_contents_but_no_order() {
        let of = |lines: &[&[u8]]| {
            let mut digest = Digest::default();
            for line in lines {
                digest.add(line);
            }
            digest
        };
        assert_eq!(of(&[b"a\n", b"b\n"]), of(&[b"b\n", b"a\n"]));
        assert_ne!(of(&[b"a\n", b"b\n"]), of(&[b"a\n", b"c\n"]));
        assert_ne!(of(&[b"a\n"]), of(&[b"a\n", b"a\n"]));
        assert_eq!(of(&[b"a\n"]).to_string().len(), 32);
    }
}
