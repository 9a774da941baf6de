//! From configured apps to routes and the senders that serve them.
//!
//! Nothing here changes what is running: a reload makes everything new first, and a credential that cannot be used
//! leaves the old configuration in force. A credential that is the same as before keeps its sender and its connections.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::Context as _;

use super::senders::{CredentialError, apns_settings, fcm_settings};
use crate::config::{self, ApnsEnvironment, Config, RateLimit};
use crate::delivery::{Pacing, Routing};
use crate::domain::allow::AllowList;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppId, AppKey, Locale};
use crate::domain::pacing::Rate;
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::runtime::Runtime;
use crate::senders::apns::ApnsSender;
use crate::senders::fcm::FcmSender;
use crate::senders::http2::SendingThreads;
use crate::senders::{Registry as Senders, Sender};
use crate::service::{AppLimits, AppSetup, CredentialSetup, Sending};
use crate::storage::Registry;

/// A credential in use.
#[derive(Clone)]
pub struct Credential {
    fingerprint: [u8; 32],
    sender: Arc<dyn Sender>,
}

/// By app, platform and name.
pub type Credentials = BTreeMap<(AppId, Platform, String), Credential>;

/// What [`build`] made.
#[derive(Default)]
pub struct Routed {
    pub apps: Vec<AppSetup>,
    pub routing: Routing,
    /// Of the apps that have one.
    pub default_locales: HashMap<AppKey, Locale>,
    pub credentials: Credentials,
}

impl Routed {
    /// What shows payloads as the engine sends them.
    #[must_use]
    pub fn sending(&self) -> Sending {
        let Routing { senders, without_push_id, .. } = &self.routing;
        Sending { senders: senders.clone(), without_push_id: without_push_id.clone() }
    }
}

/// What senders are made with.
pub struct Workshop<'a> {
    pub runtime: &'a Runtime,
    pub store: &'a dyn Registry,
    pub threads: &'a SendingThreads,
    pub deny: &'a Arc<DenyFeed>,
    /// Credentials in use now.
    pub known: &'a Credentials,
}

/// Credentials that cannot be used, each with its section and why.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct BadCredentials(pub Vec<String>);

/// Makes the apps' and routes' rows where they are missing, and one sender per credential that is not in use yet.
pub async fn build(config: &Config, workshop: &Workshop<'_>) -> anyhow::Result<Routed> {
    let credentials = connect(config, workshop)?;
    let (store, runtime) = (workshop.store, workshop.runtime);
    let mut routed = Routed::default();
    for (id, app) in &config.apps {
        let key = store.ensure_app(id, runtime.now()).await.context("registering an app")?;
        let mut setup = AppSetup {
            id: id.clone(),
            key,
            allow_undeclared_types: app.allow_undeclared_types,
            limits: AppLimits {
                max_events_per_second: app.max_events_per_second,
                max_open_targets: app.max_open_targets,
            },
            credentials: Vec::new(),
            routes: Vec::new(),
        };
        for (name, credential) in &app.apns {
            let sender = &credentials[&(id.clone(), Platform::Apns, name.clone())].sender;
            let specs = apns_specs(key, name, &credential.topics);
            let probes = credential.environment_probes_per_minute;
            let pacing = Pacing { rate: rate(credential.rate), environment_probes_per_minute: probes };
            let before = setup.routes.len();
            add(workshop, &mut routed.routing.senders, &mut setup, specs, sender).await?;
            routed.routing.pacing.extend(setup.routes[before..].iter().map(|route| (route.id, pacing)));
            setup.credentials.push(CredentialSetup {
                platform: Platform::Apns,
                name: name.as_str().into(),
                default_environment: match credential.environment {
                    ApnsEnvironment::Production => Environment::Production,
                    ApnsEnvironment::Sandbox => Environment::Sandbox,
                },
                default_bundle: credential.topics.first().map_or("", String::as_str).into(),
            });
        }
        for (name, credential) in &app.fcm {
            let sender = &credentials[&(id.clone(), Platform::Fcm, name.clone())].sender;
            let pacing = Pacing { rate: rate(credential.rate), environment_probes_per_minute: 0 };
            let before = setup.routes.len();
            add(workshop, &mut routed.routing.senders, &mut setup, vec![fcm_spec(key, name)], sender).await?;
            routed.routing.pacing.extend(setup.routes[before..].iter().map(|route| (route.id, pacing)));
            setup.credentials.push(CredentialSetup {
                platform: Platform::Fcm,
                name: name.as_str().into(),
                default_environment: Environment::None,
                default_bundle: "".into(),
            });
        }
        if let Some(locale) = &app.default_locale {
            routed.default_locales.insert(key, locale.clone());
        }
        if !app.push_id {
            routed.routing.without_push_id.extend(setup.routes.iter().map(|route| route.id));
        }
        if let Some(list) = allow_list(app) {
            routed.routing.allow_lists.insert(key, Arc::new(list));
        }
        routed.apps.push(setup);
    }
    routed.credentials = credentials;
    Ok(routed)
}

/// 0 stands for none.
fn rate(limit: RateLimit) -> Option<Rate> {
    (limit.per_minute > 0).then_some(Rate { per_minute: limit.per_minute, ramp_up: limit.ramp_up })
}

fn allow_list(app: &config::App) -> Option<AllowList> {
    let list = AllowList { users: app.only_users.clone(), labels: app.only_labels.clone() };
    (list != AllowList::default()).then_some(list)
}

/// A sender for every credential, or all that is wrong with them. Reads the credentials' files.
fn connect(config: &Config, workshop: &Workshop<'_>) -> Result<Credentials, BadCredentials> {
    let Workshop { runtime, threads, deny, known, .. } = workshop;
    let (mut credentials, mut wrong) = (Credentials::new(), Vec::new());
    for (id, app) in &config.apps {
        for (name, credential) in &app.apns {
            let place = (id.clone(), Platform::Apns, name.clone());
            let made = apns_settings(credential, &config.delivery).and_then(|settings| {
                let fingerprint = settings.fingerprint();
                let sender = match same(known, &place, fingerprint) {
                    Some(sender) => sender,
                    None => Arc::new(ApnsSender::new(runtime, threads, deny, &settings)?),
                };
                Ok(Credential { fingerprint, sender })
            });
            keep(&mut credentials, &mut wrong, place, made);
        }
        for (name, credential) in &app.fcm {
            let place = (id.clone(), Platform::Fcm, name.clone());
            let made = fcm_settings(credential, &config.delivery).and_then(|settings| {
                let fingerprint = settings.fingerprint();
                let sender = match same(known, &place, fingerprint) {
                    Some(sender) => sender,
                    None => Arc::new(FcmSender::new(runtime, threads, deny, &settings)?),
                };
                Ok(Credential { fingerprint, sender })
            });
            keep(&mut credentials, &mut wrong, place, made);
        }
    }
    if wrong.is_empty() { Ok(credentials) } else { Err(BadCredentials(wrong)) }
}

fn same(known: &Credentials, place: &(AppId, Platform, String), fingerprint: [u8; 32]) -> Option<Arc<dyn Sender>> {
    known.get(place).filter(|known| known.fingerprint == fingerprint).map(|known| Arc::clone(&known.sender))
}

fn keep(
    credentials: &mut Credentials,
    wrong: &mut Vec<String>,
    place: (AppId, Platform, String),
    made: Result<Credential, CredentialError>,
) {
    match made {
        Ok(credential) => {
            credentials.insert(place, credential);
        }
        Err(error) => {
            let (app, platform, name) = &place;
            let error = anyhow::Error::from(error);
            wrong.push(format!("the credential [apps.{app}.{platform}] {name:?}: {error:#}"));
        }
    }
}

async fn add(
    workshop: &Workshop<'_>,
    senders: &mut Senders,
    setup: &mut AppSetup,
    specs: Vec<RouteSpec>,
    sender: &Arc<dyn Sender>,
) -> anyhow::Result<()> {
    let routes = workshop.store.ensure_routes(&specs, workshop.runtime.now()).await.context("registering routes")?;
    for route in routes {
        senders.insert(route.clone(), Arc::clone(sender));
        setup.routes.push(route);
    }
    Ok(())
}

/// Every bundle in both of Apple's environments: a phone says which one its token is for.
fn apns_specs(app: AppKey, credential: &str, topics: &[String]) -> Vec<RouteSpec> {
    let mut specs = Vec::new();
    for bundle in topics {
        for environment in [Environment::Production, Environment::Sandbox] {
            specs.push(RouteSpec {
                app,
                platform: Platform::Apns,
                credential: credential.into(),
                environment,
                bundle: bundle.as_str().into(),
            });
        }
    }
    specs
}

fn fcm_spec(app: AppKey, credential: &str) -> RouteSpec {
    RouteSpec {
        app,
        platform: Platform::Fcm,
        credential: credential.into(),
        environment: Environment::None,
        bundle: "".into(),
    }
}
