//! Scripted misbehaviour, and what is the matter with single tokens.
//!
//! A fault is played on pushes that are in order; one that breaks a rule gets the answer of that rule and uses no fault
//! up. The first fault that matches is played, in the order they were added.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock};

use serde::{Deserialize, Serialize};

use super::SandboxError;
use super::record::Platform;
use crate::domain::time::UnixMs;

/// Faults waiting at once.
pub const MAX_FAULTS: usize = 1000;

/// Tokens with a state of their own.
pub const MAX_TOKEN_STATES: usize = 1_000_000;

/// Longest delay of one fault: one hour.
const MAX_DELAY_MS: u64 = 3_600_000;

/// Whose requests a fault is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    Apns,
    Fcm,
    /// FCM's OAuth token endpoint.
    Oauth,
}

impl From<Platform> for Target {
    fn from(platform: Platform) -> Self {
        match platform {
            Platform::Apns => Self::Apns,
            Platform::Fcm => Self::Fcm,
        }
    }
}

/// One scripted misbehaviour. No Debug: it may carry a token.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Absent: pushes of either platform, but not the token endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Only pushes to exactly this token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Only pushes to tokens that start so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_prefix: Option<String>,
    /// This many matching requests pass first (2 = the third is hit).
    #[serde(default)]
    pub skip: u32,
    /// How often it is played; at least 1.
    #[serde(default = "once")]
    pub times: u32,
    /// Chance that a matching request is hit, above 0 and up to 1; absent = always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probability: Option<f64>,
    /// Decides the draws of `probability`.
    #[serde(default)]
    pub seed: u64,
    pub action: Action,
}

fn once() -> u32 {
    1
}

/// What happens instead of the ordinary answer. The token endpoint knows `Status`, `Garbage`, `Delay` and `Stall`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// An HTTP status with the platform's error body.
    Status {
        status: u16,
        /// APNs' `reason`, FCM's `errorCode` (absent = an answer without `FcmError`), OAuth's `error`.
        #[serde(default)]
        reason: Option<String>,
        /// The Retry-After header: seconds or an HTTP date.
        #[serde(default)]
        retry_after: Option<String>,
        /// Sent instead of the platform's error body.
        #[serde(default)]
        body: Option<String>,
        /// APNs 410's timestamp, milliseconds; absent = now.
        #[serde(default)]
        timestamp: Option<i64>,
    },
    /// A GOAWAY frame.
    Goaway {
        /// This stream and later ones are above last-stream-id, hence surely not processed.
        #[serde(default)]
        refuse: bool,
        /// Cut the connection right after the frame; without `refuse` this stream stays unanswered (maybe sent).
        #[serde(default)]
        close: bool,
        /// APNs' debug data `{"reason": …}`.
        #[serde(default)]
        reason: Option<String>,
    },
    /// RST_STREAM(REFUSED_STREAM): not processed.
    RefuseStream {},
    /// RST_STREAM with this code (RFC 9113 §7); not processed, which the sender cannot know.
    Reset { code: u32 },
    /// Never answer.
    Stall {},
    /// Answer as usual, later.
    Delay { ms: u64 },
    /// A page of HTML where JSON belongs.
    Garbage {
        #[serde(default = "ok")]
        status: u16,
    },
    /// Cut the TCP connection without a word.
    CloseConnection {},
    /// Accept, and lower (or raise) SETTINGS_MAX_CONCURRENT_STREAMS; 0: nothing more on this connection.
    MaxStreams { streams: u32 },
    /// Take the push, then reset the stream: delivered, and the sender cannot know.
    AcceptThenDrop {},
    /// The connection stands still from now on, in both directions, and is not closed for ten minutes.
    Freeze {},
    /// Bytes that are no HTTP/2 frame, as a proxy's that speaks HTTP/1.1.
    InvalidFrames {},
}

fn ok() -> u16 {
    200
}

impl Fault {
    /// Played once, on the next push.
    #[must_use]
    pub fn new(action: Action) -> Self {
        Self { target: None, token: None, token_prefix: None, skip: 0, times: 1, probability: None, seed: 0, action }
    }

    /// An error answer with this status and reason.
    #[must_use]
    pub fn status(status: u16, reason: &str) -> Self {
        Self::new(Action::Status {
            status,
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            retry_after: None,
            body: None,
            timestamp: None,
        })
    }

    #[must_use]
    pub fn on(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    #[must_use]
    pub fn token_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.token_prefix = Some(prefix.into());
        self
    }

    #[must_use]
    pub fn skip(mut self, skip: u32) -> Self {
        self.skip = skip;
        self
    }

    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = times;
        self
    }

    /// With this chance each, the draws decided by `seed`.
    #[must_use]
    pub fn probability(mut self, probability: f64, seed: u64) -> Self {
        self.probability = Some(probability);
        self.seed = seed;
        self
    }

    fn check(&self) -> Result<(), SandboxError> {
        let bad = |why: &str| Err(SandboxError::Fault(why.to_owned()));
        if self.times == 0 {
            return bad("times must be at least 1");
        }
        if self.probability.is_some_and(|chance| !(chance > 0.0 && chance <= 1.0)) {
            return bad("probability must be above 0 and at most 1");
        }
        match &self.action {
            Action::Status { status, .. } | Action::Garbage { status } if !(200..=599).contains(status) => {
                return bad("status must be from 200 to 599");
            }
            Action::Status { retry_after: Some(after), .. } if http::HeaderValue::from_str(after).is_err() => {
                return bad("retry_after must be a header value");
            }
            Action::Delay { ms } if *ms > MAX_DELAY_MS => return bad("ms must be at most 3600000"),
            _ => {}
        }
        let for_oauth = matches!(
            self.action,
            Action::Status { .. } | Action::Garbage { .. } | Action::Delay { .. } | Action::Stall {}
        );
        if self.target == Some(Target::Oauth) && !for_oauth {
            return bad("the token endpoint knows status, garbage, delay and stall only");
        }
        if self.target == Some(Target::Oauth) && (self.token.is_some() || self.token_prefix.is_some()) {
            return bad("the token endpoint sees no device tokens");
        }
        Ok(())
    }

    fn matches(&self, target: Target, token: &str) -> bool {
        let targeted = match self.target {
            Some(wanted) => wanted == target,
            None => target != Target::Oauth,
        };
        targeted
            && self.token.as_deref().is_none_or(|wanted| wanted == token)
            && self.token_prefix.as_deref().is_none_or(|prefix| token.starts_with(prefix))
    }
}

struct Armed {
    fault: Fault,
    to_skip: u32,
    left: u32,
    draws: u64,
}

/// The faults that still wait.
#[derive(Default)]
pub(super) struct Faults {
    /// Looked at first, so that pushes without faults take no lock.
    count: AtomicUsize,
    armed: Mutex<Vec<Armed>>,
}

impl Faults {
    pub(super) fn add(&self, fault: Fault) -> Result<(), SandboxError> {
        fault.check()?;
        let mut armed = self.armed();
        if armed.len() >= MAX_FAULTS {
            return Err(SandboxError::Fault(format!("{MAX_FAULTS} faults are waiting already")));
        }
        armed.push(Armed { to_skip: fault.skip, left: fault.times, draws: fault.seed, fault });
        self.count.store(armed.len(), Ordering::Release);
        Ok(())
    }

    pub(super) fn clear(&self) {
        let mut armed = self.armed();
        armed.clear();
        self.count.store(0, Ordering::Release);
    }

    /// Those that wait, with what is left of `skip` and `times`.
    pub(super) fn list(&self) -> Vec<Fault> {
        let remaining = |armed: &Armed| Fault { skip: armed.to_skip, times: armed.left, ..armed.fault.clone() };
        self.armed().iter().map(remaining).collect()
    }

    /// The fault to play on this request, if any; counted as played.
    pub(super) fn take(&self, target: Target, token: &str) -> Option<Action> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut armed = self.armed();
        for index in 0..armed.len() {
            let candidate = &mut armed[index];
            if !candidate.fault.matches(target, token) {
                continue;
            }
            if candidate.to_skip > 0 {
                candidate.to_skip -= 1;
                continue;
            }
            if let Some(probability) = candidate.fault.probability
                && draw(&mut candidate.draws) >= probability
            {
                continue;
            }
            let action = candidate.fault.action.clone();
            candidate.left -= 1;
            if candidate.left == 0 {
                armed.remove(index);
                self.count.store(armed.len(), Ordering::Release);
            }
            return Some(action);
        }
        None
    }

    fn armed(&self) -> MutexGuard<'_, Vec<Armed>> {
        self.armed.lock().expect("no panic while held")
    }
}

/// The next number in `0.0..1.0` (splitmix64): the same seed hits the same requests on every machine.
#[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
fn draw(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

/// What the platform thinks of one token. A token without a state is valid.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum TokenState {
    Valid {},
    /// APNs 410 Unregistered with this time in milliseconds (absent: when it was set); FCM 404 UNREGISTERED.
    Unregistered {
        #[serde(default)]
        since: Option<UnixMs>,
    },
    /// APNs 410 ExpiredToken; FCM as `Unregistered`.
    Expired {
        #[serde(default)]
        since: Option<UnixMs>,
    },
    /// APNs 400 BadDeviceToken; FCM 400 INVALID_ARGUMENT about the token.
    Bad {},
    /// APNs 400 DeviceTokenNotForTopic; FCM 403 SENDER_ID_MISMATCH.
    OtherApp {},
}

#[derive(Default)]
pub(super) struct TokenStates {
    count: AtomicUsize,
    states: RwLock<HashMap<String, TokenState>>,
}

impl TokenStates {
    pub(super) fn set(&self, token: &str, state: TokenState, now: UnixMs) -> Result<(), SandboxError> {
        let state = match state {
            TokenState::Unregistered { since } => TokenState::Unregistered { since: since.or(Some(now)) },
            TokenState::Expired { since } => TokenState::Expired { since: since.or(Some(now)) },
            TokenState::Valid {} | TokenState::Bad {} | TokenState::OtherApp {} => state,
        };
        let mut states = self.states.write().expect("no panic while held");
        if state == (TokenState::Valid {}) {
            states.remove(token);
        } else if states.len() >= MAX_TOKEN_STATES && !states.contains_key(token) {
            return Err(SandboxError::TokenStates);
        } else {
            states.insert(token.to_owned(), state);
        }
        self.count.store(states.len(), Ordering::Release);
        Ok(())
    }

    pub(super) fn get(&self, token: &str) -> Option<TokenState> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.states.read().expect("no panic while held").get(token).copied()
    }
}
