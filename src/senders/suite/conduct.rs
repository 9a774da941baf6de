//! HTTP/2 conduct against the sandbox: what Apple and Google ask of a connection, over real TLS. What needs a clock or
//! single frames is tested on pipes, in `http2::tests`.

use super::*;

fn accepted(stage: &Stage) -> BTreeMap<String, usize> {
    let mut accepted = BTreeMap::new();
    for push in stage.sandbox.received().iter().filter(|push| push.accepted) {
        *accepted.entry(push.token.clone()).or_insert(0) += 1;
    }
    accepted
}

fn counts(stage: &Stage) -> sandbox::ConnectionCounts {
    let connections = stage.sandbox.connections();
    if stage.kind == Kind::Fcm { connections.fcm } else { connections.apns }
}

async fn slow(kind: Kind, max_concurrent_streams: u32) -> Stage {
    let latency = Duration::from_millis(150);
    let options = sandbox::Options { max_concurrent_streams, latency, ..sandbox::Options::default() };
    let http2 = http2::Settings { max_connections: 1, ..http2::Settings::default() };
    Stage::with(kind, http2, options).await
}

#[tokio::test]
async fn the_first_request_is_alone_until_the_token_is_accepted() {
    let mut stage = slow(Kind::ApnsToken, 1_000).await;
    let outcomes = stage.send(&hello(), 0..20).await;
    assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
    let mut received = stage.sandbox.received();
    received.sort_unstable_by_key(|push| push.stream_ordinal);
    let after_first = received[1].at.since(received[0].at);
    assert!(after_first >= Duration::from_millis(140), "the second came {after_first:?} after the first");
    let rest = received[19].at.since(received[1].at);
    assert!(rest < Duration::from_millis(19 * 150), "{rest:?}: the others came together");
    assert_eq!(counts(&stage).refused_streams, 0);
    stage.end().await;
}

#[tokio::test]
async fn an_error_of_the_server_does_not_prove_the_token() {
    let mut stage = slow(Kind::ApnsToken, 1_000).await;
    stage.add(Fault::status(503, "ServiceUnavailable").on(Target::Apns).times(2));
    let outcomes = stage.send(&hello(), 0..6).await;
    assert_eq!(outcomes.iter().filter(|outcome| is_sent(outcome)).count(), 4, "{outcomes:?}");
    let mut received = stage.sandbox.received();
    received.sort_unstable_by_key(|push| push.stream_ordinal);
    for pair in received[..3].windows(2) {
        let gap = pair[1].at.since(pair[0].at);
        assert!(gap >= Duration::from_millis(140), "alone until one was taken: {gap:?}");
    }
    stage.end().await;
}

#[tokio::test]
async fn the_announced_limit_is_never_exceeded_also_after_it_shrank() {
    for kind in [Kind::ApnsToken, Kind::Fcm] {
        let mut stage = slow(kind, 8).await;
        stage.warm_up().await;
        let outcomes = stage.send(&hello(), 0..40).await;
        assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
        assert_eq!(counts(&stage).refused_streams, 0, "{kind:?}");
        stage.add(Fault::new(Action::MaxStreams { streams: 2 }).on(kind.target()));
        assert!(is_sent(&stage.send_one().await));
        let refused = counts(&stage).refused_streams;
        let outcomes = stage.send(&hello(), 100..120).await;
        assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
        assert_eq!(counts(&stage).refused_streams, refused, "{kind:?}: two at a time from now on");
        stage.end().await;
    }
}

#[tokio::test]
async fn a_replacement_is_there_before_the_old_connection_is_drained() {
    for kind in [Kind::ApnsToken, Kind::Fcm] {
        let mut stage = slow(kind, 10).await;
        stage.warm_up().await;
        stage.add(Fault::new(Action::Goaway { refuse: false, close: false, reason: None }).on(kind.target()).skip(3));
        let outcomes = stage.send(&hello(), 0..60).await;
        assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
        assert!(accepted(&stage).values().all(|count| *count == 1), "nobody twice");
        let received = stage.sandbox.received();
        let old = received[0].connection;
        assert!(received.iter().any(|push| push.connection != old), "new work went over a new one");
        assert!(received.iter().filter(|push| push.connection == old).all(|push| push.accepted), "the old one drained");
        assert_eq!(counts(&stage).opened, 2);
        stage.end().await;
    }
}

#[tokio::test]
async fn streams_below_a_goaways_last_id_are_in_doubt_when_it_dies_and_those_above_are_sent_again() {
    for kind in [Kind::ApnsToken, Kind::ApnsCertificate, Kind::Fcm] {
        let mut stage = slow(kind, 100).await;
        stage.warm_up().await;
        stage.add(Fault::new(Action::Goaway { refuse: false, close: true, reason: None }).on(kind.target()).skip(5));
        let outcomes = stage.send(&hello(), 0..30).await;
        let in_doubt = outcomes.iter().filter(|outcome| is_maybe(outcome)).count();
        assert!(in_doubt >= 1, "{kind:?}: {outcomes:?}");
        assert!(outcomes.iter().all(|outcome| is_maybe(outcome) || is_sent(outcome)), "{outcomes:?}");
        let accepted = accepted(&stage);
        assert!(accepted.values().all(|count| *count == 1), "nothing in doubt was repeated by the sender itself");
        stage.end().await;
    }
}

#[tokio::test]
async fn apples_reasons_about_a_connection_replace_it() {
    for (status, reason, cause) in
        [(400, "IdleTimeout", RetryCause::Transport), (503, "Shutdown", RetryCause::ServerError)]
    {
        let mut stage = Stage::new(Kind::ApnsToken).await;
        stage.warm_up().await;
        stage.add(Fault::status(status, reason).on(Target::Apns));
        assert_eq!(later(&stage.send_one().await).0, cause);
        assert!(is_sent(&stage.send_one().await));
        let received = stage.sandbox.received();
        assert_ne!(received[0].connection, received[1].connection, "{reason}");
        stage.end().await;
    }
}

#[tokio::test]
async fn too_many_token_updates_mint_nothing_and_leave_the_connection() {
    let mut stage = Stage::new(Kind::ApnsToken).await;
    stage.send_one().await;
    stage.add(Fault::status(429, "TooManyProviderTokenUpdates").on(Target::Apns));
    assert_eq!(later(&stage.send_one().await).0, RetryCause::Throttled);
    assert!(is_sent(&stage.send_one().await));
    let received = stage.sandbox.received();
    assert!(received.iter().all(|push| push.auth_hash == received[0].auth_hash), "the older token goes on");
    assert_ne!(received[1].connection, received[2].connection, "that connection is unusable");
    stage.end().await;
}

/// As two replicas, or one before and after a restart, have them.
#[tokio::test]
async fn every_sender_of_a_team_has_the_same_token() {
    let mut stage = Stage::new(Kind::ApnsToken).await;
    stage.warm_up().await;
    let mut other = Stage::new(Kind::ApnsToken).await;
    let credentials = stage.sandbox.credentials();
    let auth = apns::Auth::Token {
        p8_pem: Secret::new(credentials.apns_key_pem.as_bytes()),
        key_id: credentials.key_id.clone(),
        team_id: credentials.team_id.clone(),
    };
    let settings = apns::Settings {
        endpoint: stage.sandbox.apns_endpoint().to_owned(),
        endpoint_sandbox: stage.sandbox.apns_endpoint().to_owned(),
        ca_pem: Some(stage.sandbox.ca_pem().as_bytes().to_vec()),
        ..apns::Settings::new(auth, vec![BUNDLE.to_owned()])
    };
    let second = ApnsSender::new(&other.runtime, &other.threads, &other.deny, &settings).expect("good settings");
    let first = std::mem::replace(&mut other.sender, Arc::new(second));
    // Not across a step of the 40-minute grid.
    assert!(is_sent(&stage.send_one().await));
    assert!(is_sent(&other.send_one().await));
    let received = stage.sandbox.received();
    assert_eq!(received.len(), 2);
    assert_ne!(received[0].connection, received[1].connection);
    let minute = received[0].at.secs() / 2_400 == received[1].at.secs() / 2_400;
    assert!(!minute || received[0].auth_hash == received[1].auth_hash, "byte for byte");
    first.drain(Duration::from_secs(1)).await;
    other.end().await;
    stage.end().await;
}

/// A provider that answers nothing holds its own deliveries, within the limits, and gives them back.
#[tokio::test]
async fn a_stalled_provider_holds_no_more_than_its_streams() {
    let http2 = http2::Settings {
        max_connections: 1,
        max_streams: 10,
        max_queued_targets: 50,
        request_timeout: Duration::from_millis(800),
        ..http2::Settings::default()
    };
    let mut stage = Stage::with(Kind::Fcm, http2, sandbox::Options::default()).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::Stall {}).on(Target::Fcm).times(10_000));
    let batch = stage.batch(&hello(), 0..50);
    assert!(stage.sender.submit(batch).is_ok());
    stage.runtime.sleep(Duration::from_millis(200)).await;
    let status = stage.sender.status();
    assert!(status.in_flight <= 10 && status.in_flight + status.queued <= 50, "{status:?}");
    let more = stage.batch(&hello(), 0..50);
    assert!(stage.sender.submit(more).is_err(), "the queue is bounded");
    stage.sandbox.clear_faults();
    let outcomes = stage.collect(50).await;
    assert!(outcomes.iter().all(|outcome| is_maybe(outcome) || is_sent(outcome)), "{outcomes:?}");
    assert!(outcomes.iter().any(is_maybe), "those that were handed over");
    stage.end().await;
}
