//! Every use case up to the store, for [`crate::fuzzing`].

use crate::domain::device::Registration;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppKey, TypeVersionId};
use crate::domain::notification::NewEvent;
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::render::Templates;
use crate::storage::{NewOptIn, NewSubscription};

use super::devices::{self, RegisterDevice};
use super::events::{self, NotifyEvent};
use super::opt_in::{self, SetOptIn};
use super::subscriptions::{self, SetSubscription};
use super::{Call, Result, watch};

/// `declared`: the type, where it is.
pub fn event(call: Call<'_>, input: NotifyEvent, declared: Option<&Templates>, now: UnixMs) -> Result<NewEvent> {
    let (_, mut event, given) = events::check(call, input, now)?;
    events::complete(&mut event, &given, declared.map(|templates| (TypeVersionId(1), templates)), now)?;
    Ok(event)
}

pub fn registration(call: Call<'_>, input: RegisterDevice, now: UnixMs) -> Result<Registration> {
    devices::registration(call, input, now)
}

pub fn choice(call: Call<'_>, input: SetOptIn, now: UnixMs) -> Result<NewOptIn> {
    opt_in::choice(call, input, now)
}

pub fn subscription(call: Call<'_>, input: &SetSubscription, now: UnixMs) -> Result<NewSubscription> {
    subscriptions::subscription(call, input, now)
}

#[must_use]
pub fn issue_cursor(identity: &IdentityKey, app: AppKey, position: &WatchPosition) -> String {
    watch::issue(identity, app, position)
}

/// `None`: not of a cursor's shape. `Err`: not of this installation and app.
pub fn read_cursor(identity: &IdentityKey, app: AppKey, text: &str) -> Option<Result<WatchPosition>> {
    watch::RawCursor::read(text).map(|cursor| cursor.open(identity, app))
}
