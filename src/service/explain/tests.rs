use std::sync::Arc;

use super::*;
use crate::domain::device::DeviceDetails;
use crate::domain::ids::{AppKey, BlockId, EventType, RouteId, UserKey};
use crate::domain::notification::{Body, Notification};
use crate::domain::outcome::{Entry, OutcomeBlock};
use crate::domain::pause::{Pause, PauseScope, Pauses};
use crate::domain::platform::{DeviceKind, Environment, Lane, Permission, Platform};
use crate::domain::sending::{Priority, ProviderAnswer};
use crate::domain::targets::Target;
use crate::storage::{OptIn, OptInChange};

const NOON: UnixMs = UnixMs(1_795_521_600_000);
const PHONE: DeviceId = DeviceId(11);
const TABLET: DeviceId = DeviceId(12);
const USER: UserKey = UserKey(5);

fn later(secs: i64) -> UnixMs {
    UnixMs(NOON.0 + secs * 1000)
}

fn device(id: DeviceId) -> Device {
    Device {
        id,
        user: UserId::trusted("choco"),
        platform: Platform::Fcm,
        kind: DeviceKind::Alert,
        route: RouteId(1),
        credential: "default".to_owned(),
        environment: Environment::None,
        bundle: String::new(),
        installation_id: None,
        details: DeviceDetails { permission: Permission::Denied, ..DeviceDetails::default() },
        active: true,
        retired_reason: None,
        created_at: later(-3600),
        observed_at: later(-3600),
        confirmed_at: later(-3600),
        retired_at: None,
    }
}

/// A block's route (none: planning), its second after noon, and what it says.
type Block = (Option<i64>, i64, Vec<(DeviceId, ResultCode)>);

fn history(blocks: Vec<Block>) -> PersonHistory {
    PersonHistory {
        notification: Notification {
            id: NotificationId(9),
            app: AppKey(1),
            event_type: EventType::trusted("comment.created"),
            type_version: None,
            default_opt_in: true,
            lane: Lane::Interactive,
            priority: Priority::High,
            on_maybe: crate::domain::event_type::OnMaybe::Retry,
            collapse_key: None,
            actor: None,
            body: Arc::new(Body::default()),
            event_at: NOON,
            accepted_at: NOON,
            not_before: None,
            expires_at: later(86_400),
            cancelled_at: None,
        },
        user: Some(USER),
        user_id: UserId::trusted("choco"),
        blocks: blocks
            .into_iter()
            .zip(1..)
            .map(|((route, secs, entries), id)| OutcomeBlock {
                id: BlockId(id),
                notification: NotificationId(9),
                route: route.map(RouteId),
                at: later(secs),
                entries: entries.into_iter().map(|(device, code)| Entry { user: USER, device, code }).collect(),
            })
            .collect(),
        open: Vec::new(),
        attempts: Vec::new(),
        devices: vec![device(PHONE)],
        choices: vec![choice(-7200, true, None, None, "sign-up")],
        expansion_pending: false,
    }
}

fn choice(secs: i64, opted_in: bool, event_type: Option<&str>, on: Option<DeviceId>, source: &str) -> OptInChange {
    OptInChange {
        choice: OptIn {
            event_type: event_type.map(EventType::trusted),
            device: on,
            opted_in,
            observed_at: later(secs),
            recorded_at: later(secs),
            source: Some(source.to_owned()),
            policy_version: None,
            evidence: None,
        },
        applied: true,
        caller: None,
    }
}

fn explained(history: &PersonHistory) -> Explanation {
    explain(history, &IdentityKey::new([1; 32]), None)
}

fn verdicts(explanation: &Explanation) -> Vec<(&'static str, Verdict, &'static str)> {
    explanation.decisions.iter().map(|decision| (decision.step, decision.verdict, decision.reason)).collect()
}

#[test]
fn an_opt_out_says_when_and_where() {
    let mut history = history(vec![(None, 1, vec![(DeviceId(0), ResultCode::OptedOut)])]);
    history.choices.push(choice(-60, false, None, None, "settings-screen"));
    history.choices.push(choice(600, true, None, None, "settings-screen"));
    let explanation = explained(&history);
    assert_eq!(
        explanation.summary,
        "Not sent: choco had opted out of everything on 2026-11-24T11:59:00Z via settings-screen."
    );
    assert_eq!(
        verdicts(&explanation),
        [
            ("AUDIENCE", Verdict::Passed, ""),
            ("DEVICE", Verdict::Passed, ""),
            ("MASTER_SWITCH", Verdict::Blocked, "OPTED_OUT"),
            ("EVENT_TYPE", Verdict::NotReached, ""),
            ("DEVICE_CHOICE", Verdict::NotReached, ""),
            ("ACTOR", Verdict::NotReached, ""),
            ("TTL_AND_SIZE", Verdict::NotReached, ""),
            ("QUEUE", Verdict::NotReached, ""),
            ("RESULT", Verdict::Blocked, "OPTED_OUT"),
            ("DEVICE", Verdict::Noted, "NOT_TARGETED"),
        ]
    );
    assert_eq!(explanation.decisions[2].detail, "Opted out of everything on 2026-11-24T11:59:00Z via settings-screen.");
    assert_eq!(explanation.deliveries.len(), 1);
    assert_eq!(explanation.deliveries[0].device, None);
    assert_eq!(explanation.deliveries[0].nudged_id, None);
}

#[test]
fn a_sent_push_passed_everything_and_the_permission_is_only_noted() {
    let history = history(vec![(Some(1), 2, vec![(PHONE, ResultCode::Sent)])]);
    let explanation = explained(&history);
    assert_eq!(
        verdicts(&explanation),
        [
            ("AUDIENCE", Verdict::Passed, ""),
            ("DEVICE", Verdict::Passed, ""),
            ("DEVICE", Verdict::Noted, "OS_PERMISSION"),
            ("MASTER_SWITCH", Verdict::Passed, ""),
            ("EVENT_TYPE", Verdict::Passed, ""),
            ("DEVICE_CHOICE", Verdict::Passed, ""),
            ("ACTOR", Verdict::Passed, ""),
            ("TTL_AND_SIZE", Verdict::Passed, ""),
            ("QUEUE", Verdict::Passed, ""),
            ("ATTEMPT", Verdict::Passed, "SENT"),
            ("RESULT", Verdict::Passed, "SENT"),
        ]
    );
    assert!(explanation.decisions[2].detail.contains("settings refuse notifications"));
    assert_eq!(explanation.decisions[3].detail, "Opted in since 2026-11-24T10:00:00Z via sign-up.");
    assert!(explanation.summary.starts_with("Sent: the platform took it for choco's device dev_"));
    assert_eq!(explanation.deliveries[0].state, State::Sent);
}

#[test]
fn a_retry_is_pending_and_tells_the_platforms_answer() {
    let mut history = history(vec![(Some(1), 2, vec![(PHONE, ResultCode::MovedToRetry)])]);
    history.attempts.push(Attempt {
        user: USER,
        device: PHONE,
        attempt: 1,
        at: later(2),
        result: "MOVED_TO_RETRY",
        answer: ProviderAnswer::new(503, "UNAVAILABLE"),
        next_at: Some(later(4)),
    });
    history.open.push((Target { user: USER, device: PHONE }, RouteId(1), 1, later(4)));
    let explanation = explained(&history);
    let tail = &verdicts(&explanation)[8..];
    assert_eq!(
        tail,
        [
            ("QUEUE", Verdict::Pending, "MOVED_TO_RETRY"),
            ("ATTEMPT", Verdict::Pending, "MOVED_TO_RETRY"),
            ("RESULT", Verdict::Pending, "MOVED_TO_RETRY"),
        ]
    );
    assert!(explanation.summary.starts_with("Waiting: attempt 2 for choco's device"));
    assert!(explanation.decisions[9].detail.contains("503 UNAVAILABLE"), "{}", explanation.decisions[9].detail);
    assert_eq!(explanation.deliveries[0].state, State::Open);
}

#[test]
fn what_waits_but_was_cancelled_says_so() {
    let mut history = history(Vec::new());
    history.open.push((Target { user: USER, device: PHONE }, RouteId(1), 0, later(4)));
    assert!(explained(&history).summary.starts_with("Waiting: queued for choco's device"));
    history.notification.cancelled_at = Some(later(1));
    let explanation = explained(&history);
    assert!(explanation.summary.contains("cancelled at 2026-11-24T12:00:01Z"), "{}", explanation.summary);
    assert_eq!(explanation.deliveries[0].state, State::Open);
}

#[test]
fn devices_are_explained_one_by_one() {
    let mut history = history(vec![
        (None, 1, vec![(TABLET, ResultCode::DeviceTypeOptedOut)]),
        (Some(1), 2, vec![(PHONE, ResultCode::DeadToken)]),
    ]);
    history.devices.push(device(TABLET));
    history.choices.push(choice(-30, false, Some("comment.created"), Some(TABLET), "tablet"));
    let explanation = explained(&history);
    assert_eq!(
        explanation.summary,
        "Not sent to 2 of them: the platform says that the device's token is dead; choco had opted out of \
         comment.created on this device on 2026-11-24T11:59:30Z via tablet."
    );
    let blocked: Vec<_> =
        explanation.decisions.iter().filter(|decision| decision.verdict == Verdict::Blocked).collect();
    assert_eq!(blocked[0].reason, "TOKEN_GONE");
    assert_eq!((blocked[1].step, blocked[1].device), ("DEVICE_CHOICE", Some(TABLET)));
    let only = explain(&history, &IdentityKey::new([1; 32]), Some(TABLET));
    assert!(only.decisions.iter().all(|decision| decision.device.is_none_or(|device| device == TABLET)));
    assert_eq!(only.deliveries.len(), 1);
}

#[test]
fn somebody_outside_the_audience_hears_so() {
    let mut outside = history(Vec::new());
    let explanation = explained(&outside);
    assert_eq!(verdicts(&explanation), [("AUDIENCE", Verdict::Blocked, "NOT_IN_AUDIENCE")]);
    assert_eq!(explanation.summary, "Not sent: choco is not among the people of this notification.");
    outside.user = None;
    assert_eq!(verdicts(&explained(&outside)), [("AUDIENCE", Verdict::Blocked, "UNKNOWN_USER")]);
    outside.expansion_pending = true;
    assert_eq!(verdicts(&explained(&outside)), [("AUDIENCE", Verdict::Pending, "EXPANDING")]);
}

#[test]
fn every_code_has_its_sentence_and_its_gate() {
    for code in ResultCode::ALL {
        let history = history(vec![(Some(1), 2, vec![(PHONE, *code)])]);
        let explanation = explained(&history);
        assert!(explanation.summary.ends_with('.'), "{code:?}: {}", explanation.summary);
        let blocked: Vec<_> = explanation
            .decisions
            .iter()
            .filter(|decision| decision.verdict == Verdict::Blocked && decision.step != STEP_RESULT)
            .map(|decision| decision.step)
            .collect();
        let expected: Vec<_> = Gate::of(*code).map(Gate::name).into_iter().collect();
        assert_eq!(blocked, expected, "{code:?}");
    }
}

#[test]
fn what_a_pause_holds_says_so() {
    let mut history = history(vec![]);
    history.devices = vec![device(PHONE)];
    history.open = vec![(Target { user: USER, device: PHONE }, RouteId(1), 0, NOON)];
    let told = |scope: PauseScope| {
        let pause = Pause { scope, since: later(60), reason: "a bad template".to_owned() };
        let mut explanation = explain(&history, &IdentityKey::new([1; 32]), None);
        tell_pauses(&mut explanation, &history, &Pauses(vec![pause]));
        explanation
    };
    let explanation = told(PauseScope { app: Some(AppKey(1)), ..PauseScope::default() });
    let paused: Vec<_> = explanation.decisions.iter().filter(|one| one.reason == REASON_PAUSED).collect();
    assert_eq!(paused.iter().map(|one| one.step).collect::<Vec<_>>(), [STEP_QUEUE, STEP_RESULT]);
    assert!(paused.iter().all(|one| one.verdict == Verdict::Pending && one.detail.contains("a bad template")));
    assert!(explanation.summary.contains("paused since"), "{}", explanation.summary);
    let other = told(PauseScope { platform: Some(Platform::Apns), ..PauseScope::default() });
    assert!(other.decisions.iter().all(|one| one.reason != REASON_PAUSED));
}
