//! Between protobuf messages and plain types. Reading adds a violation for what protobuf allows and we do not (an
//! unknown enum number, a time outside the calendar); every other rule is the service's.

mod devices;
mod event_types;
mod events;
mod explain;
mod notifications;
mod opt_ins;
mod pauses;
mod providers;
mod values;
mod watch;

pub use devices::{created_at, device, list_devices, register_device, unregister_device};
pub use event_types::{declared, definition, event_type, preview, previewed};
pub use events::{accepted, notify_event, rehearsed};
pub use explain::explanation;
pub use notifications::{delivery, list_deliveries, notification, notification_view};
pub use opt_ins::{opt_in, set_opt_in, set_subscription, subscription};
pub use pauses::{pause, pause_delivery, resume_delivery};
pub use providers::{provider_status, redrive, route_choice};
pub use values::time;
#[cfg(any(test, feature = "fuzzing"))]
pub use values::{data, read_data};
pub use watch::{watch_deliveries, watched};
