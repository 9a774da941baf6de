//! Who of a job may be sent to now, by what the store says.

use std::sync::Arc;

use crate::delivery::flight::Flight;
use crate::delivery::holds;
use crate::domain::consent::{self, DeviceFacts};
use crate::domain::notification::{Notification, TargetFacts};
use crate::domain::outcome::ResultCode;
use crate::planted;
use crate::render::Templates;
use crate::storage::{GateFacts, GateQuestion, StoreError};

use super::{Aim, Known, Worker};

impl Worker {
    /// Templates and facts of each flight; of each target also the name and labels where there is an allow-list.
    pub(super) async fn ask_gates(
        &self,
        questions: Vec<GateQuestion>,
        notifications: Vec<Arc<Notification>>,
    ) -> Result<(Vec<Option<Arc<Templates>>>, Vec<(GateFacts, Known)>), StoreError> {
        let mut templates = Vec::with_capacity(notifications.len());
        for notification in notifications {
            templates.push(self.templates(&notification).await?);
        }
        let has_list = self.shared.table().allow_lists.contains_key(&self.lanes.route.spec.app);
        let mut known = Vec::with_capacity(questions.len());
        for asked in &questions {
            known.push(if has_list { Some(self.shared.store.names_and_labels(&asked.targets).await?) } else { None });
        }
        let facts = self.shared.store.gates(questions).await?;
        Ok((templates, facts.into_iter().zip(known).collect()))
    }

    /// Ends what the gate forbids; the rest with what sending needs.
    pub(super) fn gate(
        &self,
        mut flight: Flight,
        pending: Vec<u32>,
        (read, known): (GateFacts, Known),
    ) -> (Flight, Vec<(u32, TargetFacts)>) {
        let shared = &self.shared;
        let table = shared.table();
        let allow_list = table.allow_lists.get(&flight.notification.app);
        let known = known.unwrap_or_default();
        let mut rules = flight.notification.rules();
        rules.cancelled |= read.cancelled;
        let (now, instant) = (shared.runtime.now(), shared.runtime.instant());
        let mut allowed = Vec::with_capacity(pending.len());
        for (at, (index, facts)) in pending.into_iter().zip(read.facts).enumerate() {
            let Some(facts) = facts else {
                flight.conclude(index, ResultCode::DeviceRetired, instant);
                continue;
            };
            let device = DeviceFacts {
                state: facts.state,
                route: facts.route,
                route_known: table.routes.contains_key(&facts.route),
                allowed_here: allow_list.is_none_or(|list| {
                    let known = known.get(at).and_then(Option::as_ref);
                    known.is_some_and(|(user, labels)| list.allows(user, labels))
                }),
                choice: facts.device_choice,
            };
            let verdict = consent::gates(&rules, facts.target.user, facts.user_choice, &device, now);
            match verdict.filter(|_| !planted::is("gate-not-asked-before-sending")) {
                Some(code) => flight.conclude(index, code, instant),
                // It registered through another one since; what would go out here is not for this platform's ears.
                None if facts.route != self.route => flight.forward(index, facts.route, now, instant),
                None => allowed.push((index, facts)),
            }
        }
        (flight, allowed)
    }

    /// Whether an operator or a fault holds it: then all of it goes back to the queue.
    pub(super) fn hold(&mut self, flight: &mut Flight) -> bool {
        let spec = &self.lanes.route.spec;
        let now = self.shared.runtime.now();
        if flight.notification.expires_at <= now {
            // It waits for nothing: the gate ends it.
            return false;
        }
        if flight.job.attempt > 0 && planted::is("pause-forgets-retries") {
            return false;
        }
        let pauses = self.shared.holds.now();
        let since = match pauses.of(spec.app, spec.platform, &flight.notification.event_type) {
            Some(pause) => pause.since,
            None if self.aim == Aim::Look => {
                let Some(paused) = self.lanes.paused() else { return false };
                self.put_off = true;
                paused.since
            }
            None => return false,
        };
        flight.hold(holds::until(since, now));
        true
    }
}
