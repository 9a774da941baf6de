//! The generated messages and services, and their descriptor for server reflection.
#![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]

tonic::include_proto!("nudged.v1");

/// Every file of the API with its comments, as reflection serves it.
pub const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nudged_descriptor.bin"));
