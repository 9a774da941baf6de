use crate::api::proto;
use crate::domain::ids::DeviceId;
use crate::domain::violation::Violations;
use crate::service::watch::{WatchDeliveries, WatchedView};

use super::notifications::{delivery, read_states};
use super::values::{read_enum, time};

pub fn watch_deliveries(violations: &mut Violations, message: proto::WatchDeliveriesRequest) -> WatchDeliveries {
    use proto::watch_deliveries_request::Kind;
    let filter = message.filter.unwrap_or_default();
    let (mut deliveries, mut retirements) = (filter.kinds.is_empty(), filter.kinds.is_empty());
    // More than the kinds there are can only be repeats.
    for (at, value) in filter.kinds.into_iter().enumerate().take(32) {
        let field = format!("filter.kinds[{at}]");
        let kind = read_enum(violations, &field, value, |kind| match kind {
            Kind::Unspecified => None,
            Kind::Delivery => Some(&mut deliveries),
            Kind::DeviceRetired => Some(&mut retirements),
        });
        match kind {
            Some(wanted) => *wanted = true,
            None if violations.names(&field) => {}
            None => violations.add(field, "must be a kind"),
        }
    }
    WatchDeliveries {
        cursor: message.cursor,
        deliveries,
        retirements,
        notification_id: filter.notification_id,
        user_id: filter.user_id,
        states: read_states(violations, "filter.states", filter.states),
    }
}

pub fn watched(cursor: String, view: WatchedView) -> proto::WatchDeliveriesResponse {
    use proto::watch_deliveries_response::{DeviceRetired, Event, Progress};
    let event = match view {
        WatchedView::Delivery(view) => Event::Delivery(delivery(view)),
        WatchedView::DeviceRetired { device, user, reason, at } => Event::DeviceRetired(DeviceRetired {
            device_id: DeviceId::public(device),
            user_id: user.to_string(),
            reason,
            at: Some(time(at)),
        }),
        WatchedView::Progress => Event::Progress(Progress {}),
    };
    proto::WatchDeliveriesResponse { cursor, event: Some(event) }
}
