//! From an endpoint's name to a byte stream: DNS without a cache before each connect (Apple asks for it), TCP tuned for
//! gathered writes, TLS that must agree on HTTP/2.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, Scheme, Uri};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::gather::Transport;
use crate::runtime::Runtime;

/// The kernel holds back its buffer beyond this many unsent bytes, so that what is handed over leaves soon or waits
/// where a "no" can still reach it.
const NOTSENT_LOWAT: u32 = 64 * 1024;

/// The longest wait for one of several addresses.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(3);

/// A provider's base URL: scheme, host and port, no path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub scheme: Scheme,
    pub authority: Authority,
    host: Box<str>,
    port: u16,
}

/// Why a configured endpoint cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the endpoint {url:?} {problem}")]
pub struct EndpointError {
    url: String,
    problem: &'static str,
}

impl Endpoint {
    /// `https://host[:port]`, or for tests `http://` (HTTP/2 without TLS) on a loopback host.
    pub fn parse(url: &str) -> Result<Self, EndpointError> {
        let bad = |problem| EndpointError { url: url.to_owned(), problem };
        let parts = url.parse::<Uri>().map_err(|_| bad("is not a URL"))?.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(bad("must look like https://host or https://host:port"));
        };
        if parts.path_and_query.is_some_and(|path| path != "/") {
            return Err(bad("must have no path"));
        }
        if authority.as_str().contains('@') {
            return Err(bad("must hold no user name"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let default_port = match scheme.as_str() {
            "https" => 443,
            "http" if is_loopback => 80,
            "http" => return Err(bad("must be https: http is for loopback hosts only")),
            _ => return Err(bad("must be https")),
        };
        let (host, port) = (Box::from(host), authority.port_u16().unwrap_or(default_port));
        Ok(Self { scheme, authority, host, port })
    }

    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }
}

/// Why there is no connection. The text is kept with the deliveries that wait for one; it holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("looking up {host} failed: {source}")]
    Resolve { host: Box<str>, source: io::Error },
    #[error("{host} has no address")]
    NoAddress { host: Box<str> },
    #[error("connecting to {address} failed: {source}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("TLS with {host} failed: {source}")]
    Tls { host: Box<str>, source: io::Error },
    #[error("{host} is no name TLS can check")]
    Name { host: Box<str> },
    #[error("{host} does not speak HTTP/2")]
    NoHttp2 { host: Box<str> },
    #[error("no connection within {} s", after.as_secs())]
    Timeout { after: Duration },
    #[error("the HTTP/2 handshake failed: {0}")]
    Handshake(h2::Error),
    #[error("the connection ended before the server's first frame: {0}")]
    NoSettings(Box<str>),
}

pub type Io = Box<dyn Transport>;
pub type ConnectFuture = Pin<Box<dyn Future<Output = Result<Io, ConnectError>> + Send>>;

/// How a driver gets its byte streams. Tests and simulations give it pipes.
pub trait Connect: Send + Sync + 'static {
    /// One attempt, bounded in time.
    fn connect(&self) -> ConnectFuture;
}

/// TCP, and TLS when the endpoint is https.
#[derive(Clone)]
pub struct TcpConnector {
    pub runtime: Runtime,
    pub endpoint: Endpoint,
    pub tls: Arc<rustls::ClientConfig>,
    pub timeout: Duration,
}

impl Connect for TcpConnector {
    fn connect(&self) -> ConnectFuture {
        let this = self.clone();
        Box::pin(async move {
            let connected = this.runtime.timeout(this.timeout, this.open()).await;
            connected.unwrap_or(Err(ConnectError::Timeout { after: this.timeout }))
        })
    }
}

impl TcpConnector {
    async fn open(&self) -> Result<Io, ConnectError> {
        let stream = self.tcp().await?;
        if !self.endpoint.is_tls() {
            return Ok(Box::new(stream));
        }
        let host = self.endpoint.host.clone();
        let name =
            ServerName::try_from(String::from(host.clone())).map_err(|_| ConnectError::Name { host: host.clone() })?;
        let stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, stream)
            .await
            .map_err(|source| ConnectError::Tls { host: host.clone(), source })?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(ConnectError::NoHttp2 { host });
        }
        Ok(Box::new(stream))
    }

    async fn tcp(&self) -> Result<TcpStream, ConnectError> {
        let Endpoint { host, port, .. } = &self.endpoint;
        let addresses = tokio::net::lookup_host((&**host, *port))
            .await
            .map_err(|source| ConnectError::Resolve { host: host.clone(), source })?;
        let mut last = ConnectError::NoAddress { host: host.clone() };
        for address in addresses {
            let attempt = self.runtime.timeout(ADDRESS_TIMEOUT, self.runtime.connect(address)).await;
            match attempt.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => {
                    tune(&stream).map_err(|source| ConnectError::Tcp { address, source })?;
                    return Ok(stream);
                }
                Err(source) => last = ConnectError::Tcp { address, source },
            }
        }
        Err(last)
    }
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(NOTSENT_LOWAT)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_https_or_loopback() {
        let endpoint = Endpoint::parse("https://api.push.apple.com").expect("good");
        assert_eq!((&*endpoint.host, endpoint.port, endpoint.is_tls()), ("api.push.apple.com", 443, true));
        assert_eq!(Endpoint::parse("https://127.0.0.1:8443/").expect("good").port, 8443);
        let v6 = Endpoint::parse("http://[::1]:80").expect("good");
        assert_eq!((&*v6.host, v6.is_tls()), ("::1", false));
        assert!(Endpoint::parse("http://localhost:1").is_ok());
        for bad in ["http://example.com", "api.push.apple.com", "https://a/b", "ftp://a", "https://u@a", "", "https://"]
        {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
    }
}
