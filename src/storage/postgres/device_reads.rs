//! Devices as they stand: by their user, their id, their token or their install.

use std::collections::HashMap;

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::dead::select_devices;
use super::fail::{Attempt, Fail};
use super::ids;
use super::rows::{DeviceRow, DeviceTypes};
use super::statement::constant;
use super::users::user_key;
use crate::domain::device::{Device, Registration};
use crate::domain::ids::{AppKey, DeviceId, UserId, UserKey};
use crate::domain::platform::{DeviceKind, Platform};
use crate::storage::{Page, StoreError};

/// Rows of one token, or of one install, that are looked at. There is one per user who ever had it.
const MAX_ROWS: i64 = 64;

pub(super) async fn list(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    user: &UserId,
    after: Option<DeviceId>,
    limit: usize,
) -> Attempt<Page<Device, DeviceId>> {
    let Some(user) = user_key(conn, app, user).await? else { return Ok(Page { items: Vec::new(), next: None }) };
    // device_by_user
    let rows: Vec<DeviceRow> = constant!(
        DeviceTypes; select_devices!("WHERE d.user_key = $1 AND d.id > $2 ORDER BY d.id LIMIT $3 + 0"),
        BigInt => user.0, BigInt => after.unwrap_or_default().0, BigInt => super::page_limit(limit),
    )
    .load(conn)
    .await?;
    let items = rows.into_iter().map(DeviceRow::into_domain).collect::<Attempt<Vec<_>>>()?;
    Ok(super::page(items, limit, |device| device.id))
}

pub(super) async fn owner(conn: &mut AsyncPgConnection, app: AppKey, device: DeviceId) -> Attempt<UserId> {
    match by_id(conn, device).await? {
        Some(row) if row.app == app.0 => Ok(UserId::trusted(&row.user)),
        _ => Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
    }
}

/// The newest rows of one user, oldest first, for an explanation.
pub(super) async fn of_user(conn: &mut AsyncPgConnection, user: UserKey) -> Attempt<Vec<Device>> {
    let mut rows: Vec<DeviceRow> = constant!(
        DeviceTypes; select_devices!("WHERE d.user_key = $1 ORDER BY d.id DESC LIMIT 200"), BigInt => user.0,
    )
    .load(conn)
    .await?;
    rows.reverse();
    rows.into_iter().map(DeviceRow::into_domain).collect()
}

pub(super) async fn by_id(conn: &mut AsyncPgConnection, device: DeviceId) -> Attempt<Option<DeviceRow>> {
    Ok(constant!(DeviceTypes; select_devices!("WHERE d.id = $1"), BigInt => device.0)
        .get_result(conn)
        .await
        .optional()?)
}

/// For a change: what is read is their newest state, and nobody else changes it before our transaction ends.
pub(super) async fn lock_by_ids(conn: &mut AsyncPgConnection, devices: &[DeviceId]) -> Attempt<Vec<DeviceRow>> {
    Ok(constant!(
        DeviceTypes; select_devices!("WHERE d.id = ANY ($1) ORDER BY d.id FOR NO KEY UPDATE OF d"),
        Array<BigInt> => ids(devices.iter().map(|device| device.0)),
    )
    .load(conn)
    .await?)
}

pub(super) async fn by_ids(conn: &mut AsyncPgConnection, devices: &[DeviceId]) -> Attempt<Vec<DeviceRow>> {
    Ok(constant!(
        DeviceTypes; select_devices!("WHERE d.id = ANY ($1)"),
        Array<BigInt> => ids(devices.iter().map(|device| device.0)),
    )
    .load(conn)
    .await?)
}

pub(super) type Token<'a> = (AppKey, Platform, &'a [u8; 16]);

/// Tokens as columns.
fn columns<'a>(tokens: &[Token<'a>]) -> (Vec<i64>, Vec<i16>, Vec<&'a [u8]>) {
    let (mut apps, mut platforms, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for (app, platform, hash) in tokens {
        apps.push(app.0);
        platforms.push(platform.code());
        hashes.push(&hash[..]);
    }
    (apps, platforms, hashes)
}

fn placed(rows: Vec<(i64, DeviceRow)>) -> Attempt<Vec<(usize, DeviceRow)>> {
    let place = |(place, row): (i64, DeviceRow)| Ok((usize::try_from(place - 1).map_err(|_| out_of_range())?, row));
    rows.into_iter().map(place).collect()
}

fn out_of_range() -> Fail {
    Fail::corrupt("a place out of range")
}

/// The rows that hold these tokens: active ones, or retired in place. Laterals, here and in what follows, for each look-up must
/// go by its index, whatever a plan that was made for few rows thought of joins.
pub(super) async fn holding_tokens(
    conn: &mut AsyncPgConnection,
    tokens: &[Token<'_>],
) -> Attempt<Vec<(usize, DeviceRow)>> {
    let (apps, platforms, hashes) = columns(tokens);
    // device_by_token
    let rows: Vec<(i64, DeviceRow)> = constant!(
        (BigInt, DeviceTypes);
        concat!(
            "SELECT e.place, f.* FROM unnest($1, $2, $3) WITH ORDINALITY AS e(app, platform, hash, place) \
             CROSS JOIN LATERAL (",
            select_devices!(
                "WHERE d.app = e.app AND d.platform = e.platform AND d.plugin = '' AND d.token_hash = e.hash \
                 AND d.state = 1 OFFSET 0"
            ),
            ") AS f"
        ),
        Array<BigInt> => apps, Array<SmallInt> => platforms, Array<Binary> => hashes,
    )
    .load(conn)
    .await?;
    placed(rows)
}

/// The row that holds each token, if any, and then the others, newest first; for a change.
pub(super) async fn lock_by_tokens(
    conn: &mut AsyncPgConnection,
    tokens: &[Token<'_>],
) -> Attempt<Vec<(usize, DeviceRow)>> {
    let (apps, platforms, hashes) = columns(tokens);
    // device_by_token
    let mut rows: Vec<(i64, DeviceRow)> = constant!(
        (BigInt, DeviceTypes);
        concat!(
            "SELECT e.place, f.* FROM unnest($1, $2, $3) WITH ORDINALITY AS e(app, platform, hash, place) \
             CROSS JOIN LATERAL (",
            select_devices!(
                "WHERE d.app = e.app AND d.platform = e.platform AND d.plugin = '' AND d.token_hash = e.hash \
                 AND d.state = 1 FOR NO KEY UPDATE OF d"
            ),
            ") AS f"
        ),
        Array<BigInt> => &apps, Array<SmallInt> => &platforms, Array<Binary> => &hashes,
    )
    .load(conn)
    .await?;
    // device_by_old_token
    let old: Vec<(i64, DeviceRow)> = constant!(
        (BigInt, DeviceTypes);
        concat!(
            "SELECT e.place, f.* FROM unnest($1, $2, $3) WITH ORDINALITY AS e(app, platform, hash, place) \
             CROSS JOIN LATERAL (",
            select_devices!(
                "WHERE d.app = e.app AND d.platform = e.platform AND d.plugin = '' AND d.token_hash = e.hash \
                 AND d.state <> 1 ORDER BY d.id DESC LIMIT $4 + 0 FOR NO KEY UPDATE OF d"
            ),
            ") AS f"
        ),
        Array<BigInt> => apps, Array<SmallInt> => platforms, Array<Binary> => hashes, BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?;
    rows.extend(old);
    placed(rows)
}

/// Active rows of app installs, on the platform and of the kind that registers; for a change.
pub(super) async fn lock_by_installations(
    conn: &mut AsyncPgConnection,
    wanted: &[(AppKey, Platform, DeviceKind, &str)],
) -> Attempt<Vec<(usize, DeviceRow)>> {
    let (mut apps, mut platforms, mut kinds, mut installs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (app, platform, kind, install) in wanted {
        apps.push(app.0);
        platforms.push(platform.code());
        kinds.push(*kind as i16);
        installs.push(*install);
    }
    // device_by_installation
    let rows: Vec<(i64, DeviceRow)> = constant!(
        (BigInt, DeviceTypes);
        concat!(
            "SELECT e.place, f.* FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS e(app, install, platform, kind, place) \
             CROSS JOIN LATERAL (",
            select_devices!(
                "WHERE d.app = e.app AND d.installation_id = e.install AND d.state = 1 AND d.retired_at IS NULL \
                 AND d.platform = e.platform AND d.kind = e.kind ORDER BY d.id DESC LIMIT $5 + 0 FOR NO KEY UPDATE OF d"
            ),
            ") AS f"
        ),
        Array<BigInt> => apps, Array<Text> => installs, Array<SmallInt> => platforms, Array<SmallInt> => kinds,
        BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?;
    placed(rows)
}

/// Credential, environment and bundle of routes, by number.
pub(super) async fn routes(
    conn: &mut AsyncPgConnection,
    mut wanted: Vec<i64>,
) -> Attempt<HashMap<i64, (String, i16, String)>> {
    wanted.sort_unstable();
    wanted.dedup();
    let rows: Vec<(i64, (String, i16, String))> = constant!(
        (BigInt, (Text, SmallInt, Text)); "SELECT id, credential, environment, bundle FROM route WHERE id = ANY ($1)",
        Array<BigInt> => wanted,
    )
    .load(conn)
    .await?;
    Ok(rows.into_iter().collect())
}

/// The row that holds a token, if any, and then the others, newest first.
pub(super) async fn by_token(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    platform: Platform,
    hash: &[u8; 16],
) -> Attempt<Vec<DeviceRow>> {
    let mut rows: Vec<DeviceRow> =
        holding_tokens(conn, &[(app, platform, hash)]).await?.into_iter().map(|(_, row)| row).collect();
    // device_by_old_token
    let old: Vec<DeviceRow> = constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = $1 AND d.platform = $2 AND d.plugin = '' AND d.token_hash = $3 AND d.state <> 1 \
             ORDER BY d.id DESC LIMIT $4 + 0"
        ),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..], BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?;
    rows.extend(old);
    Ok(rows)
}

/// Active rows of an app install, on the platform and of the kind that registers.
pub(super) async fn by_installation(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    registration: &Registration,
    install: &str,
) -> Attempt<Vec<DeviceRow>> {
    // device_by_installation
    Ok(constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = $1 AND d.installation_id = $2 AND d.state = 1 AND d.retired_at IS NULL \
             AND d.platform = $3 AND d.kind = $4 ORDER BY d.id DESC LIMIT $5 + 0"
        ),
        BigInt => app.0, Text => install, SmallInt => registration.platform.code(),
        SmallInt => registration.kind as i16, BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?)
}
