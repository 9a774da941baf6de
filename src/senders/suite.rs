//! One suite for every sender, against the sandbox: real HTTP/2 over TLS, validated as strictly as the vendors do.

mod conduct;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::apns::{self, ApnsSender};
use super::fcm::{self, FcmSender};
use super::http2::{self, SendingThreads};
use super::{Batch, EncodeError, Encoded, Message, Outcomes, Secret, SendTarget, Sender, Sink};
use crate::domain::deny::{DenyFeed, DenyKey};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserKey};
use crate::domain::platform::{DeviceToken, Environment, Lane, Platform, Route, RouteSpec};
use crate::domain::sending::{Priority, RetryCause, SendOptions, SendOutcome};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::sandbox::{self, Action, Fault, Sandbox, Target, TokenState};

const BUNDLE: &str = "com.ifriendspet.app";
const PATIENCE: Duration = Duration::from_secs(30);

/// A batch around an encoded message, for tests that look at single requests.
pub(super) fn batch_of(encoded: Encoded, targets: Vec<SendTarget>) -> Batch {
    let (outcomes, _) = mpsc::unbounded_channel();
    Batch {
        route: Arc::new(route(Platform::Apns)),
        lane: Lane::Interactive,
        notification: NotificationId(1),
        encoded: vec![encoded],
        targets,
        expires_at: UnixMs::MAX,
        gated: DenyFeed::default().position(),
        gated_at: Runtime::production().instant().into_std(),
        sink: Sink { ticket: 0, outcomes },
    }
}

fn route(platform: Platform) -> Route {
    let (environment, bundle) = match platform {
        Platform::Apns => (Environment::Sandbox, BUNDLE),
        Platform::Fcm => (Environment::None, ""),
    };
    let credential = "default".into();
    Route {
        id: RouteId(1),
        spec: RouteSpec { app: AppKey(1), platform, credential, environment, bundle: bundle.into() },
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    ApnsToken,
    ApnsCertificate,
    Fcm,
}

impl Kind {
    fn platform(self) -> Platform {
        match self {
            Self::ApnsToken | Self::ApnsCertificate => Platform::Apns,
            Self::Fcm => Platform::Fcm,
        }
    }

    fn target(self) -> Target {
        match self.platform() {
            Platform::Apns => Target::Apns,
            Platform::Fcm => Target::Fcm,
        }
    }

    /// A token of the platform's shape.
    fn token(self, number: i64) -> DeviceToken {
        DeviceToken::trusted(&match self.platform() {
            Platform::Apns => format!("{number:064x}"),
            Platform::Fcm => format!("device{number:06}:APA91bExampleExampleExample"),
        })
    }

    /// An error answer the platform gives in earnest.
    fn fault(self, status: u16, apns: &str, fcm: &str) -> Fault {
        let reason = if self.platform() == Platform::Apns { apns } else { fcm };
        Fault::status(status, reason).on(self.target())
    }
}

/// A sender with the sandbox it talks to.
struct Stage {
    kind: Kind,
    runtime: Runtime,
    sandbox: Sandbox,
    threads: SendingThreads,
    deny: Arc<DenyFeed>,
    sender: Arc<dyn Sender>,
    sink: mpsc::UnboundedSender<Outcomes>,
    outcomes: mpsc::UnboundedReceiver<Outcomes>,
}

impl Stage {
    async fn new(kind: Kind) -> Self {
        Self::with(kind, http2::Settings::default(), sandbox::Options::default()).await
    }

    async fn with(kind: Kind, http2: http2::Settings, options: sandbox::Options) -> Self {
        let runtime = Runtime::production();
        let sandbox = Sandbox::start(&runtime, options).await.expect("the sandbox starts");
        let threads = SendingThreads::new(&runtime, 1).expect("a thread");
        let deny = Arc::new(DenyFeed::default());
        let credentials = sandbox.credentials();
        let ca_pem = Some(sandbox.ca_pem().as_bytes().to_vec());
        let apns = |auth| apns::Settings {
            endpoint: sandbox.apns_endpoint().to_owned(),
            endpoint_sandbox: sandbox.apns_endpoint().to_owned(),
            ca_pem: ca_pem.clone(),
            http2,
            ..apns::Settings::new(auth, vec![BUNDLE.to_owned()])
        };
        let sender: Arc<dyn Sender> = match kind {
            Kind::ApnsToken => {
                let settings = apns(apns::Auth::Token {
                    p8_pem: Secret::new(credentials.apns_key_pem.as_bytes()),
                    key_id: credentials.key_id.clone(),
                    team_id: credentials.team_id.clone(),
                });
                Arc::new(ApnsSender::new(&runtime, &threads, &deny, &settings).expect("good settings"))
            }
            Kind::ApnsCertificate => {
                let settings = apns(apns::Auth::Certificate {
                    cert_pem: credentials.client_cert_pem.clone().into_bytes(),
                    key_pem: Secret::new(credentials.client_key_pem.as_bytes()),
                });
                Arc::new(ApnsSender::new(&runtime, &threads, &deny, &settings).expect("good settings"))
            }
            Kind::Fcm => {
                let settings = fcm::Settings {
                    endpoint: sandbox.fcm_endpoint().to_owned(),
                    ca_pem,
                    http2,
                    ..fcm::Settings::new(Secret::new(credentials.service_account_json.as_bytes()))
                };
                Arc::new(FcmSender::new(&runtime, &threads, &deny, &settings).expect("good settings"))
            }
        };
        let (sink, outcomes) = mpsc::unbounded_channel();
        Self { kind, runtime, sandbox, threads, deny, sender, sink, outcomes }
    }

    fn options(&self) -> SendOptions {
        SendOptions {
            priority: Priority::High,
            collapse_key: None,
            expires_at: self.runtime.now().plus(Duration::from_secs(3600)),
            push_id: true,
        }
    }

    fn batch(&self, message: &Message, tokens: impl IntoIterator<Item = i64>) -> Batch {
        let route = Arc::new(route(self.kind.platform()));
        let options = self.options();
        let key = IdentityKey::new([5; 32]);
        let notification = NotificationId(99);
        let encoded = self.sender.encode(&route, message, &options).expect("fits");
        let targets = tokens
            .into_iter()
            .enumerate()
            .map(|(at, number)| SendTarget {
                index: u32::try_from(at).expect("few"),
                user: UserKey(number),
                device: DeviceId(number),
                token: self.kind.token(number),
                nudged_id: key.nudged_id(notification, DeviceId(number)),
                variant: 0,
            })
            .collect();
        Batch {
            route,
            lane: Lane::Interactive,
            notification,
            encoded: vec![encoded],
            targets,
            expires_at: options.expires_at,
            gated: self.deny.position(),
            gated_at: self.runtime.instant().into_std(),
            sink: Sink { ticket: 1, outcomes: self.sink.clone() },
        }
    }

    async fn collect(&mut self, count: usize) -> Vec<SendOutcome> {
        let mut seen = BTreeMap::new();
        while seen.len() < count {
            let outcomes = self.runtime.timeout(PATIENCE, self.outcomes.recv()).await.expect("in time");
            for (index, outcome) in outcomes.expect("we hold a sender").results {
                assert_eq!(seen.insert(index, outcome), None, "one outcome for a target");
            }
        }
        seen.into_values().collect()
    }

    async fn send(&mut self, message: &Message<'_>, tokens: impl IntoIterator<Item = i64>) -> Vec<SendOutcome> {
        let batch = self.batch(message, tokens);
        let count = batch.targets.len();
        assert!(self.sender.submit(batch).is_ok(), "there is room");
        self.collect(count).await
    }

    async fn send_one(&mut self) -> SendOutcome {
        self.send(&hello(), [1]).await.remove(0)
    }

    /// Answers are judged on a connection that is up and trusted.
    async fn warm_up(&mut self) {
        let outcome = self.send_one().await;
        assert!(is_sent(&outcome), "{outcome:?}");
        self.sandbox.clear();
    }

    fn add(&self, fault: Fault) {
        assert!(self.sandbox.add_fault(fault).is_ok(), "a fault that makes sense");
    }

    async fn end(self) {
        self.sender.drain(Duration::from_secs(5)).await;
        self.threads.shutdown().await;
        assert_eq!(self.sender.status(), super::SenderStatus::default());
        self.sandbox.shutdown().await;
    }
}

fn hello() -> Message<'static> {
    Message {
        title: Some("초코님이 댓글을 남겼어요".to_owned()),
        body: Some("\"너무 귀여워요\" 🐶".to_owned()),
        sound: Some("default".to_owned()),
        badge: Some(1),
        category: Some("COMMENT".to_owned()),
        thread_id: Some("post-42".to_owned()),
        link: Some("ifriendspet://posts/42".to_owned()),
        image: Some("https://img.ifriendspet.com/42.jpg".to_owned()),
        data: Cow::Owned(serde_json::json!({"post_id": 42, "tags": ["dog"]}).as_object().expect("an object").clone()),
        ..Message::default()
    }
}

fn is_sent(outcome: &SendOutcome) -> bool {
    matches!(outcome, SendOutcome::Sent { .. })
}

fn is_maybe(outcome: &SendOutcome) -> bool {
    matches!(outcome, SendOutcome::MaybeSent { .. })
}

fn later(outcome: &SendOutcome) -> (RetryCause, Option<Duration>) {
    match outcome {
        SendOutcome::RetryLater { cause, after, .. } => (*cause, *after),
        other => panic!("{other:?}"),
    }
}

async fn accepts(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    let outcomes = stage.send(&hello(), 0..300).await;
    for outcome in &outcomes {
        assert!(is_sent(outcome), "{outcome:?}");
    }
    let received = stage.sandbox.received();
    assert_eq!(received.len(), 300);
    let mut tokens: Vec<&str> = received.iter().map(|push| push.token.as_str()).collect();
    tokens.sort_unstable();
    let mut expected: Vec<String> = (0..300).map(|number| kind.token(number).expose().to_owned()).collect();
    expected.sort_unstable();
    assert_eq!(tokens, expected);
    for push in &received {
        assert!(push.accepted, "{:?}", push.reason);
        assert_eq!(push.collapse_id, push.nudged_id, "replaced on the screen, not repeated");
        let text = String::from_utf8(push.body.to_vec()).expect("UTF-8");
        assert!(text.contains("초코님이 댓글을 남겼어요") && text.contains("post_id"), "{text}");
    }
    let hashes: std::collections::BTreeSet<_> = received.iter().map(|push| push.auth_hash.clone()).collect();
    assert_eq!(hashes.len(), 1, "one credential for all");
    if kind == Kind::Fcm {
        assert_eq!(stage.sandbox.oauth_exchanges(), 1);
    }
    stage.end().await;
}

async fn sends_in_the_background(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    let data = serde_json::json!({"sync": true}).as_object().expect("an object").clone();
    let silent = Message { silent: true, data: Cow::Owned(data), ..Message::default() };
    let outcomes = stage.send(&silent, [1]).await;
    assert!(is_sent(&outcomes[0]), "{outcomes:?}");
    if kind.platform() == Platform::Apns {
        assert_eq!(stage.sandbox.received()[0].push_type.as_deref(), Some("background"));
    }
    stage.end().await;
}

async fn is_throttled_with_a_hint(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    let mut fault = kind.fault(429, "TooManyRequests", "QUOTA_EXCEEDED");
    if let Action::Status { retry_after, .. } = &mut fault.action {
        *retry_after = Some("42".to_owned());
    }
    stage.add(fault);
    let cause = if kind == Kind::Fcm { RetryCause::Throttled } else { RetryCause::DeviceThrottled };
    assert_eq!(later(&stage.send_one().await), (cause, Some(Duration::from_secs(42))));
    stage.add(kind.fault(429, "TooManyRequests", "QUOTA_EXCEEDED"));
    assert_eq!(later(&stage.send_one().await), (cause, None));
    assert!(is_sent(&stage.send_one().await));
    stage.end().await;
}

async fn finds_dead_tokens(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    let dead = kind.token(2);
    let since = UnixMs(1_790_000_000_000);
    let state = TokenState::Unregistered { since: Some(since) };
    assert!(stage.sandbox.set_token_state(dead.expose(), state).is_ok());
    let outcomes = stage.send(&hello(), [1, 2, 3]).await;
    assert!(is_sent(&outcomes[0]) && is_sent(&outcomes[2]));
    match (&outcomes[1], kind.platform()) {
        (SendOutcome::TokenGone { since: Some(told), answer, .. }, Platform::Apns) => {
            assert_eq!((*told, answer.status), (since, 410));
        }
        (SendOutcome::TokenGone { since: None, answer, .. }, Platform::Fcm) => assert_eq!(answer.status, 404),
        other => panic!("{other:?}"),
    }
    stage.end().await;
}

async fn starts_with_dead_tokens(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    for number in 0..5 {
        let state = TokenState::Unregistered { since: None };
        assert!(stage.sandbox.set_token_state(kind.token(number).expose(), state).is_ok());
    }
    let outcomes = stage.send(&hello(), 0..200).await;
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(matches!(outcome, SendOutcome::TokenGone { .. }), at < 5, "{at}: {outcome:?}");
        assert_eq!(is_sent(outcome), at >= 5, "{at}: {outcome:?}");
    }
    stage.end().await;
}

async fn knows_the_limit(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    let route = route(kind.platform());
    let with = |body: usize| Message { body: Some("x".repeat(body)), ..Message::default() };
    let fits = (1..4096).rev().find(|size| stage.sender.encode(&route, &with(*size), &stage.options()).is_ok());
    let fits = fits.expect("something fits");
    let error = stage.sender.encode(&route, &with(fits + 1), &stage.options()).expect_err("too large");
    assert_eq!(error, EncodeError::TooLarge { size: 4097, limit: 4096 });
    let outcomes = stage.send(&with(fits), [1]).await;
    assert!(is_sent(&outcomes[0]), "exactly at the limit: {outcomes:?}");
    stage.add(kind.fault(if kind == Kind::Fcm { 400 } else { 413 }, "PayloadTooLarge", "INVALID_ARGUMENT"));
    assert!(matches!(stage.send_one().await, SendOutcome::Rejected { .. }));
    stage.end().await;
}

async fn gives_up_waiting(kind: Kind) {
    let http2 = http2::Settings { request_timeout: Duration::from_millis(700), ..http2::Settings::default() };
    let mut stage = Stage::with(kind, http2, sandbox::Options::default()).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::Stall {}).on(kind.target()));
    let outcome = stage.send_one().await;
    assert!(is_maybe(&outcome), "{outcome:?}");
    stage.add(Fault::new(Action::Delay { ms: 300 }).on(kind.target()));
    assert!(is_sent(&stage.send_one().await), "slow is not lost");
    stage.end().await;
}

async fn survives_a_hang_beside_others(kind: Kind) {
    let http2 = http2::Settings { request_timeout: Duration::from_secs(2), ..http2::Settings::default() };
    let mut stage = Stage::with(kind, http2, sandbox::Options::default()).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::Stall {}).on(kind.target()).token(kind.token(5).expose()));
    let outcomes = stage.send(&hello(), 0..50).await;
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(is_maybe(outcome), at == 5, "{at}: {outcome:?}");
    }
    stage.end().await;
}

async fn copes_with_garbage(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::Garbage { status: 502 }).on(kind.target()));
    assert_eq!(later(&stage.send_one().await), (RetryCause::ServerError, None));
    stage.add(Fault::new(Action::Garbage { status: 400 }).on(kind.target()));
    assert!(matches!(stage.send_one().await, SendOutcome::Rejected { .. }), "no token is given up on a page of HTML");
    stage.add(Fault::new(Action::Garbage { status: 200 }).on(kind.target()));
    assert!(is_sent(&stage.send_one().await));
    stage.end().await;
}

async fn waits_out_server_errors(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    for (status, apns, fcm) in
        [(503, "ServiceUnavailable", "UNAVAILABLE"), (500, "InternalServerError", "INTERNAL"), (503, "Shutdown", "")]
    {
        stage.add(kind.fault(status, apns, fcm));
        assert_eq!(later(&stage.send_one().await).0, RetryCause::ServerError, "{status} {apns}");
    }
    assert!(is_sent(&stage.send_one().await));
    stage.end().await;
}

async fn survives_lost_connections(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::CloseConnection {}).on(kind.target()));
    let outcome = stage.send_one().await;
    assert!(is_maybe(&outcome), "{outcome:?}");
    assert!(is_sent(&stage.send_one().await), "over a new one");
    stage.add(Fault::new(Action::AcceptThenDrop {}).on(kind.target()));
    assert!(is_maybe(&stage.send_one().await), "taken, and we cannot know");
    stage.end().await;
}

async fn sends_refused_streams_again(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::RefuseStream {}).on(kind.target()).times(5));
    let outcomes = stage.send(&hello(), 0..40).await;
    assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
    stage.add(Fault::new(Action::Goaway { refuse: true, close: false, reason: None }).on(kind.target()).skip(10));
    let outcomes = stage.send(&hello(), 100..200).await;
    assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
    let mut accepted = BTreeMap::new();
    for push in stage.sandbox.received().iter().filter(|push| push.accepted) {
        *accepted.entry(push.token.clone()).or_insert(0) += 1;
    }
    assert!(accepted.values().all(|count| *count == 1), "nobody twice");
    stage.end().await;
}

async fn follows_a_lowered_limit(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    stage.add(Fault::new(Action::MaxStreams { streams: 3 }).on(kind.target()));
    let outcomes = stage.send(&hello(), 0..200).await;
    assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
    stage.end().await;
}

async fn holds_back_what_was_forbidden(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    let batch = stage.batch(&hello(), 0..10);
    stage.deny.publish(&[DenyKey::Device(DeviceId(4))], stage.runtime.instant().into_std());
    assert!(stage.sender.submit(batch).is_ok());
    let outcomes = stage.collect(10).await;
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(*outcome == SendOutcome::Held, at == 4, "{at}: {outcome:?}");
    }
    let token = kind.token(4);
    assert!(stage.sandbox.received().iter().all(|push| push.token != token.expose()));
    stage.end().await;
}

async fn has_its_credential_refused(kind: Kind) {
    let mut stage = Stage::new(kind).await;
    stage.warm_up().await;
    match kind {
        Kind::ApnsToken => {
            stage.add(Fault::status(403, "ExpiredProviderToken").on(Target::Apns));
            let outcome = stage.send_one().await;
            assert!(is_sent(&outcome), "once more over a new connection: {outcome:?}");
            let received = stage.sandbox.received();
            assert_eq!(received.len(), 2);
            assert_ne!(received[0].connection, received[1].connection);
            assert_eq!(received[0].auth_hash, received[1].auth_hash, "no second token within 20 minutes");
            stage.add(Fault::status(403, "ExpiredProviderToken").on(Target::Apns).times(2));
            assert!(matches!(stage.send_one().await, SendOutcome::SenderBroken { .. }));
            stage.add(Fault::status(429, "TooManyProviderTokenUpdates").on(Target::Apns));
            assert_eq!(later(&stage.send_one().await).0, RetryCause::Throttled);
        }
        Kind::ApnsCertificate => {
            stage.add(Fault::status(403, "BadCertificateEnvironment").on(Target::Apns));
            assert!(matches!(stage.send_one().await, SendOutcome::SenderBroken { .. }));
        }
        Kind::Fcm => {
            stage.sandbox.revoke_access_tokens();
            let outcomes = stage.send(&hello(), 0..100).await;
            assert!(outcomes.iter().all(is_sent), "{outcomes:?}");
            assert_eq!(stage.sandbox.oauth_exchanges(), 2, "one new token for all");
            stage.add(kind.fault(401, "", "THIRD_PARTY_AUTH_ERROR"));
            assert!(matches!(stage.send_one().await, SendOutcome::SenderBroken { .. }));
            assert_eq!(stage.sandbox.oauth_exchanges(), 2, "not our token's fault");
        }
    }
    assert!(is_sent(&stage.send_one().await));
    stage.end().await;
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod apns_token {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::ApnsToken).await; })*
        }
        mod apns_certificate {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::ApnsCertificate).await; })*
        }
        mod fcm_account {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::Fcm).await; })*
        }
    };
}

suite! {
    accepts,
    sends_in_the_background,
    is_throttled_with_a_hint,
    finds_dead_tokens,
    starts_with_dead_tokens,
    knows_the_limit,
    gives_up_waiting,
    survives_a_hang_beside_others,
    copes_with_garbage,
    waits_out_server_errors,
    survives_lost_connections,
    sends_refused_streams_again,
    follows_a_lowered_limit,
    holds_back_what_was_forbidden,
    has_its_credential_refused,
}

#[tokio::test]
async fn a_token_endpoint_in_trouble_is_waited_for() {
    let mut stage = Stage::new(Kind::Fcm).await;
    stage.add(Fault::status(503, "unavailable").on(Target::Oauth).times(2));
    assert!(is_sent(&stage.send_one().await), "the third try");
    stage.end().await;

    let mut stage = Stage::new(Kind::Fcm).await;
    stage.add(Fault::status(400, "invalid_grant").on(Target::Oauth));
    assert!(matches!(stage.send_one().await, SendOutcome::SenderBroken { .. }));
    stage.end().await;
}
