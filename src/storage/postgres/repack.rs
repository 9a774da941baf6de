//! Keeps what is packed of people true. See [`crate::storage::reach`].
//!
//! A step names whom it changes ([`Tx::changed`]), and they are packed as the last thing before its COMMIT. First their
//! rows are locked; what is read of them afterwards is what everybody has committed who held that lock before. Whoever
//! changes the same person later, or has done so and is not at their COMMIT yet, packs them after us. So no change is
//! missed, whichever of two comes first. Where a snapshot is older than the lock (an isolation level above the default),
//! the server refuses the lock, for each change of what is packed writes the person's row. Whose packed bytes were read on the
//! way anyway is spared the lock: they are written only if they are still the same ([`swap`]).
//!
//! Steps lock in this order, each kind by its key: jobs, devices, people; results that only end their jobs delete them in
//! whatever order the server finds them. What remains of deadlocks is such a deletion beside a replica that gives all its jobs
//! back, and two steps that come to several devices from different sides, as two phones that swap owners at once: rare, and
//! run again.
//!
//! Replicas of earlier versions and people at psql do not pack; triggers make that what is packed is forgotten then. See
//! the migration `reach_kept`.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable};

use super::Inner;
use super::fail::Attempt;
use super::query::RunQuery;
use super::reach::of_rows;
use super::read::read;
use super::statement::constant;
use super::tx::{Tx, step};
use crate::domain::ids::UserKey;
use crate::planted;
use crate::storage::Result;
use crate::storage::reach::{Change, Reach};

/// Until the end of the transaction nobody else changes these people's choices or what is packed of them.
pub(super) async fn lock(tx: &mut Tx, users: impl Iterator<Item = UserKey>) -> Attempt<()> {
    let mut wanted: Vec<i64> = users.map(|user| user.0).filter(|user| !tx.locked.contains_key(user)).collect();
    wanted.sort_unstable();
    wanted.dedup();
    if wanted.is_empty() {
        return Ok(());
    }
    // app_user's primary key
    let rows: Vec<(i64, Option<Vec<u8>>)> = constant!(
        (BigInt, Nullable<Binary>);
        "SELECT id, reach FROM app_user WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE", Array<BigInt> => wanted,
    )
    .load(tx.conn())
    .await?;
    tx.locked.extend(rows);
    Ok(())
}

/// Packs anew whom the step has changed. One statement to lock them, where that has not been done; one to read the rows of
/// those of whom what is packed and the change do not say enough; one to write.
pub(super) async fn pack_changed(tx: &mut Tx) -> Attempt<()> {
    let mut changed = std::mem::take(&mut tx.changed);
    if changed.is_empty() || planted::is("reach-not-packed-anew") {
        return Ok(());
    }
    swap(tx, &mut changed).await?;
    if changed.is_empty() {
        return Ok(());
    }
    lock(tx, changed.iter().map(|(user, _)| *user)).await?;
    let known = applied(&changed, |user| tx.locked.get(&user)?.as_deref());
    let unsaid = known.iter().filter(|(_, reach)| reach.is_none()).map(|(user, _)| *user).collect();
    let mut read = of_rows(tx.conn(), unsaid).await?;
    let (mut users, mut reaches) = (Vec::new(), Vec::new());
    for (user, reach) in known {
        let packed = reach.or_else(|| read.remove(&user)).unwrap_or_default().pack();
        // Who is too large is written in any case: see the module.
        if packed.is_none() || tx.locked.get(&user).is_some_and(|before| packed != *before) {
            users.push(user);
            reaches.push(packed);
        }
    }
    write(tx, users, reaches).await
}

/// What is to be packed of those who are changed, by what is packed of them: `None` where the two do not say enough.
fn applied<'a>(
    changed: &[(UserKey, Change)],
    packed: impl Fn(i64) -> Option<&'a [u8]>,
) -> BTreeMap<i64, Option<Reach>> {
    let mut known: BTreeMap<i64, Option<Reach>> = BTreeMap::new();
    for (user, change) in changed {
        let reach = known.entry(user.0).or_insert_with(|| Reach::read(packed(user.0)?));
        if !reach.as_mut().is_some_and(|reach| reach.apply(change.clone())) {
            *reach = None;
        }
    }
    known
}

/// People of whom what is packed was read on the way, without a lock: who is packed as they were then is packed anew by one
/// statement, and is changed no more. As good as under a lock that was taken before: what it would have read is the same.
async fn swap(tx: &mut Tx, changed: &mut Vec<(UserKey, Change)>) -> Attempt<()> {
    let seen = std::mem::take(&mut tx.seen);
    if seen.is_empty() {
        return Ok(());
    }
    let (mut users, mut before, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for (user, reach) in applied(changed, |user| seen.get(&user).map(Vec::as_slice)) {
        let Some(old) = seen.get(&user).filter(|_| !tx.locked.contains_key(&user)) else { continue };
        if let Some(new) = reach.and_then(|reach| reach.pack()).filter(|new| new != old) {
            users.push(user);
            before.push(old);
            after.push(new);
        }
    }
    let swapped: Vec<i64> = if users.is_empty() {
        Vec::new()
    } else if planted::is("pg-swapped-unseen") {
        write(tx, users.clone(), after.into_iter().map(Some).collect()).await?;
        users
    } else {
        constant!(
            BigInt;
            "UPDATE app_user SET reach = e.new FROM unnest($1, $2, $3) AS e(id, old, new) \
             WHERE app_user.id = e.id AND app_user.reach = e.old RETURNING app_user.id",
            Array<BigInt> => users, Array<Binary> => before, Array<Binary> => after,
        )
        .load(tx.conn())
        .await?
    };
    let swapped: HashSet<i64> = swapped.into_iter().collect();
    changed.retain(|(user, _)| !swapped.contains(&user.0));
    Ok(())
}

async fn write(tx: &mut Tx, users: Vec<i64>, reaches: Vec<Option<Vec<u8>>>) -> Attempt<()> {
    if users.is_empty() {
        return Ok(());
    }
    tx.execute(constant!(
        ();
        "UPDATE app_user SET reach = e.reach FROM unnest($1, $2) AS e(id, reach) WHERE app_user.id = e.id",
        Array<BigInt> => users, Array<Nullable<Binary>> => reaches,
    ))
    .await?;
    Ok(())
}

/// People looked at in one go.
const CHUNK: i64 = 1_000;
/// Between two looks, and so many times what the last one took: callers go first.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
const PAUSES: u32 = 4;
/// Between two tries when the database is not there.
const RETRY: std::time::Duration = std::time::Duration::from_secs(5);
const DOING: &str = "packing how people can be reached";

/// Packs whoever is not packed, walking once over everybody: in a database from before there was such a thing, and those
/// whom somebody changed who does not pack. Beside others who do the same.
pub(super) async fn sweep(inner: Arc<Inner>) {
    let context = &inner.context;
    let runtime = &context.runtime;
    let (mut after, mut packed) = (i64::MIN, 0);
    let mut pause = PAUSE;
    loop {
        tokio::select! {
            biased;
            () = context.stopping.cancelled() => return,
            () = runtime.sleep(pause) => {}
        }
        let begun = runtime.instant();
        match sweep_chunk(&inner, after).await {
            Ok(Some((last, count))) => {
                (after, packed) = (last, packed + count);
                pause = PAUSE + (runtime.instant() - begun) * PAUSES;
            }
            Ok(None) => {
                if packed > 0 {
                    tracing::info!(people = packed, "packed how people can be reached");
                }
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "people could not be packed; trying again");
                pause = RETRY;
            }
        }
    }
}

/// The last person looked at, and how many were packed; `None`: there was nobody more.
async fn sweep_chunk(inner: &Inner, after: i64) -> Result<Option<(i64, usize)>> {
    let rows: Vec<(i64, bool)> = read!(inner, DOING, |conn| async {
        // app_user's primary key
        Ok(constant!(
            (BigInt, Bool); "SELECT id, reach IS NULL FROM app_user WHERE id > $1 ORDER BY id LIMIT $2 + 0",
            BigInt => after, BigInt => CHUNK,
        )
        .load(conn)
        .await?)
    })?;
    let Some((last, _)) = rows.last().copied() else { return Ok(None) };
    let unpacked: Vec<i64> = rows.into_iter().filter(|(_, unpacked)| *unpacked).map(|(user, _)| user).collect();
    if unpacked.is_empty() {
        return Ok(Some((last, 0)));
    }
    let packed = step!(inner, DOING, |tx| pack_unpacked(tx, &unpacked))?;
    Ok(Some((last, packed)))
}

/// Whom somebody changes at this moment they pack.
async fn pack_unpacked(tx: &mut Tx, users: &[i64]) -> Attempt<usize> {
    let locked: Vec<i64> = constant!(
        BigInt;
        "SELECT id FROM app_user WHERE id = ANY ($1) AND reach IS NULL ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
        Array<BigInt> => users,
    )
    .load(tx.conn())
    .await?;
    let mut read = of_rows(tx.conn(), locked.clone()).await?;
    // Who is too large stays as they are.
    let packed = |user: i64| Some((user, Some(read.remove(&user).unwrap_or_default().pack()?)));
    let (users, reaches): (Vec<_>, Vec<_>) = locked.into_iter().filter_map(packed).unzip();
    let count = users.len();
    write(tx, users, reaches).await?;
    Ok(count)
}

/// Of whom something else is packed than their rows say, and who is not packed though they fit.
#[cfg(test)]
pub(super) async fn differing(conn: &mut diesel_async::AsyncPgConnection) -> Attempt<(Vec<i64>, Vec<i64>)> {
    use diesel_async::SimpleAsyncConnection as _;

    conn.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let people: Vec<(i64, Option<Vec<u8>>)> =
        constant!((BigInt, Nullable<Binary>); "SELECT id, reach FROM app_user ORDER BY id").load(conn).await?;
    let mut read = of_rows(conn, people.iter().map(|(user, _)| *user).collect()).await?;
    conn.batch_execute("COMMIT").await?;
    let (mut wrong, mut unpacked) = (Vec::new(), Vec::new());
    for (user, packed) in people {
        let right = read.remove(&user).unwrap_or_default().pack();
        match packed {
            Some(_) if packed != right => wrong.push(user),
            None if right.is_some() => unpacked.push(user),
            _ => {}
        }
    }
    Ok((wrong, unpacked))
}
