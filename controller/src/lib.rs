//! The control plane: it keeps what operators want, sees what hosts do, and closes the gap without ever letting
//! one VM run twice.
//!
//! A module uses only the modules above it in this list.

pub mod model;

pub mod store;

pub mod view;

pub mod plan;

pub mod ha;

mod ledger;

pub mod drive;

mod core;

mod maintenance;

mod operation;

mod loops;

pub mod agents;

pub mod intent;

pub mod controller;
