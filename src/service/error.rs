//! What a use case can answer instead of a result, in the caller's own names.

use std::time::Duration;

use crate::domain::platform::Platform;
use crate::domain::room::Full;
use crate::domain::violation::Violation;
use crate::storage::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Never empty.
    #[error("the request has {} wrong fields", .0.len())]
    Invalid(Vec<Violation>),
    #[error("the app `{app}` is not configured")]
    AppNotFound { app: String },
    #[error("this key is not bound to the app `{app}`")]
    AppNotAllowed { app: String },
    #[error("the scope `{scope}` is missing")]
    PermissionDenied { scope: &'static str },
    #[error("the app has no credential for {platform}")]
    PlatformNotConfigured { platform: Platform },
    #[error("the event type `{name}` is not declared")]
    UnknownEventType { name: String, nearest: Vec<String> },
    #[error("the app has {limit} event types, more cannot be declared")]
    TooManyEventTypes { limit: usize },
    #[error("no such device")]
    DeviceNotFound { devices: Vec<String> },
    #[error("no such notification")]
    NotificationNotFound { notification: String },
    #[error("no such delivery")]
    DeliveryNotFound { nudged_id: String },
    #[error("the idempotency key was used for another request")]
    IdempotencyKeyReused { notification: String },
    #[error("the audience is larger than max_audience ({limit})")]
    AudienceTooLarge { limit: u64 },
    #[error("what followed the cursor is no longer kept")]
    CursorExpired,
    #[error("the cursor is another installation's, database's or app's, or was altered")]
    CursorForeign,
    #[error("the app may send {per_second} events a second")]
    TooManyEvents { per_second: u32, retry_after: Duration },
    #[error("the app has {open} open deliveries; no event is taken above {limit}")]
    TooManyOpen { open: u64, limit: u64, retry_after: Duration },
    /// Of the whole server.
    #[error("no event is taken while {}", .full.words())]
    Full { full: Full, retry_after: Duration },
    /// Overloaded, unavailable or corrupt; refusals have variants of their own above.
    #[error("the store failed")]
    Store(#[source] StoreError),
}
