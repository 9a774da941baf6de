//! HTTP/1.1 to the loopback ports of our children: the sandbox's control port, the server's metrics.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;

use crate::runtime::Runtime;

const TIMEOUT: Duration = Duration::from_secs(30);

/// Pushes in one answer of `/record`.
const RECORD_LIMIT: usize = 10_000;

pub struct Control {
    runtime: Runtime,
    address: SocketAddr,
}

/// The sandbox's `/stats`, as much as is used.
#[derive(Deserialize, Clone, Debug)]
pub struct Stats {
    pub received: u64,
    pub apns: Listener,
    pub fcm: Listener,
    pub tally: Tally,
}

#[derive(Deserialize, Clone, Debug)]
pub struct Listener {
    pub open: u64,
}

#[derive(Deserialize, Clone, Debug)]
pub struct Tally {
    pub distinct: u64,
    pub repeated: u64,
    pub overflowed: bool,
    pub refused: u64,
    pub token_sum: String,
    pub first_us: Option<i64>,
    pub last_us: Option<i64>,
    pub ages: Ages,
}

#[derive(Deserialize, serde::Serialize, Clone, Copy, Debug)]
pub struct Ages {
    pub count: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

/// One push of `/record`, as much as is used.
#[derive(Deserialize, Clone)]
#[expect(clippy::struct_field_names, reason = "the field's word: apns-push-type")]
pub struct Push {
    pub seq: u64,
    pub at_us: i64,
    pub platform: String,
    pub token: String,
    pub nudged_id: Option<String>,
    pub apns_topic: Option<String>,
    pub push_type: Option<String>,
    pub priority: Option<String>,
    pub expiration: Option<String>,
    pub body: Value,
    pub accepted: bool,
}

impl Control {
    pub fn new(runtime: Runtime, address: SocketAddr) -> Self {
        Self { runtime, address }
    }

    pub async fn stats(&self) -> anyhow::Result<Stats> {
        Ok(serde_json::from_slice(&self.call(Method::GET, "/stats", None).await?)?)
    }

    /// All that is in the record.
    pub async fn record(&self) -> anyhow::Result<Vec<Push>> {
        #[derive(Deserialize)]
        struct Answer {
            received: Vec<Push>,
        }
        let (mut all, mut since) = (Vec::new(), 0);
        loop {
            let path = format!("/record?since={since}&limit={RECORD_LIMIT}");
            let answer: Answer = serde_json::from_slice(&self.call(Method::GET, &path, None).await?)?;
            let Some(last) = answer.received.last() else { return Ok(all) };
            since = last.seq;
            all.extend(answer.received);
        }
    }

    /// Empties record and counts.
    pub async fn clear(&self) -> anyhow::Result<()> {
        self.call(Method::DELETE, "/record", None).await.map(drop)
    }

    pub async fn add_fault(&self, fault: &Value) -> anyhow::Result<()> {
        self.call(Method::POST, "/faults", Some(fault)).await.map(drop)
    }

    pub async fn clear_faults(&self) -> anyhow::Result<()> {
        self.call(Method::DELETE, "/faults", None).await.map(drop)
    }

    /// The sum over labels of one metric of a Prometheus page.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let page = self.call(Method::GET, "/metrics", None).await?;
        let page = String::from_utf8_lossy(&page);
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        Ok(page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Bytes> {
        let called = self.runtime.timeout(TIMEOUT, self.exchange(method, path, body)).await;
        called.with_context(|| format!("http://{}{path} does not answer", self.address))?
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Bytes> {
        let stream = self.runtime.connect(self.address).await.with_context(|| format!("calling {}", self.address))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await?;
        let driving = self.runtime.spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, self.address.to_string())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::from(body.map(Value::to_string).unwrap_or_default()))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        driving.abort();
        if !status.is_success() {
            bail!("{path} answered {status}: {}", String::from_utf8_lossy(&bytes));
        }
        Ok(bytes)
    }
}
