//! Every fault × platform × moment × store, against the real binary over real TLS: each cell ends as the table in
//! docs/reliability.md says, which is read here. All cells run at once, each as an app of its own, with its own
//! credential and connections, so that the whole takes about as long as its slowest cells.
//!
//! `make faults TLS=yes` plays all of them, with `FAULT='REFUSED_STREAM'` the rows that contain it. An ordinary run of the
//! tests plays every row at one moment, another one on each store and in each run: `tests/sim` plays all of them every time.

#[path = "../faults/mod.rs"]
mod play;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::device::Platform;
use nudged::runtime::Runtime;
use nudged::sandbox::{Options, Sandbox};

use self::play::cell::{Cell, Providers, Stage, play};
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
const THROTTLED_SECS: u32 = 10;
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
    let options = Options { dir: Some(dir.path().to_owned()), latency: LATENCY, ..Options::default() };
    let sandbox = Sandbox::start(&Runtime::production(), options).await.unwrap();
    let config = dir.path().join("faults.toml");
    std::fs::write(&config, configuration(dir.path(), &sandbox, &cells, grpc, admin)).unwrap();
    let server = World::start_on_with(&config, environment);
    let address = format!("http://127.0.0.1:{grpc}");
    let client = super::server::client_of(&address).await;
    let admin = AdminServiceClient::connect(address).await.unwrap();
    let stage = Arc::new(Stage {
        providers: Arc::new(sandbox) as Arc<dyn Providers>,
        client,
        admin,
        runtime: Runtime::production(),
        patience: CELL_PATIENCE,
        slowest_look: SLOWEST_LOOK,
    });
    let plays = cells.into_iter().map(|cell| tokio::spawn(play(cell, Arc::clone(&stage))));
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

/// An app for each cell. Waits are short: what is tested is what follows, not how long it takes.
fn configuration(dir: &Path, sandbox: &Sandbox, cells: &[Cell], grpc: u16, admin: u16) -> String {
    let file = |name: &str| format!("\"{}\"", dir.join(name).display());
    // Ports that nobody listens on.
    let closed = format!("https://127.0.0.1:{}", free_port());
    let mut text = format!(
        "[database]\nurl = \"sqlite://{}\"\n[grpc]\nlisten = \"127.0.0.1:{grpc}\"\n[admin]\nlisten = \"127.0.0.1:{admin}\"\n\
         [delivery]\nsender_threads = 1\nsend_timeout_secs = 2\npoll_ms = 500\n",
        dir.join("nudged.db").display()
    );
    for platform in ["apns", "fcm"] {
        writeln!(text, "[delivery.{platform}]\nthrottled_floor_secs = {THROTTLED_SECS}").unwrap();
        let waits = ["transport_floor_secs", "server_error_floor_secs", "base_secs", "cap_secs"];
        for wait in waits {
            writeln!(text, "{wait} = 1").unwrap();
        }
    }
    for cell in cells {
        let (app, door) = (cell.app.clone(), cell.door());
        let at = |endpoint: &str| if door == Door::Closed { closed.clone() } else { endpoint.to_owned() };
        let ca = if door == Door::Untrusted { String::new() } else { format!("ca_file = {}\n", file("ca.pem")) };
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
