//! Rows that configuration asks for: apps and routes.

use diesel::sql_types::{BigInt, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::Attempt;
use super::group::Tx;
use super::statement::constant;
use crate::domain::ids::{AppId, AppKey, RouteId};
use crate::domain::platform::{Route, RouteSpec};
use crate::domain::time::UnixMs;

pub(super) fn app_key(conn: &mut SqliteConnection, app: &AppId) -> Attempt<Option<AppKey>> {
    let key: Option<i64> =
        constant!(BigInt; "SELECT id FROM app WHERE name = ?1", Text => app.as_str()).get_result(conn).optional()?;
    Ok(key.map(AppKey))
}

pub(super) fn ensure_app(tx: &mut Tx<'_>, app: &AppId, now: UnixMs) -> Attempt<AppKey> {
    if let Some(key) = app_key(tx.conn, app)? {
        return Ok(key);
    }
    let id = tx.next_id(now);
    tx.execute(constant!(
        (); "INSERT INTO app (id, name, created_at) VALUES (?1, ?2, ?3)",
        BigInt => id, Text => app.as_str(), BigInt => now.0,
    ))?;
    Ok(AppKey(id))
}

pub(super) fn ensure_routes(tx: &mut Tx<'_>, specs: &[RouteSpec], now: UnixMs) -> Attempt<Vec<Route>> {
    let mut routes = Vec::with_capacity(specs.len());
    for spec in specs {
        // route_by_spec
        let known: Option<i64> = constant!(
            BigInt;
            "SELECT id FROM route WHERE app = ?1 AND platform = ?2 AND plugin = '' AND credential = ?3 \
             AND environment = ?4 AND bundle = ?5",
            BigInt => spec.app.0, SmallInt => spec.platform.code(), Text => &*spec.credential,
            SmallInt => spec.environment.code(), Text => &*spec.bundle,
        )
        .get_result(tx.conn)
        .optional()?;
        let id = if let Some(id) = known {
            id
        } else {
            let id = tx.next_id(now);
            tx.execute(constant!(
                ();
                "INSERT INTO route (id, app, platform, credential, environment, bundle) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                BigInt => id, BigInt => spec.app.0, SmallInt => spec.platform.code(), Text => &*spec.credential,
                SmallInt => spec.environment.code(), Text => &*spec.bundle,
            ))?;
            id
        };
        routes.push(Route { id: RouteId(id), spec: spec.clone() });
    }
    Ok(routes)
}
