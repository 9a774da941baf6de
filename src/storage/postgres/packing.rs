//! Which pack format the cluster writes, and which of the newer ways of writing rows it uses: what every live replica reads.
//!
//! A replica says in its row what it reads; each heartbeat reads the least of them. A replica of an older version that
//! joins is heard of within a second; what is written until then it does not claim, and the others do. When the least
//! has fallen, what waits free in a newer format is packed anew, so that nothing is left to nobody when the last newer
//! replica goes. Formats of blocks and audiences would go the same way; they have had one so far.

use std::sync::atomic::{AtomicBool, AtomicI16, Ordering};

use diesel::sql_types::{Array, BigInt, Binary, Nullable, SmallInt};
use diesel_async::AsyncPgConnection;

use super::query::RunQuery;
use super::replica::DEAD_AFTER_MS;
use super::statement::constant;
use crate::domain::targets;

/// Jobs packed anew in one statement.
const BATCH: i64 = 200;

pub(super) struct Packing {
    /// The newest format that this process reads.
    pub read: i16,
    written: AtomicI16,
    /// All live replicas know of jobs without rows.
    rowless: AtomicBool,
    /// All live replicas know of devices that are retired in place.
    dead_in_place: AtomicBool,
}

impl Packing {
    /// `read`: the newest this process may read, for one that must get along with a version before.
    pub fn new(read: i16) -> Self {
        let read = read.clamp(targets::OLDEST, targets::NEWEST);
        Self {
            read,
            written: AtomicI16::new(targets::OLDEST),
            rowless: AtomicBool::new(false),
            dead_in_place: AtomicBool::new(false),
        }
    }

    /// Whether this process knows of the newer ways; one that must get along with a version before does not.
    pub fn knows_all(&self) -> bool {
        self.read == targets::NEWEST
    }

    /// Whether jobs may go without rows: see [`super::handed`].
    pub fn rowless(&self) -> bool {
        self.rowless.load(Ordering::Relaxed)
    }

    /// Whether devices may be retired in place: see [`super::dead`].
    pub fn dead_in_place(&self) -> bool {
        self.dead_in_place.load(Ordering::Relaxed)
    }

    pub fn written(&self) -> i16 {
        self.written.load(Ordering::Relaxed)
    }

    /// Asks what all live replicas read. Whether jobs may be waiting that some of them do not.
    pub async fn agree(&self, conn: &mut AsyncPgConnection) -> diesel::QueryResult<bool> {
        let (least, rowless, dead_in_place): (Option<i16>, Option<i16>, Option<i16>) = constant!(
            (Nullable<SmallInt>, Nullable<SmallInt>, Nullable<SmallInt>);
            "SELECT min(pack_format), min(rowless), min(dead_in_place) FROM replica WHERE boot_id <> 0 \
             AND heartbeat > (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - $1",
            BigInt => DEAD_AFTER_MS,
        )
        .get_result(conn)
        .await?;
        self.rowless.store(self.knows_all() && rowless == Some(1), Ordering::Relaxed);
        self.dead_in_place.store(self.knows_all() && dead_in_place == Some(1), Ordering::Relaxed);
        let agreed = least.unwrap_or(self.read).min(self.read);
        let before = self.written.swap(agreed, Ordering::Relaxed);
        if before != agreed {
            tracing::info!(format = agreed, "the cluster writes another pack format");
        }
        Ok(agreed < self.read)
    }

    /// Packs free jobs of newer formats anew, a batch of them. Whether there may be more.
    pub async fn repack(&self, conn: &mut AsyncPgConnection) -> diesel::QueryResult<bool> {
        let format = self.written();
        let found: Vec<(i64, i64, i16, Vec<u8>)> = constant!(
            (BigInt, BigInt, SmallInt, Binary);
            "SELECT id, fence, format, targets FROM job WHERE owner = 0 AND format > $1 AND format <= $2 LIMIT $3",
            SmallInt => format, SmallInt => self.read, BigInt => BATCH,
        )
        .load(conn)
        .await?;
        let count = found.len();
        let (mut ids, mut fences, mut packed) = (Vec::new(), Vec::new(), Vec::new());
        for (id, fence, from, bytes) in found {
            // What cannot be read is put off by whoever claims it.
            let Ok(unpacked) = targets::unpack(from, &bytes) else { continue };
            ids.push(id);
            fences.push(fence);
            packed.push(targets::pack(format, &unpacked));
        }
        let changed = constant!(
            ();
            "UPDATE job SET format = $4, targets = u.targets, fence = job.fence + 1 \
             FROM unnest($1, $2, $3) AS u(id, fence, targets) \
             WHERE job.id = u.id AND job.fence = u.fence AND job.owner = 0",
            Array<BigInt> => ids, Array<BigInt> => fences, Array<Binary> => packed, SmallInt => format,
        )
        .execute(conn)
        .await?;
        if changed > 0 {
            tracing::info!(jobs = changed, format, "packed open work anew for replicas of an older version");
        }
        Ok(count == usize::try_from(BATCH).unwrap_or(usize::MAX) && changed > 0)
    }
}
