use crate::api::proto;
use crate::domain::ids::DeviceId;
use crate::domain::violation::Violations;
use crate::service::opt_in::SetOptIn;
use crate::service::subscriptions::SetSubscription;
use crate::service::{OptIn, Subscription};

use super::values::{read_time, time};

pub fn set_opt_in(violations: &mut Violations, message: proto::SetOptInRequest) -> SetOptIn {
    SetOptIn {
        user_id: message.user_id,
        event_type: message.event_type,
        device_id: message.device_id,
        opted_in: message.opted_in,
        source: message.source,
        policy_version: message.policy_version,
        evidence: message.evidence,
        observed_at: read_time(violations, "observed_at", message.observed_at),
    }
}

pub fn opt_in(choice: OptIn) -> proto::OptIn {
    proto::OptIn {
        event_type: choice.event_type.map(|event_type| event_type.to_string()),
        device_id: choice.device.map(DeviceId::public),
        opted_in: Some(choice.opted_in),
        observed_at: Some(time(choice.observed_at)),
        recorded_at: Some(time(choice.recorded_at)),
        source: choice.source.unwrap_or_default(),
        policy_version: choice.policy_version.unwrap_or_default(),
        evidence: choice.evidence.unwrap_or_default(),
    }
}

pub fn set_subscription(
    violations: &mut Violations,
    user_id: String,
    topic: String,
    active: bool,
    observed_at: Option<prost_types::Timestamp>,
) -> SetSubscription {
    SetSubscription { user_id, topic, active, observed_at: read_time(violations, "observed_at", observed_at) }
}

pub fn subscription(subscription: &Subscription) -> proto::Subscription {
    proto::Subscription { topic: subscription.topic.to_string(), observed_at: Some(time(subscription.observed_at)) }
}
