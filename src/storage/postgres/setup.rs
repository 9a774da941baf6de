//! Rows that configuration asks for: apps and routes.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::Attempt;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{AppId, AppKey, RouteId};
use crate::domain::platform::{Route, RouteSpec};
use crate::domain::time::UnixMs;

pub(super) async fn app_key(conn: &mut AsyncPgConnection, app: &AppId) -> Attempt<Option<AppKey>> {
    let key: Option<i64> = constant!(BigInt; "SELECT id FROM app WHERE name = $1", Text => app.as_str())
        .get_result(conn)
        .await
        .optional()?;
    Ok(key.map(AppKey))
}

pub(super) async fn ensure_app(tx: &mut Tx, app: &AppId, now: UnixMs) -> Attempt<AppKey> {
    if let Some(key) = app_key(tx.conn(), app).await? {
        return Ok(key);
    }
    let id = tx.next_id(now);
    tx.execute(constant!(
        (); "INSERT INTO app (id, name, created_at) VALUES ($1, $2, $3)",
        BigInt => id, Text => app.as_str(), BigInt => now.0,
    ))
    .await?;
    Ok(AppKey(id))
}

pub(super) async fn ensure_routes(tx: &mut Tx, specs: &[RouteSpec], now: UnixMs) -> Attempt<Vec<Route>> {
    let mut routes = Vec::with_capacity(specs.len());
    for spec in specs {
        // route_by_spec
        let known: Option<i64> = constant!(
            BigInt;
            "SELECT id FROM route WHERE app = $1 AND platform = $2 AND plugin = '' AND credential = $3 \
             AND environment = $4 AND bundle = $5",
            BigInt => spec.app.0, SmallInt => spec.platform.code(), Text => &*spec.credential,
            SmallInt => spec.environment.code(), Text => &*spec.bundle,
        )
        .get_result(tx.conn())
        .await
        .optional()?;
        let id = if let Some(id) = known {
            id
        } else {
            let id = tx.next_id(now);
            tx.execute(constant!(
                ();
                "INSERT INTO route (id, app, platform, credential, environment, bundle) \
                 VALUES ($1, $2, $3, $4, $5, $6)",
                BigInt => id, BigInt => spec.app.0, SmallInt => spec.platform.code(), Text => &*spec.credential,
                SmallInt => spec.environment.code(), Text => &*spec.bundle,
            ))
            .await?;
            id
        };
        routes.push(Route { id: RouteId(id), spec: spec.clone() });
    }
    Ok(routes)
}

/// Settings of the server that weaken what nudged promises.
pub(super) async fn warnings(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Vec<String>> {
    let mut warnings = Vec::new();
    let asynchronous: Vec<String> = constant!(
        Text; "SELECT coalesce(application_name, '') FROM pg_stat_replication WHERE sync_state = 'async'"
    )
    .load(conn)
    .await?;
    if !asynchronous.is_empty() {
        warnings.push(format!(
            "{} standby server(s) replicate asynchronously ({}): a failover to one can lose acknowledged events and \
             opt-outs; name them in synchronous_standby_names",
            asynchronous.len(),
            asynchronous.join(", "),
        ));
    }
    let (fsync, full_page_writes): (String, String) = constant!(
        (Text, Text); "SELECT current_setting('fsync'), current_setting('full_page_writes')"
    )
    .get_result(conn)
    .await?;
    for (name, value) in [("fsync", fsync), ("full_page_writes", full_page_writes)] {
        if value == "off" {
            warnings.push(format!("{name} is off: a crash of the server's machine can lose or damage everything"));
        }
    }
    Ok(warnings)
}
