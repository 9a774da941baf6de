use super::*;
use crate::domain::ids::{AppKey, DeviceId, EventType, JobId, NotificationId, RouteId, UserKey};
use crate::domain::notification::Body;
use crate::domain::platform::{Environment, Lane, Platform, RouteSpec};
use crate::domain::sending::Priority;
use crate::domain::targets::Progress;
use crate::runtime::Runtime;

const POLICY: RetryPolicy = RetryPolicy {
    transport_floor: Duration::from_secs(1),
    throttled_floor: Duration::from_secs(60),
    server_error_floor: Duration::from_secs(10),
    base: Duration::from_secs(4),
    cap: Duration::from_secs(600),
    give_up_after: Duration::from_secs(3600),
};
const HOUR: i64 = 3_600_000;

fn flight(targets: i64, expires_at: i64) -> (Flight, Instant) {
    let instant = Runtime::simulated(1, UnixMs(0)).instant();
    let targets: Vec<Target> = (1..=targets).map(|n| Target { user: UserKey(n), device: DeviceId(n * 10) }).collect();
    let job = Job {
        id: JobId(1),
        notification: NotificationId(2),
        route: RouteId(3),
        lane: Lane::Interactive,
        progress: Progress::none(targets.len()),
        targets,
        attempt: 0,
        claims: 1,
        fence: 4,
        ready_at: UnixMs(0),
        first_attempt_at: None,
    };
    let notification = Notification {
        id: NotificationId(2),
        app: AppKey(1),
        event_type: EventType::trusted("comment.created"),
        type_version: None,
        default_opt_in: true,
        lane: Lane::Interactive,
        priority: Priority::High,
        on_maybe: OnMaybe::Retry,
        collapse_key: None,
        actor: None,
        body: Arc::new(Body::default()),
        event_at: UnixMs(0),
        accepted_at: UnixMs(0),
        not_before: None,
        expires_at: UnixMs(expires_at),
        cancelled_at: None,
    };
    let spec = RouteSpec {
        app: AppKey(1),
        platform: Platform::Fcm,
        credential: "default".into(),
        environment: Environment::None,
        bundle: "".into(),
    };
    let route = Arc::new(Route { id: RouteId(3), spec });
    let permit = Permit::new(Box::new(()));
    (Flight::new(job, Arc::new(notification), route, permit, instant), instant)
}

fn later(cause: RetryCause, after: Option<u64>) -> SendOutcome {
    let answer = ProviderAnswer::new(503, "UNAVAILABLE");
    SendOutcome::RetryLater { cause, after: after.map(Duration::from_secs), answer }
}

fn codes(flush: &Flush) -> Vec<ResultCode> {
    flush.update.entries.iter().map(|entry| entry.code).collect()
}

#[tokio::test(start_paused = true)]
async fn every_answer_becomes_one_entry_and_the_job_ends() {
    let (mut flight, instant) = flight(4, HOUR);
    flight.sending(4, UnixMs(5), instant);
    let gone = SendOutcome::TokenGone {
        since: Some(UnixMs(7)),
        elsewhere: false,
        answer: ProviderAnswer::new(410, "Unregistered"),
    };
    flight.answer(3, SendOutcome::Rejected { answer: ProviderAnswer::new(400, "BadTopic") }, UnixMs(9), instant);
    flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(9), instant);
    assert_eq!(flight.next(), Next::Wait);
    flight.answer(1, gone, UnixMs(9), instant);
    flight.answer(2, later(RetryCause::ServerError, Some(30)), UnixMs(9), instant);
    assert_eq!(flight.next(), Next::Finish);
    assert_eq!(flight.gone().len(), 1, "its registration decides");
    flight.judge_gone(&[GoneVerdict::Retire], 0.5, &POLICY);
    let flush = flight.flush(&POLICY, UnixMs(1_000), || 0.5);
    let expected = [ResultCode::Sent, ResultCode::DeadToken, ResultCode::MovedToRetry, ResultCode::DeadRejected];
    assert_eq!(codes(&flush), expected);
    assert!(flush.update.progress.is_none() && !flush.release);
    assert_eq!(flush.update.retirements[0].since, Some(UnixMs(7)));
    assert_eq!(flush.update.details.len(), 3, "only failures have details");
    let [follower] = &flush.update.followers[..] else { panic!("one follower") };
    assert_eq!(follower.attempt, 1);
    assert!(follower.ready_at >= UnixMs(31_000) && follower.due_at.0 % RETRY_GRID_MS == 0);
    assert!(follower.due_at >= follower.ready_at);
}

#[tokio::test(start_paused = true)]
async fn a_gone_token_without_a_time_is_held_to_when_it_was_read() {
    let (mut flight, instant) = flight(1, HOUR);
    flight.sending(1, UnixMs(5), instant);
    let answer = ProviderAnswer::new(404, "UNREGISTERED");
    flight.answer(0, SendOutcome::TokenGone { since: None, elsewhere: false, answer }, UnixMs(9), instant);
    let flush = flight.flush(&POLICY, UnixMs(9), || 0.5);
    assert_eq!(flush.update.retirements[0].since, Some(UnixMs(5)));
}

#[tokio::test(start_paused = true)]
async fn a_retry_past_the_ttl_expires_and_past_the_end_of_retries_dies() {
    let (mut flight, instant) = flight(1, 5_000);
    flight.sending(1, UnixMs(5), instant);
    flight.answer(0, later(RetryCause::ServerError, None), UnixMs(0), instant);
    assert_eq!(codes(&flight.flush(&POLICY, UnixMs(0), || 0.0)), [ResultCode::Expired]);

    let (mut flight, instant) = self::flight(1, 100 * HOUR);
    flight.job.first_attempt_at = Some(UnixMs(0));
    flight.sending(1, UnixMs(5), instant);
    flight.answer(0, later(RetryCause::ServerError, None), UnixMs(0), instant);
    assert_eq!(codes(&flight.flush(&POLICY, UnixMs(HOUR), || 0.0)), [ResultCode::DeadRetriesOver]);
}

#[tokio::test(start_paused = true)]
async fn followers_take_every_target_along() {
    let (mut flight, instant) = flight(5, HOUR);
    flight.sending(5, UnixMs(5), instant);
    for index in 0..5 {
        let hint = if index < 3 { None } else { Some(30) };
        flight.answer(index, later(RetryCause::ServerError, hint), UnixMs(9), instant);
    }
    let followers = flight.flush(&POLICY, UnixMs(9), || 0.5).update.followers;
    let targets: Vec<Vec<i64>> =
        followers.iter().map(|job| job.targets.iter().map(|target| target.user.0).collect()).collect();
    assert_eq!(targets, [vec![1, 2, 3], vec![4, 5]]);
}

#[tokio::test(start_paused = true)]
async fn the_event_type_says_what_follows_a_lost_answer() {
    let maybe = || SendOutcome::MaybeSent { answer: ProviderAnswer::new(0, "timeout") };
    for (on_maybe, code) in [(OnMaybe::Retry, ResultCode::MovedToRetry), (OnMaybe::Drop, ResultCode::DeadMaybeSent)] {
        let (mut flight, instant) = flight(1, HOUR);
        Arc::get_mut(&mut flight.notification).expect("not shared").on_maybe = on_maybe;
        flight.sending(1, UnixMs(5), instant);
        flight.answer(0, maybe(), UnixMs(9), instant);
        let flush = flight.flush(&POLICY, UnixMs(9), || 0.5);
        assert_eq!(codes(&flush), [code]);
        assert_eq!(flush.update.details[0].result, code.name());
        assert_eq!(flush.update.followers.len(), usize::from(on_maybe == OnMaybe::Retry));
    }
}

#[tokio::test(start_paused = true)]
async fn a_broken_credential_burns_nothing() {
    let (mut flight, instant) = flight(2, HOUR);
    flight.sending(2, UnixMs(5), instant);
    flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
    let answer = ProviderAnswer::new(403, "InvalidProviderToken");
    flight.answer(1, SendOutcome::SenderBroken { scope: FaultScope::Credential, answer }, UnixMs(0), instant);
    assert_eq!(flight.next(), Next::Return);
    assert!(flight.take_success(), "the first was taken");
    let flush = flight.flush(&POLICY, UnixMs(0), || 0.0);
    assert!(flush.release && flush.update.followers.is_empty());
    assert_eq!(codes(&flush), [ResultCode::Sent]);
    assert_eq!(flush.update.progress.expect("the job goes on").count(), 1);
}

#[tokio::test(start_paused = true)]
async fn held_targets_return_to_their_gate_and_only_they() {
    let (mut flight, instant) = flight(3, HOUR);
    assert_eq!(flight.take_pending(), [0, 1, 2]);
    flight.sending(3, UnixMs(5), instant);
    flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
    flight.answer(1, SendOutcome::Held, UnixMs(0), instant);
    flight.answer(2, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
    assert_eq!(flight.next(), Next::Regate);
    assert_eq!(flight.take_pending(), [1]);
    flight.conclude(1, ResultCode::OptedOut, instant);
    assert_eq!(flight.next(), Next::Finish);
    let flush = flight.flush(&POLICY, UnixMs(0), || 0.0);
    assert_eq!(codes(&flush), [ResultCode::Sent, ResultCode::OptedOut, ResultCode::Sent]);
}

#[tokio::test(start_paused = true)]
async fn a_suspect_job_is_halved_without_a_result() {
    let (mut flight, instant) = flight(5, HOUR);
    let pending = flight.pending();
    flight.split(&pending, 4, UnixMs(7), instant);
    assert_eq!(flight.next(), Next::Finish);
    let flush = flight.flush(&POLICY, UnixMs(7), || 0.0);
    assert!(flush.update.entries.is_empty());
    let sizes: Vec<usize> = flush.update.followers.iter().map(|job| job.targets.len()).collect();
    assert_eq!(sizes, [3, 2]);
    assert!(flush.update.followers.iter().all(|job| job.attempt == 0 && job.claims == 4));
}

fn bad_token() -> SendOutcome {
    let answer = ProviderAnswer::new(400, "BadDeviceToken");
    SendOutcome::TokenGone { since: None, elsewhere: true, answer }
}

fn other_route() -> Arc<Route> {
    let (flight, _) = flight(1, HOUR);
    Arc::new(Route { id: RouteId(9), spec: flight.route.spec.clone() })
}

#[tokio::test(start_paused = true)]
async fn a_bad_token_is_asked_about_elsewhere_and_moves_there() {
    let (mut flight, instant) = flight(3, HOUR);
    flight.take_pending();
    flight.sending(3, UnixMs(5), instant);
    flight.look_elsewhere(1, other_route());
    assert_eq!(flight.next(), Next::Wait);
    flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(9), instant);
    flight.look_elsewhere(2, other_route());
    assert_eq!(flight.next(), Next::Regate);
    assert_eq!(flight.take_pending(), [1, 2]);
    assert_eq!(flight.probing().map(|route| route.id), Some(RouteId(9)));
    flight.sending(2, UnixMs(5), instant);
    flight.answer(1, SendOutcome::Sent { provider_id: None }, UnixMs(9), instant);
    flight.answer(2, bad_token(), UnixMs(9), instant);
    assert_eq!(flight.next(), Next::Finish);
    let flush = flight.flush(&POLICY, UnixMs(9), || 0.0);
    assert_eq!(codes(&flush), [ResultCode::Sent, ResultCode::Sent, ResultCode::DeadToken]);
    let moved = DeviceChange::Reroute { device: DeviceId(20), from: RouteId(3), to: RouteId(9) };
    assert_eq!(flush.update.device_changes, [moved]);
    assert_eq!(flush.update.retirements[0].device, DeviceId(30));
    assert!(flush.update.retirements[0].reason.contains("elsewhere 400 BadDeviceToken"));
}

#[tokio::test(start_paused = true)]
async fn a_fault_of_the_credential_elsewhere_says_nothing_about_the_token() {
    let (mut flight, instant) = flight(3, HOUR);
    flight.take_pending();
    flight.sending(3, UnixMs(5), instant);
    for index in 0..3 {
        flight.look_elsewhere(index, other_route());
    }
    assert_eq!(flight.take_pending(), [0, 1, 2]);
    flight.sending(3, UnixMs(5), instant);
    let refused = |scope, reason| SendOutcome::SenderBroken { scope, answer: ProviderAnswer::new(403, reason) };
    flight.answer(0, refused(FaultScope::Credential, "InvalidProviderToken"), UnixMs(9), instant);
    // A key that Apple limited to one environment: no token of the other is ours.
    flight.answer(1, refused(FaultScope::Route, "BadEnvironmentKeyIdInToken"), UnixMs(9), instant);
    flight.answer(2, bad_token(), UnixMs(9), instant);
    assert_eq!(flight.next(), Next::Finish);
    let flush = flight.flush(&POLICY, UnixMs(9), || 0.0);
    assert_eq!(codes(&flush), [ResultCode::MovedToRetry, ResultCode::DeadToken, ResultCode::DeadToken]);
    let retired: Vec<_> = flush.update.retirements.iter().map(|retired| retired.device).collect();
    assert_eq!(retired, [DeviceId(20), DeviceId(30)]);
    let [follower] = &flush.update.followers[..] else { panic!("one follower") };
    assert_eq!((follower.route, follower.due_at), (RouteId(3), on_grid(UnixMs(9).plus(TARGET_FAULT_PAUSE))));
    assert_eq!(&*flush.update.details[0].answer.reason, "BadDeviceToken; elsewhere 403 InvalidProviderToken");
}

#[tokio::test(start_paused = true)]
async fn a_doubted_token_waits_and_one_registered_again_is_tried_again() {
    let (mut flight, instant) = flight(3, 10 * HOUR);
    flight.sending(3, UnixMs(5), instant);
    for index in 0..3 {
        let answer = ProviderAnswer::new(410, "Unregistered");
        let gone = SendOutcome::TokenGone { since: Some(UnixMs(7)), elsewhere: false, answer };
        flight.answer(index, gone, UnixMs(1_000), instant);
    }
    let verdicts = [GoneVerdict::Doubt(UnixMs(HOUR)), GoneVerdict::Keep, GoneVerdict::Doubt(UnixMs(20 * HOUR))];
    let doubted = flight.judge_gone(&verdicts, 0.0, &POLICY);
    assert_eq!(doubted.len(), 2);
    let flush = flight.flush(&POLICY, UnixMs(1_000), || 0.0);
    assert_eq!(codes(&flush), [ResultCode::MovedToRetry, ResultCode::MovedToRetry, ResultCode::Expired]);
    assert!(flush.update.retirements.is_empty());
    let due: Vec<i64> = flush.update.followers.iter().map(|job| job.due_at.0).collect();
    assert_eq!(due, [61_000, HOUR], "a minute at least, and the hour of the doubt");
    assert!(flush.update.followers.iter().all(|job| job.attempt == 1));
    assert_eq!(flush.update.device_changes.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_waits_aside_keeps_its_attempts_and_its_route() {
    let (mut flight, instant) = flight(3, HOUR);
    flight.take_pending();
    flight.defer(0, UnixMs(60_010), instant);
    flight.forward(1, RouteId(8), UnixMs(1), instant);
    flight.sending(1, UnixMs(5), instant);
    let answer = ProviderAnswer::new(401, "THIRD_PARTY_AUTH_ERROR");
    flight.answer(2, SendOutcome::SenderBroken { scope: FaultScope::Target, answer }, UnixMs(9), instant);
    assert_eq!(flight.next(), Next::Finish);
    let flush = flight.flush(&POLICY, UnixMs(9), || 0.0);
    assert_eq!(codes(&flush), [ResultCode::Deferred, ResultCode::Deferred, ResultCode::MovedToRetry]);
    let jobs: Vec<_> = flush.update.followers.iter().map(|job| (job.route, job.due_at.0, job.attempt)).collect();
    let in_five_minutes = on_grid(UnixMs(9).plus(TARGET_FAULT_PAUSE)).0;
    assert_eq!(jobs, [(RouteId(3), 60_250, 0), (RouteId(3), in_five_minutes, 0), (RouteId(8), 1, 0)]);
}
