//! The gRPC server: PushService, AdminService, reflection and health behind the layers.

use std::convert::Infallible;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use http::{Request, Response};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::ServiceBuilder;
use tower_layer::Layer as _;

use crate::runtime::Runtime;
use crate::service::Service;

use super::admin_service::AdminApi;
use super::auth::{AuthLayer, KeyRing};
use super::connection::{self, Terms};
use super::incoming::{self, Link};
use super::limits::{LimitsLayer, ServerLimits};
use super::notify::Notify;
use super::proto::DESCRIPTOR;
use super::proto::admin_service_server::{self, AdminServiceServer};
use super::proto::push_service_server::{PushServiceServer, SERVICE_NAME};
use super::push_service::PushApi;
use super::services::Services;
use super::tls::{Tls, TlsError, TlsSetup};
use super::trace::TraceLayer;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("the TLS certificate, its key or the client CA cannot be used")]
    Tls(#[source] TlsError),
    #[error("the API descriptor cannot be served by reflection")]
    Reflection(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What `grpc.health.v1` answers. Begins NOT_SERVING.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// The server as a whole, and its services.
    const NAMES: [&'static str; 3] = ["", SERVICE_NAME, admin_service_server::SERVICE_NAME];

    /// Watchers hear of it.
    pub async fn set_serving(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in Self::NAMES {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// Watchers hear NOT_SERVING, then their streams end: otherwise they would hold up the shutdown.
    async fn end(&self) {
        self.set_serving(false).await;
        let mut reporter = self.reporter.clone();
        for name in Self::NAMES {
            reporter.clear_service_status(name).await;
        }
    }
}

/// Everything the listeners share: several `serve` calls, each on a runtime of its own if wanted, are one server with
/// one set of limits.
pub struct Server {
    service: Arc<Service>,
    keys: Arc<KeyRing>,
    limits: ServerLimits,
    tls: Option<Arc<Tls>>,
    health: Health,
    places: Arc<Semaphore>,
    requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    imports: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
    runtime: Runtime,
}

impl Server {
    #[must_use]
    pub fn new(service: Arc<Service>, keys: Arc<KeyRing>, limits: ServerLimits, runtime: Runtime) -> Self {
        Self {
            service,
            keys,
            tls: None,
            health: Health { reporter: HealthReporter::new() },
            places: Arc::new(Semaphore::new(limits.max_connections)),
            requests: Arc::new(Semaphore::new(limits.max_concurrent_requests)),
            streams: Arc::new(Semaphore::new(limits.max_event_streams)),
            imports: Arc::new(Semaphore::new(limits.max_import_streams)),
            watchers: Arc::new(Semaphore::new(limits.max_watchers)),
            limits,
            runtime,
        }
    }

    /// Serves TLS only. Fails when the certificate, its key or the CA cannot be used.
    pub fn with_tls(mut self, tls: &TlsSetup) -> Result<Self, ServerError> {
        self.tls = Some(Arc::new(Tls::new(tls).map_err(ServerError::Tls)?));
        Ok(self)
    }

    /// For connections from now on. A server without TLS stays without.
    pub fn replace_tls(&self, tls: &TlsSetup) -> Result<(), ServerError> {
        self.tls.as_ref().map_or(Ok(()), |current| current.replace(tls)).map_err(ServerError::Tls)
    }

    /// To be set SERVING by whoever knows that everything behind it is up.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Serves until `shutdown`, then lets open calls finish for [`ServerLimits::drain`] and cuts the rest.
    ///
    /// Runs on the current runtime, which may have a single thread; connections are its tasks.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), ServerError> {
        self.serve_on(incoming::tcp(listener, self.runtime.clone()), shutdown).await
    }

    /// The same over any byte streams, as they come.
    pub async fn serve_on<S: incoming::Socket>(
        &self,
        sockets: impl Stream<Item = S> + Send,
        shutdown: CancellationToken,
    ) -> Result<(), ServerError> {
        let limits = &self.limits;
        let layers = ServiceBuilder::new()
            .layer(TraceLayer)
            .layer(AuthLayer::new(Arc::clone(&self.keys), self.runtime.clone()))
            .layer(LimitsLayer::new(limits.max_deadline, Arc::clone(&self.requests), self.runtime.clone()))
            .into_inner();
        let api = PushApi::new(
            Arc::clone(&self.service),
            Arc::clone(&self.keys),
            Arc::clone(&self.streams),
            Arc::clone(&self.imports),
            Arc::clone(&self.watchers),
            limits,
            shutdown.clone(),
        );
        let reflection_v1 = reflection().build_v1().map_err(|error| ServerError::Reflection(error.into()))?;
        let reflection_v1alpha = reflection().build_v1alpha().map_err(|error| ServerError::Reflection(error.into()))?;
        let api = Arc::new(api);
        let push = PushServiceServer::from_arc(Arc::clone(&api)).max_decoding_message_size(limits.max_message_bytes);
        let push = Notify::new(api, limits.max_message_bytes, push);
        let admin = AdminServiceServer::new(AdminApi::new(Arc::clone(&self.service)))
            .max_decoding_message_size(limits.max_message_bytes);
        let others = Routes::new(admin)
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .add_service(HealthServer::new(HealthService::from_health_reporter(self.health.reporter.clone())));
        let services = layers.layer(Services::new(push, others));

        let (ends, cut) = (CancellationToken::new(), CancellationToken::new());
        let terms = Terms { limits: *limits, runtime: self.runtime.clone(), ends: ends.clone(), cut: cut.clone() };
        let connections = incoming::accept(sockets, Arc::clone(&self.places));
        let open = TaskTracker::new();
        match &self.tls {
            None => open_each(connections, &services, &terms, &open, &shutdown).await,
            Some(tls) => {
                let connections = incoming::greet(connections, Arc::clone(tls), limits.handshake, self.runtime.clone());
                open_each(connections, &services, &terms, &open, &shutdown).await;
            }
        }
        if shutdown.is_cancelled() {
            self.health.end().await;
        }
        ends.cancel();
        open.close();
        let drained = async {
            shutdown.cancelled().await;
            self.runtime.sleep(limits.drain).await;
            tracing::warn!(drain_secs = limits.drain.as_secs(), "open calls are cut at the end of the drain");
            cut.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = open.wait() => Ok(()),
            () = drained => unreachable!("it only cuts the connections, so that serving ends"),
        }
    }
}

/// Until there are no more of them, or the shutdown.
async fn open_each<L, S>(
    connections: impl Stream<Item = L> + Send,
    services: &S,
    terms: &Terms,
    open: &TaskTracker,
    shutdown: &CancellationToken,
) where
    L: Link,
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let mut connections = std::pin::pin!(connections);
    while let Some(Some(link)) = shutdown.run_until_cancelled(connections.next()).await {
        let serving = connection::serve(link, services.clone(), terms.clone());
        // The tracker waits for it.
        drop(terms.runtime.spawn(open.track_future(serving)));
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
