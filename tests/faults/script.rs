//! The faults by their names in the table.
//!
//! `STATUS REASON` is an answer with the platform's error body; `STATUS` alone has no body at all, `STATUS html` a page of
//! HTML, `STATUS noise` bytes that are nothing. `; Retry-After: 2` adds the header, `date` the same as a date; `, twice`
//! gives the same answer to the next attempt, too. The others are listed in [`named`].

use std::time::Duration;

use nudged::api::proto::device::Platform;
use nudged::domain::time::UnixMs;
use nudged::sandbox::Action;

/// The windows in which a fault can hit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Moment {
    /// The first request of a connection.
    First,
    /// With others in flight.
    Mid,
    /// Between the provider's GOAWAY and its last answer.
    Draining,
}

/// What the pushes to the provider meet before they reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Door {
    Open,
    /// Nobody listens.
    Closed,
    /// A certificate that nobody here trusts.
    Untrusted,
    /// It is connected to, and says nothing: no SETTINGS, which are waited for.
    Mute,
}

pub struct Script {
    pub door: Door,
    /// What the pushes to the one device are answered with, in this order; then they are taken.
    pub answers: Vec<Action>,
    /// What FCM's token endpoint answers with, once it has given a token.
    pub token_endpoint: Vec<Action>,
    /// Of the event, where waiting is the end. What cannot be tried again before ends at once.
    pub ttl_secs: Option<i64>,
}

/// Of an event that nobody can be sent: all of it is waited for.
const SHORT: i64 = 12;
/// Shorter than the hour in which a token is in doubt, and time enough for those beside it.
const BELOW_THE_HOUR: i64 = 30 * 60;
/// Shorter than the five minutes' steps of devices behind a third party.
const BELOW_THE_STEP: i64 = 4 * 60;

fn open(answers: Vec<Action>) -> Script {
    Script { door: Door::Open, answers, token_endpoint: Vec::new(), ttl_secs: None }
}

/// The token that there is counts no more, and another one is not to be had: as often as nudged asks for one before it
/// gives a fetch up.
fn without_a_token(answer: Action, times: usize) -> Script {
    Script { token_endpoint: vec![answer; times], ..open(vec![status(401, None)]) }
}

/// nudged asks so often in one fetch, where the answer is one that passes.
const TRIES_OF_A_FETCH: usize = 3;

/// `now` by the clock that providers and nudged have.
pub fn script(fault: &str, platform: Platform, now: UnixMs) -> Script {
    if let Some(script) = named(fault, platform, now) {
        return script;
    }
    let (fault, times) = fault.strip_suffix(", twice").map_or((fault, 1), |fault| (fault, 2));
    let (fault, hint) = fault.split_once("; Retry-After: ").map_or((fault, None), |(fault, hint)| (fault, Some(hint)));
    let (status, reason) = fault.split_once(' ').unwrap_or((fault, ""));
    let status = status.parse().unwrap_or_else(|_| panic!("{fault}: no such fault"));
    let retry_after = hint.map(|hint| if hint == "date" { in_two_seconds(now) } else { hint.to_owned() });
    let (reason, body) = match reason {
        "" => (None, Some(String::new())),
        "html" => return open(vec![Action::Garbage { status }; times]),
        "noise" => (None, Some("\u{0}\u{1}{\"reason\":".to_owned())),
        // Of FCM an answer without an FcmError: the RPC status says it.
        reason if platform == Platform::Fcm && reason.starts_with("without") => (None, None),
        reason => (Some(reason.to_owned()), None),
    };
    open(vec![Action::Status { status, reason, retry_after, body, timestamp: None }; times])
}

fn named(fault: &str, platform: Platform, now: UnixMs) -> Option<Script> {
    const INTERNAL_ERROR: u32 = 2;
    const CANCEL: u32 = 8;
    const HOUR: i64 = 3_600_000;
    let one = |action| Some(open(vec![action]));
    let gone = |reason: &str, timestamp: i64| Action::Status {
        status: 410,
        reason: Some(reason.to_owned()),
        retry_after: None,
        body: None,
        timestamp: Some(timestamp),
    };
    let google = |status: u16, rpc: &str, message: &str, details: &str| Action::Status {
        status,
        reason: None,
        retry_after: None,
        body: Some(format!(
            r#"{{"error":{{"code":{status},"message":"{message}","status":"{rpc}","details":[{details}]}}}}"#
        )),
        timestamp: None,
    };
    match fault {
        "410 Unregistered, before the registration" => one(gone("Unregistered", now.0 - 24 * HOUR)),
        "410 Unregistered, within the hour after it" => {
            Some(Script { ttl_secs: Some(BELOW_THE_HOUR), ..open(vec![gone("Unregistered", now.0 + HOUR / 6)]) })
        }
        "410 Unregistered, later" => one(gone("Unregistered", now.0 + 2 * HOUR)),
        "410 ExpiredToken, later" => one(gone("ExpiredToken", now.0 + 2 * HOUR)),
        "400 INVALID_ARGUMENT about the token" => {
            one(google(400, "INVALID_ARGUMENT", "The registration token is not a valid FCM registration token", ""))
        }
        "401 THIRD_PARTY_AUTH_ERROR" => {
            Some(Script { ttl_secs: Some(BELOW_THE_STEP), ..script_of(401, "THIRD_PARTY_AUTH_ERROR") })
        }
        "429 about the project" => one(google(
            429,
            "RESOURCE_EXHAUSTED",
            "Quota exceeded",
            r#"{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"RATE_LIMIT_EXCEEDED","metadata":{"quota_limit":"SendsPerMinutePerProject"}}"#,
        )),
        "429 about the device" => one(google(
            429,
            "RESOURCE_EXHAUSTED",
            "Quota exceeded",
            r#"{"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"subject":"device:x"}]}"#,
        )),
        "REFUSED_STREAM" => one(Action::RefuseStream {}),
        "RST_STREAM INTERNAL_ERROR" => one(Action::Reset { code: INTERNAL_ERROR }),
        "RST_STREAM CANCEL" => one(Action::Reset { code: CANCEL }),
        "taken, then RST_STREAM" => one(Action::AcceptThenDrop {}),
        "GOAWAY, above its last stream" => one(goaway(true, false)),
        "GOAWAY, below its last stream" => one(goaway(false, false)),
        "GOAWAY, below its last stream, and cut" => one(goaway(false, true)),
        "GOAWAY, above its last stream, and cut" => one(goaway(true, true)),
        "connection cut" => one(Action::CloseConnection {}),
        "stall" => one(Action::Stall {}),
        "connection frozen" => one(Action::Freeze {}),
        "invalid frames" => one(Action::InvalidFrames {}),
        "token endpoint: 503" => Some(without_a_token(status(503, None), TRIES_OF_A_FETCH)),
        "token endpoint: 400 invalid_grant" => Some(without_a_token(status(400, Some("invalid_grant")), 1)),
        "token endpoint: stall" => Some(without_a_token(Action::Stall {}, TRIES_OF_A_FETCH)),
        "slow answer" => one(Action::Delay { ms: 400 }),
        "MAX_CONCURRENT_STREAMS 1" => one(Action::MaxStreams { streams: 1 }),
        "MAX_CONCURRENT_STREAMS 0" => one(Action::MaxStreams { streams: 0 }),
        "connection refused" => Some(Script { door: Door::Closed, ttl_secs: Some(SHORT), ..open(Vec::new()) }),
        "TLS failure" => Some(Script { door: Door::Untrusted, ttl_secs: Some(SHORT), ..open(Vec::new()) }),
        "no SETTINGS" => Some(Script { door: Door::Mute, ttl_secs: Some(SHORT), ..open(Vec::new()) }),
        "no fault" => Some(open(Vec::new())),
        _ if platform == Platform::Apns && fault == "400 BadDeviceToken, in both environments" => {
            Some(script("400 BadDeviceToken, twice", platform, now))
        }
        _ => None,
    }
}

/// What interrupts the connection of a cell that is to be draining.
pub fn goaway(refuse: bool, close: bool) -> Action {
    Action::Goaway { refuse, close, reason: None }
}

fn script_of(code: u16, reason: &str) -> Script {
    open(vec![status(code, Some(reason))])
}

fn status(status: u16, reason: Option<&str>) -> Action {
    let reason = reason.map(str::to_owned);
    Action::Status { status, reason, retry_after: None, body: None, timestamp: None }
}

/// As an HTTP date, which has whole seconds.
fn in_two_seconds(now: UnixMs) -> String {
    let at = jiff::Timestamp::from_millisecond(now.plus(Duration::from_secs(2)).0).unwrap();
    at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// Every answer of the platforms' own documents has its row, and every way in which a connection can fail.
pub fn required(platform: Platform) -> Vec<String> {
    let of_apns = [
        "400 BadCollapseId",
        "400 BadExpirationDate",
        "400 BadMessageId",
        "400 BadPriority",
        "400 BadTopic",
        "400 DuplicateHeaders",
        "400 InvalidPushType",
        "400 MissingDeviceToken",
        "400 MissingTopic",
        "400 PayloadEmpty",
        "400 BadDeviceToken",
        "400 BadDeviceToken, in both environments",
        "400 DeviceTokenNotForTopic",
        "400 TopicDisallowed",
        "400 IdleTimeout",
        "403 BadCertificate",
        "403 BadCertificateEnvironment",
        "403 ExpiredProviderToken",
        "403 ExpiredProviderToken, twice",
        "403 InvalidProviderToken",
        "403 MissingProviderToken",
        "403 Forbidden",
        "403 UnrelatedKeyIdInToken",
        "403 BadEnvironmentKeyIdInToken",
        "404 BadPath",
        "405 MethodNotAllowed",
        "410 Unregistered, before the registration",
        "410 Unregistered, within the hour after it",
        "410 Unregistered, later",
        "410 ExpiredToken, later",
        "413 PayloadTooLarge",
        "429 TooManyProviderTokenUpdates",
        "429 TooManyRequests",
        "500 InternalServerError",
        "503 ServiceUnavailable",
        "503 Shutdown",
        "400 SomethingNew",
        "429 SomethingNew",
        "503 SomethingNew",
    ];
    let of_fcm = [
        "400 INVALID_ARGUMENT",
        "400 INVALID_ARGUMENT about the token",
        "400 without an FCM code",
        "401 without an FCM code",
        "401 without an FCM code, twice",
        "401 THIRD_PARTY_AUTH_ERROR",
        "403 SENDER_ID_MISMATCH",
        "403 without an FCM code",
        "404 UNREGISTERED",
        "404 without an FCM code",
        "429 QUOTA_EXCEEDED",
        "429 about the project",
        "429 about the device",
        "500 INTERNAL",
        "503 UNAVAILABLE",
        "400 UNSPECIFIED_ERROR",
        "503 UNSPECIFIED_ERROR",
        "503 SOMETHING_NEW",
        "token endpoint: 503",
        "token endpoint: 400 invalid_grant",
        "token endpoint: stall",
    ];
    let of_both = [
        "400",
        "400 html",
        "400 noise",
        "410",
        "410 html",
        "503",
        "502 html",
        "503 noise",
        "429 html",
        "REFUSED_STREAM",
        "RST_STREAM INTERNAL_ERROR",
        "RST_STREAM CANCEL",
        "taken, then RST_STREAM",
        "GOAWAY, above its last stream",
        "GOAWAY, below its last stream",
        "GOAWAY, below its last stream, and cut",
        "GOAWAY, above its last stream, and cut",
        "connection cut",
        "stall",
        "connection frozen",
        "invalid frames",
        "slow answer",
        "MAX_CONCURRENT_STREAMS 1",
        "MAX_CONCURRENT_STREAMS 0",
        "connection refused",
        "TLS failure",
        "no SETTINGS",
        "no fault",
    ];
    let hints = match platform {
        Platform::Fcm => ["503 UNAVAILABLE; Retry-After: 2", "503 UNAVAILABLE; Retry-After: date"],
        _ => ["503 ServiceUnavailable; Retry-After: 2", "503 ServiceUnavailable; Retry-After: date"],
    };
    let own: &[&str] = if platform == Platform::Fcm { &of_fcm } else { &of_apns };
    let all = own.iter().chain(&hints).chain(&of_both);
    all.map(|fault| (*fault).to_owned()).collect()
}
