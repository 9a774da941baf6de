//! What a platform answered, as data. Only a sender's `classify.rs` builds these; only `delivery` acts on them.

use std::fmt;
use std::time::Duration;

use super::time::UnixMs;

/// A provider's own words for its answer: status and reason string, kept verbatim but bounded and printable, so that an
/// unknown reason is still explained. Never holds a device token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProviderAnswer {
    /// The HTTP status; 0 when there was no answer.
    pub status: u16,
    pub reason: Box<str>,
}

impl ProviderAnswer {
    /// The longest reason kept, in bytes.
    pub const MAX_REASON_BYTES: usize = 120;

    /// Cuts `reason` to the limit at a character boundary and replaces control characters.
    #[must_use]
    pub fn new(status: u16, reason: &str) -> Self {
        // Nearly every answer: an id, a reason in one word.
        if reason.len() <= Self::MAX_REASON_BYTES && reason.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            return Self { status, reason: reason.into() };
        }
        let mut kept = String::with_capacity(reason.len().min(Self::MAX_REASON_BYTES));
        for c in reason.chars() {
            if kept.len() + c.len_utf8() > Self::MAX_REASON_BYTES {
                break;
            }
            kept.push(if c.is_control() { ' ' } else { c });
        }
        Self { status, reason: kept.into_boxed_str() }
    }
}

impl fmt::Display for ProviderAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, &*self.reason) {
            (0, reason) => f.write_str(reason),
            (status, "") => write!(f, "{status}"),
            (status, reason) => write!(f, "{status} {reason}"),
        }
    }
}

/// Why another attempt makes sense; each has its own floor in the retry policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RetryCause {
    /// The connection failed or the stream was refused.
    Transport,
    /// The provider asked us to slow down (429), and does not say of what it was too much.
    Throttled,
    /// … of this device: the device is left alone.
    DeviceThrottled,
    /// … of everything that goes through this credential: all of it is held.
    ProviderThrottled,
    /// The provider failed (5xx).
    ServerError,
}

/// How far a configuration fault reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultScope {
    /// Everything that goes through the credential.
    Credential,
    /// One bundle in one environment.
    Route,
    /// Some kind of device only, such as iPhones behind FCM: the delivery waits, the others go on.
    Target,
}

/// The end of one attempt for one target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SendOutcome {
    /// The platform took it; more nobody can know. `provider_id` as the platform named it, where it did.
    Sent { provider_id: Option<Box<str>> },
    /// Surely not sent; worth another try, not before `after`.
    RetryLater { cause: RetryCause, after: Option<Duration>, answer: ProviderAnswer },
    /// The request left and the answer did not come: it may be on a screen by now.
    MaybeSent { answer: ProviderAnswer },
    /// The token is dead. `since`: when the platform knew (APNs' 410 timestamp): a later registration wins.
    /// `elsewhere`: it may be good in the platform's other environment.
    TokenGone { since: Option<UnixMs>, elsewhere: bool, answer: ProviderAnswer },
    /// This message will never be taken; the token is not at fault.
    Rejected { answer: ProviderAnswer },
    /// The credential, project or configuration is wrong: pauses what it reaches, burns no attempt.
    SenderBroken { scope: FaultScope, answer: ProviderAnswer },
    /// Not handed over: a "no" arrived since the gate, or the gate is too old. Back to the gate, no attempt.
    Held,
    /// Not handed over: the sender is draining or its queue was dropped. Back to the queue, no attempt.
    NotAttempted,
}

impl SendOutcome {
    /// Whether a provider may have seen it: what counts as an attempt.
    #[must_use]
    pub fn is_attempt(&self) -> bool {
        !matches!(self, Self::Held | Self::NotAttempted | Self::SenderBroken { .. })
    }

    /// Whether a provider said something, whatever it was: a sign of life.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match self {
            Self::Sent { .. } => true,
            Self::RetryLater { answer, .. }
            | Self::MaybeSent { answer }
            | Self::TokenGone { answer, .. }
            | Self::Rejected { answer }
            | Self::SenderBroken { answer, .. } => answer.status != 0,
            Self::Held | Self::NotAttempted => false,
        }
    }
}

/// What the device is asked to do about power: not the same as the lane (our queues).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Priority {
    /// Shown at once: APNs 10, FCM HIGH. The default of visible notifications.
    #[default]
    High,
    /// When convenient: APNs 5, FCM NORMAL.
    Normal,
}

/// Options of one notification that every sender needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SendOptions {
    pub priority: Priority,
    /// What a shown notice is replaced by: the caller's key, else the digest's; without one, a delivery's `nudged_id`.
    pub collapse_key: Option<super::ids::CollapseKey>,
    /// The provider is told to stop trying then.
    pub expires_at: UnixMs,
    /// Whether payloads carry `nudged_id` (`push_id` of the app).
    pub push_id: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_bounded_and_printable() {
        let answer = ProviderAnswer::new(400, &format!("a\n{}", "é".repeat(200)));
        assert!(answer.reason.len() <= ProviderAnswer::MAX_REASON_BYTES);
        assert!(answer.reason.starts_with("a é"));
        assert_eq!(ProviderAnswer::new(410, "Unregistered").to_string(), "410 Unregistered");
        assert_eq!(ProviderAnswer::new(0, "timeout").to_string(), "timeout");
    }
}
