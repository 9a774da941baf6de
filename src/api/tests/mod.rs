//! The API over a real socket, against the real SQLite store.
