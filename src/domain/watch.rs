//! Where somebody who watches an app's results is.
//!
//! Results become visible in the order of their transactions' ends, which is not the order of their ids. A watcher goes by
//! transaction, then by row, then by the entry of a block. On Postgres the transaction is the server's own number, and
//! rows are told only when every transaction with a lower number has ended, so nothing can appear behind a watcher. On
//! SQLite there is one writer, which numbers its transactions itself.

use super::ids::made_at;
use super::time::UnixMs;

/// Everything up to here has been told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchPosition {
    /// Of the database: numbers mean nothing in another one.
    pub epoch: i64,
    pub transaction: i64,
    /// A block's or a retirement's id; [`WatchPosition::ALL_ROWS`] after all of the transaction.
    pub row: i64,
    /// So many entries of the row.
    pub entry: u32,
    /// Nothing that comes after was made much earlier.
    pub at: UnixMs,
}

impl WatchPosition {
    pub const ALL_ROWS: i64 = i64::MAX;
    pub const ALL_ENTRIES: u32 = u32::MAX;

    /// After all of a transaction, and so of all before it.
    #[must_use]
    pub const fn after_transaction(epoch: i64, transaction: i64, at: UnixMs) -> Self {
        Self { epoch, transaction, row: Self::ALL_ROWS, entry: Self::ALL_ENTRIES, at }
    }

    /// Within a row, after its first so many entries.
    #[must_use]
    pub fn within(epoch: i64, transaction: i64, row: i64, entry: u32) -> Self {
        Self { epoch, transaction, row, entry, at: made_at(row) }
    }

    /// The row to read after: a row that is told in part is read again.
    #[must_use]
    pub const fn read_after(&self) -> (i64, i64) {
        match self.entry {
            Self::ALL_ENTRIES => (self.transaction, self.row),
            _ => (self.transaction, self.row.saturating_sub(1)),
        }
    }

    /// Whether rows of transactions up to `deleted`, which are gone, may have come after this.
    #[must_use]
    pub const fn misses(&self, deleted: i64) -> bool {
        self.transaction < deleted || (self.transaction == deleted && self.row != Self::ALL_ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_have_come_after_is_missed() {
        let whole = WatchPosition::after_transaction(1, 5, UnixMs(0));
        assert!(!whole.misses(0) && !whole.misses(5) && whole.misses(6));
        let within = WatchPosition::within(1, 5, 9, 3);
        assert!(!within.misses(4) && within.misses(5) && within.misses(6));
    }

    #[test]
    fn a_row_told_in_part_is_read_again() {
        assert_eq!(WatchPosition::within(1, 5, 9, 3).read_after(), (5, 8));
        assert_eq!(WatchPosition::within(1, 5, 9, WatchPosition::ALL_ENTRIES).read_after(), (5, 9));
        assert_eq!(WatchPosition::after_transaction(1, 5, UnixMs(0)).read_after(), (5, i64::MAX));
    }
}
