use crate::api::proto;
use crate::domain::content::{Content, LocalizedText};
use crate::domain::identity::IdentityKey;
use crate::domain::notification::Accepted;
use crate::domain::sending::Priority;
use crate::domain::violation::Violations;
use crate::service::events::NotifyEvent;

use super::values::{read_data, read_duration, read_enum, read_labels, read_time};

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
    proto::NotifyEventResponse {
        notification_id: identity.public_notification(accepted.notification).to_string(),
        duplicate: Some(accepted.duplicate),
    }
}
