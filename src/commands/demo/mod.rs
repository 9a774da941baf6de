//! `nudged demo`: the whole story against fake providers, as a backend would live it.
//!
//! Starts the sandbox and a real server on an embedded database in a directory of their own, acts only through gRPC,
//! prints a timeline, and exits 0 only if everything that it tells really happened.

mod backend;
mod story;
mod timeline;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::app::App;
use crate::config::{Config, Log, LogFormat};
use crate::runtime::Runtime;
use crate::sandbox::{Options, Sandbox};
use crate::telemetry::{self, Metrics};

use backend::Backend;
use timeline::Timeline;

#[derive(clap::Args)]
pub struct DemoArgs {
    /// Leave the server and the sandbox running, with what the story made, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
}

pub async fn run(args: DemoArgs, runtime: Runtime) -> anyhow::Result<ExitCode> {
    telemetry::init_logs(&Log { format: LogFormat::Auto, level: "off".to_owned() })?;
    let metrics = Metrics::install(&runtime)?;
    let dir = std::env::temp_dir().join(format!("nudged-demo-{}", runtime.uuid().simple()));
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let told = tell(&args, &runtime, metrics, &dir).await;
    // The directory is ours and new; what cannot be removed is the operating system's to clean.
    let _ = std::fs::remove_dir_all(&dir);
    told
}

async fn tell(args: &DemoArgs, runtime: &Runtime, metrics: Metrics, dir: &Path) -> anyhow::Result<ExitCode> {
    let sandbox = Sandbox::start(
        runtime,
        Options {
            dir: Some(dir.to_owned()),
            grpc_listen: Some(usual_or_any(50051)),
            admin_listen: Some(usual_or_any(9464)),
            ..Options::default()
        },
    )
    .await?;
    let config = Config::load(Some(&dir.join("nudged.toml")))?;
    let app = App::start(runtime.clone(), &config, metrics).await?;
    let mut timeline = Timeline::new(runtime);
    timeline.title(&format!(
        "iFriendsPet on nudged {}: gRPC on {}, SQLite in {}",
        env!("CARGO_PKG_VERSION"),
        app.grpc_address(),
        dir.display()
    ));
    let backend = Backend::connect(app.grpc_address(), runtime.clone()).await?;
    let told = story::play(&backend, &sandbox, &mut timeline, runtime).await;
    let code = match told {
        Ok(()) => timeline.summary(),
        Err(error) => {
            timeline.failed(&format!("{error:#}"));
            timeline.summary()
        }
    };
    if args.keep {
        go_on_by_hand(&app, &sandbox);
        tokio::signal::ctrl_c().await.context("listening for Ctrl-C")?;
    } else {
        println!(
            "\nGo on by hand: `nudged demo --keep` leaves all of this running and prints grpcurl commands to try."
        );
    }
    app.shutdown().await;
    sandbox.shutdown().await;
    Ok(code)
}

fn go_on_by_hand(app: &App, sandbox: &Sandbox) {
    let address = app.grpc_address();
    println!("\nGo on by hand (Ctrl-C ends it):");
    println!("  grpcurl -plaintext {address} describe nudged.v1.PushService");
    println!(
        "  grpcurl -plaintext -d '{{\"user_ids\":[\"choco\"],\"event_type\":\"comment.created\",\
         \"content\":{{\"title\":\"Hello\",\"body\":\"from me\"}}}}' {address} nudged.v1.PushService/NotifyEvent"
    );
    println!(
        "  grpcurl -plaintext -d '{{\"notification_id\":\"…\",\"user_id\":\"choco\"}}' {address} \
         nudged.v1.PushService/ExplainDelivery"
    );
    println!("  curl -s http://{}/record    # what the phones would have got", sandbox.control_addr());
    println!("  curl -s http://{}/metrics", app.admin_address());
}

/// The documented port when it is free, else any: the demo must not fail because a server runs already.
fn usual_or_any(port: u16) -> SocketAddr {
    let usual = SocketAddr::from(([127, 0, 0, 1], port));
    if std::net::TcpListener::bind(usual).is_ok() { usual } else { SocketAddr::from(([127, 0, 0, 1], 0)) }
}
