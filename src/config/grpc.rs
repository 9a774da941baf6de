//! `[grpc]`: the listener callers use.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::section::Section;
use super::values::{SecretSource, listen_address};
use crate::domain::ids::AppId;

#[derive(Clone, Debug)]
pub struct Grpc {
    /// Default 127.0.0.1:50051. Another than a loopback address needs keys.
    pub listen: SocketAddr,
    /// The app of requests that name none.
    pub default_app: Option<AppId>,
    pub tls: Option<GrpcTls>,
    /// Current-thread runtimes that serve connections. Default 1.
    pub threads: usize,
    /// Connections at once; more wait to be accepted. Default 1024.
    pub max_connections: usize,
    /// HTTP/2 streams at once on one connection. Default 1024.
    pub max_streams_per_connection: usize,
    /// Requests worked on at once in all; more are refused with `RESOURCE_EXHAUSTED`. Default 4096.
    pub max_concurrent_requests: usize,
    /// WatchDeliveries streams at once; more are refused with `RESOURCE_EXHAUSTED`. Default 64.
    pub max_watchers: usize,
    /// The longest a unary call may take; a caller's shorter deadline holds as well. Default 30 s.
    pub request_timeout: Duration,
}

/// Server certificate and, optionally, who issues client certificates.
#[derive(Clone, Debug)]
pub struct GrpcTls {
    /// PEM, leaf first.
    pub cert_file: PathBuf,
    /// PEM.
    pub key: SecretSource,
    /// PEM; when set, a client that presents a certificate must present one of this authority.
    pub client_ca_file: Option<PathBuf>,
}

impl Grpc {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let grpc = Self {
            listen: section
                .parsed("listen", "write address:port, e.g. 127.0.0.1:50051", listen_address)
                .unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 50051))),
            default_app: section.parsed("default_app", "name one of the [apps.…] sections", |text| {
                AppId::parse("", text).map_err(|violation| violation.description)
            }),
            tls: GrpcTls::read(section.table("tls")),
            threads: section.count("threads", 1, 1..=256),
            max_connections: section.count("max_connections", 1024, 1..=1_000_000),
            max_streams_per_connection: section.count("max_streams_per_connection", 1024, 1..=100_000),
            max_concurrent_requests: section.count("max_concurrent_requests", 4096, 1..=1_000_000),
            max_watchers: section.count("max_watchers", 64, 0..=10_000),
            request_timeout: section.seconds("request_timeout_secs", 30, 1..=3600),
        };
        section.finish();
        grpc
    }
}

impl GrpcTls {
    fn read(mut section: Section<'_>) -> Option<Self> {
        let given = !section.is_empty();
        let cert_file = section.path("cert_file");
        let key = section.secret("key", "key_file");
        let client_ca_file = section.path("client_ca_file");
        if given && !section.has("cert_file") {
            section.missing("cert_file", "TLS needs the server's certificate");
        }
        if given && !section.has("key") && !section.has("key_file") {
            section.missing("key_file", "TLS needs the certificate's private key");
        }
        section.finish();
        Some(Self { cert_file: cert_file?, key: key?, client_ca_file })
    }
}
