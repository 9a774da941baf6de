use crate::api::proto;
use crate::domain::content::Content;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::DeviceId;
use crate::domain::notification::Notification;
use crate::domain::outcome::State;
use crate::domain::platform::Lane;
use crate::domain::sending::Priority;
use crate::domain::violation::Violations;
use crate::service::notifications::{DeliveryView, ListDeliveries};
use crate::service::{Attempt, Counts, NotificationView};

use super::values::{data, read_enum, time};

pub(super) fn lane(lane: Lane) -> proto::lane::Value {
    match lane {
        Lane::Interactive => proto::lane::Value::Interactive,
        Lane::Bulk => proto::lane::Value::Bulk,
    }
}

/// `with_content`: whether the caller may see what it says.
pub fn notification(identity: &IdentityKey, notification: &Notification, with_content: bool) -> proto::Notification {
    let priority = match notification.priority {
        Priority::High => proto::priority::Value::High,
        Priority::Normal => proto::priority::Value::Normal,
    };
    let body = &notification.body;
    proto::Notification {
        notification_id: identity.public_notification(notification.id).to_string(),
        event_type: notification.event_type.to_string(),
        lane: lane(notification.lane).into(),
        priority: priority.into(),
        collapse_key: notification.collapse_key.as_ref().map_or_else(String::new, ToString::to_string),
        subject: body.subject.clone().unwrap_or_default(),
        content: with_content.then(|| content(&body.content)),
        data: with_content.then(|| data(&body.data)),
        labels: body.labels.clone().into_iter().collect(),
        event_at: Some(time(notification.event_at)),
        accepted_at: Some(time(notification.accepted_at)),
        not_before: notification.not_before.map(time),
        expires_at: Some(time(notification.expires_at)),
        cancelled_at: notification.cancelled_at.map(time),
        people: None,
        expanding: None,
        counts: None,
    }
}

pub fn notification_view(identity: &IdentityKey, view: &NotificationView, with_content: bool) -> proto::Notification {
    let Counts { open, sent, suppressed, expired, cancelled, dead } = view.counts;
    proto::Notification {
        people: view.people,
        expanding: Some(view.expanding),
        counts: Some(proto::notification::Counts {
            open: Some(open),
            sent: Some(sent),
            suppressed: Some(suppressed),
            expired: Some(expired),
            cancelled: Some(cancelled),
            dead: Some(dead),
        }),
        ..notification(identity, &view.notification, with_content)
    }
}

fn content(content: &Content) -> proto::Content {
    let content = content.clone();
    let localized = content.localized.into_iter().map(|(locale, texts)| {
        let texts = proto::content::Texts { title: texts.title, subtitle: texts.subtitle, body: texts.body };
        (locale, texts)
    });
    proto::Content {
        title: content.title,
        subtitle: content.subtitle,
        body: content.body,
        image: content.image,
        link: content.link,
        sound: content.sound,
        badge: content.badge,
        category: content.category,
        thread_id: content.thread_id,
        localized: localized.collect(),
    }
}

pub fn list_deliveries(violations: &mut Violations, message: proto::ListDeliveriesRequest) -> ListDeliveries {
    ListDeliveries {
        notification_id: message.notification_id,
        user_id: message.user_id,
        states: read_states(violations, "states", message.states),
        page_size: message.page_size,
        page_token: message.page_token,
    }
}

/// Each once.
pub(super) fn read_states(violations: &mut Violations, field: &str, values: Vec<i32>) -> Vec<State> {
    use proto::delivery::State as ProtoState;
    let mut states = Vec::new();
    // More than the states there are can only be repeats.
    for (at, value) in values.into_iter().enumerate().take(32) {
        let field = format!("{field}[{at}]");
        let state = read_enum(violations, &field, value, |state| match state {
            ProtoState::Unspecified => None,
            ProtoState::Open => Some(State::Open),
            ProtoState::Sent => Some(State::Sent),
            ProtoState::Suppressed => Some(State::Suppressed),
            ProtoState::Expired => Some(State::Expired),
            ProtoState::Cancelled => Some(State::Cancelled),
            ProtoState::Dead => Some(State::Dead),
        });
        match state {
            Some(state) if !states.contains(&state) => states.push(state),
            Some(_) => {}
            None if violations.names(&field) => {}
            None => violations.add(field, "must be a state"),
        }
    }
    states
}

pub fn delivery(view: DeliveryView) -> proto::Delivery {
    use proto::delivery::State as ProtoState;
    let state = match view.state {
        State::Open => ProtoState::Open,
        State::Sent => ProtoState::Sent,
        State::Suppressed => ProtoState::Suppressed,
        State::Expired => ProtoState::Expired,
        State::Cancelled => ProtoState::Cancelled,
        State::Dead => ProtoState::Dead,
    };
    proto::Delivery {
        user_id: view.user.to_string(),
        device_id: view.device.map_or_else(String::new, DeviceId::public),
        nudged_id: view.nudged_id.map_or_else(String::new, |id| id.to_string()),
        state: state.into(),
        reason: view.reason.to_owned(),
        at: Some(time(view.at)),
        last_attempt: view.last_attempt.map(attempt),
        notification_id: view.notification.to_string(),
    }
}

fn attempt(attempt: Attempt) -> proto::Attempt {
    proto::Attempt {
        attempt: attempt.attempt,
        at: Some(time(attempt.at)),
        result: attempt.result.to_owned(),
        status: attempt.answer.status.into(),
        platform_reason: attempt.answer.reason.into(),
        next_at: attempt.next_at.map(time),
        device_id: attempt.device.public(),
    }
}
