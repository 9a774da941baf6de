//! The fake providers over byte streams that somebody brings along: without ports and TLS, on any clock. With them a
//! simulation plays the faults that a sandbox plays, to the byte.

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::BodyExt as _;
use tokio::io::{AsyncRead, AsyncWrite};

use super::credentials::{self, Identity};
use super::h2_server::{Host, Service};
use super::{Credentials, Fault, Options, Received, SandboxError, Shared, apns, fcm, hosts, oauth};
use crate::runtime::Runtime;

/// Where the service account says that access tokens come from; nobody listens there.
const TOKEN_URI: &str = "https://localhost/token";

/// Keys and certificates, which take longer to make than a simulation to run. Good for any number of providers with the
/// same bundle id and project.
#[derive(Clone)]
pub struct Keys(Arc<Identity>);

impl Keys {
    pub fn new(runtime: &Runtime, options: &Options) -> Result<Self, SandboxError> {
        credentials::prepare(runtime, options, TOKEN_URI).map(|identity| Self(Arc::new(identity)))
    }

    pub fn credentials(&self) -> &Credentials {
        &self.0.credentials
    }
}

/// Fake APNs and FCM. Their connections live as long as their peers want, or `runtime`.
pub struct Pipes {
    shared: Arc<Shared>,
    apns: Arc<Host<apns::Apns>>,
    fcm: Arc<Host<fcm::Fcm>>,
    oauth: oauth::Oauth,
}

impl Pipes {
    /// Of the options those about listening, files and the server's configuration mean nothing here.
    pub fn new(runtime: &Runtime, options: Options, keys: &Keys) -> Result<Self, SandboxError> {
        options.check()?;
        let shared = Shared::new(runtime, options);
        let (apns, fcm) = hosts(&shared, &keys.0);
        let oauth = oauth::Oauth::new(&shared, &keys.0, TOKEN_URI.to_owned());
        Ok(Self { shared, apns: Arc::new(apns), fcm: Arc::new(fcm), oauth })
    }

    /// The other end of a connection to APNs.
    pub fn apns<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, io: T) {
        self.serve(&self.apns, io);
    }

    /// The other end of a connection to FCM.
    pub fn fcm<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, io: T) {
        self.serve(&self.fcm, io);
    }

    fn serve<S: Service, T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, host: &Arc<Host<S>>, io: T) {
        let host = Arc::clone(host);
        // It ends with the stream.
        drop(self.shared.runtime.spawn(async move { host.serve(io).await }));
    }

    /// What the token endpoint answers to this form.
    pub async fn exchange(&self, form: &[(&str, String)]) -> (StatusCode, Bytes) {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        let (head, body) = self.oauth.post(&headers, encoded(form).as_bytes()).await.into_parts();
        let body = body.collect().await.unwrap_or_else(|never| match never {});
        (head.status, body.to_bytes())
    }

    /// Refused when it makes no sense, or when too many wait already.
    pub fn add_fault(&self, fault: Fault) -> Result<(), SandboxError> {
        self.shared.faults.add(fault)
    }

    /// The pushes still in the record, oldest first.
    pub fn received(&self) -> Vec<Arc<Received>> {
        self.shared.record.all()
    }
}

fn encoded(form: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in form {
        let _ = write!(text, "{}{name}=", if text.is_empty() { "" } else { "&" });
        for byte in value.bytes() {
            let _ = if byte.is_ascii_alphanumeric() {
                write!(text, "{}", char::from(byte))
            } else {
                write!(text, "%{byte:02x}")
            };
        }
    }
    text
}
