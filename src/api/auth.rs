//! Who calls: API keys and client certificates, checked before anything of a request is read.
//!
//! A key is sent as `authorization: Bearer nk_…`; the server knows only its SHA-256. Over TLS with client certificates
//! a key may name a certificate instead (SHA-256 of its DER). When both are presented the bearer key decides. Without
//! any configured key every caller may do everything; the composition root allows that on loopback only.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http::{HeaderMap, Request, Response, header};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tonic::body::Body;
use tower::Service;
use tower_layer::Layer;

use crate::domain::ids::AppId;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Runtime;

use super::incoming::ClientCertificate;
use super::scopes::{self, Access, Scope, Scopes};
use super::status::{self, ApiError};

/// Which apps a key is bound to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BoundApps {
    All,
    Only(Vec<AppId>),
}

impl BoundApps {
    #[must_use]
    pub fn allows(&self, app: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(apps) => apps.iter().any(|bound| bound.as_str() == app),
        }
    }
}

/// One `[[keys]]` entry. Holds hashes only.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiKey {
    pub name: Arc<str>,
    /// SHA-256 of the key's text.
    pub sha256: Option<[u8; 32]>,
    /// SHA-256 of a client certificate's DER that stands for this key.
    pub client_cert_sha256: Option<[u8; 32]>,
    pub apps: BoundApps,
    pub scopes: Scopes,
    /// Refused from then on.
    pub expires_at: Option<UnixMs>,
}

impl ApiKey {
    /// What the configuration holds instead of a key's text (or of a certificate's DER).
    #[must_use]
    pub fn hash(presented: &[u8]) -> [u8; 32] {
        Sha256::digest(presented).into()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AuthError {
    #[error("a key is required: send it as `authorization: Bearer …`")]
    Missing,
    #[error("the key is not valid")]
    Invalid,
    #[error("the key has expired")]
    Expired,
    #[error("the key lacks the scope `{}`", .0.name())]
    ScopeMissing(Scope),
    #[error("there is no such method")]
    UnknownMethod,
}

/// Who calls; put into the request's extensions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// `None`: no keys are configured.
    key: Option<Arc<ApiKey>>,
    generation: u64,
}

impl Caller {
    /// The key's name, for the consent history; never the key.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.key.as_deref().map(|key| &*key.name)
    }

    #[must_use]
    pub fn apps(&self) -> &BoundApps {
        self.key.as_deref().map_or(&BoundApps::All, |key| &key.apps)
    }

    #[must_use]
    pub fn has(&self, scope: Scope) -> bool {
        self.key.as_deref().is_none_or(|key| key.scopes.has(scope))
    }
}

/// The configured keys; can be replaced while serving.
pub struct KeyRing {
    keys: RwLock<Vec<Arc<ApiKey>>>,
    /// Counts replacements, so that a stream notices that its key may be gone.
    generation: AtomicU64,
}

impl KeyRing {
    #[must_use]
    pub fn new(keys: Vec<ApiKey>) -> Self {
        Self { keys: RwLock::new(keys.into_iter().map(Arc::new).collect()), generation: AtomicU64::new(1) }
    }

    /// Takes effect for every request from now on, and for open streams at their next event.
    pub fn replace(&self, keys: Vec<ApiKey>) {
        let keys = keys.into_iter().map(Arc::new).collect();
        *self.keys.write().expect("no panic while held") = keys;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Whether no key is configured and every caller may do everything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.keys.read().expect("no panic while held").is_empty()
    }

    /// `bearer`: the presented key. `certificate`: the DER of the client's certificate.
    pub fn authenticate(
        &self,
        bearer: Option<&[u8]>,
        certificate: Option<&[u8]>,
        now: UnixMs,
    ) -> Result<Caller, AuthError> {
        let generation = self.generation.load(Ordering::Acquire);
        let keys = self.keys.read().expect("no panic while held");
        if keys.is_empty() {
            return Ok(Caller { key: None, generation });
        }
        let key = match (bearer, certificate) {
            (Some(bearer), _) => find(&keys, bearer, |key| key.sha256.as_ref()),
            (None, Some(certificate)) => find(&keys, certificate, |key| key.client_cert_sha256.as_ref()),
            (None, None) => return Err(AuthError::Missing),
        };
        let key = key.ok_or(AuthError::Invalid)?;
        if key.expires_at.is_some_and(|end| end <= now) && !planted::is("expired-key-taken") {
            return Err(AuthError::Expired);
        }
        Ok(Caller { key: Some(Arc::clone(key)), generation })
    }

    /// The caller as the ring knows it now: a long stream's key may have expired, changed or gone.
    pub fn refresh(&self, caller: &Caller, now: UnixMs) -> Result<Caller, AuthError> {
        let generation = self.generation.load(Ordering::Acquire);
        let mut current = caller.clone();
        if generation != caller.generation && !planted::is("lost-key-keeps-its-stream") {
            let keys = self.keys.read().expect("no panic while held");
            current.generation = generation;
            current.key = match &caller.key {
                // Keys were configured since: whoever came without one has to show one.
                None if keys.is_empty() => None,
                None => return Err(AuthError::Missing),
                Some(old) => {
                    let same = |key: &&Arc<ApiKey>| {
                        key.sha256 == old.sha256 && key.client_cert_sha256 == old.client_cert_sha256
                    };
                    Some(Arc::clone(keys.iter().find(same).ok_or(AuthError::Invalid)?))
                }
            };
        }
        match &current.key {
            Some(key) if key.expires_at.is_some_and(|end| end <= now) => Err(AuthError::Expired),
            _ => Ok(current),
        }
    }
}

/// Compares with every key, whichever matches, so that the time taken tells nothing.
fn find<'a>(
    keys: &'a [Arc<ApiKey>],
    presented: &[u8],
    hash: impl Fn(&ApiKey) -> Option<&[u8; 32]>,
) -> Option<&'a Arc<ApiKey>> {
    let presented = ApiKey::hash(presented);
    let mut found = None;
    for key in keys {
        if let Some(hash) = hash(key)
            && bool::from(hash.ct_eq(&presented))
        {
            found = Some(key);
        }
    }
    found
}

/// Authenticates every request and checks its scope.
#[derive(Clone)]
pub struct AuthLayer {
    keys: Arc<KeyRing>,
    runtime: Runtime,
}

impl AuthLayer {
    #[must_use]
    pub fn new(keys: Arc<KeyRing>, runtime: Runtime) -> Self {
        Self { keys, runtime }
    }

    fn admit<B>(&self, request: &Request<B>) -> Result<Option<Caller>, AuthError> {
        let access = scopes::needed(request.uri().path());
        if access == Some(Access::Open) {
            return Ok(None);
        }
        let bearer = bearer(request.headers())?;
        let certificate = request.extensions().get().map(ClientCertificate::der);
        let caller = self.keys.authenticate(bearer, certificate, self.runtime.now())?;
        match access {
            // What is in no table is never served. Told only to those with a key.
            None => Err(AuthError::UnknownMethod),
            Some(Access::Scope(scope))
                if !(caller.has(scope)
                    || planted::is("scope-not-asked") && request.uri().path().ends_with("/CancelNotification")) =>
            {
                Err(AuthError::ScopeMissing(scope))
            }
            Some(Access::Scope(_) | Access::AnyKey | Access::Open) => Ok(Some(caller)),
        }
    }
}

/// The presented key; another scheme is a wrong credential, not a missing one.
fn bearer(headers: &HeaderMap) -> Result<Option<&[u8]>, AuthError> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let (scheme, key) = value.as_bytes().split_at_checked(7).ok_or(AuthError::Invalid)?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") {
        return Err(AuthError::Invalid);
    }
    Ok(Some(key.trim_ascii()))
}

impl<S> Layer<S> for AuthLayer {
    type Service = Authenticated<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authenticated { inner, layer: self.clone() }
    }
}

/// See [`AuthLayer`].
#[derive(Clone)]
pub struct Authenticated<S> {
    inner: S,
    layer: AuthLayer,
}

impl<S, B> Service<Request<B>> for Authenticated<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.layer.admit(&request) {
            Ok(caller) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                Either::Left(self.inner.call(request))
            }
            Err(error) => {
                tracing::debug!(path = request.uri().path(), %error, "a request was refused");
                let status = status::status(&ApiError::Auth(error), &self.layer.runtime);
                Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);

    fn key(name: &str, text: &str, expires_at: Option<UnixMs>) -> ApiKey {
        ApiKey {
            name: Arc::from(name),
            sha256: Some(Sha256::digest(text).into()),
            client_cert_sha256: None,
            apps: BoundApps::All,
            scopes: Scopes::all(),
            expires_at,
        }
    }

    #[test]
    fn a_key_is_found_by_its_hash_until_it_expires() {
        let ring = KeyRing::new(vec![key("a", "nk_a", None), key("b", "nk_b", Some(UnixMs(1_001)))]);
        let name = |bearer: &[u8], now| ring.authenticate(Some(bearer), None, now).map(|c| c.name().map(str::to_owned));
        assert_eq!(name(b"nk_a", NOW), Ok(Some("a".to_owned())));
        assert_eq!(name(b"nk_b", NOW), Ok(Some("b".to_owned())));
        assert_eq!(name(b"nk_b", UnixMs(1_001)), Err(AuthError::Expired));
        assert_eq!(name(b"nk_c", NOW), Err(AuthError::Invalid));
        assert_eq!(ring.authenticate(None, None, NOW), Err(AuthError::Missing));
    }

    #[test]
    fn a_certificate_stands_for_its_key() {
        let by_cert =
            ApiKey { sha256: None, client_cert_sha256: Some(Sha256::digest(b"der").into()), ..key("c", "", None) };
        let ring = KeyRing::new(vec![by_cert]);
        assert_eq!(ring.authenticate(None, Some(b"der"), NOW).expect("known").name(), Some("c"));
        assert_eq!(ring.authenticate(None, Some(b"other"), NOW), Err(AuthError::Invalid));
        assert_eq!(ring.authenticate(Some(b"der"), None, NOW), Err(AuthError::Invalid), "no hash, no key");
    }

    #[test]
    fn an_open_stream_notices_that_its_key_is_gone() {
        let ring = KeyRing::new(vec![key("a", "nk_a", None)]);
        let caller = ring.authenticate(Some(b"nk_a"), None, NOW).expect("known");
        assert_eq!(ring.refresh(&caller, NOW), Ok(caller.clone()));
        let fewer = ApiKey { scopes: [Scope::Read].into_iter().collect(), ..key("a", "nk_a", Some(UnixMs(2_000))) };
        ring.replace(vec![fewer]);
        assert!(!ring.refresh(&caller, NOW).expect("still known").has(Scope::Notify));
        assert_eq!(ring.refresh(&caller, UnixMs(2_000)), Err(AuthError::Expired));
        ring.replace(vec![key("b", "nk_b", None)]);
        assert_eq!(ring.refresh(&caller, NOW), Err(AuthError::Invalid));
    }

    #[test]
    fn only_bearer_is_understood() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, http::HeaderValue::from_static(text));
            bearer(&headers).map(|key| key.map(<[u8]>::to_vec))
        };
        assert_eq!(read("Bearer nk_x"), Ok(Some(b"nk_x".to_vec())));
        assert_eq!(read("bearer nk_x"), Ok(Some(b"nk_x".to_vec())));
        assert_eq!(read("Basic nk_x"), Err(AuthError::Invalid));
        assert_eq!(read("x"), Err(AuthError::Invalid));
    }
}
