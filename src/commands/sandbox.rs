//! `nudged sandbox`: the fake providers alone, for trying nudged or testing any APNs or FCM client.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use crate::runtime::Runtime;
use crate::sandbox::{Options, Platform, Received, Sandbox};

/// Pushes printed at once before looking for new ones.
const PRINT_BATCH: usize = 1000;

/// Characters of a text shown per push.
const SHOWN_CHARS: usize = 60;

/// Run fake APNs and FCM servers with ready-made credentials and configuration.
#[derive(clap::Args)]
pub struct SandboxArgs {
    /// Directory for keys, certificates and nudged.toml; made when absent, keys found there are used again.
    #[arg(long)]
    pub dir: PathBuf,
    /// Address of the fake APNs; port 0 picks a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub apns_listen: SocketAddr,
    /// Address of the fake FCM.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub fcm_listen: SocketAddr,
    /// Address of the fake OAuth token endpoint.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub token_listen: SocketAddr,
    /// Address of the control port; loopback only.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub control_listen: SocketAddr,
    /// Host name or address that clients use, when they are not on this machine.
    #[arg(long)]
    pub public_host: Option<String>,
    /// The app id in the written configuration.
    #[arg(long, default_value = "ifriendspet")]
    pub app: String,
    /// The APNs topic (bundle id).
    #[arg(long, default_value = "com.ifriendspet.app")]
    pub bundle: String,
    /// Further bundle ids the APNs key may push to; may be repeated.
    #[arg(long = "topic")]
    pub topics: Vec<String>,
    /// The Firebase project.
    #[arg(long, default_value = "ifriendspet")]
    pub project: String,
    /// Pushes kept for GET /record.
    #[arg(long, default_value_t = 100_000)]
    pub record_limit: usize,
    /// Streams allowed per connection.
    #[arg(long, default_value_t = 1000)]
    pub max_streams: u32,
    /// Milliseconds added to each answer.
    #[arg(long, default_value_t = 0)]
    pub latency_ms: u64,
    /// Refuse provider tokens with headers Apple does not ask for (`typ`).
    #[arg(long)]
    pub strict_jwt: bool,
    /// For measurements: keep no bodies, count identities and ages in GET /stats, print nothing.
    #[arg(long)]
    pub tally: bool,
    /// Keep only pushes to tokens that start so for GET /record.
    #[arg(long, value_name = "PREFIX")]
    pub keep_prefix: Option<String>,
    /// Do not print the pushes.
    #[arg(long)]
    pub quiet: bool,
}

/// Runs until interrupted.
pub async fn run(args: SandboxArgs) -> anyhow::Result<()> {
    let runtime = Runtime::production();
    let (quiet, tally) = (args.quiet, args.tally);
    let dir = args.dir.clone();
    // Asked for before anything listens, so that an early signal is not lost.
    let mut stop = std::pin::pin!(interrupted()?);
    let sandbox = Sandbox::start(&runtime, args.into_options()).await.context("starting the sandbox")?;
    announce(&sandbox, &dir)?;
    if tally {
        stop.await;
        sandbox.shutdown().await;
        return Ok(());
    }
    let mut seen = 0;
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            () = sandbox.wait_beyond(seen) => {}
        }
        let batch = sandbox.received_since(seen, PRINT_BATCH);
        let mut out = std::io::stdout().lock();
        for received in &batch {
            if !quiet {
                writeln!(out, "{}", line(received)).context("printing a push")?;
            }
        }
        if let Some(last) = batch.last() {
            seen = last.seq;
        }
    }
    sandbox.shutdown().await;
    Ok(())
}

impl SandboxArgs {
    fn into_options(self) -> Options {
        Options {
            dir: Some(self.dir),
            apns_listen: self.apns_listen,
            fcm_listen: self.fcm_listen,
            token_listen: self.token_listen,
            control_listen: self.control_listen,
            public_host: self.public_host,
            app_id: self.app,
            bundle_id: self.bundle,
            extra_topics: self.topics,
            project_id: self.project,
            record_limit: self.record_limit,
            record_bodies: !self.tally || self.keep_prefix.is_some(),
            tally: self.tally,
            keep_prefix: self.keep_prefix,
            max_concurrent_streams: self.max_streams,
            latency: Duration::from_millis(self.latency_ms),
            lenient_jwt: !self.strict_jwt,
            ..Options::default()
        }
    }
}

fn announce(sandbox: &Sandbox, dir: &std::path::Path) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let control = sandbox.control_addr();
    let dir = dir.display();
    write!(
        out,
        "APNs     {}\nFCM      {}\ntokens   {}\ncontrol  http://{control} (GET /record, POST /faults)\nfiles    {dir}\n\n\
         Next, in another terminal:\n  nudged serve --config {dir}/nudged.toml\n\n",
        sandbox.apns_endpoint(),
        sandbox.fcm_endpoint(),
        sandbox.token_endpoint(),
    )
    .and_then(|()| out.flush())
    .context("printing where the sandbox is")
}

/// One push for people: when, what, to whom, and what it was told.
fn line(received: &Received) -> String {
    let platform = match received.platform {
        Platform::Apns => "APNs",
        Platform::Fcm => "FCM ",
    };
    let body = received.json();
    let text = [
        "/aps/alert/body",
        "/aps/alert/title",
        "/aps/alert",
        "/message/notification/body",
        "/message/notification/title",
        "/message/android/notification/body",
    ]
    .into_iter()
    .find_map(|path| body.pointer(path)?.as_str())
    .unwrap_or_default();
    // Control characters of a payload must not reach the terminal.
    let shown: String = text.chars().filter(|c| !c.is_control()).take(SHOWN_CHARS).collect();
    let outcome = match (received.status, received.reason.as_deref()) {
        (0, reason) => format!("no answer ({})", reason.unwrap_or("fault")),
        (status, None) => status.to_string(),
        (status, Some(reason)) => format!("{status} {reason}"),
    };
    format!("{} {platform} {:<7} {outcome:<24} {shown}", received.at, received.masked_token())
}

/// Resolves at ctrl-c or, on Unix, SIGTERM.
#[cfg(unix)]
fn interrupted() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for ctrl-c")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "as on Unix")]
fn interrupted() -> anyhow::Result<impl Future<Output = ()>> {
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SandboxArgs,
    }

    #[test]
    fn defaults_are_those_of_the_library() {
        let args = Line::try_parse_from(["sandbox", "--dir", "x"]).unwrap().args;
        let (options, defaults) = (args.into_options(), Options::default());
        assert_eq!(options.app_id, defaults.app_id);
        assert_eq!(options.bundle_id, defaults.bundle_id);
        assert_eq!(options.project_id, defaults.project_id);
        assert_eq!(options.record_limit, defaults.record_limit);
        assert_eq!(options.max_concurrent_streams, defaults.max_concurrent_streams);
        assert!(options.control_listen.ip().is_loopback());
        assert!(Line::try_parse_from(["sandbox"]).is_err(), "the directory is required");
    }
}
