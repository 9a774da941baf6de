//! Every fault × platform × moment × store, against the real binary over real TLS: each cell ends as the table in
//! docs/reliability.md says, which is read here. All cells run at once, each as an app of its own, with its own
//! credential and connections, so that the whole takes about as long as its slowest cells.
//!
//! `make faults TLS=yes` plays all of them, with `FAULT='REFUSED_STREAM'` the rows that contain it. An ordinary run of the
//! tests plays every row at one moment, another one on each store and in each run: `tests/sim` plays all of them every time.

#[path = "../faults/mod.rs"]
mod play;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::device::Platform;
use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::sandbox::{Options, Sandbox};
use rustls_pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;

use self::play::cell::{Cell, Floors, Providers, Stage, play};
use self::play::script::Door;
use super::postgres::Postgres;
use super::server::{World, free_port};

/// Added to every answer, so that others are in flight when a fault comes, and a fault comes while its connection drains.
const LATENCY: Duration = Duration::from_millis(150);
/// Cells under way together.
const AT_ONCE: usize = 96;
/// Only a cell that is red waits so long.
const CELL_PATIENCE: Duration = Duration::from_secs(240);
/// What the server does about a fault is to be seen by looks that a busy machine makes rare: a pause lasts five seconds, and
/// a route that is slowed is slowed for so long.
const THROTTLED: Duration = Duration::from_secs(10);
const WAIT: Duration = Duration::from_secs(1);
const FLOORS: Floors = Floors { apns_error: WAIT, fcm_error: WAIT, throttled: THROTTLED };
const SLOWEST_LOOK: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_ends_as_the_table_says() {
    run("SQLite", 0, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_ends_as_the_table_says_on_postgres() {
    let postgres = Postgres::start();
    run("Postgres", 1, &[("NUDGED_DATABASE__URL", postgres.url())]).await;
}

/// The second in which the first of the stores began.
static BEGUN: LazyLock<usize> = LazyLock::new(|| usize::try_from(Runtime::production().now().secs()).unwrap());

/// The cells of this run: all, where `NUDGED_TEST_FAULT_MOMENTS=all`, or one of each row. Which one, `NUDGED_TEST_FAULT_SEED`
/// says, or the time.
fn chosen(turn: usize) -> (Vec<Cell>, String) {
    let cells = play::cells(&play::chosen(play::rows()));
    let setting = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    if setting("NUDGED_TEST_FAULT_MOMENTS").is_some_and(|moments| moments == "all") {
        return (cells, "all moments".to_owned());
    }
    let seed = match setting("NUDGED_TEST_FAULT_SEED") {
        Some(seed) => seed.parse().unwrap(),
        None => *BEGUN,
    };
    let of_row = |cells: &[Cell], at: usize| cells[(at + seed + turn) % cells.len()].clone();
    let rows = cells.chunk_by(|one, next| one.row == next.row);
    let cells = rows.enumerate().map(|(at, cells)| of_row(cells, at)).collect();
    (cells, format!("one moment of each row, NUDGED_TEST_FAULT_SEED={seed}"))
}

async fn run(store: &str, turn: usize, environment: &[(&str, String)]) {
    let begun = Instant::now();
    let (cells, choice) = chosen(turn);
    println!("{store}: {} cells, {choice}", cells.len());
    let dir = tempfile::tempdir().unwrap();
    let (grpc, admin) = (free_port(), free_port());
    let sandbox = sandbox(dir.path()).await;
    // A token endpoint does not know for whom a token is: where it is at fault, the cell has one for itself.
    let mut own = BTreeMap::new();
    for cell in cells.iter().filter(|cell| !cell.script(UnixMs(0)).token_endpoint.is_empty()) {
        let dir = dir.path().join(&cell.app);
        std::fs::create_dir(&dir).unwrap();
        own.insert(cell.app.clone(), Arc::new(self::sandbox(&dir).await));
    }
    let config = dir.path().join("faults.toml");
    let mute = mute(dir.path()).await;
    std::fs::write(&config, configuration(dir.path(), &sandbox, &own, &mute, &cells, grpc, admin)).unwrap();
    let server = World::start_on_with(&config, environment);
    let address = format!("http://127.0.0.1:{grpc}");
    let client = super::server::client_of(&address).await;
    let admin = AdminServiceClient::connect(address).await.unwrap();
    let stage = |providers: Arc<dyn Providers>| {
        Arc::new(Stage {
            providers,
            client: client.clone(),
            admin: admin.clone(),
            runtime: Runtime::production(),
            patience: CELL_PATIENCE,
            floors: FLOORS,
            slowest_look: SLOWEST_LOOK,
        })
    };
    let shared = stage(Arc::new(sandbox));
    let plays = cells.into_iter().map(|cell| {
        let own = own.get(&cell.app).map(|own| stage(Arc::clone(own) as Arc<dyn Providers>));
        tokio::spawn(play(cell, own.unwrap_or_else(|| Arc::clone(&shared))))
    });
    let plays = futures_util::stream::iter(plays).buffer_unordered(AT_ONCE);
    let mut plays: Vec<_> = plays.map(Result::unwrap).collect().await;
    plays.sort_by_key(|(cell, _)| cell.number);
    let (mut text, mut wrong, count) = (String::new(), 0, plays.len());
    for (cell, found) in plays {
        if !found.wrong.is_empty() {
            wrong += 1;
            writeln!(text, "{cell}: {found}").unwrap();
        }
    }
    println!("{store}: {count} cells in {:.1} s, {wrong} not as the table says\n{text}", begun.elapsed().as_secs_f64());
    assert_eq!(wrong, 0, "{store}, {choice}\n{text}");
    assert!(server.terminate().success());
}

async fn sandbox(dir: &Path) -> Sandbox {
    let options = Options { dir: Some(dir.to_owned()), latency: LATENCY, ..Options::default() };
    Sandbox::start(&Runtime::production(), options).await.unwrap()
}

/// A server that takes connections, and says nothing over them. Trusted by `mute.pem`, which has the sandbox's authority,
/// too.
async fn mute(dir: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let authorities = std::fs::read_to_string(dir.join("ca.pem")).unwrap() + &made.cert.pem();
    std::fs::write(dir.join("mute.pem"), authorities).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let tls = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let tls = tls.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let mut tls = tls.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((tcp, _)) = listener.accept().await {
            held.push(tls.accept(tcp).await);
        }
    });
    format!("https://localhost:{port}")
}

/// An app for each cell. Waits are short: what is tested is what follows, not how long it takes.
fn configuration(
    dir: &Path,
    shared: &Sandbox,
    own: &BTreeMap<String, Arc<Sandbox>>,
    mute: &str,
    cells: &[Cell],
    grpc: u16,
    admin: u16,
) -> String {
    // Ports that nobody listens on.
    let closed = format!("https://127.0.0.1:{}", free_port());
    let mut text = format!(
        "[database]\nurl = \"sqlite://{}\"\n[grpc]\nlisten = \"127.0.0.1:{grpc}\"\n[admin]\nlisten = \"127.0.0.1:{admin}\"\n\
         [delivery]\nsender_threads = 1\nsend_timeout_secs = 2\npoll_ms = 500\n",
        dir.join("nudged.db").display()
    );
    for platform in ["apns", "fcm"] {
        writeln!(text, "[delivery.{platform}]\nthrottled_floor_secs = {}", THROTTLED.as_secs()).unwrap();
        let waits = ["transport_floor_secs", "server_error_floor_secs", "base_secs", "cap_secs"];
        for wait in waits {
            writeln!(text, "{wait} = {}", WAIT.as_secs()).unwrap();
        }
    }
    for cell in cells {
        let (app, door) = (cell.app.clone(), cell.door());
        let (dir, sandbox) = match own.get(&app) {
            Some(own) => (dir.join(&app), &**own),
            None => (dir.to_owned(), shared),
        };
        let file = |name: &str| format!("\"{}\"", dir.join(name).display());
        let at = |endpoint: &str| match door {
            Door::Open | Door::Untrusted => endpoint.to_owned(),
            Door::Closed => closed.clone(),
            Door::Mute => mute.to_owned(),
        };
        let ca = match door {
            Door::Open | Door::Closed => format!("ca_file = {}\n", file("ca.pem")),
            Door::Untrusted => String::new(),
            Door::Mute => format!("ca_file = {}\n", file("mute.pem")),
        };
        if cell.row.platform == Platform::Fcm {
            // The token endpoint is trusted in any case: the account's own file says where it is.
            write!(
                text,
                "[apps.{app}.fcm]\nservice_account_file = {}\nendpoint = \"{}\"\nrate_per_minute = 0\n{ca}",
                file("service-account.json"),
                at(sandbox.fcm_endpoint()),
            )
            .unwrap();
        } else {
            let endpoint = at(sandbox.apns_endpoint());
            let credentials = sandbox.credentials();
            write!(
                text,
                "[apps.{app}.apns]\nkey_file = {}\nkey_id = \"{}\"\nteam_id = \"{}\"\ntopic = \"{}\"\nenvironment = \"sandbox\"\n\
                 endpoint = \"{endpoint}\"\nendpoint_sandbox = \"{endpoint}\"\n{ca}",
                file("AuthKey_SANDBOX001.p8"),
                credentials.key_id,
                credentials.team_id,
                sandbox.options().bundle_id,
            )
            .unwrap();
        }
    }
    text
}
