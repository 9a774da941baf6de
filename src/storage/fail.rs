//! How a step fails inside, before it becomes a [`StoreError`].

use diesel::result::Error as DieselError;

use crate::domain::targets::PackError;
use crate::storage::StoreError;

/// The result of a step or a read.
pub(super) type Attempt<T> = Result<T, Fail>;

#[derive(Debug)]
pub(super) enum Fail {
    /// The step looked and said no, before its first write.
    Refused(StoreError),
    Database(DieselError),
    Corrupt(String),
}

impl Fail {
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }

    /// SQLite rolls back when the disk is full, so nothing was written and the caller may try again later.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Database(error) if is_disk_full(error))
    }

    pub fn into_store(self, doing: &'static str) -> StoreError {
        match self {
            Self::Refused(error) => error,
            Self::Database(error) if is_disk_full(&error) => StoreError::Overloaded { what: "the disk is full" },
            Self::Database(error) => StoreError::Unavailable { doing, source: Some(Box::new(error)) },
            Self::Corrupt(detail) => StoreError::Corrupt { doing, detail },
        }
    }
}

/// diesel passes SQLite's message on, not its code.
pub(super) fn is_disk_full(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(_, info) if info.message().contains("database or disk is full"))
}

/// Another connection holds a lock for longer than the busy timeout: SQLite did nothing.
pub(super) fn is_busy(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(_, info) if info.message().contains("database is locked"))
}

impl From<DieselError> for Fail {
    fn from(error: DieselError) -> Self {
        match error {
            DieselError::DeserializationError(error) => Self::Corrupt(error.to_string()),
            error => Self::Database(error),
        }
    }
}

impl From<StoreError> for Fail {
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}

impl From<PackError> for Fail {
    fn from(error: PackError) -> Self {
        Self::Corrupt(error.to_string())
    }
}

impl From<serde_json::Error> for Fail {
    fn from(error: serde_json::Error) -> Self {
        // Only the place: the message of a data error quotes content.
        Self::Corrupt(format!("JSON is not as expected at line {} column {}", error.line(), error.column()))
    }
}

pub(super) fn unavailable(doing: &'static str) -> StoreError {
    StoreError::Unavailable { doing, source: None }
}
