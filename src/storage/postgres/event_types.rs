//! The event catalogue: versions that are only ever added. The newest of a name stands, unless it was deleted.

use std::sync::Arc;

use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Nullable, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::query::RunQuery;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::event_type::{Definition, MAX_EVENT_TYPES, TypeVersion};
use crate::domain::ids::{AppKey, EventType, TypeVersionId};
use crate::domain::time::UnixMs;
use crate::storage::{DeclaredType, Page, StoreError};

/// The most declared names compared with an undeclared one.
const MAX_NAMES: i64 = 2_000;
/// How alike (0 to 1, Jaro-Winkler) a name must be to be suggested.
const ALIKE: f64 = 0.7;
/// How many names are suggested.
const MAX_NEAREST: usize = 3;

#[derive(diesel::Queryable)]
struct Row {
    id: i64,
    version: i64,
    definition: String,
    created_at: i64,
    deleted_at: Option<i64>,
}

type RowTypes = (BigInt, BigInt, Text, BigInt, Nullable<BigInt>);

impl Row {
    fn into_domain(self) -> Attempt<TypeVersion> {
        Ok(TypeVersion {
            id: TypeVersionId(self.id),
            version: u32::try_from(self.version).map_err(|_| Fail::corrupt("an event type's version"))?,
            definition: Arc::new(serde_json::from_str(&self.definition)?),
            created_at: UnixMs(self.created_at),
        })
    }
}

/// The newest version of a name, deleted or not.
async fn newest(conn: &mut AsyncPgConnection, app: AppKey, name: &str) -> Attempt<Option<Row>> {
    // event_type_by_name
    Ok(constant!(
        RowTypes;
        "SELECT id, version, definition, created_at, deleted_at FROM event_type_version \
         WHERE app = $1 AND name = $2 ORDER BY version DESC LIMIT 1",
        BigInt => app.0, Text => name,
    )
    .get_result(conn)
    .await
    .optional()?)
}

pub(super) async fn declared(conn: &mut AsyncPgConnection, app: AppKey, name: &EventType) -> Attempt<DeclaredType> {
    // event_type_by_name
    let newest: Option<(i64, Option<i64>)> = constant!(
        (BigInt, Nullable<BigInt>);
        "SELECT id, deleted_at FROM event_type_version WHERE app = $1 AND name = $2 ORDER BY version DESC LIMIT 1",
        BigInt => app.0, Text => name.as_str(),
    )
    .get_result(conn)
    .await
    .optional()?;
    if let Some((id, None)) = newest {
        return Ok(DeclaredType { any_declared: true, current: Some(TypeVersionId(id)), nearest: Vec::new() });
    }
    // Only the newest version of a name can stand.
    let names: Vec<String> = constant!(
        Text;
        "SELECT name FROM event_type_version AS v WHERE app = $1 AND deleted_at IS NULL \
         AND version = (SELECT max(version) FROM event_type_version WHERE app = $1 AND name = v.name) \
         ORDER BY name LIMIT $2 + 0",
        BigInt => app.0, BigInt => MAX_NAMES,
    )
    .load(conn)
    .await?;
    let any_declared = !names.is_empty();
    let mut alike: Vec<(f64, String)> = names
        .into_iter()
        .map(|other| (strsim::jaro_winkler(name.as_str(), &other), other))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0));
    let nearest = alike.into_iter().take(MAX_NEAREST).map(|(_, other)| other).collect();
    Ok(DeclaredType { any_declared, current: None, nearest })
}

/// A definition on its way in.
pub(super) struct Declaration {
    app: AppKey,
    definition: Arc<Definition>,
    json: String,
}

impl Declaration {
    pub fn new(app: AppKey, definition: Arc<Definition>) -> Attempt<Self> {
        let json = serde_json::to_string(&*definition)?;
        Ok(Self { app, definition, json })
    }
}

pub(super) async fn put(tx: &mut Tx, new: &Declaration, now: UnixMs) -> Attempt<(TypeVersion, bool)> {
    let name = &new.definition.name;
    let newest = newest(tx.conn(), new.app, name).await?;
    let (version, stands) = match newest {
        Some(row) if row.deleted_at.is_none() => {
            let version = row.version;
            let standing = row.into_domain()?;
            if standing.definition == new.definition {
                return Ok((standing, false));
            }
            (version + 1, true)
        }
        Some(row) => (row.version + 1, false),
        None => (1, false),
    };
    if !stands {
        let declared: i64 = constant!(
            BigInt; "SELECT count(DISTINCT name) FROM event_type_version WHERE app = $1 AND deleted_at IS NULL",
            BigInt => new.app.0,
        )
        .get_result(tx.conn())
        .await?;
        if declared >= i64::try_from(MAX_EVENT_TYPES).unwrap_or(i64::MAX) {
            return Err(StoreError::TooManyEventTypes { limit: MAX_EVENT_TYPES }.into());
        }
    }
    let id = tx.next_id(now);
    tx.execute(constant!(
        ();
        "INSERT INTO event_type_version (id, app, name, version, definition, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6)",
        BigInt => id, BigInt => new.app.0, Text => name.as_str(), BigInt => version, Text => new.json.as_str(),
        BigInt => now.0,
    ))
    .await?;
    let version = u32::try_from(version).map_err(|_| Fail::corrupt("an event type's version"))?;
    let definition = Arc::clone(&new.definition);
    Ok((TypeVersion { id: TypeVersionId(id), version, definition, created_at: now }, true))
}

pub(super) async fn get(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    name: &EventType,
    version: Option<u32>,
) -> Attempt<TypeVersion> {
    let row = match version {
        None => newest(conn, app, name.as_str()).await?.filter(|row| row.deleted_at.is_none()),
        // event_type_by_name
        Some(version) => constant!(
            RowTypes;
            "SELECT id, version, definition, created_at, deleted_at FROM event_type_version \
             WHERE app = $1 AND name = $2 AND version = $3",
            BigInt => app.0, Text => name.as_str(), BigInt => i64::from(version),
        )
        .get_result(conn)
        .await
        .optional()?,
    };
    match row {
        Some(row) => row.into_domain(),
        None => Err(StoreError::EventTypeNotFound { name: name.to_string() }.into()),
    }
}

pub(super) async fn list(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    after: Option<&EventType>,
    limit: usize,
) -> Attempt<Page<TypeVersion, EventType>> {
    // event_type_by_name
    let rows: Vec<Row> = constant!(
        RowTypes;
        "SELECT id, version, definition, created_at, deleted_at FROM event_type_version AS v \
         WHERE app = $1 AND name > $2 AND deleted_at IS NULL \
         AND version = (SELECT max(version) FROM event_type_version WHERE app = $1 AND name = v.name) \
         ORDER BY name LIMIT $3 + 0",
        BigInt => app.0, Text => after.map_or("", EventType::as_str), BigInt => super::page_limit(limit),
    )
    .load(conn)
    .await?;
    let items = rows.into_iter().map(Row::into_domain).collect::<Attempt<Vec<_>>>()?;
    Ok(super::page(items, limit, |item| EventType::trusted(&item.definition.name)))
}

/// Marks every version, so that none stands.
pub(super) async fn delete(tx: &mut Tx, app: AppKey, name: &EventType, now: UnixMs) -> Attempt<bool> {
    match newest(tx.conn(), app, name.as_str()).await? {
        Some(row) if row.deleted_at.is_none() => {}
        _ => return Ok(false),
    }
    tx.execute(constant!(
        (); "UPDATE event_type_version SET deleted_at = $3 WHERE app = $1 AND name = $2 AND deleted_at IS NULL",
        BigInt => app.0, Text => name.as_str(), BigInt => now.0,
    ))
    .await?;
    Ok(true)
}

pub(super) async fn definition(conn: &mut AsyncPgConnection, version: TypeVersionId) -> Attempt<Definition> {
    let json: Option<String> = constant!(
        Text; "SELECT definition FROM event_type_version WHERE id = $1", BigInt => version.0,
    )
    .get_result(conn)
    .await
    .optional()?;
    match json {
        Some(json) => Ok(serde_json::from_str(&json)?),
        None => Err(Fail::corrupt(format!("event type version {version} is missing"))),
    }
}
