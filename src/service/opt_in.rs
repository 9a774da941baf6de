//! SetOptIn, ListOptIns.

use crate::domain::ids::EventType;
use crate::domain::time::UnixMs;
use crate::storage::{NewOptIn, OptIn};

use super::{Call, Result, Service, fields};

/// `source` and `policy_version`, in bytes.
pub const MAX_SOURCE_BYTES: usize = 256;
/// The caller's own proof, in bytes.
pub const MAX_EVIDENCE_BYTES: usize = 4096;

/// Texts as they arrived; empty means absent, but for `event_type`.
pub struct SetOptIn {
    pub user_id: String,
    /// `None`: the master switch. Present and empty is wrong: a forgotten value must not turn everything on or off.
    pub event_type: Option<String>,
    pub device_id: String,
    pub opted_in: Option<bool>,
    pub source: String,
    pub policy_version: String,
    pub evidence: String,
    pub observed_at: Option<UnixMs>,
}

impl Service {
    /// The choice that stands afterwards, and whether it is this one.
    pub async fn set_opt_in(&self, call: Call<'_>, input: SetOptIn) -> Result<(OptIn, bool)> {
        let now = self.runtime.now();
        let choice = choice(call, input, now)?;
        self.store.set_opt_in(choice, now).await.map_err(|error| self.refused(error))
    }

    pub async fn list_opt_ins(&self, mut call: Call<'_>, user_id: &str) -> Result<Vec<OptIn>> {
        let user = fields::user_id(&mut call.violations, user_id);
        let app = call.checked()?;
        let user = user.expect("a missing user is a violation");
        self.store.list_opt_ins(app.key, &user).await.map_err(|error| self.refused(error))
    }
}

/// Everything that can be said of a choice without the store.
pub(super) fn choice(mut call: Call<'_>, input: SetOptIn, now: UnixMs) -> Result<NewOptIn> {
    let caller = call.caller.map(str::to_owned);
    let violations = &mut call.violations;
    let user = fields::user_id(violations, &input.user_id);
    let event_type = input.event_type.as_deref().and_then(|name| violations.take(EventType::parse("event_type", name)));
    let device = fields::optional_device(violations, &input.device_id);
    if input.opted_in.is_none() {
        violations.add("opted_in", "is required");
    }
    let source = fields::optional_line(violations, "source", input.source, MAX_SOURCE_BYTES);
    let policy_version = fields::optional_line(violations, "policy_version", input.policy_version, MAX_SOURCE_BYTES);
    let evidence = fields::optional_text(violations, "evidence", input.evidence, MAX_EVIDENCE_BYTES);
    let observed_at = fields::observed_at(violations, input.observed_at, now);
    let app = call.checked()?;
    Ok(NewOptIn {
        app: app.key,
        user: user.expect("a missing user is a violation"),
        event_type,
        device,
        opted_in: input.opted_in.expect("a missing choice is a violation"),
        observed_at,
        caller,
        source,
        policy_version,
        evidence,
    })
}
