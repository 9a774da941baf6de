//! A generic client, the equivalent of grpcurl: it knows nothing but what reflection tells.

use prost_reflect::{DescriptorPool, DynamicMessage};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

/// A client that learns the API from the server, as grpcurl does.
pub struct Generic {
    channel: Channel,
    pool: DescriptorPool,
}

impl Generic {
    pub async fn connect(address: &str) -> Self {
        let channel = Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
        let mut pool = DescriptorPool::global();
        for service in ["nudged.v1.PushService", "nudged.v1.AdminService"] {
            let files = ask(&channel, MessageRequest::FileContainingSymbol(service.into())).await;
            let Some(MessageResponse::FileDescriptorResponse(files)) = files.message_response else {
                panic!("no descriptors: {files:?}")
            };
            for bytes in files.file_descriptor_proto {
                add(&channel, &mut pool, bytes).await;
            }
        }
        Self { channel, pool }
    }

    /// PushService's method.
    pub async fn call(&self, method: &str, json: &str) -> serde_json::Value {
        self.call_service("nudged.v1.PushService", method, json).await
    }

    /// The answer as grpcurl prints it.
    pub async fn call_service(&self, service: &str, method: &str, json: &str) -> serde_json::Value {
        let name = service;
        let service = self.pool.get_service_by_name(name).unwrap_or_else(|| panic!("no service {name}"));
        let descriptor = service.methods().find(|known| known.name() == method);
        let descriptor = descriptor.unwrap_or_else(|| panic!("no method {method}"));
        let mut reader = serde_json::Deserializer::from_str(json);
        let request = DynamicMessage::deserialize(descriptor.input(), &mut reader).unwrap();
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/{name}/{method}").parse().unwrap();
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
