//! What each target's device is sent: one variant for all who read the same words.

use std::sync::Arc;

use crate::delivery::flight::Flight;
use crate::delivery::shared::Link;
use crate::domain::ids::{Locale, NotificationId};
use crate::domain::notification::{Notification, TargetFacts};
use crate::domain::outcome::ResultCode;
use crate::domain::sending::SendOptions;
use crate::planted;
use crate::render::{self, Templates, Variant};
use crate::senders::{EncodeError, Encoded, SendTarget};

use super::Worker;

/// Encoded variants kept per lane: a broadcast's jobs share theirs.
const ENCODED_KEPT: usize = 64;
/// A job of so few targets is nearly always the only one of its notification on its route: what was encoded for it would
/// only push out what others share.
const KEPT_FROM: usize = 17;

/// A notification, and its variant as `render::Variant` names it.
pub(super) type EncodedKey = (NotificationId, Option<String>, Option<usize>);

impl Worker {
    /// Renders and encodes for each target; what cannot be is concluded.
    pub(super) fn encode_for(
        &mut self,
        flight: &mut Flight,
        notification: &Arc<Notification>,
        templates: Option<&Templates>,
        allowed: Vec<(u32, TargetFacts)>,
        link: &Link,
    ) -> (Vec<Encoded>, Vec<SendTarget>) {
        let shared = Arc::clone(&self.shared);
        let now = shared.runtime.instant();
        let identity = shared.store.identity();
        let mut encoded: Vec<Encoded> = Vec::new();
        let mut variants: Vec<(Variant<'_>, Result<u16, ResultCode>)> = Vec::new();
        let app_default = templates.and_then(|_| shared.types.default_locale(notification.app));
        let renamed = if planted::is("identity-changes-on-retry") { i64::from(flight.job.attempt) } else { 0 };
        let is_shared = flight.job.targets.len() >= KEPT_FROM;
        let mut targets = Vec::with_capacity(allowed.len());
        for (index, facts) in allowed {
            let content = &notification.body.content;
            let named = render::choose(content, templates, facts.locale.as_ref(), app_default.as_ref());
            let found = variants.iter().find(|(known, _)| *known == named).map(|(_, variant)| *variant);
            let variant = found.unwrap_or_else(|| {
                let made = if is_shared {
                    self.encoded_once(link, notification, templates, named, app_default.as_ref())
                } else {
                    self.encode(link, notification, templates, named, app_default.as_ref())
                };
                let made = made.map(|one| {
                    encoded.push(one);
                    u16::try_from(encoded.len() - 1).expect("no more variants than targets")
                });
                variants.push((named, made));
                made
            });
            match variant {
                Err(code) => flight.conclude(index, code, now),
                Ok(variant) => targets.push(SendTarget {
                    index,
                    user: facts.target.user,
                    device: facts.target.device,
                    token: facts.token,
                    nudged_id: identity.nudged_id(NotificationId(notification.id.0 + renamed), facts.target.device),
                    variant,
                }),
            }
        }
        (encoded, targets)
    }

    fn encoded_once(
        &mut self,
        link: &Link,
        notification: &Notification,
        templates: Option<&Templates>,
        variant: Variant<'_>,
        app_default: Option<&Locale>,
    ) -> Result<Encoded, ResultCode> {
        let key = (notification.id, variant.inline.map(str::to_owned), variant.entry);
        if let Some(known) = self.encoded.get(&key) {
            return known.clone();
        }
        let made = self.encode(link, notification, templates, variant, app_default);
        if self.encoded.len() >= ENCODED_KEPT {
            self.encoded.clear();
        }
        self.encoded.insert(key, made.clone());
        made
    }

    fn encode(
        &self,
        link: &Link,
        notification: &Notification,
        templates: Option<&Templates>,
        variant: Variant<'_>,
        app_default: Option<&Locale>,
    ) -> Result<Encoded, ResultCode> {
        let event_type = notification.event_type.as_str();
        let rendered = render::render(&notification.body, event_type, templates, variant, app_default);
        if let Some(templates) = templates {
            templates.report(&rendered.problems);
        }
        let message = rendered.message;
        let options = SendOptions {
            priority: notification.priority,
            collapse_key: notification.collapse_key.clone(),
            expires_at: notification.expires_at,
            push_id: link.push_id,
        };
        let platform = self.lanes.route.spec.platform;
        link.sender.encode(&self.lanes.route, &message, &options).map_err(|error| {
            tracing::info!(notification_id = %self.shared.public_id(notification.id), %platform, %error,
                "a notification cannot be sent on this platform");
            match error {
                EncodeError::TooLarge { .. } => ResultCode::PayloadTooLarge,
                EncodeError::Invalid(_) => ResultCode::NotEncodable,
            }
        })
    }
}
