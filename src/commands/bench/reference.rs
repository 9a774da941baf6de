//! What a push costs at least: bare `h2` on one thread, with gathered writes, one task per stream in flight.
//!
//! It sends what the server sends (a template taken from the server's own pushes, with the same headers), to the same
//! people, over as many connections and streams, to the same fake providers. It keeps nothing, asks nobody and retries
//! nothing.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Request};
use rustls::ClientConfig;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::control::Push;
use super::people;
use super::process::cpu_us;
use super::tls;
use crate::domain::platform::Platform;
use crate::runtime::Runtime;
use crate::sandbox::{KEY_ID, TEAM_ID};

/// Where [`Templates`] are.
pub const FILE: &str = "reference.json";

#[derive(clap::Args)]
pub struct ReferenceArgs {
    /// The sandbox's directory.
    #[arg(long)]
    dir: PathBuf,
    /// Pushes, half of them each platform's.
    #[arg(long)]
    pushes: u32,
    /// Registered people.
    #[arg(long)]
    devices: u32,
    /// Connections to APNs and to FCM.
    #[arg(long)]
    connections: u32,
    /// Requests in flight on each.
    #[arg(long)]
    streams: u32,
}

/// What it says at its end, as JSON on standard output.
#[derive(Serialize, Deserialize, Clone, Copy)]
pub struct Answer {
    pub pushes: u64,
    pub cpu_us: u64,
    pub wall_us: u64,
}

/// One push of each platform as the server sent it.
#[derive(Serialize, Deserialize)]
pub struct Templates {
    apns: Template,
    fcm: Template,
}

#[derive(Serialize, Deserialize)]
struct Template {
    headers: Vec<(String, String)>,
    token: String,
    nudged_id: String,
    body: String,
}

impl Templates {
    /// From pushes that the sandbox recorded; `None` while one platform is missing.
    pub fn of(pushes: &[Push]) -> Option<Self> {
        let template = |platform: &str| {
            let push = pushes.iter().rev().find(|push| push.platform == platform && push.accepted)?;
            let mut headers = Vec::new();
            for (name, value) in [
                ("apns-topic", &push.apns_topic),
                ("apns-push-type", &push.push_type),
                ("apns-priority", &push.priority),
                ("apns-expiration", &push.expiration),
            ] {
                if let Some(value) = value.as_ref().filter(|_| platform == "apns") {
                    headers.push((name.to_owned(), value.clone()));
                }
            }
            let (token, nudged_id) = (push.token.clone(), push.nudged_id.clone()?);
            Some(Template { headers, token, nudged_id, body: push.body.to_string() })
        };
        Some(Self { apns: template("apns")?, fcm: template("fcm")? })
    }

    pub fn body_bytes(&self) -> (usize, usize) {
        (self.apns.body.len(), self.fcm.body.len())
    }
}

pub fn run(args: &ReferenceArgs, runtime: &Runtime) -> anyhow::Result<()> {
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let answer = threads.block_on(local.run_until(send_all(args, runtime)))?;
    println!("{}", serde_json::to_string(&answer)?);
    Ok(())
}

async fn send_all(args: &ReferenceArgs, runtime: &Runtime) -> anyhow::Result<Answer> {
    let read = |name: &str| {
        let path = args.dir.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let templates: Templates = serde_json::from_str(&read(FILE)?)?;
    let endpoints: Value = serde_json::from_str(&read("sandbox.json")?)?;
    let service_account: Value = serde_json::from_str(&read("service-account.json")?)?;
    let tls_config = tls::client_config(&args.dir.join("ca.pem"))?;
    let endpoint = |name: &str| endpoints[name].as_str().unwrap_or_default().to_owned();
    let provider_token = provider_token(&read("AuthKey_SANDBOX001.p8")?, runtime)?;
    let access_token = access_token(runtime, &tls_config, &endpoint("token"), &service_account).await?;
    let project = service_account["project_id"].as_str().unwrap_or_default();

    let mut routes = Vec::new();
    for (platform, template, authorization) in [
        (Platform::Apns, &templates.apns, format!("bearer {provider_token}")),
        (Platform::Fcm, &templates.fcm, format!("Bearer {access_token}")),
    ] {
        let name = if platform == Platform::Apns { "apns" } else { "fcm" };
        let path = if platform == Platform::Apns {
            "/3/device/".to_owned()
        } else {
            format!("/v1/projects/{project}/messages:send")
        };
        let route = Rc::new(Route::new(platform, &endpoint(name), path, template, &authorization)?);
        routes.push((tls::address(&endpoint(name))?, route));
    }
    // Tokens are made beforehand: a real sender has them, too.
    let queue: Rc<[Queue; 2]> = Rc::new([Queue::default(), Queue::default()]);
    for at in 0..args.pushes {
        let number = people::someone(args.devices, 7, at);
        let index = usize::from(people::platform(number) == Platform::Fcm);
        queue[index].push(people::token(number));
    }
    let mut senders = Vec::new();
    for (index, (address, route)) in routes.iter().enumerate() {
        for _ in 0..args.connections {
            let sender = tls::connect(runtime, &tls_config, *address).await?;
            // The first request is alone, as APNs wants it, and not measured.
            let Some(token) = queue[index].pop() else { continue };
            route.send(&mut sender.clone().ready().await?, &token, random_id(runtime)).await?;
            senders.push((index, sender, Rc::clone(route)));
        }
    }
    let began = runtime.instant();
    let cpu = cpu_us("self")?;
    let done = Rc::new(Cell::new(0_u64));
    let mut running = Vec::new();
    for (index, sender, route) in senders {
        for _ in 0..args.streams {
            let (mut sender, route, queue, done) =
                (sender.clone(), Rc::clone(&route), Rc::clone(&queue), Rc::clone(&done));
            let runtime_ = runtime.clone();
            running.push(runtime.spawn_local(async move {
                while let Some(token) = queue[index].pop() {
                    sender = sender.ready().await?;
                    route.send(&mut sender, &token, random_id(&runtime_)).await?;
                    done.set(done.get() + 1);
                }
                anyhow::Ok(())
            }));
        }
    }
    for worker in running {
        worker.await??;
    }
    Ok(Answer {
        pushes: done.get(),
        cpu_us: cpu_us("self")? - cpu,
        wall_us: super::load::micros(runtime.instant() - began),
    })
}

fn random_id(runtime: &Runtime) -> u128 {
    u128::from(runtime.random_u64()) << 64 | u128::from(runtime.random_u64())
}

/// Tokens still to be sent to.
#[derive(Default)]
struct Queue(std::cell::RefCell<Vec<String>>);

impl Queue {
    fn push(&self, token: String) {
        self.0.borrow_mut().push(token);
    }

    fn pop(&self) -> Option<String> {
        self.0.borrow_mut().pop()
    }
}

/// A piece of a body.
enum Piece {
    Text(Bytes),
    Token,
    Id,
}

struct Route {
    platform: Platform,
    base: http::uri::Parts,
    path: String,
    headers: HeaderMap,
    pieces: Vec<Piece>,
    body_len: usize,
}

impl Route {
    fn new(
        platform: Platform,
        endpoint: &str,
        path: String,
        template: &Template,
        authorization: &str,
    ) -> anyhow::Result<Self> {
        let mut headers = HeaderMap::new();
        for (name, value) in &template.headers {
            headers.insert(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(value)?);
        }
        if platform == Platform::Apns {
            headers.insert("apns-id", HeaderValue::from_static(""));
            headers.insert("apns-collapse-id", HeaderValue::from_static(""));
        } else {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        headers.insert(AUTHORIZATION, HeaderValue::from_str(authorization)?);
        let base = endpoint.parse::<http::Uri>()?.into_parts();
        let pieces = pieces(template);
        Ok(Self { platform, base, path, headers, pieces, body_len: template.body.len() })
    }

    async fn send(&self, sender: &mut SendRequest<Bytes>, token: &str, id: u128) -> anyhow::Result<()> {
        let id = uuid::Builder::from_custom_bytes(id.to_be_bytes()).into_uuid();
        let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
        let id = &*id.hyphenated().encode_lower(&mut buffer);
        let mut body = BytesMut::with_capacity(self.body_len);
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => body.extend_from_slice(text),
                Piece::Token => body.extend_from_slice(token.as_bytes()),
                Piece::Id => body.extend_from_slice(id.as_bytes()),
            }
        }
        let mut parts = http::uri::Parts::default();
        parts.scheme.clone_from(&self.base.scheme);
        parts.authority.clone_from(&self.base.authority);
        parts.path_and_query = Some(match self.platform {
            Platform::Apns => format!("{}{token}", self.path).parse()?,
            Platform::Fcm => self.path.parse()?,
        });
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = http::Uri::from_parts(parts)?;
        *request.headers_mut() = self.headers.clone();
        if self.platform == Platform::Apns {
            let mut value = HeaderValue::from_str(id)?;
            value.set_sensitive(true);
            request.headers_mut().insert("apns-id", value.clone());
            request.headers_mut().insert("apns-collapse-id", value);
        }
        let (response, mut stream) = sender.send_request(request, false)?;
        stream.send_data(body.freeze(), true)?;
        let response = response.await?;
        let status = response.status();
        let mut answer = response.into_body();
        let mut text = BytesMut::new();
        while let Some(data) = answer.data().await {
            let data = data?;
            answer.flow_control().release_capacity(data.len())?;
            if status != 200 {
                text.extend_from_slice(&data);
            }
        }
        if status != 200 {
            bail!("a push was refused: {status} {}", String::from_utf8_lossy(&text));
        }
        Ok(())
    }
}

/// The body around the token and the id, wherever they stand.
fn pieces(template: &Template) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut rest, mut text) = (template.body.as_str(), String::new());
    while let Some(next) = rest.chars().next() {
        let found = if rest.starts_with(&template.token) {
            Some((Piece::Token, template.token.len()))
        } else if rest.starts_with(&template.nudged_id) {
            Some((Piece::Id, template.nudged_id.len()))
        } else {
            None
        };
        if let Some((piece, length)) = found {
            pieces.push(Piece::Text(std::mem::take(&mut text).into()));
            pieces.push(piece);
            rest = &rest[length..];
        } else {
            text.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    pieces.push(Piece::Text(text.into()));
    pieces
}

fn segment(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// APNs: ES256 over the team and the time.
fn provider_token(key_pem: &str, runtime: &Runtime) -> anyhow::Result<String> {
    let der = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes())?;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der())
        .map_err(|error| anyhow::anyhow!("reading the APNs key: {error}"))?;
    let signed = format!(
        "{}.{}",
        segment(&json!({"alg": "ES256", "kid": KEY_ID})),
        segment(&json!({"iss": TEAM_ID, "iat": runtime.now().secs()})),
    );
    let random = aws_lc_rs::rand::SystemRandom::new();
    let signature = key.sign(&random, signed.as_bytes()).context("signing the provider token")?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// FCM: the service account's assertion for an access token.
async fn access_token(
    runtime: &Runtime,
    tls_config: &Arc<ClientConfig>,
    endpoint: &str,
    account: &Value,
) -> anyhow::Result<String> {
    let text = |name: &str| account[name].as_str().unwrap_or_default();
    let der = PrivatePkcs8KeyDer::from_pem_slice(text("private_key").as_bytes())?;
    let key = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der())
        .map_err(|error| anyhow::anyhow!("reading the service account's key: {error}"))?;
    let now = runtime.now().secs();
    let claims = json!({
        "iss": text("client_email"), "scope": "https://www.googleapis.com/auth/firebase.messaging",
        "aud": text("token_uri"), "iat": now, "exp": now + 3600,
    });
    let header = json!({"alg": "RS256", "typ": "JWT", "kid": text("private_key_id")});
    let signed = format!("{}.{}", segment(&header), segment(&claims));
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &aws_lc_rs::rand::SystemRandom::new(), signed.as_bytes(), &mut signature)
        .context("signing the assertion")?;
    let form = format!(
        "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion={signed}.{}",
        URL_SAFE_NO_PAD.encode(signature)
    );
    let mut sender = tls::connect(runtime, tls_config, tls::address(endpoint)?).await?.ready().await?;
    let request = Request::post(endpoint).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(())?;
    let (response, mut stream) = sender.send_request(request, false)?;
    stream.send_data(form.into(), true)?;
    let mut answer = response.await?.into_body();
    let mut body = Vec::new();
    while let Some(data) = answer.data().await {
        body.extend_from_slice(&data?);
    }
    let answer: Value = serde_json::from_slice(&body)?;
    answer["access_token"].as_str().map(str::to_owned).with_context(|| format!("no access token: {answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_cut_at_token_and_id() {
        let template = Template {
            headers: Vec::new(),
            token: "TOK".to_owned(),
            nudged_id: "ID".to_owned(),
            body: "{\"t\":\"TOK\",\"i\":\"ID\",\"tag\":\"ID\"}".to_owned(),
        };
        let pieces = pieces(&template);
        let shown: String = pieces
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => String::from_utf8_lossy(text).into_owned(),
                Piece::Token => "<t>".to_owned(),
                Piece::Id => "<i>".to_owned(),
            })
            .collect();
        assert_eq!(shown, "{\"t\":\"<t>\",\"i\":\"<i>\",\"tag\":\"<i>\"}");
    }
}
