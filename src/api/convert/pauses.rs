//! Pauses.

use crate::api::proto;
use crate::domain::ids::{AppId, EventType};
use crate::domain::platform::Platform;
use crate::domain::violation::Violations;
use crate::service::pauses::{PauseDelivery, PauseView};

use super::devices::platform;
use super::values::time;

pub fn pause_delivery(violations: &mut Violations, message: proto::PauseDeliveryRequest) -> PauseDelivery {
    PauseDelivery {
        event_type: message.event_type,
        platform: platform(violations, message.platform),
        reason: message.reason,
    }
}

pub fn resume_delivery(violations: &mut Violations, message: proto::ResumeDeliveryRequest) -> PauseDelivery {
    let platform = platform(violations, message.platform);
    PauseDelivery { event_type: message.event_type, platform, reason: String::new() }
}

pub fn pause(pause: PauseView) -> proto::list_pauses_response::Pause {
    let platform = match pause.platform {
        None => proto::device::Platform::Unspecified,
        Some(Platform::Apns) => proto::device::Platform::Apns,
        Some(Platform::Fcm) => proto::device::Platform::Fcm,
    };
    proto::list_pauses_response::Pause {
        app_id: pause.app.as_ref().map(AppId::to_string).unwrap_or_default(),
        event_type: pause.event_type.as_ref().map(EventType::to_string).unwrap_or_default(),
        platform: platform.into(),
        all_apps: Some(pause.all_apps),
        reason: pause.reason,
        since: Some(time(pause.since)),
    }
}
