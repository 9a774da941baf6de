//! Every fault × platform × moment × store, against the real binary over real TLS: each cell ends as the table in
//! docs/reliability.md says, which is read here. All cells run at once, each as an app of its own, with its own
//! credential and connections, so that the whole takes about as long as its slowest cell.
//!
//! `make faults` prints the table of what was found; `FAULT='REFUSED_STREAM'` plays the rows that contain it.

mod cell;
mod script;
mod table;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::device::Platform;
use nudged::runtime::Runtime;
use nudged::sandbox::{Options, Sandbox};

use self::cell::{Cell, Stage, play};
use self::script::{Door, required};
use super::postgres::Postgres;
use super::server::{PATIENCE, World, free_port};

/// Added to every answer, so that others are in flight when a fault comes, and a fault comes while its connection drains.
const LATENCY: Duration = Duration::from_millis(150);
/// Cells under way together.
const AT_ONCE: usize = 96;

fn rows() -> Vec<table::Row> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reliability.md")).unwrap();
    table::read(&page)
}

fn cells() -> Vec<Cell> {
    let only = std::env::var("NUDGED_TEST_FAULT").unwrap_or_default();
    let rows = rows().into_iter().filter(|row| row.fault.contains(&only));
    let cells = rows.flat_map(|row| {
        let moments = script::script(&row.fault, row.platform).moments();
        moments.iter().map(move |moment| Cell { number: 0, row: row.clone(), moment: *moment })
    });
    cells.enumerate().map(|(number, cell)| Cell { number, ..cell }).collect()
}

#[test]
fn the_table_has_every_fault() {
    let rows = rows();
    for platform in [Platform::Apns, Platform::Fcm] {
        let mut listed: Vec<String> =
            rows.iter().filter(|row| row.platform == platform).map(|row| row.fault.clone()).collect();
        let mut wanted = required(platform);
        listed.sort();
        wanted.sort();
        assert_eq!(listed, wanted, "{platform:?}: docs/reliability.md against tests/it/faults/script.rs");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_ends_as_the_table_says() {
    run("SQLite", &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_ends_as_the_table_says_on_postgres() {
    let postgres = Postgres::start();
    run("Postgres", &[("NUDGED_DATABASE__URL", postgres.url())]).await;
}

async fn run(store: &str, environment: &[(&str, String)]) {
    let begun = Instant::now();
    let cells = cells();
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
    let stage = Arc::new(Stage { sandbox, client, admin });
    let plays = cells.into_iter().map(|cell| tokio::spawn(play(cell, Arc::clone(&stage))));
    let plays = futures_util::stream::iter(plays).buffer_unordered(AT_ONCE);
    let mut plays: Vec<_> = plays.map(Result::unwrap).collect().await;
    plays.sort_by_key(|(cell, _)| cell.number);
    let (mut text, mut wrong, count) = (String::new(), 0, plays.len());
    for (cell, findings) in plays {
        if !findings.is_empty() {
            wrong += 1;
            writeln!(text, "{cell}: {}", findings.join("; ")).unwrap();
        }
    }
    println!("{store}: {count} cells in {:.1} s, {wrong} not as the table says\n{text}", begun.elapsed().as_secs_f64());
    assert_eq!(wrong, 0, "{store}\n{text}");
    assert!(server.terminate().success());
    assert!(begun.elapsed() < 4 * PATIENCE);
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
        let waits =
            ["transport_floor_secs", "throttled_floor_secs", "server_error_floor_secs", "base_secs", "cap_secs"];
        writeln!(text, "[delivery.{platform}]").unwrap();
        for wait in waits {
            writeln!(text, "{wait} = 1").unwrap();
        }
    }
    for cell in cells {
        let (app, door) = (cell.app(), cell.script().door);
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
