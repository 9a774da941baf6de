//! A server on port 0 with two apps, `pets` (APNs and FCM) and `shop` (FCM), and clients for it.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};

use prost_types::{Struct, Value, value::Kind};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::api::auth::{ApiKey, BoundApps, KeyRing};
use crate::api::limits::ServerLimits;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::{self, Content, NotifyEventRequest, RegisterDeviceRequest, SetOptInRequest};
use crate::api::scopes::{Scope, Scopes};
use crate::api::server::{Server, ServerError};
use crate::api::tls::TlsSetup;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppId, RouteId};
use crate::domain::notification::{HandOff, HandedOver, NoHandOff, Permit};
use crate::domain::platform::{Environment, Lane, Platform, RouteSpec};
use crate::runtime::Runtime;
use crate::service::{AppDirectory, AppLimits, AppSetup, CredentialSetup, Service};
use crate::storage::sqlite::{Settings, SqliteStore, Synchronous};
use crate::storage::{Registry as _, Store};

pub type Client = PushServiceClient<InterceptedService<Channel, Bearer>>;

/// Adds the key, where there is one.
#[derive(Clone)]
pub struct Bearer(Option<String>);

impl Bearer {
    pub fn key(key: &str) -> Self {
        Self(Some(key.to_owned()))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            let value = MetadataValue::try_from(format!("Bearer {key}")).expect("ASCII");
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

pub struct Setup {
    pub keys: Vec<ApiKey>,
    pub limits: ServerLimits,
    pub default_app: Option<&'static str>,
    pub hand_off: Arc<dyn HandOff>,
    pub tls: Option<TlsSetup>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            limits: ServerLimits::default(),
            default_app: None,
            hand_off: Arc::new(NoHandOff),
            tls: None,
        }
    }
}

pub struct TestServer {
    pub address: SocketAddr,
    pub server: Arc<Server>,
    service: Arc<Service>,
    pub keys: Arc<KeyRing>,
    pub store: Arc<SqliteStore>,
    pub shutdown: CancellationToken,
    pub runtime: Runtime,
    serving: JoinHandle<Result<(), ServerError>>,
    directory: TempDir,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    pub async fn with(setup: Setup) -> Self {
        let runtime = Runtime::production();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut settings = Settings::file(directory.path().join("nudged.db"));
        settings.synchronous = Synchronous::Normal;
        let store = SqliteStore::open(runtime.clone(), &settings, Arc::new(DenyFeed::default())).expect("a database");
        let store = Arc::new(store);
        let apps = vec![pets(&store, &runtime).await, shop(&store, &runtime).await];
        let directory_of_apps = AppDirectory::new(apps, setup.default_app.map(AppId::trusted));
        let service = Service::new(
            Arc::clone(&store) as Arc<dyn Store>,
            Arc::new(directory_of_apps),
            setup.hand_off,
            runtime.clone(),
        );
        let keys = Arc::new(KeyRing::new(setup.keys));
        let service = Arc::new(service);
        let mut server = Server::new(Arc::clone(&service), Arc::clone(&keys), setup.limits, runtime.clone());
        if let Some(tls) = setup.tls {
            server = server.with_tls(&tls).expect("good certificates");
        }
        let server = Arc::new(server);
        server.health().set_serving(true).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shutdown = CancellationToken::new();
        let serving = runtime.spawn({
            let (server, shutdown) = (Arc::clone(&server), shutdown.clone());
            async move { server.serve(listener, shutdown).await }
        });
        Self { address, server, service, keys, store, shutdown, runtime, serving, directory }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("an address");
        endpoint.connect().await.expect("a connection")
    }

    pub async fn client(&self) -> Client {
        PushServiceClient::with_interceptor(self.channel().await, Bearer(None))
    }

    pub async fn client_with(&self, key: &str) -> Client {
        PushServiceClient::with_interceptor(self.channel().await, Bearer(Some(key.to_owned())))
    }

    /// The database's file.
    pub fn database(&self) -> std::path::PathBuf {
        self.directory.path().join("nudged.db")
    }

    /// What another server over the same store would be made of.
    pub fn parts(&self) -> (Arc<Service>, Arc<KeyRing>, ServerLimits, Runtime) {
        (Arc::clone(&self.service), Arc::clone(&self.keys), ServerLimits::default(), self.runtime.clone())
    }

    /// Shuts down in order and hands back what serving came to.
    pub async fn stop(self) -> Result<(), ServerError> {
        self.shutdown.cancel();
        self.serving.await.expect("no panic")
    }
}

async fn pets(store: &SqliteStore, runtime: &Runtime) -> AppSetup {
    let id = AppId::trusted("pets");
    let key = store.ensure_app(&id, runtime.now()).await.expect("an app");
    let apns = |environment, bundle: &str| RouteSpec {
        app: key,
        platform: Platform::Apns,
        credential: Arc::from("default"),
        environment,
        bundle: Arc::from(bundle),
    };
    let specs = [
        apns(Environment::Production, "com.example.pets"),
        apns(Environment::Sandbox, "com.example.pets"),
        apns(Environment::Production, "com.example.pets.beta"),
        RouteSpec {
            app: key,
            platform: Platform::Fcm,
            credential: Arc::from("default"),
            environment: Environment::None,
            bundle: Arc::from(""),
        },
    ];
    let routes = store.ensure_routes(&specs, runtime.now()).await.expect("routes");
    let credential = |platform, default_environment, default_bundle: &str| CredentialSetup {
        platform,
        name: Arc::from("default"),
        default_environment,
        default_bundle: Arc::from(default_bundle),
    };
    let credentials = vec![
        credential(Platform::Apns, Environment::Production, "com.example.pets"),
        credential(Platform::Fcm, Environment::None, ""),
    ];
    AppSetup { id, key, allow_undeclared_types: false, limits: AppLimits::default(), credentials, routes }
}

async fn shop(store: &SqliteStore, runtime: &Runtime) -> AppSetup {
    let id = AppId::trusted("shop");
    let key = store.ensure_app(&id, runtime.now()).await.expect("an app");
    let spec = RouteSpec {
        app: key,
        platform: Platform::Fcm,
        credential: Arc::from("default"),
        environment: Environment::None,
        bundle: Arc::from(""),
    };
    let routes = store.ensure_routes(&[spec], runtime.now()).await.expect("routes");
    let credentials = vec![CredentialSetup {
        platform: Platform::Fcm,
        name: Arc::from("default"),
        default_environment: Environment::None,
        default_bundle: Arc::from(""),
    }];
    AppSetup { id, key, allow_undeclared_types: false, limits: AppLimits::default(), credentials, routes }
}

/// A key whose text is `nk_<name>`.
pub fn key(name: &str, apps: &[&str], scopes: &[Scope]) -> ApiKey {
    ApiKey {
        name: Arc::from(name),
        sha256: Some(Sha256::digest(format!("nk_{name}")).into()),
        client_cert_sha256: None,
        apps: BoundApps::Only(apps.iter().map(|app| AppId::trusted(app)).collect()),
        scopes: scopes.iter().copied().collect(),
        expires_at: None,
    }
}

/// A key that may do everything in every app.
pub fn root_key(name: &str) -> ApiKey {
    ApiKey { apps: BoundApps::All, scopes: Scopes::all(), ..key(name, &[], &[]) }
}

/// Blocks the store inside its transaction until let go: a stalled database. Asked for every job of an accepted event,
/// so there must be a device to send to.
#[derive(Default)]
pub struct Stall {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Stall {
    pub fn let_go(&self) {
        *self.open.lock().expect("no panic while held") = true;
        self.changed.notify_all();
    }
}

impl HandOff for Stall {
    fn try_permit(&self, _: RouteId, _: Lane, _: usize) -> Option<Permit> {
        let mut open = self.open.lock().expect("no panic while held");
        while !*open {
            open = self.changed.wait(open).expect("no panic while held");
        }
        None
    }
    fn deliver(&self, _: HandedOver) {}
    fn wake_jobs(&self, _: RouteId, _: Lane) {}
    fn wake_fanout(&self) {}
}

pub fn phone(user: &str, token: &str) -> RegisterDeviceRequest {
    RegisterDeviceRequest {
        app_id: "pets".to_owned(),
        user_id: user.to_owned(),
        platform: proto::device::Platform::Fcm.into(),
        token: token.to_owned(),
        ..RegisterDeviceRequest::default()
    }
}

pub fn choice(user: &str, opted_in: bool) -> SetOptInRequest {
    SetOptInRequest {
        app_id: "pets".to_owned(),
        user_id: user.to_owned(),
        opted_in: Some(opted_in),
        ..SetOptInRequest::default()
    }
}

pub fn comment(users: &[&str]) -> NotifyEventRequest {
    NotifyEventRequest {
        app_id: "pets".to_owned(),
        event_type: "comment.created".to_owned(),
        user_ids: users.iter().map(|user| (*user).to_owned()).collect(),
        content: Some(Content { title: Some("새 댓글".to_owned()), ..Content::default() }),
        data: Some(Struct {
            fields: [("post".to_owned(), Value { kind: Some(Kind::NumberValue(42.0)) })].into_iter().collect(),
        }),
        ..NotifyEventRequest::default()
    }
}

/// Registers a phone for `user` and opts them in.
pub async fn enrol(client: &mut Client, user: &str) -> String {
    let registered = client.register_device(phone(user, &format!("token-of-{user}"))).await.expect("registered");
    client.set_opt_in(choice(user, true)).await.expect("opted in");
    registered.into_inner().device.expect("a device").device_id
}

pub fn code<T>(answer: Result<T, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

pub fn reason(status: &Status) -> String {
    status.get_details_error_info().map_or_else(String::new, |info| {
        assert_eq!(info.domain, "nudged");
        info.reason
    })
}

/// The field paths of a BadRequest, in order.
pub fn fields<T: std::fmt::Debug>(answer: Result<T, Status>) -> Vec<String> {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(reason(&status), "INVALID_REQUEST");
    let bad_request = status.get_details_bad_request().expect("details");
    bad_request.field_violations.into_iter().map(|violation| violation.field).collect()
}
