use std::collections::BTreeSet;

use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

use super::harness::*;

#[tokio::test]
async fn both_reflections_list_the_services_and_describe_them() {
    let server = TestServer::start().await;
    let channel = server.channel().await;
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let describe = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::FileContainingSymbol(
            "nudged.v1.PushService".into(),
        )),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let answers = client.server_reflection_info(tokio_stream::iter([request, describe])).await.expect("served");
    let answers: Vec<_> =
        answers.into_inner().map(|answer| answer.expect("an answer").message_response).collect().await;
    let Some(Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(listed))) = answers.first()
    else {
        panic!("{answers:?}");
    };
    let names: BTreeSet<&str> = listed.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains("nudged.v1.PushService") && names.contains("grpc.health.v1.Health"), "{names:?}");
    assert!(matches!(
        answers.get(1),
        Some(Some(v1::server_reflection_response::MessageResponse::FileDescriptorResponse(_)))
    ));

    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.expect("served").into_inner();
    assert!(answers.next().await.expect("an answer").is_ok());
}

#[tokio::test]
async fn health_needs_no_key_and_reflection_any() {
    let keys = vec![key("nothing", &["pets"], &[])];
    let server = TestServer::with(Setup { keys, ..Setup::default() }).await;
    let channel = server.channel().await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "nudged.v1.PushService"] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.expect("no key needed");
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    }
    let mut reflection = v1::server_reflection_client::ServerReflectionClient::new(channel);
    let request = || tokio_stream::empty::<v1::ServerReflectionRequest>();
    assert_eq!(code(reflection.server_reflection_info(request()).await), Code::Unauthenticated);
    let mut with_key = Request::new(request());
    with_key.metadata_mut().insert("authorization", "Bearer nk_nothing".parse().expect("ASCII"));
    reflection.server_reflection_info(with_key).await.expect("any key");
}

#[tokio::test]
async fn watchers_hear_of_a_shutdown_and_do_not_hold_it_up() {
    let server = TestServer::start().await;
    let mut health = HealthClient::new(server.channel().await);
    let watch = health.watch(HealthCheckRequest { service: String::new() }).await.expect("watching");
    let mut watch = watch.into_inner();
    assert_eq!(watch.next().await.expect("first").expect("status").status(), ServingStatus::Serving);
    server.server.health().set_serving(false).await;
    assert_eq!(watch.next().await.expect("next").expect("status").status(), ServingStatus::NotServing);
    server.stop().await.expect("stopped");
    while let Some(status) = watch.next().await {
        assert_eq!(status.expect("status").status(), ServingStatus::NotServing);
    }
}
