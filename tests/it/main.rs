//! The real binary, real gRPC clients, and the sandbox's real HTTP/2 over TLS.
#![expect(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests drive real processes on real time")]

mod catalog;
mod consent;
mod crash;
mod first_call;
mod guards;
mod reload;
mod server;
