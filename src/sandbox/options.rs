//! How a sandbox is run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::SandboxError;

/// Topics beside the bundle id; Apple allows a key 400 in all.
const MAX_EXTRA_TOPICS: usize = 100;

const MAX_TOPIC_BYTES: usize = 255;

/// How to run a sandbox. `Options::default()` keeps everything in memory on free loopback ports.
#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches of a test tool, each named where it is set")]
pub struct Options {
    /// Where credentials and configuration are written; keys found there are used again. Nothing is written without.
    pub dir: Option<PathBuf>,
    pub apns_listen: SocketAddr,
    pub fcm_listen: SocketAddr,
    pub token_listen: SocketAddr,
    /// Loopback only.
    pub control_listen: SocketAddr,
    /// The host name or address in the endpoints and the certificate; needed when a listener is bound to all addresses
    /// and clients come from elsewhere. Default: the listener's own address.
    pub public_host: Option<String>,
    /// The app of the written configuration.
    pub app_id: String,
    /// The APNs topic, without suffix.
    pub bundle_id: String,
    /// More bundle ids the APNs key and certificate may push to; at most 100.
    pub extra_topics: Vec<String>,
    /// The Firebase project.
    pub project_id: String,
    /// Pushes kept, newest last; at least 1, for the record is never unlimited.
    pub record_limit: usize,
    /// Keep the bodies of pushes. Without, a benchmark's record stays small.
    pub record_bodies: bool,
    /// The record keeps only pushes to tokens that start so; the others are counted.
    pub keep_prefix: Option<String>,
    /// Count identities, tokens and ages in `/stats`, for measurements (module `tally`).
    pub tally: bool,
    /// Refuse what the vendor refuses. Without, every push is taken, whatever it holds.
    pub validate: bool,
    /// SETTINGS_MAX_CONCURRENT_STREAMS; at least 1.
    pub max_concurrent_streams: u32,
    /// Token connections to APNs get one stream until the first request with a valid token succeeded, as Apple's do.
    pub first_stream_alone: bool,
    /// Let a provider token carry the `typ` header, which Apple does not ask for but lets pass.
    pub lenient_jwt: bool,
    /// Added to each push's answer.
    pub latency: Duration,
    /// `expires_in` of OAuth access tokens, whole seconds.
    pub access_token_ttl: Duration,
    /// `database.url` of the written configuration; default: `nudged.db` in the directory.
    pub database_url: Option<String>,
    /// `grpc.listen` and `admin.listen` of the written configuration; default: nudged's defaults.
    pub grpc_listen: Option<SocketAddr>,
    pub admin_listen: Option<SocketAddr>,
}

impl Default for Options {
    fn default() -> Self {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            dir: None,
            apns_listen: any_port,
            fcm_listen: any_port,
            token_listen: any_port,
            control_listen: any_port,
            public_host: None,
            app_id: "ifriendspet".to_owned(),
            bundle_id: "com.ifriendspet.app".to_owned(),
            extra_topics: Vec::new(),
            project_id: "ifriendspet".to_owned(),
            record_limit: 100_000,
            record_bodies: true,
            keep_prefix: None,
            tally: false,
            validate: true,
            max_concurrent_streams: 1000,
            first_stream_alone: true,
            lenient_jwt: false,
            latency: Duration::ZERO,
            access_token_ttl: Duration::from_secs(3599),
            database_url: None,
            grpc_listen: None,
            admin_listen: None,
        }
    }
}

impl Options {
    pub(super) fn bundles(&self) -> Vec<String> {
        std::iter::once(&self.bundle_id).chain(&self.extra_topics).cloned().collect()
    }

    /// What Apple puts into a universal certificate for these bundles.
    pub(super) fn certificate_topics(&self) -> Vec<String> {
        let of = |bundle: String| {
            [".voip", ".complication"].map(|suffix| format!("{bundle}{suffix}")).into_iter().chain([bundle])
        };
        self.bundles().into_iter().flat_map(of).collect()
    }

    pub(super) fn check(&self) -> Result<(), SandboxError> {
        let bad = |what: &str| Err(SandboxError::Options(what.to_owned()));
        let is_topic = |topic: &String| (1..=MAX_TOPIC_BYTES).contains(&topic.len()) && topic.is_ascii();
        if self.record_limit == 0 {
            return bad("record_limit must be at least 1");
        }
        if self.max_concurrent_streams == 0 {
            return bad("max_concurrent_streams must be at least 1");
        }
        if !self.control_listen.ip().is_loopback() {
            return bad("control_listen must be a loopback address");
        }
        if self.extra_topics.len() > MAX_EXTRA_TOPICS || !self.bundles().iter().all(is_topic) {
            return bad("topics must be at most 100 ASCII texts of 1 to 255 bytes");
        }
        if self.project_id.is_empty() || self.project_id.contains('/') {
            return bad("project_id must not be empty nor contain a slash");
        }
        Ok(())
    }
}
