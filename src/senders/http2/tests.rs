//! The driver against a server of raw frames, on a paused clock.

mod harness;
mod recall;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use self::harness::{Bench, Peer, START, TestWire, is_maybe, is_transport, route, sent};
use super::Settings;
use crate::domain::deny::{DenyFeed, DenyKey};
use crate::domain::ids::UserKey;
use crate::domain::platform::Lane;
use crate::domain::sending::SendOutcome;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;

fn one_connection() -> Settings {
    Settings { max_connections: 1, ..Settings::default() }
}

fn answer_of(outcome: &SendOutcome) -> String {
    match outcome {
        SendOutcome::RetryLater { answer, .. } | SendOutcome::MaybeSent { answer } => answer.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn every_target_is_sent_once_and_answered_once() {
    let mut bench = Bench::new(Settings::default());
    bench.submit(bench.batch(1, Lane::Bulk, 0..300));
    bench.submit(bench.batch(2, Lane::Interactive, 300..310));
    let peer = bench.serve(1000).await;
    let outcomes = bench.outcomes(310).await;
    assert!(outcomes.iter().all(|outcome| *outcome == sent()));
    let status = bench.driver.status();
    assert_eq!((status.connections, status.queued), (1, 0));
    bench.driver.drain(Duration::from_secs(1)).await;
    assert!(peer.await.expect("served").got_goaway, "closed with a goodbye");
}

#[tokio::test(start_paused = true)]
async fn requests_leave_together() {
    let mut bench = Bench::with_wire(one_connection(), 1 << 20, || TestWire { padding: 300, ..TestWire::default() });
    bench.submit(bench.batch(1, Lane::Interactive, 0..1));
    let mut peer = bench.accept(100).await;
    let (stream, _) = peer.request().await.expect("the first");
    peer.answer(stream).await;
    bench.outcomes(1).await;
    let before = bench.pipes.writes.load(Ordering::SeqCst);
    bench.submit(bench.batch(2, Lane::Interactive, 0..60));
    assert_eq!(peer.requests_within(&bench.runtime, 10).await.len(), 60);
    let writes = bench.pipes.writes.load(Ordering::SeqCst) - before;
    assert!(writes <= 2, "{writes} writes for 60 requests with bodies of 300 bytes");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_before_the_servers_settings() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..2));
    let io = bench.accept_silent().await;
    drop(io);
    let mut peer = bench.accept(10).await;
    assert_eq!(peer.requests_within(&bench.runtime, 50).await.len(), 2, "nothing was lost with the first");
}

#[tokio::test(start_paused = true)]
async fn the_peers_limit_is_obeyed_also_when_it_shrinks() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..20));
    let mut peer = bench.accept(8).await;
    let mut open = peer.requests_within(&bench.runtime, 100).await;
    assert_eq!(open.len(), 8);
    peer.limit(2).await;
    for (stream, _) in open.drain(..7) {
        peer.answer(stream).await;
    }
    open.extend(peer.requests_within(&bench.runtime, 100).await);
    assert_eq!(open.len(), 2, "one left of the eight, one more");
    peer.limit(5).await;
    open.extend(peer.requests_within(&bench.runtime, 100).await);
    assert_eq!(open.len(), 5);
    for (stream, _) in open {
        peer.answer(stream).await;
    }
    bench.runtime.spawn(peer.serve());
    assert!(bench.outcomes(20).await.iter().all(|outcome| *outcome == sent()));
}

#[tokio::test(start_paused = true)]
async fn a_refused_stream_is_sent_again_a_few_times() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, [1, 2]));
    let mut peer = bench.accept(10).await;
    let mut tries = 0;
    let deadline = bench.runtime.instant() + Duration::from_secs(3);
    while let Some((stream, user)) = tokio::select! {
        request = peer.request() => request,
        () = bench.runtime.sleep_until(deadline) => None,
    } {
        if user == 1 {
            peer.refuse(stream).await;
            tries += 1;
        } else {
            peer.answer(stream).await;
        }
    }
    let outcomes = bench.outcomes(2).await;
    assert!(is_transport(&outcomes[0]), "{:?}", outcomes[0]);
    assert_eq!(outcomes[1], sent());
    assert_eq!(tries, 1 + usize::from(super::MAX_RESENDS));
}

#[tokio::test(start_paused = true)]
async fn streams_above_a_goaways_last_id_are_sent_elsewhere_and_the_others_answered() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..4));
    let mut old = bench.accept(10).await;
    let requests = old.requests_within(&bench.runtime, 20).await;
    let ids: Vec<u32> = requests.iter().map(|(stream, _)| *stream).collect();
    assert_eq!(ids, [1, 3, 5, 7]);
    old.goaway(3).await;
    bench.submit(bench.batch(2, Lane::Interactive, [9]));
    let mut new = bench.accept(10).await;
    let mut users: Vec<i64> = new.requests_within(&bench.runtime, 20).await.into_iter().map(|(_, u)| u).collect();
    users.sort_unstable();
    assert_eq!(users, [2, 3, 9], "exactly those");
    old.answer(1).await;
    old.answer(3).await;
    for stream in [1, 3, 5] {
        new.answer(stream).await;
    }
    assert!(bench.outcomes(5).await.iter().all(|outcome| *outcome == sent()));
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_leaves_its_requests_in_doubt_and_the_queue_intact() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..5));
    let mut peer = bench.accept(2).await;
    assert_eq!(peer.requests_within(&bench.runtime, 20).await.len(), 2);
    drop(peer);
    bench.serve(10).await;
    let outcomes = bench.outcomes(5).await;
    assert!(outcomes[..2].iter().all(is_maybe), "{outcomes:?}");
    assert!(outcomes[2..].iter().all(|outcome| *outcome == sent()));
}

#[tokio::test(start_paused = true)]
async fn no_answer_in_time_is_maybe_sent_and_the_stream_is_reset() {
    let mut bench = Bench::new(one_connection());
    let began = bench.runtime.instant();
    bench.submit(bench.batch(1, Lane::Interactive, [1, 2]));
    let mut peer = bench.accept(10).await;
    let peer = bench.runtime.spawn({
        let runtime = bench.runtime.clone();
        async move {
            let (stream, _) = peer.request().await.expect("the first");
            peer.answer_half(stream).await;
            peer.requests_within(&runtime, 20_000).await;
            peer
        }
    });
    let outcomes = bench.outcomes(2).await;
    assert_eq!(outcomes[0], sent(), "the status counts, whatever becomes of the body");
    assert_eq!(answer_of(&outcomes[1]), "timeout");
    let took = bench.runtime.instant() - began;
    assert!((Duration::from_secs(15)..Duration::from_secs(16)).contains(&took), "{took:?}");
    assert_eq!(peer.await.expect("served").resets, [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_peer_without_sign_of_life_is_given_nothing_more_and_then_given_up() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let mut peer = bench.accept(10).await;
    peer.answers_pings = false;
    peer.requests_within(&bench.runtime, 2000).await;
    assert_eq!(peer.pings, 1);
    bench.submit(bench.batch(2, Lane::Interactive, [2]));
    assert!(peer.requests_within(&bench.runtime, 1000).await.is_empty(), "it has not moved for 500 ms");
    bench.serve(10).await;
    let outcomes = bench.outcomes(2).await;
    assert_eq!(outcomes[1], sent(), "over another connection");
    assert!(is_maybe(&outcomes[0]));
}

#[tokio::test(start_paused = true)]
async fn a_stalled_connection_takes_no_more_than_the_buffers_hold() {
    let settings = Settings { max_streams: 1000, ..one_connection() };
    let wire = || TestWire { padding: 1000, ..TestWire::default() };
    let mut bench = Bench::with_wire(settings, 8 * 1024, wire);
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let mut peer = bench.accept(1000).await;
    let (stream, _) = peer.request().await.expect("the first");
    peer.answer(stream).await;
    bench.outcomes(1).await;
    // The peer stops reading; the connection's window alone would let 64 KiB through.
    bench.submit(bench.batch(2, Lane::Bulk, 0..40));
    bench.pause(600).await;
    bench.submit(bench.batch(3, Lane::Interactive, 100..140));
    bench.pause(6000).await;
    let mut seen = std::collections::HashSet::new();
    for (stream, user) in peer.requests_within(&bench.runtime, 2000).await {
        seen.insert(user);
        peer.answer(stream).await;
    }
    assert!(!seen.contains(&100), "handed over after the stall");
    let outcomes = bench.outcomes(80).await;
    assert!(outcomes[40..].iter().all(is_transport), "given back within 5 s");
}

#[tokio::test(start_paused = true)]
async fn a_no_stops_what_is_queued() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, [1, 2, 3]));
    let mut peer = bench.accept(1).await;
    let (stream, user) = peer.request().await.expect("the first");
    assert_eq!(user, 1);
    bench.deny.publish(&[DenyKey::User(UserKey(2))], bench.runtime.instant().into_std());
    peer.answer(stream).await;
    let (stream, user) = peer.request().await.expect("the third");
    assert_eq!(user, 3);
    peer.answer(stream).await;
    assert_eq!(bench.outcomes(3).await, [sent(), SendOutcome::Held, sent()]);
}

#[tokio::test(start_paused = true)]
async fn old_gates_and_expired_messages_are_held() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    bench.serve(10).await;
    bench.outcomes(1).await;
    let old = bench.batch(2, Lane::Interactive, [1]);
    bench.runtime.sleep(DenyFeed::GATE_GOOD_FOR + Duration::from_millis(1)).await;
    bench.submit(old);
    let mut expired = bench.batch(3, Lane::Interactive, [1]);
    expired.expires_at = bench.runtime.now();
    bench.submit(expired);
    let mut just = bench.batch(4, Lane::Interactive, [1]);
    just.expires_at = UnixMs(bench.runtime.now().0 + 100);
    bench.submit(just);
    assert_eq!(bench.outcomes(3).await, [SendOutcome::Held, SendOutcome::Held, sent()]);
    assert!(bench.runtime.now() > START);
}

#[tokio::test(start_paused = true)]
async fn a_quarter_of_the_streams_is_kept_for_the_interactive_lane() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Bulk, 0..50));
    let mut peer = bench.accept(8).await;
    let mut open = peer.requests_within(&bench.runtime, 20).await;
    assert_eq!(open.len(), 6, "of eight");
    bench.submit(bench.batch(2, Lane::Interactive, 100..120));
    open.extend(peer.requests_within(&bench.runtime, 20).await);
    assert_eq!(open.len(), 8);
    let mut order: Vec<i64> = Vec::new();
    for _ in 0..20 {
        let (stream, _) = open.remove(0);
        peer.answer(stream).await;
        let request = peer.request().await.expect("the next");
        order.push(request.1);
        open.push(request);
    }
    let interactive = order.iter().filter(|user| **user >= 100).count();
    assert!(interactive >= 16, "first those of the interactive lane: {order:?}");
    assert!(order.iter().any(|user| *user < 100), "but the other is not stopped: {order:?}");
}

#[tokio::test(start_paused = true)]
async fn batches_and_routes_take_turns() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Bulk, 0..500));
    bench.submit(bench.batch(2, Lane::Bulk, 500..1000));
    let mut small = bench.batch(3, Lane::Bulk, [5000]);
    small.route = route(2);
    bench.submit(small);
    bench.submit(bench.batch(4, Lane::Bulk, [6000]));
    let mut peer = bench.accept(400).await;
    let users: Vec<i64> = peer.requests_within(&bench.runtime, 20).await.into_iter().map(|(_, u)| u).collect();
    assert_eq!(users.len(), 300);
    assert!(users[..65].contains(&5000), "its route's turn comes after one quantum: {users:?}");
    assert!(users.contains(&6000) && users.contains(&500), "{users:?}");
}

#[tokio::test(start_paused = true)]
async fn without_a_connection_targets_are_given_back_and_the_provider_is_left_alone() {
    let mut bench = Bench::new(Settings::default());
    bench.pipes.failing.store(usize::MAX, Ordering::SeqCst);
    let began = bench.runtime.instant();
    bench.submit(bench.batch(1, Lane::Interactive, 0..3));
    let outcomes = bench.outcomes(3).await;
    let took = bench.runtime.instant() - began;
    assert!((Duration::from_secs(5)..Duration::from_millis(5200)).contains(&took), "{took:?}");
    assert!(outcomes.iter().all(is_transport));
    assert!(answer_of(&outcomes[0]).starts_with("connect failed: "), "{}", answer_of(&outcomes[0]));
    for round in 0..60 {
        bench.submit(bench.batch(2 + round, Lane::Interactive, [1]));
        bench.outcomes(1).await;
    }
    let attempts = bench.pipes.attempts.load(Ordering::SeqCst);
    assert!((6..=20).contains(&attempts), "{attempts} attempts in five minutes");
}

#[tokio::test(start_paused = true)]
async fn connecting_works_again_after_failures() {
    let mut bench = Bench::new(Settings::default());
    bench.pipes.failing.store(2, Ordering::SeqCst);
    bench.submit(bench.batch(1, Lane::Interactive, 0..3));
    bench.serve(10).await;
    assert!(bench.outcomes(3).await.iter().all(|outcome| *outcome == sent()));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_no_connection() {
    let mut bench = Bench::new(Settings::default());
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let silent = bench.accept_silent().await;
    assert!(is_transport(&bench.outcomes(1).await[0]));
    bench.pause(6000).await;
    bench.submit(bench.batch(2, Lane::Interactive, [1]));
    bench.serve(10).await;
    assert_eq!(bench.outcomes(1).await, [sent()]);
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn busy_connections_get_company_and_no_more_than_allowed() {
    let settings = Settings { max_connections: 3, ..Settings::default() };
    let mut bench = Bench::new(settings);
    let began = bench.runtime.instant();
    bench.submit(bench.batch(1, Lane::Interactive, 0..500));
    // Reads all, answers pings, and answers requests only after three seconds.
    let slow = |mut peer: Peer, runtime: Runtime| async move {
        for (stream, _) in peer.requests_within(&runtime, 3000).await {
            peer.answer(stream).await;
        }
        peer.serve().await
    };
    let first = bench.accept(10).await;
    bench.runtime.spawn(slow(first, bench.runtime.clone()));
    let second = bench.accept(10).await;
    let grew = bench.runtime.instant() - began;
    assert!((Duration::from_millis(100)..Duration::from_millis(400)).contains(&grew), "{grew:?}");
    bench.runtime.spawn(slow(second, bench.runtime.clone()));
    let third = bench.accept(10).await;
    bench.runtime.spawn(slow(third, bench.runtime.clone()));
    bench.pause(2500).await;
    assert_eq!(bench.pipes.attempts.load(Ordering::SeqCst), 3);
    assert!(bench.outcomes(500).await.iter().all(|outcome| *outcome == sent()));
}

#[tokio::test(start_paused = true)]
async fn idle_and_old_connections_are_replaced() {
    let settings = Settings { max_age: Duration::from_secs(60), ..one_connection() };
    let mut bench = Bench::new(settings);
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let old = bench.serve(10).await;
    bench.outcomes(1).await;
    let young = bench.serve(10).await;
    assert!(old.await.expect("served").got_goaway, "closed once the new one was there");
    bench.submit(bench.batch(2, Lane::Interactive, [1]));
    assert_eq!(bench.outcomes(1).await, [sent()]);
    drop(young);

    let settings = Settings { idle_after: Duration::from_secs(90), ..one_connection() };
    let mut bench = Bench::new(settings);
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let idle = bench.accept(10).await;
    let began = bench.runtime.instant();
    let idle = idle.serve().await;
    assert!(idle.got_goaway && idle.pings >= 1, "asked for a sign of life, then closed");
    assert!(bench.runtime.instant() - began > Duration::from_secs(90));
}

#[tokio::test(start_paused = true)]
async fn a_first_request_is_alone_until_the_credential_is_accepted() {
    let wire = || TestWire { first_alone: true, ..TestWire::default() };
    let mut bench = Bench::with_wire(one_connection(), 64 * 1024, wire);
    bench.submit(bench.batch(1, Lane::Interactive, 0..10));
    let mut peer = bench.accept(100).await;
    let open = peer.requests_within(&bench.runtime, 1000).await;
    assert_eq!(open.len(), 1);
    peer.answer(open[0].0).await;
    assert_eq!(peer.requests_within(&bench.runtime, 20).await.len(), 9);
}

#[tokio::test(start_paused = true)]
async fn a_stale_credential_is_renewed_once_over_a_new_connection() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, [1, 2]));
    let mut old = bench.accept(10).await;
    for (stream, _) in old.requests_within(&bench.runtime, 20).await {
        old.answer_400(stream).await;
    }
    let runtime = bench.runtime.clone();
    let mut new = runtime.timeout(Duration::from_secs(60), bench.accept(10)).await.expect("a new connection");
    let again = new.requests_within(&bench.runtime, 100).await;
    assert_eq!(again.len(), 2);
    new.answer(again[0].0).await;
    new.answer_400(again[1].0).await;
    let outcomes = bench.outcomes(2).await;
    let broken = outcomes.iter().filter(|outcome| matches!(outcome, SendOutcome::SenderBroken { .. })).count();
    assert_eq!((broken, outcomes.contains(&sent())), (1, true), "twice is once too often: {outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_gives_batches_back() {
    let settings = Settings { max_queued_targets: 10, ..one_connection() };
    let mut bench = Bench::new(settings);
    bench.submit(bench.batch(1, Lane::Interactive, 0..10));
    let back = bench.driver.submit(bench.batch(2, Lane::Interactive, [1])).expect_err("full");
    assert_eq!(back.targets.len(), 1);
    bench.serve(100).await;
    bench.outcomes(10).await;
    bench.submit(back);
    assert_eq!(bench.outcomes(1).await, [sent()]);
    assert!(bench.driver.submit(bench.batch(3, Lane::Interactive, [])).is_ok(), "nothing to do");
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_answers_and_gives_the_rest_back() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..5));
    let mut peer = bench.accept(2).await;
    let open = peer.requests_within(&bench.runtime, 20).await;
    assert_eq!(open.len(), 2);
    let late = bench.batch(2, Lane::Interactive, [9]);
    let began = bench.runtime.instant();
    let drain = async {
        bench.driver.drain(Duration::from_secs(4)).await;
        bench.driver.submit(late).expect_err("it takes nothing more");
    };
    let serve = async {
        bench.runtime.sleep(Duration::from_secs(3)).await;
        peer.answer(open[0].0).await;
        peer.requests_within(&bench.runtime, 10_000).await
    };
    let ((), more) = tokio::join!(drain, serve);
    assert!(more.is_empty(), "no hand-over in the second half");
    assert!(bench.runtime.instant() - began < Duration::from_secs(7));
    let outcomes = bench.outcomes(5).await;
    assert_eq!(outcomes[0], sent());
    assert!(is_maybe(&outcomes[1]), "handed over and never answered");
    assert!(outcomes[2..].iter().all(|outcome| *outcome == SendOutcome::NotAttempted));
    bench.threads.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_one_turns_failure() {
    let wire = || TestWire { panics_at: Some(3), ..TestWire::default() };
    let mut bench = Bench::with_wire(one_connection(), 64 * 1024, wire);
    bench.submit(bench.batch(1, Lane::Interactive, [1]));
    let mut peer = bench.accept(100).await;
    peer.request().await.expect("the first");
    bench.submit(bench.batch(2, Lane::Interactive, [2, 3, 4]));
    let outcomes = bench.outcomes(4).await;
    assert!(is_maybe(&outcomes[0]) && is_maybe(&outcomes[1]), "handed over: {outcomes:?}");
    assert!(outcomes[2..].iter().all(|outcome| *outcome == SendOutcome::NotAttempted), "not: {outcomes:?}");
    bench.submit(bench.batch(3, Lane::Interactive, [5]));
    bench.serve(100).await;
    assert_eq!(bench.outcomes(1).await, [sent()], "it goes on");
    assert_eq!(bench.driver.status().queued, 0);
}

#[tokio::test(start_paused = true)]
async fn a_crash_answers_everything_once() {
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..5));
    let mut peer: Peer = bench.accept(2).await;
    peer.requests_within(&bench.runtime, 20).await;
    bench.threads = super::SendingThreads::new(&bench.runtime, 1).expect("no threads in simulation");
    let outcomes = bench.outcomes(5).await;
    assert!(outcomes[..2].iter().all(is_maybe));
    assert!(outcomes[2..].iter().all(|outcome| *outcome == SendOutcome::NotAttempted));
    let late = bench.batch(2, Lane::Interactive, [1]);
    assert!(bench.driver.submit(late).is_err(), "nobody is there to take it");
}

/// On real threads and a real clock: the same code without simulation.
#[tokio::test]
async fn a_real_thread_sends_and_is_joined() {
    let runtime = Runtime::production();
    let threads = super::SendingThreads::new(&runtime, 2).expect("threads");
    let (sink, mut outcomes) = tokio::sync::mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let endpoint = super::Endpoint::parse(&format!("http://{}", listener.local_addr().expect("bound"))).expect("a URL");
    let connector = super::connect::TcpConnector {
        runtime: runtime.clone(),
        endpoint,
        tls: Arc::new(super::tls::client_config(None, None, &[b"h2"]).expect("roots")),
        timeout: Duration::from_secs(5),
    };
    let parts = super::Parts {
        name: "test".into(),
        runtime: runtime.clone(),
        settings: Settings::default(),
        deny: Arc::new(DenyFeed::default()),
        connector: Arc::new(connector),
    };
    let driver = super::Driver::start(&threads, parts, TestWire::default);
    let server = runtime.spawn(async move {
        let (stream, _) = listener.accept().await.expect("a connection");
        let mut connection = h2::server::handshake(stream).await.expect("a handshake");
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let _ = respond.send_response(http::Response::new(()), true);
        }
    });
    let bench = Bench::new(Settings::default());
    let mut batch = bench.batch(7, Lane::Bulk, 0..500);
    batch.gated_at = runtime.instant().into_std();
    batch.sink.outcomes = sink;
    assert!(driver.submit(batch).is_ok());
    let mut answered = 0;
    while answered < 500 {
        let outcome = runtime.timeout(Duration::from_secs(20), outcomes.recv()).await.expect("in time");
        let results = outcome.expect("the batch holds a sender").results;
        assert!(results.iter().all(|(_, outcome)| *outcome == sent()));
        answered += results.len();
    }
    driver.drain(Duration::from_secs(2)).await;
    threads.shutdown().await;
    server.await.expect("served");
}

#[tokio::test(start_paused = true)]
async fn a_goaways_reason_is_logged() {
    let captured = crate::telemetry::capture::capture();
    let mut bench = Bench::new(one_connection());
    bench.submit(bench.batch(1, Lane::Interactive, 0..1));
    let mut peer = bench.accept(10).await;
    let (stream, _) = peer.request().await.expect("the first");
    peer.answer(stream).await;
    bench.outcomes(1).await;
    peer.goaway(stream).await;
    drop(peer);
    bench.pause(200).await;
    let text = captured.text();
    assert!(text.contains("Shutdown"), "{text}");
}
