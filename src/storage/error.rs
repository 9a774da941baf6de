//! What a store can answer instead of a result.

use crate::domain::ids::{DeviceId, NotificationId};

/// Refusals leave nothing behind; of the rest the outcome may be unknown.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("no such device")]
    DeviceNotFound { devices: Vec<DeviceId> },
    #[error("no such notification")]
    NotificationNotFound { notification: NotificationId },
    #[error("no such event type, or no such version of it")]
    EventTypeNotFound { name: String },
    #[error("the app has {limit} event types, more cannot be declared")]
    TooManyEventTypes { limit: usize },
    #[error("the idempotency key was used for another request")]
    IdempotencyKeyReused { notification: NotificationId },
    #[error("the audience is larger than max_audience ({limit})")]
    AudienceTooLarge { limit: u64 },
    #[error("an audience this large needs the scope `broadcast`")]
    BroadcastNotAllowed,
    /// Its TTL is over, and its idempotency key, if it has one, was not used before.
    #[error("the event's time to live has already ended")]
    AlreadyExpired,
    /// History after the watcher's position has been deleted.
    #[error("what followed the cursor is no longer kept")]
    CursorExpired,
    #[error("the cursor is not of this database")]
    CursorForeign,
    /// Too much open work or a full queue: nothing was written.
    #[error("too much waits: {what}")]
    Overloaded { what: &'static str },
    /// There is no room for what it would write: nothing was written.
    #[error("the disk of the database is full")]
    DiskFull,
    /// The database does not answer; the step may have happened.
    #[error("the database is unavailable while {doing}")]
    Unavailable {
        doing: &'static str,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// What is stored cannot be read: a bug or a newer version's format.
    #[error("stored data cannot be read while {doing}: {detail}")]
    Corrupt { doing: &'static str, detail: String },
}

impl StoreError {
    /// Certainly nothing was written.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::DeviceNotFound { .. }
            | Self::NotificationNotFound { .. }
            | Self::EventTypeNotFound { .. }
            | Self::TooManyEventTypes { .. }
            | Self::IdempotencyKeyReused { .. }
            | Self::AudienceTooLarge { .. }
            | Self::BroadcastNotAllowed
            | Self::AlreadyExpired
            | Self::CursorExpired
            | Self::CursorForeign
            | Self::Overloaded { .. }
            | Self::DiskFull => true,
            Self::Unavailable { .. } | Self::Corrupt { .. } => false,
        }
    }
}
