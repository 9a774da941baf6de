//! How providers are doing, and redrives.

use crate::api::proto;
use crate::api::proto::get_provider_status_response::{Route, State};
use crate::domain::platform::Platform;
use crate::domain::provider::{RouteCondition, RouteStatus};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::service::providers::{Redrive, RouteChoice};

use super::devices::{environment, platform, shown_environment};
use super::values::{read_time, time};

pub fn provider_status(status: RouteStatus) -> Route {
    let (state, cause, reason, since, next_try_at) = match status.condition {
        RouteCondition::Working => (State::Working, "", String::new(), None, None),
        RouteCondition::Slowed { until } => (State::Slowed, "", String::new(), None, Some(until)),
        RouteCondition::Paused { cause, reason, since, next_probe } => {
            (State::Paused, cause, reason, Some(since), Some(next_probe).filter(|at| *at > UnixMs(0)))
        }
    };
    Route {
        platform: match status.spec.platform {
            Platform::Apns => proto::device::Platform::Apns,
            Platform::Fcm => proto::device::Platform::Fcm,
        }
        .into(),
        credential: status.spec.credential.to_string(),
        apns_environment: shown_environment(status.spec.environment).into(),
        apns_topic: status.spec.bundle.to_string(),
        state: state.into(),
        cause: cause.to_owned(),
        reason,
        since: since.map(time),
        next_try_at: next_try_at.map(time),
        rate_per_minute: status.rate_per_minute,
        connections: status.connections,
        in_flight: status.in_flight,
        queued: status.queued,
    }
}

pub fn route_choice(violations: &mut Violations, message: proto::ConfirmRetirementsRequest) -> RouteChoice {
    RouteChoice {
        platform: platform(violations, message.platform),
        credential: message.credential,
        environment: environment(violations, message.apns_environment),
        bundle: message.apns_topic,
    }
}

pub fn redrive(violations: &mut Violations, message: proto::RedriveDeliveriesRequest) -> Redrive {
    Redrive {
        nudged_id: message.nudged_id,
        notification_id: message.notification_id,
        user_id: message.user_id,
        reasons: message.reasons,
        died_from: read_time(violations, "died_from", message.died_from),
        died_before: read_time(violations, "died_before", message.died_before),
        page_token: message.page_token,
    }
}
