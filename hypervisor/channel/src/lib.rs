//! How Godwit's processes reach each other: HTTP over UNIX sockets, mutual TLS, and the pool's own CA.
//!
//! A module uses only the modules above it in this list.

// A `Problem` is made once per refused request: boxing it would only complicate every handler.
#![allow(clippy::result_large_err)]

pub mod file;

pub mod problem;

pub mod upgrade;

pub mod client;

pub mod serve;

pub mod uds;

pub mod pki;

pub mod tls;

pub use client::CallError;
