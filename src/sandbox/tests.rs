//! The sandbox seen by a client of its own: bare h2, signatures by hand, no sender code.

mod apns;
mod control;
mod faults;
mod fcm;
mod files;
mod oauth;

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request, StatusCode};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::runtime::Runtime;

const TOKEN: &str = "00fc13adff785122b4ad28809a3420982341241421348097878e577c991de8f0";
const TOPIC: &str = "com.ifriendspet.app";

/// Enough for a loaded machine; nothing waits this long when it works.
const PATIENCE: Duration = Duration::from_secs(30);

async fn start(options: Options) -> Sandbox {
    Sandbox::start(&Runtime::production(), options).await.unwrap()
}

fn port(endpoint: &str) -> u16 {
    let address = endpoint.strip_prefix("https://").unwrap();
    address.split('/').next().unwrap().rsplit(':').next().unwrap().parse().unwrap()
}

async fn tls(sandbox: &Sandbox, endpoint: &str, protocol: &str, certificate: bool) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(sandbox.ca_pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = if certificate {
        let credentials = sandbox.credentials();
        let chain = vec![CertificateDer::from_pem_slice(credentials.client_cert_pem.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(credentials.client_key_pem.as_bytes()).unwrap();
        builder.with_client_auth_cert(chain, key).unwrap()
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let address = ([127, 0, 0, 1], port(endpoint)).into();
    let tcp = Runtime::production().connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
}

struct Client {
    send: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// APNs' status and reason.
    fn apns(&self) -> (u16, String) {
        (self.status.as_u16(), self.json()["reason"].as_str().unwrap_or_default().to_owned())
    }
}

impl Client {
    async fn open(sandbox: &Sandbox, endpoint: &str, certificate: bool) -> Self {
        let stream = tls(sandbox, endpoint, "h2", certificate).await;
        let (send, connection) =
            h2::client::Builder::new().initial_max_send_streams(1).handshake(stream).await.unwrap();
        Self { send, connection: Runtime::production().spawn(connection) }
    }

    async fn apns(sandbox: &Sandbox) -> Self {
        Self::open(sandbox, sandbox.apns_endpoint(), false).await
    }

    async fn fcm(sandbox: &Sandbox) -> Self {
        Self::open(sandbox, sandbox.fcm_endpoint(), false).await
    }

    /// Puts a request on the wire (when the peer's limit allows) without waiting for the answer.
    async fn start(&mut self, request: Request<Bytes>) -> Result<ResponseFuture, h2::Error> {
        std::future::poll_fn(|cx| self.send.poll_ready(cx)).await?;
        let (head, body) = request.into_parts();
        let (answer, mut stream) = self.send.send_request(Request::from_parts(head, ()), body.is_empty())?;
        if !body.is_empty() {
            stream.send_data(body, true)?;
        }
        Ok(answer)
    }

    async fn send(&mut self, request: Request<Bytes>) -> Result<Answer, h2::Error> {
        let answer = self.start(request).await?;
        finish(answer).await
    }

    /// How the connection ended.
    async fn ended(self) -> Result<(), h2::Error> {
        drop(self.send);
        patient(self.connection).await.unwrap()
    }
}

async fn finish(answer: ResponseFuture) -> Result<Answer, h2::Error> {
    let (head, mut body) = patient(answer).await?.into_parts();
    let mut bytes = Vec::new();
    while let Some(data) = patient(body.data()).await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(Answer { status: head.status, headers: head.headers, body: bytes.into() })
}

async fn patient<F: Future>(future: F) -> F::Output {
    Runtime::production().timeout(PATIENCE, future).await.expect("an answer in time")
}

/// A compact JWS over these parts.
fn jws(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let signed = format!("{}.{}", encode(header), encode(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

fn es256(pem: &str) -> impl Fn(&[u8]) -> Vec<u8> {
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der()).unwrap();
    move |bytes| key.sign(&SystemRandom::new(), bytes).unwrap().as_ref().to_vec()
}

fn rs256(pem: &str) -> impl Fn(&[u8]) -> Vec<u8> {
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap();
    let key = rsa::KeyPair::from_pkcs8(der.secret_pkcs8_der()).unwrap();
    move |bytes| {
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), bytes, &mut signature).unwrap();
        signature
    }
}

fn now_secs() -> i64 {
    Runtime::production().now().secs()
}

/// A provider token issued `age_secs` ago.
pub(super) fn provider_token(credentials: &Credentials, age_secs: i64) -> String {
    jws(
        &json!({ "alg": "ES256", "kid": credentials.key_id }),
        &json!({ "iss": credentials.team_id, "iat": now_secs() - age_secs }),
        es256(&credentials.apns_key_pem),
    )
}

/// A push to APNs that is in order; tests break one thing at a time.
fn alert(jwt: &str) -> Request<Bytes> {
    Request::post(format!("https://localhost/3/device/{TOKEN}"))
        .header("authorization", format!("bearer {jwt}"))
        .header("apns-topic", TOPIC)
        .header("apns-push-type", "alert")
        .header("apns-priority", "10")
        .header("apns-expiration", "0")
        .header("apns-id", "123e4567-e89b-42d3-a456-426614174000")
        .body(Bytes::from(r#"{"aps":{"alert":{"title":"초코","body":"새 글"}},"nudged_id":"n-1"}"#))
        .unwrap()
}

/// An assertion for the token endpoint with these claims over the ordinary ones.
fn assertion(sandbox: &Sandbox, over: &Value) -> String {
    let credentials = sandbox.credentials();
    let iat = now_secs();
    let mut claims = json!({
        "iss": credentials.client_email,
        "scope": "https://www.googleapis.com/auth/firebase.messaging",
        "aud": sandbox.token_endpoint(),
        "iat": iat,
        "exp": iat + 3600,
    });
    for (key, value) in over.as_object().unwrap() {
        claims[key] = value.clone();
    }
    jws(
        &json!({ "alg": "RS256", "typ": "JWT", "kid": credentials.private_key_id }),
        &claims,
        rs256(&credentials.service_account_key_pem),
    )
}

fn exchange(assertion: &str) -> Request<Bytes> {
    let grant = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer";
    Request::post("https://localhost/token")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(format!("grant_type={grant}&assertion={assertion}").into())
        .unwrap()
}

async fn access_token(sandbox: &Sandbox) -> String {
    let mut client = Client::open(sandbox, sandbox.token_endpoint(), false).await;
    let answer = client.send(exchange(&assertion(sandbox, &json!({})))).await.unwrap();
    answer.json()["access_token"].as_str().unwrap().to_owned()
}

fn fcm_send(access_token: &str, body: &Value) -> Request<Bytes> {
    Request::post("https://localhost/v1/projects/ifriendspet/messages:send")
        .header("authorization", format!("Bearer {access_token}"))
        .header("content-type", "application/json")
        .body(body.to_string().into())
        .unwrap()
}
