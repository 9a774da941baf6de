//! Trace export, into a collector's real OTLP receiver: calls are children of the caller's span, a broadcast is linked
//! to its call, and nobody's device token is told.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use nudged::api::proto::{GetNotificationRequest, NotifyEventRequest, device};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tonic::{Request, Response, Status};

use super::server::{APP, PATIENCE, World, event, free_port, opt_in, register};

const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
const CALLER: u64 = 0x00f0_67aa_0ba9_02b7;
const TOKEN: &str = "abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn spans(&self) -> Vec<Span> {
        let batches = self.0.lock().unwrap();
        let scopes = batches.iter().flat_map(|batch| &batch.resource_spans).flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// As soon as it has come.
    async fn span(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> Span {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(span) = self.spans().into_iter().find(|span| wanted(span)) {
                return span;
            }
            assert!(Instant::now() < deadline, "no {what} in {:#?}", self.spans());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let value = span.attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value?;
    Some(match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_broadcasts_reach_a_collector() {
    let collector = Collector::default();
    let address = format!("127.0.0.1:{}", free_port());
    let receiver = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(collector.clone()))
        .serve(address.parse().unwrap());
    let receiver = tokio::spawn(receiver);

    let world = World::new().await;
    let server = world.start_with(&[("NUDGED_TRACES__OTLP_ENDPOINT", format!("http://{address}"))]);
    let mut client = world.client().await;
    register(&mut client, "choco", device::Platform::Apns, TOKEN).await;
    opt_in(&mut client, "choco", true).await;

    let everyone = NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..event("notice-1", &[]) };
    let mut traced = Request::new(everyone);
    let sampled = format!("00-{TRACE:032x}-{CALLER:016x}-01");
    traced.metadata_mut().insert("traceparent", sampled.parse().unwrap());
    let id = client.notify_event(traced).await.unwrap().into_inner().notification_id;
    // A caller that decided not to record is obeyed.
    let mut unsampled = Request::new(event("comment-1", &["choco"]));
    unsampled
        .metadata_mut()
        .insert("traceparent", "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".parse().unwrap());
    client.notify_event(unsampled).await.unwrap();
    let unknown = GetNotificationRequest { app_id: APP.into(), notification_id: "nonsense".into() };
    let refused = client.get_notification(unknown).await.unwrap_err();

    let call = collector.span("span of the call", |span| span.name.ends_with("/NotifyEvent")).await;
    assert_eq!(call.name, "nudged.v1.PushService/NotifyEvent");
    assert_eq!(
        (call.trace_id.as_slice(), call.parent_span_id.as_slice()),
        (&TRACE.to_be_bytes()[..], &CALLER.to_be_bytes()[..])
    );
    assert_eq!(attribute(&call, "nudged.notification_id"), Some(id.clone()));
    assert_eq!(attribute(&call, "rpc.grpc.status_code").as_deref(), Some("0"));

    let failed = collector.span("span of the refused call", |span| span.name.ends_with("/GetNotification")).await;
    assert_eq!(attribute(&failed, "rpc.grpc.status_code"), Some((refused.code() as i32).to_string()));
    assert!(failed.status.is_none_or(|status| status.code() != StatusCode::Error), "the caller's fault");
    assert!(failed.parent_span_id.is_empty() && failed.trace_id != call.trace_id, "a trace of its own");

    let broadcast = collector.span("span of the broadcast", |span| span.name == "broadcast").await;
    assert_eq!(attribute(&broadcast, "nudged.notification_id"), Some(id));
    assert_eq!(attribute(&broadcast, "nudged.sent").as_deref(), Some("1"));
    let links: Vec<_> = broadcast.links.iter().map(|link| (link.trace_id.clone(), link.span_id.clone())).collect();
    assert_eq!(links, [(call.trace_id.clone(), call.span_id.clone())], "linked, not a child");
    assert!(broadcast.end_time_unix_nano >= broadcast.start_time_unix_nano && broadcast.start_time_unix_nano > 0);

    // The drain sends what is queued.
    assert!(server.terminate().success());
    let told = format!("{:?}", collector.0.lock().unwrap());
    assert!(
        told.contains("\"nudged\"") && told.contains("/RegisterDevice"),
        "service.name, and the last batch: {told}"
    );
    assert!(!told.contains(TOKEN), "a device's token is nobody's");
    let comments = collector.spans().iter().filter(|span| span.name.ends_with("/NotifyEvent")).count();
    assert_eq!(comments, 1, "the unsampled call was recorded");
    receiver.abort();
}
