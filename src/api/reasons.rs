//! `google.rpc.ErrorInfo.reason` constants: UPPER_SNAKE, at most 63 characters, never reused for a new meaning.

/// `google.rpc.ErrorInfo.domain` of all of them.
pub const DOMAIN: &str = "nudged";

/// A field is wrong; `BadRequest` names every one.
pub const INVALID_REQUEST: &str = "INVALID_REQUEST";
/// The bytes are no message of this RPC.
pub const UNREADABLE_MESSAGE: &str = "UNREADABLE_MESSAGE";
/// No credential was presented.
pub const CREDENTIAL_MISSING: &str = "CREDENTIAL_MISSING";
/// The credential is not `Bearer` and a key of this server, or the client certificate belongs to no key.
pub const CREDENTIAL_INVALID: &str = "CREDENTIAL_INVALID";
/// The key's `expires_at` has passed.
pub const CREDENTIAL_EXPIRED: &str = "CREDENTIAL_EXPIRED";
/// The key lacks a scope; metadata `scope` names it.
pub const SCOPE_MISSING: &str = "SCOPE_MISSING";
/// The key is not bound to the app; metadata `app_id`.
pub const APP_NOT_ALLOWED: &str = "APP_NOT_ALLOWED";
/// No such app is configured; metadata `app_id`.
pub const APP_NOT_FOUND: &str = "APP_NOT_FOUND";
/// No such RPC.
pub const METHOD_NOT_FOUND: &str = "METHOD_NOT_FOUND";
/// The app has no credential for the platform; metadata `platform`.
pub const PLATFORM_NOT_CONFIGURED: &str = "PLATFORM_NOT_CONFIGURED";
/// The event type is not declared; metadata `event_type` and `nearest` (comma-separated).
pub const EVENT_TYPE_UNKNOWN: &str = "EVENT_TYPE_UNKNOWN";
/// The app has as many event types as it may; metadata `limit`.
pub const TOO_MANY_EVENT_TYPES: &str = "TOO_MANY_EVENT_TYPES";
/// No such device of this app, or not that user's.
pub const DEVICE_NOT_FOUND: &str = "DEVICE_NOT_FOUND";
/// No such notification of this app.
pub const NOTIFICATION_NOT_FOUND: &str = "NOTIFICATION_NOT_FOUND";
/// The `nudged_id` names no delivery of this app.
pub const DELIVERY_NOT_FOUND: &str = "DELIVERY_NOT_FOUND";
/// The idempotency key was used for another request; metadata `notification_id` of that one.
pub const IDEMPOTENCY_KEY_REUSED: &str = "IDEMPOTENCY_KEY_REUSED";
/// More people than `max_audience`; metadata `max_audience`.
pub const AUDIENCE_TOO_LARGE: &str = "AUDIENCE_TOO_LARGE";
/// What followed a watcher's cursor is no longer kept.
pub const CURSOR_EXPIRED: &str = "CURSOR_EXPIRED";
/// A watcher's cursor is another installation's, database's or app's, or was altered.
pub const CURSOR_FOREIGN: &str = "CURSOR_FOREIGN";
/// A watcher did not read what it was sent.
pub const WATCHER_TOO_SLOW: &str = "WATCHER_TOO_SLOW";
/// More events than the app's `max_events_per_second`; metadata of that name. RetryInfo says when there is room.
pub const EVENT_RATE_EXCEEDED: &str = "EVENT_RATE_EXCEEDED";
/// More open deliveries than the app's `max_open_targets`; metadata of that name.
pub const OPEN_TARGETS_EXCEEDED: &str = "OPEN_TARGETS_EXCEEDED";
/// More is open on the whole server than `delivery.max_open_targets` or `delivery.max_open_rows`; metadata `full`.
pub const OPEN_WORK_FULL: &str = "OPEN_WORK_FULL";
/// The database or its disk is full, or nearly so; metadata `full`.
pub const DATABASE_FULL: &str = "DATABASE_FULL";
/// Too much waits in the store or its queue.
pub const STORE_OVERLOADED: &str = "STORE_OVERLOADED";
/// Too many requests at once.
pub const SERVER_OVERLOADED: &str = "SERVER_OVERLOADED";
/// Too many NotifyEvents streams, imports or watchers at once.
pub const TOO_MANY_STREAMS: &str = "TOO_MANY_STREAMS";
/// The server shuts down before a stream has ended: to be opened again.
pub const SERVER_SHUTTING_DOWN: &str = "SERVER_SHUTTING_DOWN";
/// The database does not answer; the call may have happened.
pub const DATABASE_UNAVAILABLE: &str = "DATABASE_UNAVAILABLE";
/// The caller's or the server's deadline passed; the call may have happened.
pub const DEADLINE_EXCEEDED: &str = "DEADLINE_EXCEEDED";
/// A bug; `RequestInfo.request_id` is in the server's log.
pub const INTERNAL: &str = "INTERNAL";

/// All of them, for the docs and the test of their shape.
pub const ALL: &[&str] = &[
    INVALID_REQUEST,
    UNREADABLE_MESSAGE,
    CREDENTIAL_MISSING,
    CREDENTIAL_INVALID,
    CREDENTIAL_EXPIRED,
    SCOPE_MISSING,
    APP_NOT_ALLOWED,
    APP_NOT_FOUND,
    METHOD_NOT_FOUND,
    PLATFORM_NOT_CONFIGURED,
    EVENT_TYPE_UNKNOWN,
    TOO_MANY_EVENT_TYPES,
    DEVICE_NOT_FOUND,
    NOTIFICATION_NOT_FOUND,
    DELIVERY_NOT_FOUND,
    IDEMPOTENCY_KEY_REUSED,
    AUDIENCE_TOO_LARGE,
    CURSOR_EXPIRED,
    CURSOR_FOREIGN,
    WATCHER_TOO_SLOW,
    EVENT_RATE_EXCEEDED,
    OPEN_TARGETS_EXCEEDED,
    OPEN_WORK_FULL,
    DATABASE_FULL,
    STORE_OVERLOADED,
    SERVER_OVERLOADED,
    TOO_MANY_STREAMS,
    SERVER_SHUTTING_DOWN,
    DATABASE_UNAVAILABLE,
    DEADLINE_EXCEEDED,
    INTERNAL,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_distinct_and_well_shaped() {
        let distinct: std::collections::BTreeSet<_> = ALL.iter().collect();
        assert_eq!(distinct.len(), ALL.len());
        for reason in ALL {
            assert!(reason.len() <= 63 && reason.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{reason}");
        }
    }
}
