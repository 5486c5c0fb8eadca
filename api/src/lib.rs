//! REST API, web console, command line and demo: everything an operator touches.
//!
//! A module uses only the modules above it in this list.

pub mod resource;

pub mod client;

pub mod cli;

pub mod rest;

pub mod server;

pub mod demo;

pub mod program;

/// Line on the server's stdout that says where the API is; printed when it answers.
const READY_PREFIX: &str = "Console and API: ";
