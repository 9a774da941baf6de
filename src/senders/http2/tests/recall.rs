//! What a "no" still reaches after the hand-over.

use std::ops::Range;

use super::harness::{Bench, TestWire, is_maybe, sent};
use super::one_connection;
use crate::domain::deny::DenyKey;
use crate::domain::ids::UserKey;
use crate::domain::platform::Lane;
use crate::domain::sending::SendOutcome;
use crate::senders::http2::Settings;

fn say_no(bench: &Bench, users: Range<i64>) {
    let keys: Vec<DenyKey> = users.map(|user| DenyKey::User(UserKey(user))).collect();
    bench.deny.publish(&keys, bench.runtime.instant().into_std());
}

#[tokio::test(start_paused = true)]
async fn what_the_peers_window_holds_back_stays_with_us() {
    let settings = Settings { max_streams: 1000, ..one_connection() };
    let mut bench = Bench::with_wire(settings, 1 << 20, || TestWire { padding: 4000, ..TestWire::default() });
    bench.submit(bench.batch(1, Lane::Interactive, 0..200));
    let mut peer = bench.accept(1000).await;
    // It answers PINGs and reads everything, but opens its window of 65 535 bytes no further.
    let first = peer.requests_within(&bench.runtime, 300).await;
    assert_eq!(first.len(), 16);
    say_no(&bench, 0..200);
    for (stream, _) in &first {
        peer.answer(*stream).await;
    }
    assert!(peer.requests_within(&bench.runtime, 1000).await.is_empty(), "the window is shut");
    peer.open_window(1 << 20).await;
    assert!(peer.requests_within(&bench.runtime, 1000).await.is_empty(), "what h2 held left after the no");
    let outcomes = bench.outcomes(200).await;
    let count = |is: fn(&SendOutcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
    assert_eq!(count(|outcome| *outcome == sent()), 16);
    assert!((1..=17).contains(&count(is_maybe)), "no more than 64 KiB are h2's");
    assert!(count(|outcome| *outcome == SendOutcome::Held) >= 200 - 33);
    bench.submit(bench.batch(2, Lane::Interactive, [7]));
    assert_eq!(peer.requests_within(&bench.runtime, 100).await.len(), 1, "the connection stays");
}

#[tokio::test(start_paused = true)]
async fn a_no_calls_back_what_a_stalled_connection_has_not_let_out() {
    let settings = Settings { max_streams: 1000, ..one_connection() };
    let wire = || TestWire { padding: 1000, ..TestWire::default() };
    let mut bench = Bench::with_wire(settings, 8 * 1024, wire);
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let mut peer = bench.accept(1000).await;
    let (stream, _) = peer.request().await.expect("the first");
    peer.answer(stream).await;
    bench.outcomes(1).await;
    // The peer stops reading: 8 KiB are in the pipe, the others in our process.
    bench.submit(bench.batch(2, Lane::Bulk, 0..40));
    bench.pause(100).await;
    bench.submit(bench.batch(3, Lane::Bulk, 40..50));
    bench.pause(100).await;
    assert_eq!(bench.driver.status().queued, 10, "nothing is handed over while bytes wait here");
    say_no(&bench, 0..50);
    bench.pause(900).await;
    let late = peer.requests_within(&bench.runtime, 1000).await;
    assert!(late.len() <= 8, "{} had left by then", late.len());
    assert!(peer.request().await.is_none(), "the connection was cut");
    let new = bench.serve(1000).await;
    let outcomes = bench.outcomes(50).await;
    assert!(outcomes[..40].iter().all(is_maybe));
    assert!(outcomes[40..].iter().all(|outcome| *outcome == SendOutcome::Held));
    drop(new);
}

#[tokio::test(start_paused = true)]
async fn a_no_that_touches_nothing_here_leaves_a_slow_connection_alone() {
    let wire = || TestWire { padding: 1000, ..TestWire::default() };
    let mut bench = Bench::with_wire(one_connection(), 8 * 1024, wire);
    bench.submit(bench.batch(1, Lane::Bulk, 0..20));
    let mut peer = bench.accept(1000).await;
    bench.pause(100).await;
    say_no(&bench, 20..50);
    bench.pause(900).await;
    let runtime = bench.runtime.clone();
    let late = peer.requests_within(&runtime, 100).await;
    assert_eq!(late.len(), 20);
    say_no(&bench, 0..20);
    bench.pause(900).await;
    assert_eq!(bench.driver.status().in_flight, 20, "they have left");
    for (stream, _) in late {
        peer.answer(stream).await;
    }
    assert!(bench.outcomes(20).await.iter().all(|outcome| *outcome == sent()));
}
