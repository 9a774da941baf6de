use crate::api::proto;
use crate::domain::content::{Content, LocalizedText};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::DeviceId;
use crate::domain::notification::Accepted;
use crate::domain::platform::RouteSpec;
use crate::domain::sending::Priority;
use crate::domain::violation::Violations;
use crate::service::dry_run::{Decision, Rehearsal, Sample};
use crate::service::events::NotifyEvent;

use super::devices::{shown_environment, shown_platform};
use super::notifications::lane;
use super::values::{read_data, read_duration, read_enum, read_labels, read_time};

/// A sample's decision.
const SEND: &str = "SEND";

pub fn notify_event(violations: &mut Violations, message: proto::NotifyEventRequest) -> NotifyEvent {
    NotifyEvent {
        event_type: message.event_type,
        idempotency_key: message.idempotency_key,
        user_ids: message.user_ids,
        topics: message.topics,
        device_ids: message.device_ids,
        everyone: message.everyone,
        actor_id: message.actor_id,
        subject: message.subject,
        data: read_data(violations, "data", message.data),
        content: message.content.map(content),
        priority: read_enum(violations, "priority", message.priority, |value| match value {
            proto::priority::Value::PriorityUnspecified => None,
            proto::priority::Value::High => Some(Priority::High),
            proto::priority::Value::Normal => Some(Priority::Normal),
        }),
        ttl_ms: read_duration(violations, "ttl", message.ttl),
        collapse_key: message.collapse_key,
        event_at: read_time(violations, "event_at", message.event_at),
        not_before: read_time(violations, "not_before", message.not_before),
        labels: read_labels(message.labels),
        max_audience: message.max_audience,
        dry_run: message.dry_run,
    }
}

pub(super) fn content(message: proto::Content) -> Content {
    let localized = message.localized.into_iter().map(|(locale, texts)| {
        let proto::content::Texts { title, subtitle, body } = texts;
        (locale, LocalizedText { title, subtitle, body })
    });
    Content {
        title: message.title,
        subtitle: message.subtitle,
        body: message.body,
        image: message.image,
        link: message.link,
        sound: message.sound,
        badge: message.badge,
        category: message.category,
        thread_id: message.thread_id,
        localized: localized.collect(),
    }
}

pub fn accepted(identity: &IdentityKey, accepted: Accepted) -> proto::NotifyEventResponse {
    let id = identity.public_notification(accepted.notification);
    proto::NotifyEventResponse {
        notification_id: id.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()).to_owned(),
        duplicate: Some(accepted.duplicate),
        plan: None,
    }
}

pub fn rehearsed(rehearsal: Rehearsal) -> proto::NotifyEventResponse {
    let suppressed = rehearsal.suppressed.into_iter();
    let plan = proto::Plan {
        people: rehearsal.people,
        lane: lane(rehearsal.lane).into(),
        suppressed: suppressed
            .map(|(reason, count)| proto::plan::Suppressed { reason: reason.to_owned(), count })
            .collect(),
        targets: rehearsal.targets.into_iter().map(targets).collect(),
        samples: rehearsal.samples.into_iter().map(sample).collect(),
        partial: Some(rehearsal.partial),
    };
    proto::NotifyEventResponse { plan: Some(plan), ..proto::NotifyEventResponse::default() }
}

fn targets((route, count): (Option<RouteSpec>, u64)) -> proto::plan::Targets {
    let Some(route) = route else { return proto::plan::Targets { count, ..proto::plan::Targets::default() } };
    proto::plan::Targets {
        platform: shown_platform(route.platform).into(),
        credential: route.credential.to_string(),
        apns_environment: shown_environment(route.environment).into(),
        apns_topic: route.bundle.to_string(),
        count,
    }
}

fn sample(sample: Sample) -> proto::plan::Sample {
    let shown = proto::plan::Sample {
        user_id: sample.user.to_string(),
        device_id: sample.device.map_or_else(String::new, DeviceId::public),
        ..proto::plan::Sample::default()
    };
    match sample.decision {
        Decision::Suppressed(code) => proto::plan::Sample { decision: code.name().to_owned(), ..shown },
        Decision::Send { locale, payload: None } => proto::plan::Sample { decision: SEND.to_owned(), locale, ..shown },
        Decision::Send { locale, payload: Some(payload) } => proto::plan::Sample {
            decision: SEND.to_owned(),
            platform: shown_platform(payload.platform).into(),
            locale,
            payload: payload.body,
            headers: payload.headers.into_iter().collect(),
            size_bytes: u32::try_from(payload.size).unwrap_or(u32::MAX),
            ..shown
        },
    }
}
