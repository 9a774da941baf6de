//! Whether there is room for another event: how much is open, and how much disk is left.
//!
//! One value that three sides share: the engine counts the open work every some seconds and keeps up with it in between,
//! the composition root looks at the disk, and whoever accepts events asks. Asking costs a few atomic reads. What it
//! refuses is new events alone: consent, devices, cancellations and results always have the rest to themselves, which
//! is why the limits lie before the end of the disk and not at it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Why no new event is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Full {
    /// More deliveries are open than `delivery.max_open_targets`.
    OpenTargets,
    /// More jobs and fan-outs are open than `delivery.max_open_rows`.
    OpenRows,
    /// The file system of the database has less free than `database.min_free_mib`.
    DiskFree,
    /// The database is larger than `database.max_mib`.
    DatabaseSize,
    /// The last write failed because the disk was full.
    DiskFull,
}

impl Full {
    pub const ALL: [Self; 5] = [Self::OpenTargets, Self::OpenRows, Self::DiskFree, Self::DatabaseSize, Self::DiskFull];

    /// The label of the metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OpenTargets => "open_targets",
            Self::OpenRows => "open_rows",
            Self::DiskFree => "disk_free",
            Self::DatabaseSize => "database_size",
            Self::DiskFull => "disk_full",
        }
    }

    /// What a caller, or `/readyz`, is told.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::OpenTargets => "more deliveries are open than delivery.max_open_targets",
            Self::OpenRows => "more jobs are open than delivery.max_open_rows",
            Self::DiskFree => "the disk has less free than database.min_free_mib",
            Self::DatabaseSize => "the database is larger than database.max_mib",
            Self::DiskFull => "the disk is full",
        }
    }

    /// Made good by deliveries that end; otherwise somebody has to make room.
    #[must_use]
    pub const fn is_open_work(self) -> bool {
        matches!(self, Self::OpenTargets | Self::OpenRows)
    }
}

/// Where it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoomLimits {
    /// Open deliveries.
    pub max_open_targets: u64,
    /// Open jobs and fan-outs: rows of the queue.
    pub max_open_rows: u64,
    /// Bytes that stay free on the database's file system; 0: no limit.
    pub min_free_bytes: u64,
    /// Bytes of the database; 0: no limit.
    pub max_bytes: u64,
}

impl Default for RoomLimits {
    /// The open work's are the documented defaults; the disk's are off.
    fn default() -> Self {
        Self { max_open_targets: 20_000_000, max_open_rows: 10_000_000, min_free_bytes: 0, max_bytes: 0 }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Room {
    limits: RoomLimits,
    targets: Open,
    rows: Open,
    /// `u64::MAX` while it is not known.
    free_bytes: AtomicU64,
    bytes: AtomicU64,
    disk_full: AtomicBool,
}

/// An amount that was counted, and what has come and ended since.
#[derive(Debug, Default)]
struct Open {
    /// Since the start.
    came: AtomicU64,
    ended: AtomicU64,
    counted: AtomicU64,
    /// `came` when the count began, `ended` when it was there.
    came_at: AtomicU64,
    ended_at: AtomicU64,
}

impl Open {
    /// At most: what came or ended while it was counted is in it.
    fn at_most(&self) -> u64 {
        let came = self.came.load(Relaxed).saturating_sub(self.came_at.load(Relaxed));
        let ended = self.ended.load(Relaxed).saturating_sub(self.ended_at.load(Relaxed));
        self.counted.load(Relaxed).saturating_add(came).saturating_sub(ended)
    }
}

/// Taken before a count begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CountMark {
    targets: u64,
    rows: u64,
}

impl Room {
    #[must_use]
    pub fn new(limits: RoomLimits) -> Self {
        Self {
            limits,
            targets: Open::default(),
            rows: Open::default(),
            free_bytes: AtomicU64::new(u64::MAX),
            bytes: AtomicU64::new(0),
            disk_full: AtomicBool::new(false),
        }
    }

    #[must_use]
    pub const fn limits(&self) -> RoomLimits {
        self.limits
    }

    /// So much was written to the queue.
    pub fn opened(&self, targets: u64, rows: u64) {
        self.targets.came.fetch_add(targets, Relaxed);
        self.rows.came.fetch_add(rows, Relaxed);
    }

    /// So much has left it.
    pub fn ended(&self, targets: u64, rows: u64) {
        self.targets.ended.fetch_add(targets, Relaxed);
        self.rows.ended.fetch_add(rows, Relaxed);
    }

    /// To be taken before the open work is read.
    #[must_use]
    pub fn mark(&self) -> CountMark {
        CountMark { targets: self.targets.came.load(Relaxed), rows: self.rows.came.load(Relaxed) }
    }

    /// So much is open.
    pub fn counted(&self, mark: CountMark, targets: u64, rows: u64) {
        for (open, at, counted) in [(&self.targets, mark.targets, targets), (&self.rows, mark.rows, rows)] {
            open.counted.store(counted, Relaxed);
            open.came_at.store(at, Relaxed);
            open.ended_at.store(open.ended.load(Relaxed), Relaxed);
        }
    }

    /// What the file system of the database has left.
    pub fn set_free_bytes(&self, free: u64) {
        self.free_bytes.store(free, Relaxed);
    }

    /// How large the database is.
    pub fn set_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Relaxed);
    }

    /// Whether the last write found the disk full.
    pub fn set_disk_full(&self, full: bool) {
        self.disk_full.store(full, Relaxed);
    }

    #[must_use]
    pub fn is(&self, full: Full) -> bool {
        let RoomLimits { max_open_targets, max_open_rows, min_free_bytes, max_bytes } = self.limits;
        match full {
            Full::OpenTargets => self.targets.at_most() >= max_open_targets,
            Full::OpenRows => self.rows.at_most() >= max_open_rows,
            Full::DiskFree => self.free_bytes.load(Relaxed) < min_free_bytes,
            Full::DatabaseSize => max_bytes > 0 && self.bytes.load(Relaxed) >= max_bytes,
            Full::DiskFull => self.disk_full.load(Relaxed),
        }
    }

    /// Why no event is taken now, the disk's reasons first: they do not go away by themselves.
    #[must_use]
    pub fn full(&self) -> Option<Full> {
        Full::ALL.into_iter().rev().find(|full| self.is(*full))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RoomLimits =
        RoomLimits { max_open_targets: 10, max_open_rows: 5, min_free_bytes: 100, max_bytes: 1_000 };

    #[test]
    fn nothing_known_is_room() {
        assert_eq!(Room::new(LIMITS).full(), None);
        assert_eq!(Room::new(RoomLimits::default()).full(), None);
    }

    #[test]
    fn what_comes_between_two_counts_is_added_and_a_count_takes_its_place() {
        let room = Room::new(LIMITS);
        room.opened(9, 4);
        assert_eq!(room.full(), None);
        room.opened(1, 0);
        assert_eq!(room.full(), Some(Full::OpenTargets));
        let mark = room.mark();
        // Comes in while it is counted: taken for not counted.
        room.opened(3, 1);
        room.counted(mark, 2, 2);
        assert_eq!(room.full(), None);
        room.opened(0, 2);
        assert_eq!(room.full(), Some(Full::OpenRows));
        room.ended(0, 1);
        assert_eq!(room.full(), None);
        room.opened(0, 1);
        assert_eq!(room.full(), Some(Full::OpenRows));
        room.counted(room.mark(), 0, 0);
        assert_eq!(room.full(), None);
    }

    #[test]
    fn the_disk_s_reasons_come_first() {
        let room = Room::new(LIMITS);
        room.opened(100, 100);
        assert_eq!(room.full(), Some(Full::OpenRows));
        room.set_free_bytes(99);
        assert_eq!(room.full(), Some(Full::DiskFree));
        room.set_bytes(1_000);
        assert_eq!(room.full(), Some(Full::DatabaseSize));
        room.set_disk_full(true);
        assert_eq!(room.full(), Some(Full::DiskFull));
        room.set_free_bytes(100);
        room.set_bytes(999);
        room.set_disk_full(false);
        room.counted(room.mark(), 0, 0);
        assert_eq!(room.full(), None);
    }

    #[test]
    fn limits_of_nothing_are_no_limits_for_the_disk() {
        let room = Room::new(RoomLimits { min_free_bytes: 0, max_bytes: 0, ..LIMITS });
        room.set_free_bytes(0);
        room.set_bytes(u64::MAX);
        assert_eq!(room.full(), None);
    }
}
