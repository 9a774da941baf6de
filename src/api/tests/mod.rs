//! The API over a real socket, against the real SQLite store.

mod access;
mod bad_input;
mod connection;
mod dry_run;
mod event_types;
mod explain;
mod foreign;
mod harness;
mod imports;
mod limits;
mod notify;
mod paging;
mod pauses;
mod raw;
mod reflection;
mod rpcs;
mod stream;
mod tls;
mod watch;
