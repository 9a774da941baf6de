//! The use cases: check a request, resolve its app, decide, and ask the store. Knows neither protobuf nor SQL.
//!
//! Every method takes a [`Call`] (who calls, for which app, and what was already found wrong while the message was
//! read) and a plain input, gathers every violation before it answers, and writes nothing when there is one.

pub mod apps;
pub mod canonical;
pub mod devices;
pub mod dry_run;
pub mod error;
pub mod event_types;
pub mod events;
pub mod explain;
mod fields;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod imports;
mod limits;
pub mod notifications;
pub mod opt_in;
pub mod page_token;
pub mod pauses;
pub mod providers;
pub mod restore;
pub mod subscriptions;
pub mod watch;

use std::sync::{Arc, OnceLock, RwLock};

use crate::domain::identity::IdentityKey;
use crate::domain::ids::{DeviceId, RouteId};
use crate::domain::notification::HandOff;
use crate::domain::room::Full;
use crate::domain::violation::{Violation, Violations};
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::Registry;
use crate::storage::Store;

pub use apps::{App, AppDirectory, AppLimits, AppSetup, CredentialSetup};
pub use error::ServiceError;

/// What the store answers in the use cases' own words, for those who show it.
pub use crate::storage::{Attempt, Counts, NotificationView, OptIn, StoreError, Subscription};

use self::dry_run::LargeDryRuns;
use self::events::{Meters, UndeclaredApps};
use self::limits::Limits;

pub type Result<T, E = ServiceError> = std::result::Result<T, E>;

/// How far a caller's clock may run ahead of ours, for `observed_at`.
pub const MAX_CLOCK_AHEAD_MS: i64 = 5 * 60 * 1000;

/// All use cases. Cheap to share behind an `Arc`.
pub struct Service {
    store: Arc<dyn Store>,
    /// Replaced as a whole when the configuration changes.
    apps: RwLock<Arc<AppDirectory>>,
    hand_off: Arc<dyn HandOff>,
    runtime: Runtime,
    types: Arc<Types>,
    /// For previews and dry runs.
    sending: RwLock<Arc<Sending>>,
    undeclared: UndeclaredApps,
    meters: OnceLock<Meters>,
    limits: Limits,
    large_dry_runs: LargeDryRuns,
}

/// How payloads are made, for those who show them.
#[derive(Clone, Default)]
pub struct Sending {
    pub senders: Registry,
    /// Routes of apps with `push_id = false`: their payloads go without a `nudged_id`.
    pub without_push_id: Vec<RouteId>,
}

impl Service {
    #[must_use]
    pub fn new(store: Arc<dyn Store>, apps: Arc<AppDirectory>, hand_off: Arc<dyn HandOff>, runtime: Runtime) -> Self {
        Self {
            store,
            apps: RwLock::new(apps),
            hand_off,
            runtime,
            undeclared: UndeclaredApps::default(),
            meters: OnceLock::new(),
            types: Arc::default(),
            sending: RwLock::default(),
            limits: Limits::default(),
            large_dry_runs: LargeDryRuns::default(),
        }
    }

    /// Compiled event types, shared with the engine that sends by them.
    #[must_use]
    pub fn with_types(self, types: Arc<Types>) -> Self {
        Self { types, ..self }
    }

    /// Whose payloads previews and dry runs show.
    #[must_use]
    pub fn with_sending(self, sending: Sending) -> Self {
        Self { sending: RwLock::new(Arc::new(sending)), ..self }
    }

    #[must_use]
    pub fn apps(&self) -> Arc<AppDirectory> {
        Arc::clone(&self.apps.read().expect("no panic while held"))
    }

    /// Takes effect for every call that begins from now on.
    pub fn reconfigure(&self, apps: AppDirectory, sending: Sending) {
        *self.apps.write().expect("no panic while held") = Arc::new(apps);
        *self.sending.write().expect("no panic while held") = Arc::new(sending);
    }

    fn sending(&self) -> Arc<Sending> {
        Arc::clone(&self.sending.read().expect("no panic while held"))
    }

    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The installation's key: public ids are made with it.
    #[must_use]
    pub fn identity(&self) -> &IdentityKey {
        self.store.identity()
    }

    /// Gives what the store refused in the caller's own names.
    fn refused(&self, error: StoreError) -> ServiceError {
        match error {
            StoreError::DeviceNotFound { devices } => {
                ServiceError::DeviceNotFound { devices: devices.into_iter().map(DeviceId::public).collect() }
            }
            StoreError::NotificationNotFound { notification } => ServiceError::NotificationNotFound {
                notification: self.identity().public_notification(notification).to_string(),
            },
            StoreError::IdempotencyKeyReused { notification } => ServiceError::IdempotencyKeyReused {
                notification: self.identity().public_notification(notification).to_string(),
            },
            StoreError::EventTypeNotFound { name } => ServiceError::UnknownEventType { name, nearest: Vec::new() },
            StoreError::TooManyEventTypes { limit } => ServiceError::TooManyEventTypes { limit },
            StoreError::AudienceTooLarge { limit } => ServiceError::AudienceTooLarge { limit },
            StoreError::BroadcastNotAllowed => ServiceError::PermissionDenied { scope: events::BROADCAST_SCOPE },
            StoreError::CursorExpired => ServiceError::CursorExpired,
            StoreError::CursorForeign => ServiceError::CursorForeign,
            // NotifyEvent names the field before it comes here.
            StoreError::AlreadyExpired => ServiceError::Invalid(vec![Violation::new("ttl", error.to_string())]),
            StoreError::DiskFull => ServiceError::Full { full: Full::DiskFull, retry_after: limits::DISK_RETRY },
            other @ (StoreError::Overloaded { .. } | StoreError::Unavailable { .. } | StoreError::Corrupt { .. }) => {
                ServiceError::Store(other)
            }
        }
    }
}

/// Who calls for which app, and what was found wrong so far.
pub struct Call<'a> {
    app: Option<Arc<App>>,
    caller: Option<&'a str>,
    may_broadcast: bool,
    may_read: bool,
    violations: Violations,
}

impl<'a> Call<'a> {
    #[must_use]
    pub fn new(app: &Arc<App>) -> Self {
        let violations = Violations::default();
        Self { app: Some(Arc::clone(app)), caller: None, may_broadcast: false, may_read: false, violations }
    }

    /// For a request whose `app_id` is itself wrong: the other fields are still checked, then it is refused.
    #[must_use]
    pub fn without_app(violation: Violation) -> Self {
        let mut violations = Violations::default();
        violations.add(violation.field, violation.description);
        Self { app: None, caller: None, may_broadcast: false, may_read: false, violations }
    }

    /// The API key's name, kept with the consent history.
    #[must_use]
    pub fn by(self, caller: Option<&'a str>) -> Self {
        Self { caller, ..self }
    }

    /// Whether the caller holds the scope `broadcast`.
    #[must_use]
    pub fn may_broadcast(self, may_broadcast: bool) -> Self {
        Self { may_broadcast, ..self }
    }

    /// Whether the caller holds the scope `read`.
    #[must_use]
    pub fn may_read(self, may_read: bool) -> Self {
        Self { may_read, ..self }
    }

    /// Where whoever reads the message adds what is wrong with it.
    pub fn violations(&mut self) -> &mut Violations {
        &mut self.violations
    }

    /// Whether `app_id` is the call's app; also when that is itself wrong.
    #[must_use]
    pub fn is_for(&self, app_id: &str) -> bool {
        self.app.as_ref().is_none_or(|app| app.id.as_str() == app_id)
    }

    /// The app, unless anything is wrong.
    fn checked(self) -> Result<Arc<App>> {
        self.violations.finish().map_err(ServiceError::Invalid)?;
        Ok(self.app.expect("a call without an app has a violation"))
    }
}
