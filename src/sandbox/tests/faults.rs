use super::*;

async fn proven(sandbox: &Sandbox) -> (Client, String) {
    let jwt = provider_token(sandbox.credentials(), 0);
    let mut client = Client::apns(sandbox).await;
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    sandbox.clear();
    (client, jwt)
}

fn goaway(refuse: bool, close: bool) -> Fault {
    Fault::new(Action::Goaway { refuse, close, reason: Some("Shutdown".to_owned()) })
}

#[tokio::test]
async fn status_fault_answers_with_reason_hint_and_body() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox
        .add_fault(Fault::new(Action::Status {
            status: 503,
            reason: Some("ServiceUnavailable".to_owned()),
            retry_after: Some("7".to_owned()),
            body: None,
            timestamp: None,
        }))
        .unwrap();
    let answer = client.send(alert(&jwt)).await.unwrap();
    assert_eq!(answer.apns(), (503, "ServiceUnavailable".to_owned()));
    assert_eq!(answer.headers["retry-after"], "7");
    let push = &sandbox.received()[0];
    assert_eq!((push.status, push.reason.as_deref(), push.accepted), (503, Some("ServiceUnavailable"), false));
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200, "played once");

    sandbox.add_fault(Fault::status(500, "")).unwrap();
    assert!(client.send(alert(&jwt)).await.unwrap().body.is_empty(), "no reason, no body");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn faults_pick_their_requests() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::status(500, "InternalServerError").on(Target::Fcm).times(9)).unwrap();
    sandbox.add_fault(Fault::status(500, "InternalServerError").token("ff00").times(9)).unwrap();
    sandbox.add_fault(Fault::status(429, "TooManyRequests").token_prefix("00fc").skip(1).times(2)).unwrap();
    let mut statuses = Vec::new();
    for _ in 0..5 {
        statuses.push(client.send(alert(&jwt)).await.unwrap().status.as_u16());
    }
    assert_eq!(statuses, [200, 429, 429, 200, 200]);
    assert_eq!(sandbox.faults().len(), 2, "the used-up one is gone");

    // A push that breaks a rule gets that rule's answer and uses nothing up.
    sandbox.clear_faults();
    sandbox.add_fault(Fault::status(500, "InternalServerError")).unwrap();
    let mut broken = alert(&jwt);
    broken.headers_mut().remove("apns-topic");
    assert_eq!(client.send(broken).await.unwrap().status, 400);
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 500);

    let outcome = async |client: &mut Client| {
        sandbox.clear_faults();
        sandbox.add_fault(Fault::status(500, "x").times(100).probability(0.5, 42)).unwrap();
        let mut hits = Vec::new();
        for _ in 0..40 {
            hits.push(client.send(alert(&jwt)).await.unwrap().status == 500);
        }
        hits
    };
    let (first, second) = (outcome(&mut client).await, outcome(&mut client).await);
    assert_eq!(first, second, "one seed, one sequence");
    let hits = first.iter().filter(|hit| **hit).count();
    assert!((8..=32).contains(&hits), "{hits} of 40 at one half");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn nonsensical_faults_are_refused() {
    let sandbox = start(Options::default()).await;
    for fault in [
        Fault::status(500, "x").times(0),
        Fault::status(500, "x").probability(1.5, 0),
        Fault::status(500, "x").probability(f64::NAN, 0),
        Fault::status(99, "x"),
        Fault::new(Action::Reset { code: 2 }).on(Target::Oauth),
        Fault::status(500, "x").on(Target::Oauth).token("t"),
    ] {
        assert!(sandbox.add_fault(fault).is_err());
    }
    for _ in 0..MAX_FAULTS {
        sandbox.add_fault(Fault::status(500, "x")).unwrap();
    }
    assert!(sandbox.add_fault(Fault::status(500, "x")).is_err(), "one past the limit");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn refused_and_reset_streams_carry_their_codes() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::RefuseStream {})).unwrap();
    sandbox.add_fault(Fault::new(Action::Reset { code: 0xb })).unwrap();
    sandbox.add_fault(Fault::new(Action::AcceptThenDrop {})).unwrap();
    for (code, accepted) in [
        (h2::Reason::REFUSED_STREAM, false),
        (h2::Reason::ENHANCE_YOUR_CALM, false),
        (h2::Reason::INTERNAL_ERROR, true),
    ] {
        let error = client.send(alert(&jwt)).await.unwrap_err();
        assert!(error.is_reset());
        assert_eq!(error.reason(), Some(code));
        let push = sandbox.received().pop().unwrap();
        assert_eq!((push.status, push.accepted), (0, accepted));
    }
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200, "the connection lives on");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_frozen_connection_answers_nobody_and_is_not_closed() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Freeze {})).unwrap();
    let frozen = client.start(alert(&jwt)).await.unwrap();
    let beside = client.start(alert(&jwt)).await.unwrap();
    let both = futures_util::future::select(Box::pin(frozen), Box::pin(beside));
    assert!(Runtime::production().timeout(Duration::from_millis(100), both).await.is_none());
    let push = &sandbox.received()[0];
    assert_eq!((push.status, push.reason.as_deref(), push.accepted), (0, Some("freeze"), false));
    let (mut other, jwt) = proven(&sandbox).await;
    assert_eq!(other.send(alert(&jwt)).await.unwrap().status, 200, "another connection is none the worse");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn invalid_frames_end_the_connection_at_the_clients_side() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::InvalidFrames {})).unwrap();
    let error = client.send(alert(&jwt)).await.unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::FRAME_SIZE_ERROR), "{error}");
    assert_eq!(sandbox.received()[0].reason.as_deref(), Some("invalid_frames"));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn stalled_push_is_never_answered_while_others_are() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Stall {})).unwrap();
    let stalled = client.start(alert(&jwt)).await.unwrap();
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    let waited = Runtime::production().timeout(Duration::from_millis(50), stalled).await;
    assert!(waited.is_none());
    assert_eq!(sandbox.received()[0].reason.as_deref(), Some("stall"));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn delayed_answer_comes_late() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Delay { ms: 80 })).unwrap();
    let runtime = Runtime::production();
    let before = runtime.instant();
    let slow = client.start(alert(&jwt)).await.unwrap();
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200, "others overtake it");
    assert_eq!(finish(slow).await.unwrap().status, 200);
    assert!(runtime.instant() - before >= Duration::from_millis(80));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn garbage_is_html() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Garbage { status: 502 })).unwrap();
    let answer = client.send(alert(&jwt)).await.unwrap();
    assert_eq!(answer.status, 502);
    assert!(answer.body.starts_with(b"<!DOCTYPE html>"));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn cut_connection_ends_without_a_word() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::CloseConnection {})).unwrap();
    let error = client.send(alert(&jwt)).await.unwrap_err();
    assert!(!error.is_go_away() && !error.is_reset(), "{error}");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn lowered_stream_limit_is_announced() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    assert_eq!(client.send.current_max_send_streams(), 1000);
    for limit in [2, 1, 30] {
        sandbox.add_fault(Fault::new(Action::MaxStreams { streams: limit })).unwrap();
        assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
        assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
        assert_eq!(client.send.current_max_send_streams(), usize::try_from(limit).unwrap());
    }
    sandbox.shutdown().await;
}

#[tokio::test]
async fn graceful_goaway_answers_what_it_has_and_hangs_up() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Delay { ms: 100 })).unwrap();
    sandbox.add_fault(goaway(false, false)).unwrap();
    let earlier = client.start(alert(&jwt)).await.unwrap();
    let current = client.start(alert(&jwt)).await.unwrap();
    assert_eq!(finish(current).await.unwrap().status, 200);
    assert_eq!(finish(earlier).await.unwrap().status, 200, "streams up to last-stream-id are answered");
    assert!(client.start(alert(&jwt)).await.is_err(), "no new streams");
    let _ = client.ended().await;
    assert_eq!(sandbox.totals().accepted, 2);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn refusing_goaway_leaves_this_stream_and_later_ones_unprocessed() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(Fault::new(Action::Delay { ms: 100 })).unwrap();
    sandbox.add_fault(goaway(true, false)).unwrap();
    let earlier = client.start(alert(&jwt)).await.unwrap();
    let refused = client.start(alert(&jwt)).await.unwrap();
    let error = finish(refused).await.unwrap_err();
    assert!(error.is_go_away() && error.is_remote(), "{error}");
    assert_eq!(finish(earlier).await.unwrap().status, 200, "the stream below last-stream-id is answered");
    assert_eq!(sandbox.totals().accepted, 1);
    sandbox.shutdown().await;
}

#[tokio::test]
async fn goaway_with_cut_leaves_the_outcome_open() {
    let sandbox = start(Options::default()).await;
    let (mut client, jwt) = proven(&sandbox).await;
    sandbox.add_fault(goaway(false, true)).unwrap();
    let error = client.send(alert(&jwt)).await.unwrap_err();
    let ended = client.ended().await;
    assert!(!error.is_reset(), "{error} {ended:?}");
    let push = sandbox.received().pop().unwrap();
    assert_eq!((push.status, push.accepted, push.reason.as_deref()), (0, true, Some("goaway")));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn hundreds_of_streams_at_once_are_all_answered() {
    let sandbox = start(Options { latency: Duration::from_millis(5), ..Options::default() }).await;
    let (mut client, jwt) = proven(&sandbox).await;
    let mut answers = Vec::new();
    for _ in 0..800 {
        answers.push(client.start(alert(&jwt)).await.unwrap());
    }
    for answer in answers {
        assert_eq!(finish(answer).await.unwrap().status, 200);
    }
    assert_eq!(sandbox.totals().accepted, 800);
    assert_eq!(sandbox.connections().apns.refused_streams, 0);
    sandbox.shutdown().await;
}
