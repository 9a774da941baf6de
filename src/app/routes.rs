//! From configured apps to routes and the senders that serve them.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Context as _;

use super::senders::{apns_settings, fcm_settings};
use crate::config::{ApnsEnvironment, Config};
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, Locale, RouteId};
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::runtime::Runtime;
use crate::senders::apns::ApnsSender;
use crate::senders::fcm::FcmSender;
use crate::senders::http2::SendingThreads;
use crate::senders::{Registry as Senders, Sender};
use crate::service::{AppSetup, CredentialSetup};
use crate::storage::Registry;

/// What [`build`] made.
pub struct Routed {
    pub apps: Vec<AppSetup>,
    pub senders: Senders,
    /// Routes of apps with `push_id = false`.
    pub without_push_id: Vec<RouteId>,
    /// Of the apps that have one.
    pub default_locales: HashMap<AppKey, Locale>,
}

/// Makes the apps' and routes' rows where they are missing, and one sender per credential.
pub async fn build(
    runtime: &Runtime,
    config: &Config,
    store: &dyn Registry,
    threads: &SendingThreads,
    deny: &Arc<DenyFeed>,
) -> anyhow::Result<Routed> {
    let mut routed = Routed {
        apps: Vec::new(),
        senders: Senders::default(),
        without_push_id: Vec::new(),
        default_locales: HashMap::new(),
    };
    for (id, app) in &config.apps {
        let key = store.ensure_app(id, runtime.now()).await.context("registering an app")?;
        let mut setup = AppSetup {
            id: id.clone(),
            key,
            allow_undeclared_types: app.allow_undeclared_types,
            credentials: Vec::new(),
            routes: Vec::new(),
        };
        for (name, credential) in &app.apns {
            let context = || format!("the credential [apps.{id}.apns] {name:?}");
            let settings = apns_settings(credential, &config.delivery).with_context(context)?;
            let sender = ApnsSender::new(runtime, threads, deny, &settings).with_context(context)?;
            let specs = apns_specs(key, name, &credential.topics);
            add(store, runtime, &mut routed, &mut setup, specs, Arc::new(sender)).await?;
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
            let context = || format!("the credential [apps.{id}.fcm] {name:?}");
            let settings = fcm_settings(credential, &config.delivery).with_context(context)?;
            let sender = FcmSender::new(runtime, threads, deny, &settings).with_context(context)?;
            add(store, runtime, &mut routed, &mut setup, vec![fcm_spec(key, name)], Arc::new(sender)).await?;
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
            routed.without_push_id.extend(setup.routes.iter().map(|route| route.id));
        }
        routed.apps.push(setup);
    }
    Ok(routed)
}

async fn add(
    store: &dyn Registry,
    runtime: &Runtime,
    routed: &mut Routed,
    setup: &mut AppSetup,
    specs: Vec<RouteSpec>,
    sender: Arc<dyn Sender>,
) -> anyhow::Result<()> {
    for route in store.ensure_routes(&specs, runtime.now()).await.context("registering routes")? {
        routed.senders.insert(route.clone(), Arc::clone(&sender));
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
