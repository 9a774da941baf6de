//! gRPC: the only place that knows protobuf and `Status`.
//!
//! A request passes, from the outside in: its [`connection`], [`auth`] (which key, which scopes), [`limits`]
//! (deadline, load shedding), [`services`] (which service), [`notify`] or tonic's server, then a handler of
//! [`push_service`] or [`admin_service`] that reads the message (`convert`), resolves the app ([`access`]) and calls the
//! service. [`status`] alone makes error answers.

pub mod access;
pub mod admin_service;
pub mod auth;
pub mod codec;
mod connection;
mod convert;
mod imports;
pub mod incoming;
pub mod limits;
mod notify;
pub mod proto;
pub mod push_service;
pub mod reasons;
pub mod scopes;
pub mod server;
mod services;
pub mod status;
mod stream;
pub mod tls;
mod trace;
mod watch;

/// Event types between messages and definitions, for clients of ours.
pub mod catalogue {
    pub use super::convert::{declared, definition};
}

/// What messages are read by.
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing {
    pub use super::convert::{
        data, declared, definition, notify_event, read_data, register_device, set_opt_in, set_subscription,
    };
}

#[cfg(test)]
mod tests;

/// What clients of ours (the demo, the command line) connect with, so that only this module names tonic.
pub mod transport {
    pub use tonic::transport::Channel;
}
