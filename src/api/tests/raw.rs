//! A client that knows only the service descriptor: every RPC that there is or will be, called with messages from JSON.

use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, ReflectMessage as _};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::api::proto;

/// Bytes in, bytes out: a generic client.
#[derive(Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buf, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; bytes::Buf::remaining(buf)];
        bytes::Buf::copy_to_slice(buf, &mut bytes);
        Ok(Some(bytes))
    }
}

/// Every RPC of ours.
pub fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(proto::DESCRIPTOR).expect("our descriptor");
    let services: Vec<_> = pool.services().filter(|service| service.package_name() == "nudged.v1").collect();
    services.iter().flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

pub fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}

/// Calls any RPC with the messages and gives all answers; of a stream of the server's alone, which has no end, the first.
/// What a stream refuses of one message is an error here.
pub async fn call(
    channel: &Channel,
    method: &MethodDescriptor,
    messages: &[DynamicMessage],
    key: Option<&str>,
) -> Result<Vec<Vec<u8>>, Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("connected");
    let path = http::uri::PathAndQuery::try_from(path(method)).expect("a path");
    let authorize = |metadata: &mut MetadataMap| {
        if let Some(key) = key {
            metadata.insert("authorization", MetadataValue::try_from(format!("Bearer {key}")).expect("ASCII"));
        }
    };
    let encoded: Vec<Vec<u8>> = messages.iter().map(prost::Message::encode_to_vec).collect();
    if !method.is_client_streaming() && !method.is_server_streaming() {
        let mut request = Request::new(encoded.into_iter().next().expect("one message"));
        authorize(request.metadata_mut());
        return client.unary(request, path, Raw).await.map(|answer| vec![answer.into_inner()]);
    }
    let mut request = Request::new(tokio_stream::iter(encoded));
    authorize(request.metadata_mut());
    let mut stream = client.streaming(request, path, Raw).await?.into_inner();
    let mut answers = Vec::new();
    while let Some(answer) = stream.message().await? {
        refusal_in(method, &answer)?;
        answers.push(answer);
        if !method.is_client_streaming() {
            break;
        }
    }
    Ok(answers)
}

/// The error of one event, or the first refused item.
fn refusal_in(method: &MethodDescriptor, answer: &[u8]) -> Result<(), Status> {
    let answer = DynamicMessage::decode(method.output(), answer).expect("an answer");
    if let Some(error) = answer.get_field_by_name("error")
        && answer.has_field_by_name("error")
    {
        let bytes = error.as_message().expect("a status").encode_to_vec();
        let status = tonic_types::Status::decode(bytes.as_slice()).expect("a status");
        return Err(Status::new(Code::from(status.code), status.message));
    }
    let Some(progress) = answer.get_field_by_name("progress") else { return Ok(()) };
    let Some(refused) = progress.as_message().and_then(|progress| progress.get_field_by_name("refused")) else {
        return Ok(());
    };
    let Some(first) = refused.as_list().and_then(|list| list.first()) else { return Ok(()) };
    let first = first.as_message().expect("a message");
    let reason = first.get_field_by_name("reason").and_then(|reason| reason.as_str().map(str::to_owned));
    let reason = reason.unwrap_or_else(|| panic!("{} without a reason", first.descriptor().full_name()));
    let code = match reason.as_str() {
        "DEVICE_NOT_FOUND" => Code::NotFound,
        "INVALID_REQUEST" => Code::InvalidArgument,
        _ => Code::Unknown,
    };
    Err(Status::new(code, format!("{reason}: {first:?}")))
}
