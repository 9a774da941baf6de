use crate::api::proto;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::DeviceId;
use crate::service::explain::{Decision, Explanation, Verdict};

use super::notifications::delivery;
use super::values::time;

pub fn explanation(identity: &IdentityKey, explanation: Explanation) -> proto::ExplainDeliveryResponse {
    proto::ExplainDeliveryResponse {
        notification_id: identity.public_notification(explanation.notification).to_string(),
        user_id: explanation.user.to_string(),
        summary: explanation.summary,
        decisions: explanation.decisions.into_iter().map(decision).collect(),
        deliveries: explanation.deliveries.into_iter().map(delivery).collect(),
    }
}

fn decision(decision: Decision) -> proto::Decision {
    use proto::decision::Verdict as ProtoVerdict;
    let verdict = match decision.verdict {
        Verdict::Passed => ProtoVerdict::Passed,
        Verdict::Blocked => ProtoVerdict::Blocked,
        Verdict::NotReached => ProtoVerdict::NotReached,
        Verdict::Pending => ProtoVerdict::Pending,
        Verdict::Noted => ProtoVerdict::Noted,
    };
    proto::Decision {
        step: decision.step.to_owned(),
        verdict: verdict.into(),
        reason: decision.reason.to_owned(),
        detail: decision.detail,
        at: decision.at.map(time),
        device_id: decision.device.map_or_else(String::new, DeviceId::public),
    }
}
