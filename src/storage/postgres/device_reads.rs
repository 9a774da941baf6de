//! Devices as they stand: by their user, their id, their token or their install.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Binary, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::people::user_key;
use super::rows::{DeviceRow, DeviceTypes, select_devices};
use super::statement::constant;
use crate::domain::device::{Device, Registration};
use crate::domain::ids::{AppKey, DeviceId, UserId, UserKey};
use crate::domain::platform::Platform;
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

/// `locked`: for a change; what is read is its newest state.
pub(super) async fn look_by_id(
    conn: &mut AsyncPgConnection,
    device: DeviceId,
    locked: bool,
) -> Attempt<Option<DeviceRow>> {
    if !locked {
        return by_id(conn, device).await;
    }
    Ok(constant!(DeviceTypes; select_devices!("WHERE d.id = $1 FOR NO KEY UPDATE OF d"), BigInt => device.0)
        .get_result(conn)
        .await
        .optional()?)
}

pub(super) async fn read_row(conn: &mut AsyncPgConnection, id: i64) -> Attempt<DeviceRow> {
    by_id(conn, DeviceId(id)).await?.ok_or_else(|| Fail::corrupt("a device row vanished"))
}

pub(super) async fn read(conn: &mut AsyncPgConnection, id: i64) -> Attempt<Device> {
    read_row(conn, id).await?.into_domain()
}

pub(super) async fn active_by_token(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    platform: Platform,
    hash: &[u8; 16],
) -> Attempt<Option<DeviceRow>> {
    // device_by_token
    Ok(constant!(
        DeviceTypes;
        select_devices!("WHERE d.app = $1 AND d.platform = $2 AND d.plugin = '' AND d.token_hash = $3 AND d.state = 1"),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..],
    )
    .get_result(conn)
    .await
    .optional()?)
}

/// The active row of a token, if any, and then the retired ones, newest first. `locked`: for a change.
pub(super) async fn by_token(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    platform: Platform,
    hash: &[u8; 16],
    locked: bool,
) -> Attempt<Vec<DeviceRow>> {
    if !locked {
        let mut rows: Vec<DeviceRow> = active_by_token(conn, app, platform, hash).await?.into_iter().collect();
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
        return Ok(rows);
    }
    let mut rows: Vec<DeviceRow> = constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = $1 AND d.platform = $2 AND d.plugin = '' AND d.token_hash = $3 AND d.state = 1 \
             FOR NO KEY UPDATE OF d"
        ),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..],
    )
    .load(conn)
    .await?;
    // device_by_old_token
    let old: Vec<DeviceRow> = constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = $1 AND d.platform = $2 AND d.plugin = '' AND d.token_hash = $3 AND d.state <> 1 \
             ORDER BY d.id DESC LIMIT $4 + 0 FOR NO KEY UPDATE OF d"
        ),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..], BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?;
    rows.extend(old);
    Ok(rows)
}

/// Active rows of an app install, on the platform and of the kind that registers. `locked`: for a change.
pub(super) async fn by_installation(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    registration: &Registration,
    install: &str,
    locked: bool,
) -> Attempt<Vec<DeviceRow>> {
    if !locked {
        // device_by_installation
        return Ok(constant!(
            DeviceTypes;
            select_devices!(
                "WHERE d.app = $1 AND d.installation_id = $2 AND d.state = 1 AND d.platform = $3 AND d.kind = $4 \
                 ORDER BY d.id DESC LIMIT $5 + 0"
            ),
            BigInt => app.0, Text => install, SmallInt => registration.platform.code(),
            SmallInt => registration.kind as i16, BigInt => MAX_ROWS,
        )
        .load(conn)
        .await?);
    }
    // device_by_installation
    Ok(constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = $1 AND d.installation_id = $2 AND d.state = 1 AND d.platform = $3 AND d.kind = $4 \
             ORDER BY d.id DESC LIMIT $5 + 0 FOR NO KEY UPDATE OF d"
        ),
        BigInt => app.0, Text => install, SmallInt => registration.platform.code(),
        SmallInt => registration.kind as i16, BigInt => MAX_ROWS,
    )
    .load(conn)
    .await?)
}
