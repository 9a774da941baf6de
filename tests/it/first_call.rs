//! A stranger's first calls: a generic client that knows nothing but reflection, and what `serve` refuses.

use prost_reflect::{DescriptorPool, DynamicMessage};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use super::server::{PATIENCE, World, binary};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_reflection_only_registers_opts_in_and_notifies() {
    let world = World::new().await;
    let _server = world.start();
    world.client().await;
    let generic = Generic::connect(&world.address).await;

    let registered = generic
        .call(
            "RegisterDevice",
            r#"{"app_id":"ifriendspet","user_id":"choco","platform":"APNS","token":"a1b2c3d4e5f60718","apns_environment":"SANDBOX","locale":"ko-KR"}"#,
        )
        .await;
    assert_eq!(registered["created"], true, "{registered}");
    assert!(registered["device"]["deviceId"].as_str().unwrap().starts_with("dev_"));
    let chosen = generic.call("SetOptIn", r#"{"app_id":"ifriendspet","user_id":"choco","opted_in":true}"#).await;
    assert_eq!(chosen["applied"], true, "{chosen}");
    let notified = generic
        .call(
            "NotifyEvent",
            r#"{"app_id":"ifriendspet","event_type":"comment.created","idempotency_key":"comment-42","user_ids":["choco"],
                "content":{"title":"New comment","localized":{"ko":{"title":"새 댓글","body":"보리: 너무 귀여워요!"}}},"data":{"post":42}}"#,
        )
        .await;
    assert_eq!(notified["duplicate"], false, "false prints: {notified}");

    assert!(world.sandbox.wait_for(1, PATIENCE).await, "the push arrives");
    let push = &world.received()[0];
    assert!(push.accepted, "{:?}", push.reason);
    let body = push.json();
    assert_eq!(body["aps"]["alert"]["title"], "새 댓글");
    assert_eq!(body["post"], 42, "an integer again");
    assert_eq!(body["nudged_id"].as_str(), push.apns_id.as_deref());
}

#[tokio::test]
async fn serve_refuses_to_listen_beyond_loopback_without_keys() {
    let dir = tempfile::tempdir().unwrap();
    let output =
        binary().arg("serve").current_dir(dir.path()).env("NUDGED_GRPC__LISTEN", "0.0.0.0:50051").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("grpc.listen") && text.contains("nudged key new"), "{text}");
    assert!(!dir.path().join("nudged.db").exists(), "nothing was begun");
}

/// A client that learns the API from the server, as grpcurl does.
struct Generic {
    channel: Channel,
    pool: DescriptorPool,
}

impl Generic {
    async fn connect(address: &str) -> Self {
        let channel = Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
        let mut pool = DescriptorPool::global();
        let files = ask(&channel, MessageRequest::FileContainingSymbol("nudged.v1.PushService".into())).await;
        let Some(MessageResponse::FileDescriptorResponse(files)) = files.message_response else {
            panic!("no descriptors: {files:?}")
        };
        for bytes in files.file_descriptor_proto {
            add(&channel, &mut pool, bytes).await;
        }
        Self { channel, pool }
    }

    async fn call(&self, method: &str, json: &str) -> serde_json::Value {
        let service = self.pool.get_service_by_name("nudged.v1.PushService").unwrap();
        let descriptor = service.methods().find(|known| known.name() == method).unwrap();
        let mut reader = serde_json::Deserializer::from_str(json);
        let request = DynamicMessage::deserialize(descriptor.input(), &mut reader).unwrap();
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/nudged.v1.PushService/{method}").parse().unwrap();
        let codec = Dynamic { output: descriptor.output() };
        let answer = grpc.unary(tonic::Request::new(request), path, codec).await.unwrap().into_inner();
        let options = prost_reflect::SerializeOptions::new().skip_default_fields(true);
        let mut bytes = Vec::new();
        answer.serialize_with_options(&mut serde_json::Serializer::new(&mut bytes), &options).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }
}

/// Adds a file after the files it imports.
fn add<'a>(
    channel: &'a Channel,
    pool: &'a mut DescriptorPool,
    bytes: Vec<u8>,
) -> std::pin::Pin<Box<dyn Future<Output = ()> + 'a>> {
    Box::pin(async move {
        let file: prost_types::FileDescriptorProto = prost::Message::decode(&bytes[..]).unwrap();
        if pool.get_file_by_name(file.name()).is_some() {
            return;
        }
        for import in &file.dependency {
            if pool.get_file_by_name(import).is_none() {
                let answer = ask(channel, MessageRequest::FileByFilename(import.clone())).await;
                let Some(MessageResponse::FileDescriptorResponse(files)) = answer.message_response else {
                    panic!("{import} is not served: {answer:?}")
                };
                for bytes in files.file_descriptor_proto {
                    add(channel, pool, bytes).await;
                }
            }
        }
        if pool.get_file_by_name(file.name()).is_none() {
            pool.decode_file_descriptor_proto(&bytes[..]).unwrap();
        }
    })
}

async fn ask(channel: &Channel, request: MessageRequest) -> ServerReflectionResponse {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let mut client = ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap()
}

#[derive(Clone)]
struct Dynamic {
    output: prost_reflect::MessageDescriptor,
}

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        self.clone()
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for Dynamic {
    type Item = DynamicMessage;
    type Error = tonic::Status;

    fn encode(&mut self, message: DynamicMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        prost::Message::encode(&message, buffer).map_err(|error| tonic::Status::internal(error.to_string()))
    }
}

impl Decoder for Dynamic {
    type Item = DynamicMessage;
    type Error = tonic::Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, tonic::Status> {
        DynamicMessage::decode(self.output.clone(), buffer)
            .map(Some)
            .map_err(|error| tonic::Status::internal(error.to_string()))
    }
}
