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
            Self::Database(error) if is_disk_full(&error) => StoreError::DiskFull,
            Self::Database(error) => StoreError::Unavailable { doing, source: Some(Box::new(error)) },
            Self::Corrupt(detail) => StoreError::Corrupt { doing, detail },
        }
    }
}

/// SQLite's words, and the operating system's in Postgres' (which then rolls back just as well). diesel passes messages on,
/// not codes.
pub(super) fn is_disk_full(error: &DieselError) -> bool {
    says(error, &["database or disk is full", "No space left on device"])
}

/// Of SQLite: what is read is not what was written. No statement of such a file can be trusted any more.
pub(super) fn is_damaged(error: &DieselError) -> bool {
    says(error, DAMAGED)
}

/// SQLITE_CORRUPT, the same of the schema, and SQLITE_NOTADB.
pub(super) const DAMAGED: &[&str] =
    &["database disk image is malformed", "malformed database schema", "file is not a database"];

/// Of SQLite: the operating system could not read or write.
pub(super) fn is_io_error(error: &DieselError) -> bool {
    says(error, IO_ERROR)
}

/// SQLITE_IOERR, and SQLITE_READONLY: the files were opened for writing, so their file system turned read-only, or somebody moved
/// them away. Neither is over when it is tried again.
pub(super) const IO_ERROR: &[&str] = &["disk I/O error", "attempt to write a readonly database"];

fn says(error: &DieselError, words: &[&str]) -> bool {
    let DieselError::DatabaseError(_, info) = error else { return false };
    words.iter().any(|words| info.message().contains(words))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn says(message: &str) -> DieselError {
        DieselError::DatabaseError(diesel::result::DatabaseErrorKind::Unknown, Box::new(message.to_owned()))
    }

    #[test]
    fn a_full_disk_is_told_in_both_databases_words() {
        let postgres = "could not extend file \"base/16384/16397\": No space left on device";
        for message in ["database or disk is full", postgres] {
            let fail = Fail::Database(says(message));
            assert!(fail.is_disk_full());
            assert!(matches!(fail.into_store("testing"), StoreError::DiskFull), "{message}");
        }
        assert!(!is_disk_full(&says("disk I/O error")) && !is_disk_full(&DieselError::NotFound));
    }

    #[test]
    fn a_damaged_file_is_told_from_one_that_fails() {
        for message in DAMAGED {
            assert!(is_damaged(&says(message)) && !is_io_error(&says(message)));
        }
        for message in IO_ERROR {
            assert!(is_io_error(&says(message)) && !is_damaged(&says(message)) && !is_disk_full(&says(message)));
        }
        assert!(!is_damaged(&says("database is locked")) && !is_io_error(&says("database is locked")));
    }
}
