//! Event types and their previews.

use std::time::Duration;

use crate::api::proto;
use crate::domain::content::Message;
use crate::domain::event_type::{Definition, LocaleTemplate, OnMaybe, Purpose, Ttl, TypeVersion};
use crate::domain::platform::Lane;
use crate::domain::sending::Priority;
use crate::domain::violation::Violations;
use crate::service::event_types::{Payload, Preview, Previewed};

use super::devices::shown_platform;
use super::events::content;
use super::values::{read_data, read_duration, read_enum, time};

/// Empty texts mean absent. `version` and `created_at` are the server's to give.
pub fn definition(violations: &mut Violations, message: proto::EventType) -> Definition {
    let text = |text: String| (!text.is_empty()).then_some(text);
    let purpose = read_enum(violations, "event_type.purpose", message.purpose, |value| match value {
        proto::event_type::Purpose::Unspecified => None,
        proto::event_type::Purpose::Ordinary => Some(Purpose::Ordinary),
        proto::event_type::Purpose::Advertising => Some(Purpose::Advertising),
    });
    let priority = read_enum(violations, "event_type.priority", message.priority, |value| match value {
        proto::priority::Value::PriorityUnspecified => None,
        proto::priority::Value::High => Some(Priority::High),
        proto::priority::Value::Normal => Some(Priority::Normal),
    });
    let lane = read_enum(violations, "event_type.lane", message.lane, |value| match value {
        proto::lane::Value::LaneUnspecified => None,
        proto::lane::Value::Interactive => Some(Lane::Interactive),
        proto::lane::Value::Bulk => Some(Lane::Bulk),
    });
    let on_maybe = read_enum(violations, "event_type.on_maybe", message.on_maybe, |value| match value {
        proto::event_type::OnMaybe::Unspecified => None,
        proto::event_type::OnMaybe::Retry => Some(OnMaybe::Retry),
        proto::event_type::OnMaybe::Drop => Some(OnMaybe::Drop),
    });
    let ttl = read_duration(violations, "event_type.ttl", message.ttl).and_then(|ms| {
        violations.take(Ttl::new("event_type.ttl", Duration::from_millis(u64::try_from(ms).unwrap_or(0))))
    });
    Definition {
        name: message.name,
        display_name: text(message.display_name),
        group: text(message.group),
        purpose: purpose.unwrap_or_default(),
        default_opt_in: message.default_opt_in,
        priority,
        lane,
        urgent: message.urgent,
        ttl,
        collapse_key: text(message.collapse_key),
        on_maybe: on_maybe.unwrap_or_default(),
        default_locale: text(message.default_locale),
        templates: message.templates.into_iter().map(template).collect(),
    }
}

fn template(message: proto::event_type::Template) -> LocaleTemplate {
    LocaleTemplate {
        locale: message.locale,
        title: message.title,
        subtitle: message.subtitle,
        body: message.body,
        image: message.image,
        link: message.link,
        sound: message.sound,
        category: message.category,
        thread_id: message.thread_id,
        badge: message.badge,
    }
}

#[must_use]
pub fn event_type(version: &TypeVersion) -> proto::EventType {
    let message = declared(&version.definition);
    proto::EventType { version: version.version, created_at: Some(time(version.created_at)), ..message }
}

/// Without what the server gives.
#[must_use]
pub fn declared(definition: &Definition) -> proto::EventType {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    proto::EventType {
        name: definition.name.clone(),
        display_name: text(&definition.display_name),
        group: text(&definition.group),
        purpose: match definition.purpose {
            Purpose::Ordinary => proto::event_type::Purpose::Ordinary,
            Purpose::Advertising => proto::event_type::Purpose::Advertising,
        }
        .into(),
        default_opt_in: definition.default_opt_in,
        priority: match definition.priority {
            None => proto::priority::Value::PriorityUnspecified,
            Some(Priority::High) => proto::priority::Value::High,
            Some(Priority::Normal) => proto::priority::Value::Normal,
        }
        .into(),
        lane: match definition.lane {
            None => proto::lane::Value::LaneUnspecified,
            Some(Lane::Interactive) => proto::lane::Value::Interactive,
            Some(Lane::Bulk) => proto::lane::Value::Bulk,
        }
        .into(),
        urgent: definition.urgent,
        ttl: definition.ttl.and_then(|ttl| prost_types::Duration::try_from(ttl.duration()).ok()),
        collapse_key: text(&definition.collapse_key),
        on_maybe: match definition.on_maybe {
            OnMaybe::Retry => proto::event_type::OnMaybe::Retry,
            OnMaybe::Drop => proto::event_type::OnMaybe::Drop,
        }
        .into(),
        default_locale: text(&definition.default_locale),
        templates: definition.templates.iter().map(proto_template).collect(),
        version: 0,
        created_at: None,
    }
}

fn proto_template(template: &LocaleTemplate) -> proto::event_type::Template {
    let template = template.clone();
    proto::event_type::Template {
        locale: template.locale,
        title: template.title,
        subtitle: template.subtitle,
        body: template.body,
        image: template.image,
        link: template.link,
        sound: template.sound,
        category: template.category,
        thread_id: template.thread_id,
        badge: template.badge,
    }
}

pub fn preview(violations: &mut Violations, message: proto::PreviewRequest) -> Preview {
    if message.event_type.is_some() && !(message.name.is_empty() && message.version.is_none()) {
        violations.add("event_type", "stands instead of name and version");
    }
    Preview {
        definition: message.event_type.map(|event_type| definition(violations, event_type)),
        name: message.name,
        version: message.version,
        data: read_data(violations, "data", message.data),
        actor_id: message.actor_id,
        subject: message.subject,
        content: message.content.map(content),
        collapse_key: message.collapse_key,
        locales: message.locales,
    }
}

#[must_use]
pub fn previewed(previewed: Previewed) -> proto::preview_response::Preview {
    let problems = previewed.problems.into_iter();
    proto::preview_response::Preview {
        locale: previewed.locale.unwrap_or_default(),
        template_locale: previewed.template_locale.unwrap_or_default(),
        silent: Some(previewed.message.silent),
        content: Some(shown(previewed.message)),
        collapse_key: previewed.collapse_key.map_or_else(String::new, |key| key.to_string()),
        problems: problems
            .map(|problem| proto::preview_response::Problem { field: problem.field, detail: problem.detail })
            .collect(),
        payloads: previewed.payloads.into_iter().map(payload).collect(),
    }
}

fn shown(message: Message) -> proto::Content {
    proto::Content {
        title: message.title,
        subtitle: message.subtitle,
        body: message.body,
        image: message.image,
        link: message.link,
        sound: message.sound,
        badge: message.badge,
        category: message.category,
        thread_id: message.thread_id,
        ..proto::Content::default()
    }
}

fn payload(payload: Payload) -> proto::preview_response::Payload {
    let (reason, detail) = payload.refused.map_or(("", String::new()), |(code, detail)| (code.name(), detail));
    proto::preview_response::Payload {
        platform: shown_platform(payload.platform).into(),
        body: payload.body,
        headers: payload.headers.into_iter().collect(),
        size_bytes: u32::try_from(payload.size).unwrap_or(u32::MAX),
        reason: reason.to_owned(),
        detail,
    }
}
