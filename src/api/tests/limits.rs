use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use super::harness::*;
use crate::api::limits::ServerLimits;
use crate::api::proto::*;

/// A server whose database stalls at the first event for `choco`.
async fn stalled(limits: ServerLimits) -> (TestServer, Client, Arc<Stall>) {
    let stall = Arc::new(Stall::default());
    let server = TestServer::with(Setup { limits, hand_off: Arc::clone(&stall) as _, ..Setup::default() }).await;
    let mut client = server.client().await;
    enrol(&mut client, "choco").await;
    (server, client, stall)
}

#[tokio::test]
async fn the_callers_deadline_is_kept() {
    let (server, mut client, stall) = stalled(ServerLimits::default()).await;
    // The client's channel reads the same header and gives up with CANCELLED, on a busy machine before our answer is
    // there. Every call stalls, so one of them hears the server.
    let mut status = tonic::Status::cancelled("not called yet");
    for _ in 0..100 {
        let mut request = Request::new(comment(&["choco"]));
        request.metadata_mut().insert("grpc-timeout", "50m".parse().expect("ASCII"));
        status = client.notify_event(request).await.expect_err("stalled");
        if status.code() != Code::Cancelled {
            break;
        }
    }
    // First, so that a failure does not wait for the stall.
    stall.let_go();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    server.stop().await.expect("stopped");
}

#[tokio::test]
async fn the_servers_own_deadline_ends_a_call_without_one() {
    let limits = ServerLimits { max_deadline: Duration::from_millis(300), ..ServerLimits::default() };
    let (server, mut client, stall) = stalled(limits).await;
    let status = client.notify_event(comment(&["choco"])).await.expect_err("stalled");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    let mut generous = Request::new(comment(&["choco"]));
    generous.metadata_mut().insert("grpc-timeout", "1H".parse().expect("ASCII"));
    assert_eq!(code(client.notify_event(generous).await), Code::DeadlineExceeded);
    stall.let_go();
    server.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_request_too_many_is_shed_with_a_hint_and_health_is_not() {
    let limits = ServerLimits { max_concurrent_requests: 1, ..ServerLimits::default() };
    let (server, mut client, stall) = stalled(limits).await;
    let mut other = server.client().await;
    let waiting = server.runtime.spawn(async move {
        loop {
            // A probe of below may be in its way.
            match client.notify_event(comment(&["choco"])).await {
                Err(status) if status.code() == Code::ResourceExhausted => {}
                answer => return answer,
            }
        }
    });
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    let status = loop {
        // The first request may not have arrived yet.
        match other.list_opt_ins(list.clone()).await {
            Ok(_) => server.runtime.sleep(Duration::from_millis(1)).await,
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "SERVER_OVERLOADED"));
    assert_eq!(status.get_details_retry_info().expect("a hint").retry_delay, Some(Duration::from_secs(1)));
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").expect("a trailer"), "1000");
    let mut health = HealthClient::new(server.channel().await);
    health.check(HealthCheckRequest::default()).await.expect("never shed");
    stall.let_go();
    waiting.await.expect("no panic").expect("accepted in the end");
    other.list_opt_ins(list).await.expect("room again");
    server.stop().await.expect("stopped");
}

#[tokio::test]
async fn open_calls_finish_at_shutdown() {
    let (server, mut client, stall) = stalled(ServerLimits::default()).await;
    let waiting = server.runtime.spawn(async move { client.notify_event(comment(&["choco"])).await });
    // It is in the store when another write would wait behind it.
    let mut other = server.client().await;
    loop {
        let mut probe = Request::new(choice("mocha", true));
        probe.metadata_mut().insert("grpc-timeout", "20m".parse().expect("ASCII"));
        if code(other.set_opt_in(probe).await) == Code::DeadlineExceeded {
            break;
        }
    }
    let (shutdown, runtime) = (server.shutdown.clone(), server.runtime.clone());
    shutdown.cancel();
    let stopping = runtime.spawn(server.stop());
    runtime.sleep(Duration::from_millis(20)).await;
    assert!(!stopping.is_finished());
    stall.let_go();
    waiting.await.expect("no panic").expect("answered");
    stopping.await.expect("no panic").expect("stopped");
}

#[tokio::test]
async fn what_outlasts_the_drain_is_cut() {
    let limits = ServerLimits { drain: Duration::from_millis(50), ..ServerLimits::default() };
    let (server, mut client, stall) = stalled(limits).await;
    let runtime = server.runtime.clone();
    let waiting = runtime.spawn(async move { client.notify_event(comment(&["choco"])).await });
    runtime.sleep(Duration::from_millis(20)).await;
    let store = Arc::clone(&server.store);
    runtime.timeout(Duration::from_secs(10), server.stop()).await.expect("in time").expect("stopped");
    let status = waiting.await.expect("no panic").expect_err("cut");
    assert_ne!(status.code(), Code::Ok);
    stall.let_go();
    drop(store);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let limits = ServerLimits { max_connections: 1, ..ServerLimits::default() };
    let server = TestServer::with(Setup { limits, ..Setup::default() }).await;
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    let mut first = server.client().await;
    first.list_opt_ins(list.clone()).await.expect("served");
    let mut second = server.client().await;
    let waits = server.runtime.timeout(Duration::from_millis(100), second.list_opt_ins(list.clone())).await;
    assert!(waits.is_none());
    drop(first);
    second.list_opt_ins(list).await.expect("its turn");
}

#[tokio::test]
async fn a_database_that_is_gone_is_unavailable_with_a_hint() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    server.store.close();
    let status = client.set_opt_in(choice("choco", true)).await.expect_err("no database");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
    assert!(status.get_details_retry_info().is_some());
    assert!(status.get_details_request_info().is_some_and(|info| !info.request_id.is_empty()));
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").expect("a trailer"), "1000");
}
