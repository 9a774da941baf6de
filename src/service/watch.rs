//! WatchDeliveries: what a watcher asks for, and its cursor.
//!
//! A cursor is a position in the installation's history, sealed with its key for one app: base64url of version (1 byte),
//! epoch, transaction, row (8 bytes each), entry (4), time (8) and seal (8). What does not have this shape is a violation;
//! what has it and is not ours for this app is foreign. It says nothing of a filter, so that a watcher may change its mind.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq as _;

use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppKey, DeviceId, NotificationId, UserId};
use crate::domain::outcome::State;
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::storage::{WatchEvent, WatchFilter, Watched};

use super::notifications::{DeliveryView, notification_uuid};
use super::{Call, Result, Service, ServiceError, fields};

/// Events of one page: what a stream holds beside its buffer.
pub const PAGE: usize = 500;
/// Results that end a delivery: what is told unless other states are asked for.
const FINAL: [State; 5] = [State::Sent, State::Suppressed, State::Expired, State::Cancelled, State::Dead];

const VERSION: u8 = 1;
const SEALED_BYTES: usize = 1 + 3 * 8 + 4 + 8;
const SEAL_BYTES: usize = 8;
/// The longest cursor that is looked at; ours have 60 characters.
const MAX_CURSOR_BYTES: usize = 100;

pub struct WatchDeliveries {
    pub cursor: String,
    pub deliveries: bool,
    pub retirements: bool,
    pub notification_id: String,
    pub user_id: String,
    /// Empty: every final one.
    pub states: Vec<State>,
}

/// What somebody watches, and how far they are.
#[derive(Debug)]
pub struct Watch {
    app: AppKey,
    filter: WatchFilter,
    position: WatchPosition,
}

/// What a watcher is told, in public ids.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WatchedView {
    Delivery(DeliveryView),
    DeviceRetired {
        device: DeviceId,
        /// Empty for an erased person.
        user: UserId,
        reason: String,
        at: UnixMs,
    },
    Progress,
}

/// What came after the position of a [`Watch`], which is now after it.
pub struct WatchedPage {
    events: Vec<WatchEvent>,
    /// There may be more already.
    pub more: bool,
}

impl WatchedPage {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

impl Service {
    /// Checks everything, the cursor too.
    pub async fn open_watch(&self, mut call: Call<'_>, input: WatchDeliveries) -> Result<Watch> {
        let violations = &mut call.violations;
        let user = fields::optional_user(violations, "filter.user_id", &input.user_id);
        let uuid = match input.notification_id.as_str() {
            "" => None,
            text => notification_uuid(violations, "filter.notification_id", text),
        };
        let cursor = match input.cursor.as_str() {
            "" => None,
            text => {
                let read = RawCursor::read(text);
                if read.is_none() {
                    violations.add("cursor", "is not a cursor");
                }
                read
            }
        };
        let app = call.checked()?.key;
        let after = cursor.map(|cursor| cursor.open(self.identity(), app)).transpose()?;
        let notification = match uuid {
            None => None,
            Some(uuid) => Some(self.own_notification(app, uuid).await?),
        };
        let states = if input.states.is_empty() { FINAL.to_vec() } else { input.states };
        let filter =
            WatchFilter { deliveries: input.deliveries, retirements: input.retirements, notification, user, states };
        // Also asks the store whether it can go on from there.
        let page = self.store.watch(app, after, &filter, 1).await.map_err(|error| self.refused(error))?;
        Ok(Watch { app, filter, position: after.unwrap_or(page.position) })
    }

    /// The next page, [`PAGE`] events at most. At an error the watch stays where it was.
    pub async fn watch_on(&self, watch: &mut Watch) -> Result<WatchedPage> {
        let page = self.store.watch(watch.app, Some(watch.position), &watch.filter, PAGE).await;
        let page = page.map_err(|error| self.refused(error))?;
        watch.position = page.position;
        Ok(WatchedPage { events: page.events, more: page.more })
    }

    /// To go on after everything that the watch has read.
    #[must_use]
    pub fn watch_cursor(&self, watch: &Watch) -> String {
        issue(self.identity(), watch.app, &watch.position)
    }

    /// The events of a page, each with the cursor to go on after it.
    pub fn watched(&self, watch: &Watch, page: WatchedPage) -> impl Iterator<Item = (String, WatchedView)> {
        let app = watch.app;
        page.events.into_iter().map(move |event| {
            let cursor = issue(self.identity(), app, &event.position);
            let view = match event.watched {
                Watched::Delivery { notification, delivery } => {
                    WatchedView::Delivery(self.view(notification, delivery))
                }
                Watched::DeviceRetired { device, user, reason, at } => {
                    WatchedView::DeviceRetired { device, user, reason, at }
                }
            };
            (cursor, view)
        })
    }

    /// The internal id of a notification of the app.
    async fn own_notification(&self, app: AppKey, public: uuid::Uuid) -> Result<NotificationId> {
        let id = self.notification(Some(public))?;
        let next = NotificationId(id.0.saturating_add(1));
        let page = self.store.list_notifications(app, None, Some(next), 1).await;
        match page.map_err(|error| self.refused(error))?.items.first() {
            Some(found) if found.id == id => Ok(id),
            _ => Err(ServiceError::NotificationNotFound { notification: public.to_string() }),
        }
    }
}

fn seal(identity: &IdentityKey, app: AppKey, sealed: &[u8]) -> [u8; SEAL_BYTES] {
    let mut bytes = b"WatchDeliveries".to_vec();
    bytes.extend(app.0.to_be_bytes());
    bytes.extend(sealed);
    identity.seal(&bytes).to_be_bytes()
}

pub(super) fn issue(identity: &IdentityKey, app: AppKey, position: &WatchPosition) -> String {
    let mut bytes = Vec::with_capacity(SEALED_BYTES + SEAL_BYTES);
    bytes.push(VERSION);
    for number in [position.epoch, position.transaction, position.row] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(position.entry.to_be_bytes());
    bytes.extend(position.at.0.to_be_bytes());
    let seal = seal(identity, app, &bytes);
    bytes.extend(seal);
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A cursor of the right shape, not yet trusted.
pub(super) struct RawCursor {
    sealed: [u8; SEALED_BYTES],
    seal: [u8; SEAL_BYTES],
}

impl RawCursor {
    pub(super) fn read(text: &str) -> Option<Self> {
        if text.len() > MAX_CURSOR_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (sealed, seal) = bytes.split_at_checked(SEALED_BYTES)?;
        let cursor = Self { sealed: sealed.try_into().ok()?, seal: seal.try_into().ok()? };
        (cursor.sealed[0] == VERSION).then_some(cursor)
    }

    pub(super) fn open(&self, identity: &IdentityKey, app: AppKey) -> Result<WatchPosition> {
        if !bool::from(seal(identity, app, &self.sealed).ct_eq(&self.seal)) {
            return Err(ServiceError::CursorForeign);
        }
        let number = |at: usize| {
            let bytes = self.sealed[at..at + 8].try_into().expect("eight bytes");
            i64::from_be_bytes(bytes)
        };
        let entry = self.sealed[25..29].try_into().expect("four bytes");
        Ok(WatchPosition {
            epoch: number(1),
            transaction: number(9),
            row: number(17),
            entry: u32::from_be_bytes(entry),
            at: UnixMs(number(29)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_reads_back_and_no_altered_one_does(
            epoch: i64, transaction: i64, row: i64, entry: u32, at: i64, altered in 1usize..SEALED_BYTES + SEAL_BYTES,
            bit in 0u8..8,
        ) {
            let identity = IdentityKey::new([7; 32]);
            let position = WatchPosition { epoch, transaction, row, entry, at: UnixMs(at) };
            let text = issue(&identity, AppKey(1), &position);
            let cursor = RawCursor::read(&text).expect("our own");
            prop_assert_eq!(cursor.open(&identity, AppKey(1)).expect("ours"), position);
            let foreign = |answer: Result<WatchPosition>| matches!(answer, Err(ServiceError::CursorForeign));
            prop_assert!(foreign(cursor.open(&identity, AppKey(2))), "another app's");
            prop_assert!(foreign(cursor.open(&IdentityKey::new([8; 32]), AppKey(1))), "another installation's");
            let mut bytes = URL_SAFE_NO_PAD.decode(&text).expect("base64");
            bytes[altered] ^= 1 << bit;
            let cursor = RawCursor::read(&URL_SAFE_NO_PAD.encode(bytes)).expect("of the right shape");
            prop_assert!(foreign(cursor.open(&identity, AppKey(1))));
        }

        #[test]
        fn any_text_is_read_without_panic(text: String) {
            if let Some(cursor) = RawCursor::read(&text) {
                let _ = cursor.open(&IdentityKey::new([7; 32]), AppKey(1));
            }
        }
    }

    #[test]
    fn other_shapes_are_no_cursors() {
        let position = WatchPosition::after_transaction(1, 2, UnixMs(3));
        let text = issue(&IdentityKey::new([7; 32]), AppKey(1), &position);
        assert_eq!(text.len(), 60);
        for wrong in
            ["", "!", &text[1..], &text[..59], &format!("{text}A"), &text.replacen('A', "C", 1), &"A".repeat(60)]
        {
            assert!(RawCursor::read(wrong).is_none(), "{wrong}");
        }
    }
}
