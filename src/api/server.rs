//! The gRPC server: PushService, AdminService, reflection and health behind the layers.

use std::sync::Arc;

use futures_util::Stream;
use futures_util::future::Either;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::ServiceBuilder;

use crate::runtime::Runtime;
use crate::service::Service;

use super::admin_service::AdminApi;
use super::auth::{AuthLayer, KeyRing};
use super::incoming;
use super::limits::{LimitsLayer, ServerLimits};
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
    #[error("serving gRPC failed")]
    Serve(#[source] tonic::transport::Error),
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
        let builder = tonic::transport::Server::builder()
            .max_concurrent_streams(limits.max_streams_per_connection)
            .http2_max_header_list_size(limits.max_header_bytes)
            .http2_keepalive_interval(Some(limits.keepalive_interval))
            .http2_keepalive_timeout(Some(limits.keepalive_timeout));
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
        let push = PushServiceServer::new(api).max_decoding_message_size(limits.max_message_bytes);
        let admin = AdminServiceServer::new(AdminApi::new(Arc::clone(&self.service)))
            .max_decoding_message_size(limits.max_message_bytes);
        let others = Routes::new(admin)
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .add_service(HealthServer::new(HealthService::from_health_reporter(self.health.reporter.clone())));
        let (server, services) = (builder.layer(layers), Services::new(push, others));

        let cut = CancellationToken::new();
        let connections = incoming::accept(sockets, Arc::clone(&self.places), cut.clone());
        let (health, signal) = (self.health.clone(), shutdown.clone());
        let end = async move {
            signal.cancelled().await;
            health.end().await;
        };
        let serving = match &self.tls {
            None => Either::Left(server.serve_with_incoming_shutdown(services, connections, end)),
            Some(tls) => {
                let tls = Arc::clone(tls);
                let connections = incoming::greet(connections, tls, limits.tls_handshake, self.runtime.clone());
                Either::Right(server.serve_with_incoming_shutdown(services, connections, end))
            }
        };
        let drained = async {
            shutdown.cancelled().await;
            self.runtime.sleep(limits.drain).await;
            tracing::warn!(drain_secs = limits.drain.as_secs(), "open calls are cut at the end of the drain");
            cut.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            served = serving => served.map_err(ServerError::Serve),
            () = drained => unreachable!("it only cuts the connections, so that serving ends"),
        }
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
