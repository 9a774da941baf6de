//! What a platform's answers say beyond the delivery they are about: of the credential, the route, the device.

use std::sync::Arc;
use std::time::Duration;

use super::credential::Credential;
use super::flight::Flight;
use super::guard::Judgement;
use super::metrics;
use super::route_state::RouteState;
use super::shared::{RouteLanes, Shared};
use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Instant;
use crate::storage::TroubleCause;

/// One turn's look at the answers of one flight.
pub struct Learner<'a> {
    pub shared: &'a Shared,
    pub lanes: &'a RouteLanes,
    /// Credentials whose rates are to be lowered.
    pub slowing: &'a mut Vec<Arc<Credential>>,
    pub now: UnixMs,
    pub instant: Instant,
}

impl Learner<'_> {
    pub fn learn(&mut self, flight: &mut Flight, results: Vec<(u32, SendOutcome)>) {
        // Of the other environment nothing is learned but where the token belongs.
        if flight.probing().is_some() {
            for (index, outcome) in results {
                flight.answer(index, outcome, self.now, self.instant);
            }
            return;
        }
        let (mut alive, mut attempts, mut broke) = (0, false, false);
        for (index, outcome) in results {
            attempts |= outcome.is_attempt();
            let outcome = match outcome {
                SendOutcome::TokenGone { since, elsewhere, answer } => {
                    let Some(answer) = self.dead_token(flight, index, elsewhere, answer) else { continue };
                    match answer {
                        Ok(answer) => SendOutcome::TokenGone { since, elsewhere, answer },
                        Err(held) => {
                            broke = true;
                            held
                        }
                    }
                }
                SendOutcome::SenderBroken { scope, answer } => {
                    broke |= scope != FaultScope::Target;
                    self.fault(scope, &answer);
                    SendOutcome::SenderBroken { scope, answer }
                }
                SendOutcome::RetryLater { cause, after, answer } => {
                    self.complaint(flight, index, cause, after);
                    SendOutcome::RetryLater { cause, after, answer }
                }
                other => {
                    alive += usize::from(matches!(other, SendOutcome::Sent { .. } | SendOutcome::Rejected { .. }));
                    other
                }
            };
            flight.answer(index, outcome, self.now, self.instant);
        }
        let route = self.lanes.route.id;
        self.shared.guard.answered(route, alive, self.instant);
        let succeeded = flight.take_success();
        if !self.lanes.is_broken() || broke {
            return;
        }
        if succeeded {
            self.works();
        } else if attempts {
            // It said nothing about what was asked: the next may ask.
            self.lanes.end_probe();
        }
    }

    /// `None`: it is asked about elsewhere. `Err`: so many die that this one is not retired.
    fn dead_token(
        &mut self,
        flight: &mut Flight,
        index: u32,
        elsewhere: bool,
        answer: ProviderAnswer,
    ) -> Option<Result<ProviderAnswer, SendOutcome>> {
        let (shared, route) = (self.shared, self.lanes.route.id);
        let judgement = shared.guard.judge(shared.settings.retirement_guard, route, &answer.to_string(), self.instant);
        if let Judgement::Hold(words) = judgement {
            metrics::retirement_held(self.lanes.route.spec.platform);
            if self.lanes.state.broke(TroubleCause::Tokens, &words, self.instant, self.now) {
                self.tell(FaultScope::Route, &words, "so many tokens are called dead that none is retired any more");
            }
            return Some(Err(SendOutcome::SenderBroken { scope: FaultScope::Route, answer }));
        }
        if !elsewhere || planted::is("environment-never-probed") || shared.guard.is_lifted(route, self.instant) {
            return Some(Ok(answer));
        }
        let Some(other) = shared.other_environment(&self.lanes.route.spec) else { return Some(Ok(answer)) };
        let device = flight.job.targets[index as usize].device;
        match self.lanes.credential.probe_in(device, self.instant) {
            None => Some(Ok(answer)),
            Some(Duration::ZERO) => {
                flight.look_elsewhere(index, other);
                None
            }
            Some(wait) => {
                flight.look_elsewhere_later(index, self.now.plus(wait), answer, self.now, self.instant);
                None
            }
        }
    }

    fn fault(&mut self, scope: FaultScope, answer: &ProviderAnswer) {
        let words = answer.to_string();
        let (lanes, cause) = (self.lanes, TroubleCause::Configuration);
        match scope {
            FaultScope::Credential => {
                if lanes.credential.state.broke(cause, &words, self.instant, self.now) {
                    self.tell(scope, &words, "the platform refuses the credential; its deliveries wait");
                }
            }
            FaultScope::Route => {
                if lanes.state.broke(cause, &words, self.instant, self.now) {
                    self.tell(
                        scope,
                        &words,
                        "the platform refuses this topic or environment; the route's deliveries wait",
                    );
                }
            }
            FaultScope::Target => {
                metrics::unreachable_target(lanes.route.spec.platform);
                if lanes.credential.tells(self.now) {
                    self.tell(
                        scope,
                        &words,
                        "some devices cannot be reached for a fault in the platform's configuration",
                    );
                }
            }
        }
    }

    fn tell(&self, scope: FaultScope, answer: &str, what: &str) {
        let spec = &self.lanes.route.spec;
        tracing::error!(route_id = %self.lanes.route.id, platform = %spec.platform, credential = %spec.credential,
            scope = ?scope, answer, "{what}");
        self.shared.troubled.notify_one();
    }

    fn complaint(&mut self, flight: &mut Flight, index: u32, cause: RetryCause, after: Option<Duration>) {
        let credential = &self.lanes.credential;
        let hold = after.unwrap_or(self.shared.settings.retry(self.lanes.route.spec.platform).throttled_floor);
        let whole = match cause {
            RetryCause::Transport | RetryCause::ServerError => false,
            RetryCause::DeviceThrottled => {
                let until = self.now.plus(hold);
                let device = flight.leave_alone(index, until);
                self.shared.quiet.add(device, until);
                planted::is("one-device-holds-all")
            }
            RetryCause::Throttled => credential.unclear(self.instant),
            RetryCause::ProviderThrottled => true,
        };
        if whole && credential.slowed(hold, self.instant) {
            tracing::warn!(platform = %credential.key.platform, credential = %credential.key.name,
                hold_secs = hold.as_secs(), "the platform asks to slow down; everything through this credential waits");
            self.slowing.push(Arc::clone(credential));
        }
    }

    fn works(&self) {
        let lanes = self.lanes;
        // What was under way when a pause began says nothing about its end.
        let ends = |state: &RouteState| state.paused_until(self.instant).is_none() && state.works();
        let (credential, route) = (ends(&lanes.credential.state), ends(&lanes.state));
        if route {
            lanes.wake();
        }
        if credential {
            self.shared.wake_credential(&lanes.credential);
        }
        if credential || route {
            let spec = &lanes.route.spec;
            tracing::info!(route_id = %lanes.route.id, platform = %spec.platform, credential = %spec.credential,
                "the platform takes pushes again");
            self.shared.troubled.notify_one();
        }
    }
}
