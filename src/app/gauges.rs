//! Gauges that only the composition root can set: what the platforms say of each credential, how long certificates still
//! hold, and how many tasks each kind of runtime has. Set right before each scrape.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use metrics::gauge;
use tokio::runtime::Handle;

use super::certificate;
use crate::admin::Collector;
use crate::config::{ApnsAuth, Config};
use crate::delivery::RouteStates;
use crate::domain::ids::RouteId;
use crate::domain::platform::Platform;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::service::AppSetup;
use crate::telemetry::names;

const MS_PER_DAY: f64 = 86_400_000.0;

/// One credential as the labels name it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Name {
    app: String,
    platform: Platform,
    credential: String,
}

/// Which routes use a credential, and when its certificate ends.
struct Known {
    name: Name,
    routes: Vec<RouteId>,
    not_after: Option<UnixMs>,
}

pub struct CredentialGauges {
    states: RouteStates,
    runtime: Runtime,
    known: Mutex<Vec<Known>>,
}

impl CredentialGauges {
    #[must_use]
    pub fn new(states: RouteStates, runtime: Runtime) -> Arc<Self> {
        Arc::new(Self { states, runtime, known: Mutex::default() })
    }

    /// What to show from now on. Credentials that are not among it any more are shown as in order and without days, for
    /// a gauge once set cannot be taken back.
    pub fn set(&self, config: &Config, apps: &[AppSetup]) {
        let mut now_known = Vec::new();
        for app in apps {
            let names: BTreeSet<Name> = app
                .routes
                .iter()
                .map(|route| Name {
                    app: app.id.to_string(),
                    platform: route.spec.platform,
                    credential: route.spec.credential.to_string(),
                })
                .collect();
            for name in names {
                let serves = |spec: &crate::domain::platform::RouteSpec| {
                    spec.platform == name.platform && *spec.credential == *name.credential
                };
                let routes = app.routes.iter().filter(|route| serves(&route.spec)).map(|route| route.id).collect();
                let configured = config.apps.get(&app.id).filter(|_| name.platform == Platform::Apns);
                let auth = configured.and_then(|app| app.apns.get(name.credential.as_str()));
                let not_after = auth.and_then(|credential| certificate_end(&credential.auth));
                now_known.push(Known { name, routes, not_after });
            }
        }
        let mut known = self.known.lock().expect("no panic while held");
        for gone in known.iter().filter(|old| now_known.iter().all(|new| new.name != old.name)) {
            show(&gone.name, true, gone.not_after.map(|_| f64::INFINITY));
        }
        *known = now_known;
    }
}

/// The end of the leaf's validity; `None` for a signing key, or a file that cannot be read any more.
fn certificate_end(auth: &ApnsAuth) -> Option<UnixMs> {
    let ApnsAuth::Certificate { cert_file, .. } = auth else { return None };
    let chain = certificate::parse_chain(&std::fs::read(cert_file).ok()?).ok()?;
    certificate::validity(chain.first()?).map(|validity| validity.not_after)
}

#[async_trait::async_trait]
impl Collector for CredentialGauges {
    async fn collect(&self) {
        let now = self.runtime.now();
        for known in self.known.lock().expect("no panic while held").iter() {
            let works = !known.routes.iter().any(|route| self.states.is_paused(*route));
            #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
            let days = known.not_after.map(|end| (end.0 - now.0) as f64 / MS_PER_DAY);
            show(&known.name, works, days);
        }
    }
}

/// Tasks that have not ended: a leak of them shows long before memory does.
pub struct TaskGauges {
    /// By the word that the label says.
    pub runtimes: [(&'static str, Vec<Handle>); 3],
}

#[async_trait::async_trait]
impl Collector for TaskGauges {
    async fn collect(&self) {
        for (name, handles) in &self.runtimes {
            let alive: usize = handles.iter().map(|handle| handle.metrics().num_alive_tasks()).sum();
            #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
            gauge!(names::TASKS, "runtime" => *name).set(alive as f64);
        }
    }
}

fn show(Name { app, platform, credential }: &Name, works: bool, days_left: Option<f64>) {
    let labels = [("app", app.clone()), ("platform", platform.name().to_owned()), ("credential", credential.clone())];
    gauge!(names::PROVIDER_UP, &labels).set(f64::from(u8::from(works)));
    if let Some(days) = days_left {
        let labels = [("app", app.clone()), ("credential", credential.clone())];
        gauge!(names::CERTIFICATE_DAYS_LEFT, &labels).set(days);
    }
}
