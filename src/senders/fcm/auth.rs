//! Google's access token: a signed claim of the service account is exchanged for it, once for all pushes.
//!
//! One fetch at a time, early enough that nobody waits for it, and never per message. While there is no token batches
//! wait, at most for one bounded fetch; when that fails they are answered, and until the pause after it is over so is
//! everything that comes.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderValue;
use http::header::HeaderMap;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivatePkcs1KeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::senders::http2::wire::{AuthState, retry_after};

/// What Google's own libraries name, whatever the account's `token_uri` says.
const AUDIENCE: &str = "https://oauth2.googleapis.com/token";
const SCOPE: &str = "https://www.googleapis.com/auth/firebase.messaging";
const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
/// The longest Google allows.
const ASSERTION_LIFE_SECS: i64 = 3600;
/// As Google's libraries do: refreshed 3 minutes and 45 seconds before its end.
const REFRESH_BEFORE: Duration = Duration::from_secs(225);
/// A token is not used in its last moments: the request still has to travel.
const UNUSED_AT_END: Duration = Duration::from_secs(5);
/// When the reply does not say how long it lasts.
const DEFAULT_LIFE: Duration = Duration::from_secs(3600);

/// One exchange with the token endpoint.
pub(super) const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_TRIES: u32 = 3;
/// The wait before the second try; doubled for the third. With jitter.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// After a fetch failed for good reason (credential) or for now (network).
const PAUSE_BROKEN: Duration = Duration::from_secs(30);
const PAUSE_FAILED: Duration = Duration::from_secs(5);
/// Google's tokens are some 1 KiB.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// What signs the claims.
pub(super) struct ServiceAccount {
    pub(super) client_email: String,
    pub(super) private_key_id: String,
    key: RsaKeyPair,
}

impl ServiceAccount {
    /// `None`: the text is no RSA key in PEM form.
    pub(super) fn new(client_email: String, private_key_id: String, private_key_pem: &str) -> Option<Self> {
        let pem = private_key_pem.as_bytes();
        let key = if let Ok(der) = PrivatePkcs8KeyDer::from_pem_slice(pem) {
            RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).ok()?
        } else {
            let der = PrivatePkcs1KeyDer::from_pem_slice(pem).ok()?;
            RsaKeyPair::from_der(der.secret_pkcs1_der()).ok()?
        };
        Some(Self { client_email, private_key_id, key })
    }

    /// The JWT (RS256) that is exchanged for a token.
    pub(super) fn assertion(&self, now: UnixMs) -> String {
        let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(json!({ "alg": "RS256", "typ": "JWT", "kid": self.private_key_id }));
        let claims = encode(json!({
            "iss": self.client_email,
            "scope": SCOPE,
            "aud": AUDIENCE,
            "iat": now.secs(),
            "exp": now.secs() + ASSERTION_LIFE_SECS,
        }));
        let signed = format!("{header}.{claims}");
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature)
            .expect("the buffer has the modulus' length, and PKCS#1 signing has no other way to fail");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// What the token endpoint said.
pub struct TokenReply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// `Err`: no reply; the text says why and holds no secret.
pub type TokenFuture = Pin<Box<dyn Future<Output = Result<TokenReply, String>> + Send>>;

/// Where tokens come from. Tests and simulations have their own.
pub trait TokenEndpoint: Send + Sync + 'static {
    /// Posts the form, one try, bounded in time.
    fn post(&self, form: Vec<(&'static str, String)>) -> TokenFuture;
}

/// The account's `token_uri`, by reqwest.
pub(super) struct HttpTokenEndpoint {
    pub(super) client: reqwest::Client,
    pub(super) url: String,
}

impl TokenEndpoint for HttpTokenEndpoint {
    fn post(&self, form: Vec<(&'static str, String)>) -> TokenFuture {
        let request = self.client.post(&self.url).form(&form);
        Box::pin(async move {
            let mut response = request.send().await.map_err(text_of)?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(text_of)? {
                if body.len() + chunk.len() > MAX_TOKEN_BYTES {
                    return Err("the answer is too long".to_owned());
                }
                body.extend_from_slice(&chunk);
            }
            Ok(TokenReply { status, headers, body })
        })
    }
}

/// reqwest's causes hang below its own words; the URL is left out, for it is configuration and may hold anything.
fn text_of(error: reqwest::Error) -> String {
    use std::error::Error;
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

struct Token {
    header: HeaderValue,
    expires_at: Instant,
    refresh_at: Instant,
}

/// Why a fetch failed: what the waiting targets are told.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Refused {
    pub(super) outcome: SendOutcome,
    pause: Duration,
}

type Fetch = Pin<Box<dyn Future<Output = Result<Grant, Refused>> + Send>>;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Grant {
    pub(super) access_token: String,
    pub(super) life: Duration,
}

/// The access token of one service account.
pub(super) struct AccessTokens {
    runtime: Runtime,
    account: Arc<ServiceAccount>,
    endpoint: Arc<dyn TokenEndpoint>,
    token: Option<Token>,
    fetch: Option<(Fetch, Instant)>,
    refused: Option<(SendOutcome, Instant)>,
    generation: u32,
}

impl AccessTokens {
    pub(super) fn new(runtime: Runtime, account: Arc<ServiceAccount>, endpoint: Arc<dyn TokenEndpoint>) -> Self {
        Self { runtime, account, endpoint, token: None, fetch: None, refused: None, generation: 0 }
    }

    /// `bearer …`, marked sensitive, once [`AccessTokens::poll`] was ready.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        self.token.as_ref().map(|token| token.header.clone())
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// Google refused the token of `generation`.
    pub(super) fn rejected(&mut self, generation: u32) {
        if generation == self.generation {
            self.generation = self.generation.wrapping_add(1);
            self.token = None;
        }
    }

    pub(super) fn poll(&mut self, now: Instant, cx: &mut Context<'_>) -> AuthState {
        let is_good = self.token.as_ref().is_some_and(|token| now + UNUSED_AT_END < token.expires_at);
        let is_fresh = self.token.as_ref().is_some_and(|token| now < token.refresh_at);
        if is_good && is_fresh {
            return AuthState::Ready;
        }
        if let Some((outcome, until)) = &self.refused {
            if now < *until {
                return if is_good { AuthState::Ready } else { AuthState::Failed(outcome.clone()) };
            }
            self.refused = None;
        }
        let (fetch, began) = self.fetch.get_or_insert_with(|| {
            let fetch = fetch(self.runtime.clone(), Arc::clone(&self.account), Arc::clone(&self.endpoint));
            (Box::pin(fetch), now)
        });
        let Poll::Ready(result) = fetch.as_mut().poll(cx) else {
            return if is_good { AuthState::Ready } else { AuthState::Waiting };
        };
        let began = *began;
        self.fetch = None;
        match result {
            Ok(grant) => {
                let Ok(mut header) = HeaderValue::try_from(format!("Bearer {}", grant.access_token)) else {
                    return self.refuse(unreadable("the access token is no header value"), now, is_good);
                };
                header.set_sensitive(true);
                self.token = Some(Token {
                    header,
                    expires_at: began + grant.life,
                    // Half of a short life, so that a short-lived token is not fetched all the time.
                    refresh_at: began + grant.life.saturating_sub(REFRESH_BEFORE.min(grant.life / 2)),
                });
                self.generation = self.generation.wrapping_add(1);
                AuthState::Ready
            }
            Err(refused) => self.refuse(refused, now, is_good),
        }
    }

    fn refuse(&mut self, refused: Refused, now: Instant, is_good: bool) -> AuthState {
        if let SendOutcome::SenderBroken { answer, .. } | SendOutcome::RetryLater { answer, .. } = &refused.outcome {
            tracing::warn!(%answer, "no access token from Google");
        }
        self.refused = Some((refused.outcome.clone(), now + refused.pause));
        if is_good { AuthState::Ready } else { AuthState::Failed(refused.outcome) }
    }
}

/// Up to three tries, where the endpoint's answer is one that passes.
async fn fetch(
    runtime: Runtime,
    account: Arc<ServiceAccount>,
    endpoint: Arc<dyn TokenEndpoint>,
) -> Result<Grant, Refused> {
    let mut tries = 0;
    loop {
        tries += 1;
        let form = vec![("grant_type", GRANT_TYPE.to_owned()), ("assertion", account.assertion(runtime.now()))];
        let reply = runtime.timeout(FETCH_TIMEOUT, endpoint.post(form)).await;
        let refused = match reply.unwrap_or_else(|| Err("timeout".to_owned())) {
            Ok(reply) => match read(&reply, runtime.now()) {
                Ok(grant) => return Ok(grant),
                Err(refused) => refused,
            },
            Err(why) => failed(RetryCause::Transport, None, 0, &why),
        };
        let passes = matches!(refused.outcome, SendOutcome::RetryLater { after: None, .. });
        if !passes || tries >= MAX_TRIES {
            return Err(refused);
        }
        let wait = TRY_AGAIN_AFTER * (1 << (tries - 1));
        runtime.sleep(wait.mul_f64(0.5 + runtime.random_unit())).await;
    }
}

fn failed(cause: RetryCause, after: Option<Duration>, status: u16, why: &str) -> Refused {
    let answer = ProviderAnswer::new(status, &format!("access token: {why}"));
    let pause = after.unwrap_or(PAUSE_FAILED).min(PAUSE_BROKEN);
    Refused { outcome: SendOutcome::RetryLater { cause, after, answer }, pause }
}

fn broken(status: u16, why: &str) -> Refused {
    let answer = ProviderAnswer::new(status, &format!("access token: {why}"));
    Refused { outcome: SendOutcome::SenderBroken { scope: FaultScope::Credential, answer }, pause: PAUSE_BROKEN }
}

fn unreadable(why: &str) -> Refused {
    failed(RetryCause::ServerError, None, 200, why)
}

/// RFC 6749 section 5, with Google's liberties: `expires_in` may be a string.
pub(super) fn read(reply: &TokenReply, now: UnixMs) -> Result<Grant, Refused> {
    let body = serde_json::from_slice::<Value>(&reply.body).unwrap_or_default();
    let after = retry_after(&reply.headers, now);
    match reply.status {
        200 => {
            let access_token = body["access_token"].as_str().filter(|token| !token.is_empty());
            let Some(access_token) = access_token else { return Err(unreadable("the answer holds none")) };
            let secs = match &body["expires_in"] {
                Value::Number(number) => number.as_u64(),
                Value::String(text) => text.parse().ok(),
                _ => None,
            };
            let life = secs.map_or(DEFAULT_LIFE, |secs| Duration::from_secs(secs.clamp(1, 24 * 3600)));
            Ok(Grant { access_token: access_token.to_owned(), life })
        }
        status @ (408 | 429) => Err(failed(RetryCause::Throttled, after, status, "asked to slow down")),
        status @ 500.. => Err(failed(RetryCause::ServerError, after, status, "server error")),
        // invalid_grant: the key was deleted, or our clock is wrong. The rest is no better.
        status => {
            let error = body["error"].as_str().unwrap_or("refused");
            let hint = if error == "invalid_grant" { " (key deleted, or the clock is wrong)" } else { "" };
            Err(broken(status, &format!("{error}{hint}")))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use aws_lc_rs::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};

    use super::*;

    /// A 2048-bit key in PKCS#8 PEM form, good for tests only; made anew for each run.
    pub(in crate::senders) fn private_key_pem() -> String {
        use aws_lc_rs::encoding::AsDer;
        use std::sync::OnceLock;
        static PEM: OnceLock<String> = OnceLock::new();
        PEM.get_or_init(|| {
            let key = RsaKeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).expect("generates");
            let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = key.as_der().expect("encodes");
            let base64 = base64::engine::general_purpose::STANDARD.encode(der.as_ref());
            let lines: Vec<&str> =
                base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
            format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n"))
        })
        .clone()
    }

    fn account() -> Arc<ServiceAccount> {
        let account = ServiceAccount::new("a@b.iam.gserviceaccount.com".into(), "kid-1".into(), &private_key_pem());
        Arc::new(account.expect("a key"))
    }

    #[derive(Default)]
    struct Script {
        replies: Mutex<VecDeque<Result<TokenReply, String>>>,
        posts: Mutex<u32>,
    }

    impl TokenEndpoint for Script {
        fn post(&self, form: Vec<(&'static str, String)>) -> TokenFuture {
            assert_eq!(form[0], ("grant_type", GRANT_TYPE.to_owned()));
            *self.posts.lock().expect("lock") += 1;
            let reply = self.replies.lock().expect("lock").pop_front();
            Box::pin(async move {
                match reply {
                    Some(reply) => reply,
                    None => std::future::pending().await,
                }
            })
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the script is made of results")]
    fn reply(status: u16, body: &str) -> Result<TokenReply, String> {
        Ok(TokenReply { status, headers: HeaderMap::new(), body: body.as_bytes().to_vec() })
    }

    fn script(replies: impl IntoIterator<Item = Result<TokenReply, String>>) -> Arc<Script> {
        Arc::new(Script { replies: Mutex::new(replies.into_iter().collect()), posts: Mutex::new(0) })
    }

    fn tokens(endpoint: &Arc<Script>) -> AccessTokens {
        let endpoint: Arc<dyn TokenEndpoint> = Arc::clone(endpoint) as _;
        AccessTokens::new(Runtime::simulated(1, UnixMs(1_800_000_000_000)), account(), endpoint)
    }

    async fn settle(tokens: &mut AccessTokens) -> AuthState {
        std::future::poll_fn(|cx| {
            let now = tokens.runtime.instant();
            match tokens.poll(now, cx) {
                AuthState::Waiting => Poll::Pending,
                state => Poll::Ready(state),
            }
        })
        .await
    }

    fn outcome(state: AuthState) -> SendOutcome {
        match state {
            AuthState::Failed(outcome) => outcome,
            AuthState::Ready | AuthState::Waiting => panic!("expected a failure"),
        }
    }

    #[test]
    fn the_assertion_says_what_google_wants_and_is_signed() {
        let account = account();
        let assertion = account.assertion(UnixMs(1_800_000_000_500));
        let parts: Vec<&str> = assertion.split('.').collect();
        let json = |part: &str| -> Value {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
        };
        assert_eq!(json(parts[0]), json!({"alg": "RS256", "typ": "JWT", "kid": "kid-1"}));
        let claims = json(parts[1]);
        assert_eq!(claims["iat"], 1_800_000_000);
        assert_eq!(claims["exp"], 1_800_003_600);
        assert_eq!(claims["aud"], AUDIENCE);
        assert_eq!(claims["scope"], SCOPE);
        let signature = URL_SAFE_NO_PAD.decode(parts[2]).expect("base64url");
        let signed = format!("{}.{}", parts[0], parts[1]);
        UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, account.key.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .expect("our signature");
    }

    #[tokio::test(start_paused = true)]
    async fn one_fetch_serves_all_and_is_renewed_before_the_end() {
        let endpoint = script([
            reply(200, r#"{"access_token":"one","expires_in":3600}"#),
            reply(200, r#"{"access_token":"two","expires_in":"3600"}"#),
        ]);
        let mut tokens = tokens(&endpoint);
        for _ in 0..5 {
            assert!(matches!(settle(&mut tokens).await, AuthState::Ready));
        }
        let header = tokens.header().expect("there");
        assert!(header == "Bearer one" && header.is_sensitive());
        tokio::time::advance(Duration::from_secs(3600 - 226)).await;
        settle(&mut tokens).await;
        assert_eq!(*endpoint.posts.lock().expect("lock"), 1);
        tokio::time::advance(Duration::from_secs(2)).await;
        settle(&mut tokens).await;
        assert_eq!(*endpoint.posts.lock().expect("lock"), 2, "while the old one is still good");
        assert_eq!(tokens.header().expect("there"), "Bearer two");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_endpoint_is_tried_three_times_and_then_left_alone() {
        let endpoint = script([
            reply(503, ""),
            Err("refused".to_owned()),
            reply(429, "<html>"),
            reply(200, r#"{"access_token":"late"}"#),
        ]);
        let mut tokens = tokens(&endpoint);
        let first = outcome(settle(&mut tokens).await);
        assert!(matches!(first, SendOutcome::RetryLater { cause: RetryCause::Throttled, .. }), "{first:?}");
        assert_eq!(*endpoint.posts.lock().expect("lock"), 3);
        assert_eq!(outcome(settle(&mut tokens).await), first, "at once, without another fetch");
        assert_eq!(*endpoint.posts.lock().expect("lock"), 3);
        tokio::time::advance(PAUSE_FAILED).await;
        assert!(matches!(settle(&mut tokens).await, AuthState::Ready));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_key_breaks_the_sender_at_the_first_try() {
        let endpoint = script([reply(400, r#"{"error":"invalid_grant","error_description":"Invalid JWT"}"#)]);
        let mut tokens = tokens(&endpoint);
        let broken = outcome(settle(&mut tokens).await);
        let SendOutcome::SenderBroken { answer, .. } = broken else { panic!("{broken:?}") };
        assert!(answer.reason.contains("invalid_grant"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_endpoint_is_given_up() {
        let mut tokens = tokens(&script([]));
        let began = tokens.runtime.instant();
        assert!(matches!(outcome(settle(&mut tokens).await), SendOutcome::RetryLater { .. }));
        assert!(tokens.runtime.instant() - began < Duration::from_secs(20));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_dropped_once() {
        let endpoint = script([reply(200, r#"{"access_token":"one"}"#), reply(200, r#"{"access_token":"two"}"#)]);
        let mut tokens = tokens(&endpoint);
        settle(&mut tokens).await;
        let generation = tokens.generation();
        tokens.rejected(generation);
        settle(&mut tokens).await;
        tokens.rejected(generation);
        settle(&mut tokens).await;
        assert_eq!(*endpoint.posts.lock().expect("lock"), 2, "late answers to the old token count no more");
    }
}
