//! Writes a large installation straight into a database, for measurements. Not for a database in use: it drops the
//! indexes while it writes.

use std::fmt::Write as _;

use bytes::Bytes;
use futures_util::SinkExt as _;
use tokio_postgres::{Client, NoTls};

use super::devices::token_hash;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::storage::reach::{Reach, ReachDevice};
use crate::storage::seed::{Made, Scattered, Seed, SeedPerson};

/// Bytes of one piece of a COPY.
const PIECE: usize = 256 * 1024;
/// Of everybody.
const LOCALE: &str = "ko-KR";

type Result<T> = std::result::Result<T, tokio_postgres::Error>;

/// Fills a migrated, otherwise empty database that nobody else uses. No TLS: it is on this machine.
///
/// # Errors
/// As the server answers; the database is of no use then.
pub async fn seed(runtime: &Runtime, url: &str, seed: &Seed<'_>, now: UnixMs) -> std::result::Result<(), String> {
    let explained = |error: tokio_postgres::Error| super::connect::explain(&error);
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.map_err(explained)?;
    let driving = runtime.spawn(connection);
    let written = write(&client, seed, now).await.map_err(explained);
    drop(client);
    driving.await.map_err(|error| error.to_string())?.map_err(explained)?;
    written
}

async fn write(client: &Client, seed: &Seed<'_>, now: UnixMs) -> Result<()> {
    const TABLES: &str = "('app_user', 'device', 'opt_in', 'opt_in_history', 'subscription')";
    let session = "SET synchronous_commit = off; SET maintenance_work_mem = '512MB'; SET nudged.packs = on";
    client.batch_execute(session).await?;
    let keys = client
        .query(
            &format!(
                "SELECT format('ALTER TABLE %I DROP CONSTRAINT %I', t.relname, c.conname), \
                 format('ALTER TABLE %I ADD CONSTRAINT %I %s', t.relname, c.conname, pg_get_constraintdef(c.oid)) \
                 FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid \
                 WHERE c.contype = 'p' AND t.relname IN {TABLES}"
            ),
            &[],
        )
        .await?;
    let indexes = client
        .query(
            &format!(
                "SELECT format('DROP INDEX %I', i.indexname), i.indexdef FROM pg_indexes i \
                 WHERE i.tablename IN {TABLES} \
                 AND NOT EXISTS (SELECT 1 FROM pg_constraint c WHERE c.conname = i.indexname)"
            ),
            &[],
        )
        .await?;
    let both = || keys.iter().chain(&indexes);
    for row in both() {
        client.batch_execute(row.get(0)).await?;
    }

    let scattered = Scattered::new(seed.people, now);
    for (at, topic) in seed.topics.iter().enumerate() {
        client
            .execute(
                "INSERT INTO topic (id, app, name) VALUES ($1, $2, $3)",
                &[&scattered.topic(at), &seed.app.0, &topic.name],
            )
            .await?;
    }
    let mut devices = vec![0; seed.people as usize];
    for made in scattered.devices() {
        devices[made.person as usize] = made.device();
    }
    copy(client, "app_user (id, app, external_id, created_at, reach)", scattered.people(), |made, text| {
        let person = (seed.person)(made.person);
        let _ = write!(text, "{}\t{}\t{}\t{}\t\\\\x", made.user_key, seed.app.0, person.user.as_str(), made.at());
        hex(text, &reach(seed, person, devices[made.person as usize]));
        text.push('\n');
    })
    .await?;
    copy(
        client,
        "opt_in (user_key, app, opted_in, observed_at, recorded_at, source)",
        scattered.people(),
        |made, text| {
            let (opted_in, at) = (u8::from((seed.person)(made.person).opted_in), made.at());
            let _ = writeln!(text, "{}\t{}\t{opted_in}\t{at}\t{at}\tonboarding", made.user_key, seed.app.0);
        },
    )
    .await?;
    copy(
        client,
        "opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, recorded_at, source)",
        scattered.people(),
        |made, text| {
            let (opted_in, at, key) = (u8::from((seed.person)(made.person).opted_in), made.at(), made.user_key);
            let _ = writeln!(text, "{key}\t{}\t{key}\t0\t\t{opted_in}\t1\t{at}\t{at}\tonboarding", seed.app.0);
        },
    )
    .await?;
    for (place, topic) in seed.topics.iter().enumerate() {
        let id = scattered.topic(place);
        copy(
            client,
            "subscription (topic, user_key, active, observed_at, recorded_at)",
            scattered.people().filter(|made| (topic.has)(made.person)),
            |made, text| {
                let at = made.at();
                let _ = writeln!(text, "{id}\t{}\t1\t{at}\t{at}", made.user_key);
            },
        )
        .await?;
    }
    copy(
        client,
        "device (id, app, platform, user_key, route, kind, token_hash, token_sealed, locale, app_version, os_version, \
         observed_at, confirmed_at, state, created_at)",
        scattered.devices(),
        |made, text| write_device(seed, made, text),
    )
    .await?;
    for row in both() {
        client.batch_execute(row.get(1)).await?;
    }
    client.batch_execute("VACUUM app_user, device, opt_in, subscription, topic").await?;
    client.batch_execute(super::arriving::ANALYZE_FILLED).await?;
    client.batch_execute("CHECKPOINT").await
}

/// What is packed of somebody on this device.
fn reach(seed: &Seed<'_>, person: SeedPerson, device: i64) -> Vec<u8> {
    let (id, route) = (device, seed.route(person.platform).0);
    let device = ReachDevice { id, route, token: person.token, locale: Some(LOCALE.to_owned()), choices: Vec::new() };
    let reach = Reach { choices: vec![(String::new(), person.opted_in)], devices: vec![device] };
    reach.pack().expect("one device fits")
}

fn write_device(seed: &Seed<'_>, made: Made, text: &mut String) {
    let person = (seed.person)(made.person);
    let at = made.at();
    let _ = write!(
        text,
        "{}\t{}\t{}\t{}\t{}\t1\t\\\\x",
        made.device(),
        seed.app.0,
        person.platform.code(),
        made.user_key,
        seed.route(person.platform).0
    );
    hex(text, &token_hash(&person.token));
    text.push_str("\t\\\\x");
    hex(text, person.token.expose().as_bytes());
    let _ = writeln!(text, "\t{LOCALE}\t3.14.0\t18.1\t{at}\t{at}\t1\t{at}");
}

fn hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// Rows in COPY's text format; no value holds a tab, a line break or a backslash.
async fn copy(
    client: &Client,
    into: &str,
    rows: impl Iterator<Item = Made>,
    write: impl Fn(Made, &mut String),
) -> Result<()> {
    let sink = client.copy_in::<_, Bytes>(&format!("COPY {into} FROM STDIN")).await?;
    let mut sink = std::pin::pin!(sink);
    let mut text = String::with_capacity(PIECE + 1024);
    for made in rows {
        write(made, &mut text);
        if text.len() >= PIECE {
            sink.send(std::mem::take(&mut text).into()).await?;
            text.reserve(PIECE + 1024);
        }
    }
    sink.send(text.into()).await?;
    sink.finish().await?;
    Ok(())
}
