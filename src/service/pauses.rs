//! Pausing and resuming delivery: what is held waits until it is resumed or its time to live ends.

use std::sync::Arc;

use crate::domain::ids::{AppId, EventType};
use crate::domain::pause::{MAX_REASON_BYTES, Pause, PauseScope};
use crate::domain::platform::Platform;
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;

use super::apps::App;
use super::{Call, Result, Service, ServiceError, fields};

/// What to hold of an app, or of all of them.
#[derive(Clone, Default)]
pub struct PauseDelivery {
    /// Empty: whatever the type.
    pub event_type: String,
    /// `None`: on every platform.
    pub platform: Option<Platform>,
    /// For whoever lists the pauses; may be empty.
    pub reason: String,
}

/// A pause in the caller's own names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PauseView {
    /// `None`: of all apps. An app that is configured no more has no name here.
    pub app: Option<AppId>,
    pub all_apps: bool,
    pub platform: Option<Platform>,
    pub event_type: Option<EventType>,
    pub reason: String,
    pub since: UnixMs,
}

impl Service {
    /// Whether it was not held before.
    pub async fn pause_delivery(&self, mut call: Call<'_>, input: PauseDelivery) -> Result<bool> {
        let (event_type, reason) = check(&mut call.violations, &input, true);
        let app = call.checked()?;
        self.pause(PauseScope { app: Some(app.key), platform: input.platform, event_type }, reason).await
    }

    /// As [`Service::pause_delivery`], for every app there is and will be. The caller has been checked for that.
    pub async fn pause_everywhere(&self, mut violations: Violations, input: PauseDelivery) -> Result<bool> {
        let (_, reason) = check(&mut violations, &input, false);
        violations.finish().map_err(ServiceError::Invalid)?;
        self.pause(PauseScope { app: None, platform: input.platform, event_type: None }, reason).await
    }

    /// Ends exactly the pause of this scope; others that hold the same go on. Whether there was one.
    pub async fn resume_delivery(&self, mut call: Call<'_>, input: PauseDelivery) -> Result<bool> {
        let (event_type, _) = check(&mut call.violations, &input, true);
        let app = call.checked()?;
        self.resume(PauseScope { app: Some(app.key), platform: input.platform, event_type }).await
    }

    /// As [`Service::resume_delivery`], for all apps.
    pub async fn resume_everywhere(&self, mut violations: Violations, input: PauseDelivery) -> Result<bool> {
        check(&mut violations, &input, false);
        violations.finish().map_err(ServiceError::Invalid)?;
        self.resume(PauseScope { app: None, platform: input.platform, event_type: None }).await
    }

    /// What holds anything of the app.
    pub async fn list_pauses(&self, call: Call<'_>) -> Result<Vec<PauseView>> {
        let app: Arc<App> = call.checked()?;
        let mut pauses = self.read_pauses().await?;
        pauses.retain(|pause| pause.scope.app.is_none_or(|held| held == app.key));
        Ok(self.show(pauses))
    }

    /// All there are. The caller has been checked for that.
    pub async fn list_all_pauses(&self) -> Result<Vec<PauseView>> {
        let pauses = self.read_pauses().await?;
        Ok(self.show(pauses))
    }

    async fn pause(&self, scope: PauseScope, reason: String) -> Result<bool> {
        let pause = Pause { scope, since: self.runtime.now(), reason };
        let paused = self.store.pause(pause).await.map_err(|error| self.refused(error))?;
        self.hand_off.pauses_changed();
        Ok(paused)
    }

    async fn resume(&self, scope: PauseScope) -> Result<bool> {
        let resumed = self.store.resume(&scope).await.map_err(|error| self.refused(error))?;
        self.hand_off.pauses_changed();
        Ok(resumed)
    }

    pub(super) async fn read_pauses(&self) -> Result<Vec<Pause>> {
        self.store.pauses().await.map_err(|error| self.refused(error))
    }

    fn show(&self, pauses: Vec<Pause>) -> Vec<PauseView> {
        let apps = self.apps();
        let show = |Pause { scope, since, reason }: Pause| PauseView {
            app: scope.app.and_then(|key| apps.by_key(key)).map(|app| app.id.clone()),
            all_apps: scope.app.is_none(),
            platform: scope.platform,
            event_type: scope.event_type,
            reason,
            since,
        };
        pauses.into_iter().map(show).collect()
    }
}

fn check(violations: &mut Violations, input: &PauseDelivery, of_an_app: bool) -> (Option<EventType>, String) {
    let event_type = if input.event_type.is_empty() {
        None
    } else if of_an_app {
        violations.take(EventType::parse("event_type", &input.event_type))
    } else {
        violations.add("event_type", "belongs to an app; leave out all_apps");
        None
    };
    let reason = fields::optional_line(violations, "reason", input.reason.clone(), MAX_REASON_BYTES);
    (event_type, reason.unwrap_or_default())
}
