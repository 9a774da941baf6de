//! The real binary, real gRPC clients, and the sandbox's real HTTP/2 over TLS.
#![expect(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests drive real processes on real time")]

mod api_reference;
mod catalog;
mod cluster;
mod consent;
mod demo;
mod disk;
mod documents;
mod dry_run;
mod endings;
mod faults;
mod first_call;
mod generic;
mod guards;
mod imports;
mod load;
mod moving;
mod observed;
mod postgres;
mod providers;
mod proxy;
mod reload;
mod restore;
mod server;
mod soak;
mod tables;
mod torture;
mod tour;
mod traces;
mod trouble;
mod watch;
