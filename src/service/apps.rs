//! The apps as configured: an immutable snapshot that resolves slugs and routes without asking the store. A new
//! configuration is a new snapshot; a call goes on with the app it began with.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::domain::ids::{AppId, AppKey, RouteId};
use crate::domain::platform::{Environment, Platform, Route, RouteSpec};

/// The credential a request means when it names none.
pub const DEFAULT_CREDENTIAL: &str = "default";

/// One app as the composition root tells it.
pub struct AppSetup {
    pub id: AppId,
    pub key: AppKey,
    /// Accept event types that were never declared even though others are.
    pub allow_undeclared_types: bool,
    pub limits: AppLimits,
    pub credentials: Vec<CredentialSetup>,
    /// The stored routes of those credentials: every environment and bundle they may be used with.
    pub routes: Vec<Route>,
}

/// What an app may ask of this server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AppLimits {
    /// Events taken a second, over time; as many may come at once.
    pub max_events_per_second: Option<u32>,
    /// While more deliveries than this are open, no event is taken.
    pub max_open_targets: Option<u64>,
}

pub struct CredentialSetup {
    pub platform: Platform,
    /// `default` when the configuration gives it no name.
    pub name: Arc<str>,
    /// [`Environment::None`] but for APNs.
    pub default_environment: Environment,
    /// APNs: the credential's `topic`. FCM: empty.
    pub default_bundle: Arc<str>,
}

/// One credential and what can be sent through it.
#[derive(Debug)]
pub struct CredentialRoutes {
    pub default_environment: Environment,
    pub default_bundle: Arc<str>,
    pub routes: HashMap<(Environment, Arc<str>), RouteId>,
}

impl CredentialRoutes {
    /// The route for an environment and a bundle, when both are configured.
    #[must_use]
    pub fn route(&self, environment: Environment, bundle: &str) -> Option<RouteId> {
        self.routes.get(&(environment, Arc::from(bundle))).copied()
    }

    /// Whether any route has this bundle.
    #[must_use]
    pub fn has_bundle(&self, bundle: &str) -> bool {
        self.routes.keys().any(|(_, known)| **known == *bundle)
    }
}

#[derive(Debug)]
pub struct App {
    pub key: AppKey,
    pub id: AppId,
    pub allow_undeclared_types: bool,
    pub limits: AppLimits,
    /// By platform, then by name.
    pub credentials: BTreeMap<Platform, BTreeMap<Arc<str>, CredentialRoutes>>,
}

/// All configured apps.
#[derive(Debug)]
pub struct AppDirectory {
    apps: HashMap<String, Arc<App>>,
    routes: HashMap<RouteId, RouteSpec>,
    default_app: Option<AppId>,
}

impl AppDirectory {
    /// `default_app` (`grpc.default_app`) serves requests that name none.
    #[must_use]
    pub fn new(apps: Vec<AppSetup>, default_app: Option<AppId>) -> Self {
        let mut directory = Self { apps: HashMap::new(), routes: HashMap::new(), default_app };
        for setup in apps {
            let mut credentials: BTreeMap<Platform, BTreeMap<Arc<str>, CredentialRoutes>> = BTreeMap::new();
            for credential in setup.credentials {
                let routes = setup
                    .routes
                    .iter()
                    .filter(|route| {
                        route.spec.platform == credential.platform && route.spec.credential == credential.name
                    })
                    .map(|route| ((route.spec.environment, Arc::clone(&route.spec.bundle)), route.id))
                    .collect();
                credentials.entry(credential.platform).or_default().insert(
                    credential.name,
                    CredentialRoutes {
                        default_environment: credential.default_environment,
                        default_bundle: credential.default_bundle,
                        routes,
                    },
                );
            }
            directory.routes.extend(setup.routes.into_iter().map(|route| (route.id, route.spec)));
            let name = setup.id.as_str().to_owned();
            let app = App {
                key: setup.key,
                id: setup.id,
                allow_undeclared_types: setup.allow_undeclared_types,
                limits: setup.limits,
                credentials,
            };
            directory.apps.insert(name, Arc::new(app));
        }
        directory
    }

    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Arc<App>> {
        self.apps.get(id)
    }

    /// The app of requests that name none, as configured.
    #[must_use]
    pub fn default_app(&self) -> Option<&AppId> {
        self.default_app.as_ref()
    }

    #[must_use]
    pub fn route(&self, id: RouteId) -> Option<&RouteSpec> {
        self.routes.get(&id)
    }

    pub fn apps(&self) -> impl Iterator<Item = &App> {
        self.apps.values().map(|app| &**app)
    }

    /// An app by its row's key, when it is configured.
    #[must_use]
    pub fn by_key(&self, key: AppKey) -> Option<&App> {
        self.apps().find(|app| app.key == key)
    }
}
