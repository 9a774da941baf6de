//! Traces, where `traces.otlp_endpoint` names a collector: a span for each call, child of the caller's, and one for each
//! broadcast, *linked* to the call that was its beginning. Deliveries get none: one event may be a million of them, and
//! ExplainDelivery tells of each.
//!
//! Like metrics, set up once per process; without a collector nothing here does any work.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId,
    TraceState, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData,
};

use super::{TelemetryError, names};
use crate::config::Traces as Settings;
use crate::domain::time::UnixMs;

/// A collector that takes longer does not hold up the next batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// A shutdown waits no longer for the last batch.
const LAST_EXPORT: Duration = Duration::from_secs(3);
/// Calls that a broadcast can be linked to; the oldest are forgotten first.
const MAX_REMEMBERED: usize = 1024;

static TRACER: OnceLock<Tracer> = OnceLock::new();

struct Tracer {
    tracer: SdkTracer,
    calls: Mutex<VecDeque<(String, SpanContext)>>,
}

/// Keeps the exporter; to be shut down before the process ends.
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// Nothing, unless a collector is configured. The collector need not be there yet. To be called on a runtime, which
    /// carries the exporter's connection.
    pub fn start(settings: &Settings) -> Result<Option<Self>, TelemetryError> {
        let Some(endpoint) = &settings.otlp_endpoint else { return Ok(None) };
        #[expect(clippy::cast_precision_loss, reason = "at most a million")]
        let ratio = 1.0 / settings.sample_one_in as f64;
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint.clone())
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|error| TelemetryError::Traces(error.to_string()))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(settings.queue)
            .with_max_export_batch_size(settings.queue.min(512))
            .build();
        let processor = BatchSpanProcessor::builder(Counted(exporter)).with_batch_config(batches).build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(
                Resource::builder()
                    .with_service_name("nudged")
                    .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
                    .build(),
            )
            .build();
        let tracer = Tracer { tracer: provider.tracer("nudged"), calls: Mutex::default() };
        TRACER.set(tracer).map_err(|_| TelemetryError::AlreadyTracing)?;
        Ok(Some(Self { provider }))
    }

    /// Sends what is queued, for at most three seconds. Blocks: not for a runtime's thread.
    pub fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST_EXPORT) {
            tracing::warn!(%error, "the last traces were not exported");
        }
    }
}

/// A caller's span, as its `traceparent` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parent {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    pub sampled: bool,
}

/// The span of a call that is being served. Ends when its last clone is dropped.
#[derive(Clone)]
pub struct CallSpan(Arc<Mutex<Span>>);

impl CallSpan {
    /// Nothing, when traces are not exported. `path`: `/package.Service/Method`.
    #[must_use]
    pub fn start(path: &str, parent: Option<Parent>) -> Option<Self> {
        let tracer = &TRACER.get()?.tracer;
        let name = path.trim_start_matches('/').to_owned();
        let (service, method) = name.rsplit_once('/').unwrap_or(("", &name));
        let attributes = vec![
            KeyValue::new("rpc.system", "grpc"),
            KeyValue::new("rpc.service", service.to_owned()),
            KeyValue::new("rpc.method", method.to_owned()),
        ];
        let parent = parent.map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(SpanContext::new(
                TraceId::from_bytes(parent.trace_id),
                SpanId::from_bytes(parent.span_id),
                if parent.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() },
                true,
                TraceState::default(),
            ))
        });
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Server).with_attributes(attributes);
        Some(Self(Arc::new(Mutex::new(tracer.build_with_context(builder, &parent)))))
    }

    /// The ids, in hexadecimal, for logs: trace and span.
    #[must_use]
    pub fn ids(&self) -> (String, String) {
        let span = self.lock();
        (span.span_context().trace_id().to_string(), span.span_context().span_id().to_string())
    }

    /// The event became this notification: a broadcast that grows out of it will link here.
    pub fn accepted(&self, notification_id: &str) {
        let Some(tracer) = TRACER.get() else { return };
        let context = {
            let mut span = self.lock();
            span.set_attribute(KeyValue::new("nudged.notification_id", notification_id.to_owned()));
            span.span_context().clone()
        };
        let mut calls = tracer.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() == MAX_REMEMBERED {
            calls.pop_front();
        }
        calls.push_back((notification_id.to_owned(), context));
    }

    /// What was answered: a gRPC status code.
    pub fn answered(&self, code: i64) {
        /// UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS: the server's fault, as
        /// OpenTelemetry's conventions for gRPC have it.
        const FAULTS: [i64; 6] = [2, 4, 12, 13, 14, 15];
        let mut span = self.lock();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", code));
        if FAULTS.contains(&code) {
            span.set_status(Status::error(""));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Span> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A broadcast from acceptance to its last result, with its counts by name.
pub fn broadcast(
    notification_id: &str,
    event_type: &str,
    accepted_at: UnixMs,
    finished_at: UnixMs,
    counts: [(&'static str, u64); 5],
) {
    let Some(tracer) = TRACER.get() else { return };
    let mut attributes = vec![
        KeyValue::new("nudged.notification_id", notification_id.to_owned()),
        KeyValue::new("nudged.event_type", event_type.to_owned()),
    ];
    attributes.extend(
        counts.map(|(name, count)| KeyValue::new(format!("nudged.{name}"), i64::try_from(count).unwrap_or(i64::MAX))),
    );
    let call = {
        let calls = tracer.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.iter().rev().find(|(id, _)| id == notification_id).map(|(_, context)| context.clone())
    };
    let builder = SpanBuilder::from_name("broadcast")
        .with_kind(SpanKind::Internal)
        .with_start_time(moment(accepted_at))
        .with_attributes(attributes)
        .with_links(call.into_iter().map(|context| Link::new(context, Vec::new(), 0)).collect());
    let mut span = tracer.tracer.build_with_context(builder, &Context::new());
    span.end_with_timestamp(moment(finished_at));
}

fn moment(at: UnixMs) -> SystemTime {
    SystemTime::UNIX_EPOCH + at.since(UnixMs(0))
}

/// Counts what the collector took and what it did not.
#[derive(Debug)]
struct Counted(SpanExporter);

impl opentelemetry_sdk::trace::SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let exported = opentelemetry_sdk::trace::SpanExporter::export(&self.0, batch).await;
        let result = if exported.is_ok() { "exported" } else { "failed" };
        metrics::counter!(names::SPANS, "result" => result).increment(spans);
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        opentelemetry_sdk::trace::SpanExporter::shutdown_with_timeout(&self.0, timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        opentelemetry_sdk::trace::SpanExporter::set_resource(&mut self.0, resource);
    }
}
