//! The fake Google token endpoint: the JWT-bearer grant (RFC 7523) of a service account, over HTTP/1.1 and HTTP/2.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Shared;
use super::credentials::Identity;
use super::faults::{Action, Target};
use super::jwt::Jws;
use super::play;
use crate::domain::time::UnixMs;

/// The endpoint's path.
pub(super) const PATH: &str = "/token";

/// Google's own libraries name this audience whatever the service account's token_uri says.
const GOOGLE_AUDIENCE: &str = "https://oauth2.googleapis.com/token";

const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
const SCOPES: [&str; 2] =
    ["https://www.googleapis.com/auth/firebase.messaging", "https://www.googleapis.com/auth/cloud-platform"];
const MAX_FORM_BYTES: usize = 16 * 1024;
const MAX_CONNECTIONS: u64 = 256;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest life of an assertion.
const MAX_ASSERTION_SECS: i64 = 3600;

/// Clocks of provider and sender may differ by this much.
const MAX_SKEW_SECS: i64 = 300;

/// Access tokens remembered; the oldest makes room.
const MAX_ACCESS_TOKENS: usize = 10_000;

/// The access tokens handed out, and until when they are good.
#[derive(Default)]
pub(super) struct AccessTokens {
    issued: RwLock<Issued>,
    /// Successful exchanges.
    pub exchanges: AtomicU64,
}

#[derive(Default)]
struct Issued {
    good_until: HashMap<String, UnixMs>,
    order: VecDeque<String>,
}

impl AccessTokens {
    pub(super) fn is_good(&self, token: &str, now: UnixMs) -> bool {
        let issued = self.issued.read().expect("no panic while held");
        issued.good_until.get(token).is_some_and(|until| now < *until)
    }

    /// Forgets all of them, as a deleted key or a revoked grant does.
    pub(super) fn revoke(&self) {
        *self.issued.write().expect("no panic while held") = Issued::default();
    }

    fn add(&self, token: String, good_until: UnixMs) {
        let mut issued = self.issued.write().expect("no panic while held");
        if issued.order.len() >= MAX_ACCESS_TOKENS
            && let Some(oldest) = issued.order.pop_front()
        {
            issued.good_until.remove(&oldest);
        }
        issued.order.push_back(token.clone());
        issued.good_until.insert(token, good_until);
    }
}

/// The endpoint and who may use it.
pub(super) struct Oauth {
    shared: Arc<Shared>,
    /// What an assertion's `aud` says, unless it is [`GOOGLE_AUDIENCE`].
    token_uri: String,
    client_email: String,
    private_key_id: String,
    /// DER RSAPublicKey.
    public_key: Vec<u8>,
    open: AtomicU64,
}

struct Refusal {
    error: &'static str,
    description: &'static str,
}

fn invalid_grant(description: &'static str) -> Refusal {
    Refusal { error: "invalid_grant", description }
}

impl Oauth {
    pub(super) fn new(shared: &Arc<Shared>, identity: &Identity, token_uri: String) -> Self {
        Self {
            shared: Arc::clone(shared),
            token_uri,
            client_email: identity.credentials.client_email.clone(),
            private_key_id: identity.credentials.private_key_id.clone(),
            public_key: identity.service_account_public_key.clone(),
            open: AtomicU64::new(0),
        }
    }

    /// Accepts until cancelled; cancelling ends its connections as well.
    pub(super) async fn run(
        self: Arc<Self>,
        listener: TcpListener,
        tls: TlsAcceptor,
        tracker: TaskTracker,
        cancel: CancellationToken,
    ) {
        let runtime = self.shared.runtime.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((tcp, _)) = accepted else {
                runtime.sleep(Duration::from_millis(50)).await;
                continue;
            };
            if self.open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                self.open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (oauth, tls, cancel) = (Arc::clone(&self), tls.clone(), cancel.clone());
            runtime.spawn(tracker.track_future(async move {
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => {}
                    () = oauth.converse(tcp, &tls) => {}
                }
                oauth.open.fetch_sub(1, Ordering::Relaxed);
            }));
        }
    }

    async fn converse(self: &Arc<Self>, tcp: TcpStream, tls: &TlsAcceptor) {
        let Some(Ok(stream)) = self.shared.runtime.timeout(HANDSHAKE_TIMEOUT, tls.accept(tcp)).await else {
            return;
        };
        let service = service_fn(|request| {
            let oauth = Arc::clone(self);
            async move { Ok::<_, Infallible>(oauth.answer(request).await) }
        });
        // An error here is the client's doing (hung up, spoke no HTTP), and nobody is left to tell.
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        if head.uri.path() != PATH {
            return respond(404, &json!({ "error": "not_found" }));
        }
        if head.method != Method::POST {
            return respond(405, &json!({ "error": "method_not_allowed" }));
        }
        let Ok(form) = Limited::new(body, MAX_FORM_BYTES).collect().await else {
            return respond(413, &json!({ "error": "invalid_request" }));
        };
        self.post(&head.headers, &form.to_bytes()).await
    }

    /// What is answered to this form, after whatever delay a fault says.
    pub(super) async fn post(&self, headers: &HeaderMap, form: &[u8]) -> Response<Full<Bytes>> {
        let runtime = &self.shared.runtime;
        let exchange = self.exchange(headers, form);
        if let Err(Refusal { error, description }) = exchange {
            return respond(400, &json!({ "error": error, "error_description": description }));
        }
        match self.shared.faults.take(Target::Oauth, "") {
            Some(Action::Status { status, reason, retry_after, body, .. }) => {
                let error = json!({ "error": reason.unwrap_or_default(), "error_description": "played by a fault" });
                let mut response = respond(status, &error);
                if let Some(body) = body {
                    *response.body_mut() = Full::new(body.into());
                }
                play::set_retry_after(&mut response, retry_after.as_deref());
                response
            }
            Some(Action::Garbage { status }) => {
                let mut response = respond(status, &Value::Null);
                *response.body_mut() = Full::new(play::GARBAGE.into());
                response
            }
            Some(Action::Stall {}) => std::future::pending().await,
            Some(Action::Delay { ms }) => {
                runtime.sleep(Duration::from_millis(ms)).await;
                self.issue()
            }
            // No other action is admitted for this endpoint.
            _ => self.issue(),
        }
    }

    fn issue(&self) -> Response<Full<Bytes>> {
        let shared = &self.shared;
        let secret: [u8; 32] = shared.runtime.secret_bytes();
        let token = format!("ya29.sandbox-{}", URL_SAFE_NO_PAD.encode(secret));
        let life = shared.options.access_token_ttl;
        shared.access_tokens.add(token.clone(), shared.runtime.now().plus(life));
        shared.access_tokens.exchanges.fetch_add(1, Ordering::Relaxed);
        respond(200, &json!({ "access_token": token, "expires_in": life.as_secs(), "token_type": "Bearer" }))
    }

    fn exchange(&self, headers: &HeaderMap, form: &[u8]) -> Result<(), Refusal> {
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !content_type.starts_with("application/x-www-form-urlencoded") {
            return Err(Refusal { error: "invalid_request", description: "Content-Type must be a form" });
        }
        let fields = parse_form(form);
        let field = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        if field("grant_type") != Some(GRANT_TYPE) {
            return Err(Refusal { error: "unsupported_grant_type", description: "Invalid grant_type" });
        }
        let assertion = field("assertion").and_then(Jws::parse).ok_or_else(|| invalid_grant("Invalid JWT"))?;
        if assertion.text("iss") != Some(self.client_email.as_str()) {
            return Err(invalid_grant("Invalid grant: account not found"));
        }
        let kid_fits = assertion.header_text("kid") == Some(self.private_key_id.as_str());
        if !kid_fits || !assertion.verify_rs256(&self.public_key) {
            return Err(invalid_grant("Invalid JWT Signature."));
        }
        let audience = assertion.text("aud");
        if audience != Some(self.token_uri.as_str()) && audience != Some(GOOGLE_AUDIENCE) {
            return Err(invalid_grant("Failed audience check."));
        }
        let now = self.shared.runtime.now().secs();
        let timely = match (assertion.seconds("iat"), assertion.seconds("exp")) {
            (Some(iat), Some(exp)) => {
                iat <= now.saturating_add(MAX_SKEW_SECS)
                    && exp > now.saturating_sub(MAX_SKEW_SECS)
                    && exp > iat
                    && exp.saturating_sub(iat) <= MAX_ASSERTION_SECS
            }
            _ => false,
        };
        if !timely {
            return Err(invalid_grant(
                "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your \
                 iat and exp values in the JWT claim.",
            ));
        }
        let scopes = assertion.text("scope").unwrap_or_default();
        if !scopes.split(' ').any(|scope| SCOPES.contains(&scope)) {
            return Err(Refusal { error: "invalid_scope", description: "Invalid OAuth scope or ID token audience." });
        }
        Ok(())
    }
}

fn respond(status: u16, body: &Value) -> Response<Full<Bytes>> {
    Response::builder()
        .status(StatusCode::from_u16(status).expect("faults are checked when they are added"))
        .header(CONTENT_TYPE, "application/json; charset=utf-8")
        .body(Full::new(body.to_string().into()))
        .expect("static headers")
}

/// `application/x-www-form-urlencoded`; a field that is not UTF-8 once decoded is left out.
fn parse_form(form: &[u8]) -> Vec<(String, String)> {
    let decode = |part: &[u8]| -> Option<String> {
        let mut bytes = Vec::with_capacity(part.len());
        let mut rest = part.iter().copied();
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let mut digit = || char::from(rest.next()?).to_digit(16);
                    u8::try_from(digit()? * 16 + digit()?).ok()?
                }
                other => other,
            });
        }
        String::from_utf8(bytes).ok()
    };
    form.split(|byte| *byte == b'&')
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            Some((decode(&pair[..at])?, decode(&pair[at + 1..])?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded() {
        let fields = parse_form(b"grant_type=urn%3aietf%3Aparams&a=b+c&bad=%zz&empty=&noequals");
        let expected = [("grant_type", "urn:ietf:params"), ("a", "b c"), ("empty", "")];
        assert_eq!(fields, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}
