//! From errors to `tonic::Status`: the only place that makes one, by one exhaustive match.
//!
//! Details follow google.rpc: every error has an `ErrorInfo` with a reason of [`super::reasons`]; wrong fields are in
//! `BadRequest`, what was not found in `ResourceInfo`, when to come back in `RetryInfo` and in the
//! `grpc-retry-pushback-ms` trailer that stock clients obey. What went wrong inside goes to the log with a request id;
//! the caller gets the id alone.
//!
//! Everything is bounded: many clients refuse more than 8 KiB of trailers.

use std::collections::HashMap;
use std::time::Duration;

use prost::Message as _;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::domain::violation::Violation;
use crate::runtime::Runtime;
use crate::service::{ServiceError, StoreError};

use super::auth::AuthError;
use super::reasons;

/// The trailer stock gRPC clients obey for retries.
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// When to come back after an overload or an outage.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Violations are listed up to this many bytes; a last one says how many more there are.
const MAX_VIOLATION_BYTES: usize = 4096;
/// A field path or description is cut here.
const MAX_PART_BYTES: usize = 200;
/// The readable message is cut here.
const MAX_MESSAGE_BYTES: usize = 512;

/// Everything a call can end with instead of an answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Too many requests are being worked on.
    #[error("the server is busy")]
    Overloaded,
    #[error("too many streams of this kind are open")]
    TooManyStreams,
    #[error("the watcher read nothing for too long; go on with the last cursor")]
    WatcherTooSlow,
    /// Of a stream that has more to say; what was acknowledged stands.
    #[error("the server is shutting down; open the stream again and go on where it ended")]
    ShuttingDown,
    #[error("the deadline passed; the call may have happened")]
    DeadlineExceeded,
    /// A bug. The text is for the log only.
    #[error("internal error: {0}")]
    Internal(String),
}

/// The answer to a failed call. Writes the log line where there is one to write.
#[must_use]
pub fn status(error: &ApiError, runtime: &Runtime) -> Status {
    let mut details = ErrorDetails::new();
    let message = error.to_string();
    match error {
        ApiError::Service(error) => service_status(error, details, runtime),
        ApiError::Auth(error) => auth_status(*error, details, message),
        ApiError::Overloaded => {
            info(&mut details, reasons::SERVER_OVERLOADED, []);
            retry_later(Code::ResourceExhausted, message, details)
        }
        ApiError::TooManyStreams => {
            info(&mut details, reasons::TOO_MANY_STREAMS, []);
            retry_later(Code::ResourceExhausted, message, details)
        }
        ApiError::WatcherTooSlow => {
            info(&mut details, reasons::WATCHER_TOO_SLOW, []);
            retry_later(Code::ResourceExhausted, message, details)
        }
        ApiError::ShuttingDown => {
            info(&mut details, reasons::SERVER_SHUTTING_DOWN, []);
            retry_later(Code::Unavailable, message, details)
        }
        ApiError::DeadlineExceeded => {
            info(&mut details, reasons::DEADLINE_EXCEEDED, []);
            Status::with_error_details(Code::DeadlineExceeded, message, details)
        }
        ApiError::Internal(what) => internal(what, runtime),
    }
}

fn service_status(error: &ServiceError, mut details: ErrorDetails, runtime: &Runtime) -> Status {
    let message = error.to_string();
    let (code, reason, metadata) = match error {
        ServiceError::Invalid(violations) => return invalid(violations),
        ServiceError::AppNotFound { app } => {
            resource(&mut details, "nudged.app", app);
            (Code::NotFound, reasons::APP_NOT_FOUND, vec![("app_id", app.clone())])
        }
        ServiceError::AppNotAllowed { app } => {
            (Code::PermissionDenied, reasons::APP_NOT_ALLOWED, vec![("app_id", app.clone())])
        }
        ServiceError::PermissionDenied { scope } => {
            (Code::PermissionDenied, reasons::SCOPE_MISSING, vec![("scope", (*scope).to_owned())])
        }
        ServiceError::PlatformNotConfigured { platform } => (
            Code::FailedPrecondition,
            reasons::PLATFORM_NOT_CONFIGURED,
            vec![("platform", platform.name().to_ascii_uppercase())],
        ),
        ServiceError::UnknownEventType { name, nearest } => {
            resource(&mut details, "nudged.event_type", name);
            let metadata = vec![("event_type", name.clone()), ("nearest", nearest.join(","))];
            (Code::NotFound, reasons::EVENT_TYPE_UNKNOWN, metadata)
        }
        ServiceError::TooManyEventTypes { limit } => {
            (Code::FailedPrecondition, reasons::TOO_MANY_EVENT_TYPES, vec![("limit", limit.to_string())])
        }
        ServiceError::DeviceNotFound { devices } => {
            resource(&mut details, "nudged.device", devices.first().map_or("", String::as_str));
            let named = devices.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(",");
            let metadata = if named.is_empty() { Vec::new() } else { vec![("device_ids", named)] };
            (Code::NotFound, reasons::DEVICE_NOT_FOUND, metadata)
        }
        ServiceError::NotificationNotFound { notification } => {
            resource(&mut details, "nudged.notification", notification);
            (Code::NotFound, reasons::NOTIFICATION_NOT_FOUND, Vec::new())
        }
        ServiceError::DeliveryNotFound { nudged_id } => {
            resource(&mut details, "nudged.delivery", nudged_id);
            (Code::NotFound, reasons::DELIVERY_NOT_FOUND, Vec::new())
        }
        ServiceError::IdempotencyKeyReused { notification } => {
            let metadata = vec![("notification_id", notification.clone())];
            (Code::AlreadyExists, reasons::IDEMPOTENCY_KEY_REUSED, metadata)
        }
        ServiceError::AudienceTooLarge { limit } => {
            (Code::FailedPrecondition, reasons::AUDIENCE_TOO_LARGE, vec![("max_audience", limit.to_string())])
        }
        ServiceError::CursorExpired => (Code::OutOfRange, reasons::CURSOR_EXPIRED, Vec::new()),
        ServiceError::CursorForeign => (Code::OutOfRange, reasons::CURSOR_FOREIGN, Vec::new()),
        ServiceError::TooManyEvents { per_second, retry_after } => {
            info(&mut details, reasons::EVENT_RATE_EXCEEDED, [("max_events_per_second", per_second.to_string())]);
            return retry_after_that(Code::ResourceExhausted, message, details, *retry_after);
        }
        ServiceError::TooManyOpen { limit, retry_after, .. } => {
            info(&mut details, reasons::OPEN_TARGETS_EXCEEDED, [("max_open_targets", limit.to_string())]);
            return retry_after_that(Code::ResourceExhausted, message, details, *retry_after);
        }
        ServiceError::Full { full, retry_after } => {
            let reason = if full.is_open_work() { reasons::OPEN_WORK_FULL } else { reasons::DATABASE_FULL };
            info(&mut details, reason, [("full", full.name().to_owned())]);
            return retry_after_that(Code::ResourceExhausted, message, details, *retry_after);
        }
        ServiceError::Store(error) => return store_status(error, details, runtime),
    };
    info(&mut details, reason, metadata);
    Status::with_error_details(code, cut(&with_hint(message, error), MAX_MESSAGE_BYTES), details)
}

/// A message may say more than the error's own text.
fn with_hint(message: String, error: &ServiceError) -> String {
    match error {
        ServiceError::UnknownEventType { nearest, .. } if !nearest.is_empty() => {
            format!("{message}; did you mean {}?", nearest.join(", "))
        }
        _ => message,
    }
}

fn store_status(error: &StoreError, mut details: ErrorDetails, runtime: &Runtime) -> Status {
    match error {
        StoreError::Overloaded { what } => {
            info(&mut details, reasons::STORE_OVERLOADED, [("what", (*what).to_owned())]);
            retry_later(Code::ResourceExhausted, error.to_string(), details)
        }
        StoreError::Unavailable { doing, source } => {
            let request_id = runtime.uuid().to_string();
            let cause = source.as_ref().map_or_else(String::new, ToString::to_string);
            tracing::warn!(request_id, doing, cause, "the database is unavailable");
            details.set_request_info(request_id, "");
            info(&mut details, reasons::DATABASE_UNAVAILABLE, []);
            retry_later(Code::Unavailable, "the database is unavailable; the call may have happened", details)
        }
        StoreError::Corrupt { .. }
        // The service gives refusals variants of their own, so one that arrives here is a bug.
        | StoreError::DeviceNotFound { .. }
        | StoreError::NotificationNotFound { .. }
        | StoreError::EventTypeNotFound { .. }
        | StoreError::TooManyEventTypes { .. }
        | StoreError::IdempotencyKeyReused { .. }
        | StoreError::AudienceTooLarge { .. }
        | StoreError::AlreadyExpired
        | StoreError::CursorExpired
        | StoreError::CursorForeign
        | StoreError::BroadcastNotAllowed
        | StoreError::DiskFull => internal(&error.to_string(), runtime),
    }
}

fn auth_status(error: AuthError, mut details: ErrorDetails, message: String) -> Status {
    let (code, reason, metadata) = match error {
        AuthError::Missing => (Code::Unauthenticated, reasons::CREDENTIAL_MISSING, None),
        AuthError::Invalid => (Code::Unauthenticated, reasons::CREDENTIAL_INVALID, None),
        AuthError::Expired => (Code::Unauthenticated, reasons::CREDENTIAL_EXPIRED, None),
        AuthError::ScopeMissing(scope) => {
            (Code::PermissionDenied, reasons::SCOPE_MISSING, Some(("scope", scope.name().to_owned())))
        }
        AuthError::UnknownMethod => (Code::Unimplemented, reasons::METHOD_NOT_FOUND, None),
    };
    info(&mut details, reason, metadata);
    Status::with_error_details(code, message, details)
}

/// Bytes that are no message of this RPC: garbage, or nested too deep.
#[must_use]
pub fn unreadable(error: &prost::DecodeError) -> Status {
    let mut details = ErrorDetails::new();
    info(&mut details, reasons::UNREADABLE_MESSAGE, []);
    Status::with_error_details(Code::InvalidArgument, cut(&error.to_string(), MAX_MESSAGE_BYTES), details)
}

/// The reason of an error made here, and its wrong fields.
#[must_use]
pub fn reason_and_violations(status: &Status) -> (String, Vec<Violation>) {
    let reason = status.get_details_error_info().map_or_else(String::new, |info| info.reason);
    let fields = status.get_details_bad_request().map_or_else(Vec::new, |wrong| wrong.field_violations);
    (reason, fields.into_iter().map(|wrong| Violation::new(wrong.field, wrong.description)).collect())
}

/// The same error as part of a stream's answer.
#[must_use]
pub fn as_message(status: &Status) -> tonic_types::Status {
    let plain = || tonic_types::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    };
    if status.details().is_empty() {
        return plain();
    }
    tonic_types::Status::decode(status.details()).unwrap_or_else(|_| plain())
}

fn invalid(violations: &[Violation]) -> Status {
    let mut details = ErrorDetails::new();
    let (mut bytes, mut listed) = (0, 0);
    for violation in violations {
        let (field, description) = (cut(&violation.field, MAX_PART_BYTES), cut(&violation.description, MAX_PART_BYTES));
        bytes += field.len() + description.len() + 8;
        if bytes > MAX_VIOLATION_BYTES {
            break;
        }
        details.add_bad_request_violation(field, description);
        listed += 1;
    }
    if listed < violations.len() {
        details.add_bad_request_violation("", format!("{} more", violations.len() - listed));
    }
    info(&mut details, reasons::INVALID_REQUEST, []);
    let words = violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Status::with_error_details(Code::InvalidArgument, cut(&words, MAX_MESSAGE_BYTES), details)
}

fn internal(what: &str, runtime: &Runtime) -> Status {
    let request_id = runtime.uuid().to_string();
    tracing::error!(request_id, what, "a call failed inside");
    let mut details = ErrorDetails::new();
    let message = format!("internal error; request id {request_id}");
    details.set_request_info(request_id, "");
    info(&mut details, reasons::INTERNAL, []);
    Status::with_error_details(Code::Internal, message, details)
}

fn retry_later(code: Code, message: impl Into<String>, details: ErrorDetails) -> Status {
    retry_after_that(code, message, details, RETRY_AFTER)
}

fn retry_after_that(code: Code, message: impl Into<String>, mut details: ErrorDetails, after: Duration) -> Status {
    // Whole milliseconds, rounded up: not a moment too early.
    let millis = u32::try_from(after.as_micros().div_ceil(1000)).unwrap_or(u32::MAX);
    details.set_retry_info(Some(Duration::from_millis(millis.into())));
    let mut metadata = MetadataMap::new();
    metadata.insert(PUSHBACK, MetadataValue::from(millis));
    Status::with_error_details_and_metadata(code, message, details, metadata)
}

fn info<'a>(details: &mut ErrorDetails, reason: &str, metadata: impl IntoIterator<Item = (&'a str, String)>) {
    let metadata: HashMap<String, String> =
        metadata.into_iter().map(|(key, value)| (key.to_owned(), cut(&value, MAX_MESSAGE_BYTES))).collect();
    details.set_error_info(reason, reasons::DOMAIN, metadata);
}

fn resource(details: &mut ErrorDetails, kind: &str, name: &str) {
    details.set_resource_info(kind, cut(name, MAX_PART_BYTES), "", "");
}

/// At most `max` bytes, at a character's end.
fn cut(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}…", &text[..end])
}
