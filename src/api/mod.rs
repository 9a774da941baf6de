//! gRPC: the only place that knows protobuf and `Status`.

pub mod proto;
