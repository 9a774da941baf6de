//! The control port: record, statistics, faults and token states over HTTP/1.1 on loopback.
//!
//! A web page in somebody's browser must not be able to reach it: requests that carry an Origin are refused, and so is
//! a Host that is not loopback (DNS rebinding).

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use http::header::{HOST, ORIGIN};
use serde::Deserialize;
use serde_json::{Value, json};

use super::faults::{Fault, TokenState};
use super::{SandboxError, Shared};

const MAX_BODY_BYTES: usize = 64 * 1024;

/// Pushes in one answer; ask again with `since` for more.
const MAX_RECORD_LIMIT: usize = 10_000;

const DEFAULT_RECORD_LIMIT: usize = 1000;

const MAX_TOKEN_BYTES: usize = 4096;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/record", get(record).delete(clear_record))
        .route("/stats", get(stats))
        .route("/faults", get(faults).post(add_fault).delete(clear_faults))
        .route("/tokens/{token}", post(set_token))
        .route("/access-tokens", axum::routing::delete(revoke_access_tokens))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(only_local))
        .with_state(shared)
}

async fn only_local(request: Request, next: Next) -> Response {
    let headers = request.headers();
    if headers.contains_key(ORIGIN) {
        return refuse(StatusCode::FORBIDDEN, "requests from web pages are refused");
    }
    let mut hosts = headers.get_all(HOST).iter();
    let local = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().is_ok_and(is_loopback_host),
        _ => false,
    };
    if local { next.run(request).await } else { refuse(StatusCode::FORBIDDEN, "Host must be a loopback address") }
}

/// `localhost` or a loopback literal, with or without a port.
fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((literal, port)) => {
            if !(port.is_empty() || port.starts_with(':')) {
                return false;
            }
            literal
        }
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordQuery {
    /// Only pushes numbered above this.
    since: Option<u64>,
    limit: Option<usize>,
}

async fn record(State(shared): State<Arc<Shared>>, query: Result<Query<RecordQuery>, QueryRejection>) -> Response {
    let query = match query {
        Ok(Query(query)) => query,
        Err(rejection) => return refuse(StatusCode::BAD_REQUEST, &rejection.body_text()),
    };
    let limit = query.limit.unwrap_or(DEFAULT_RECORD_LIMIT);
    if limit > MAX_RECORD_LIMIT {
        return refuse(StatusCode::BAD_REQUEST, &format!("limit must be at most {MAX_RECORD_LIMIT}"));
    }
    let since = query.since.unwrap_or(0);
    let received = shared.record.since(since, limit);
    let last = received.last().map_or(since, |last| last.seq);
    let received: Vec<Value> = received.iter().map(|one| one.to_value()).collect();
    Json(json!({ "received": received, "last_seq": last, "dropped": shared.record.totals().dropped })).into_response()
}

async fn clear_record(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.clear();
    StatusCode::NO_CONTENT
}

async fn stats(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let totals = shared.record.totals();
    let connections = shared.connections();
    Json(json!({
        "received": totals.received,
        "accepted": totals.accepted,
        "dropped": totals.dropped,
        "last_seq": shared.record.last_seq(),
        "oauth_exchanges": shared.oauth_exchanges(),
        "apns": connections.apns,
        "fcm": connections.fcm,
        "faults": shared.faults.list().len(),
        "tally": shared.tally.as_ref().map(super::tally::Tally::summary),
    }))
}

async fn faults(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({ "faults": shared.faults.list() }))
}

async fn add_fault(State(shared): State<Arc<Shared>>, fault: Result<Json<Fault>, JsonRejection>) -> Response {
    match fault {
        Err(rejection) => refuse(rejection.status(), &rejection.body_text()),
        Ok(Json(fault)) => done(shared.faults.add(fault)),
    }
}

async fn clear_faults(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.faults.clear();
    StatusCode::NO_CONTENT
}

async fn set_token(
    State(shared): State<Arc<Shared>>,
    Path(token): Path<String>,
    state: Result<Json<TokenState>, JsonRejection>,
) -> Response {
    match state {
        Err(rejection) => refuse(rejection.status(), &rejection.body_text()),
        Ok(_) if token.len() > MAX_TOKEN_BYTES => refuse(StatusCode::BAD_REQUEST, "the token is too long"),
        Ok(Json(state)) => done(shared.set_token_state(&token, state)),
    }
}

async fn revoke_access_tokens(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.access_tokens.revoke();
    StatusCode::NO_CONTENT
}

fn done(result: Result<(), SandboxError>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::is_loopback_host;

    #[test]
    fn only_loopback_hosts_pass() {
        for host in ["127.0.0.1", "127.0.0.1:9000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:80", "127.9.9.9:1"] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in
            ["example.com", "localhost.example.com", "10.0.0.1", "[::2]:80", "[::1]x", "", "127.0.0.1.nip.io:80"]
        {
            assert!(!is_loopback_host(host), "{host}");
        }
    }
}
