//! The control plane: it keeps what operators want, sees what hosts do, and closes the gap without ever letting
//! one VM run twice.
//!
//! A module uses only the modules above it in this list.

// A `Problem` is made once per refused request: boxing it would only complicate every decision.
#![allow(clippy::result_large_err)]

pub mod model;

pub mod store;

pub mod view;

pub mod plan;

pub mod ha;

pub mod intent;

mod ledger;

pub mod drive;

mod core;

mod maintenance;

mod operation;

mod loops;

mod packet_gaps;

mod agents;

mod decide;

pub mod controller;

#[cfg(test)]
mod simulation;

pub use controller::{Controller, ControllerConfig, Duplex, StartError};
pub use intent::{
    Accepted, Intent, NewDevices, NewDisk, NewDiskSource, NewImage, NewJoinToken, NewMaintenance,
    NewNetwork, NewNic, NewVm, NewVmDisk, NicAddress, Placement, Preview, Resource, VmChange,
};
pub use view::View;
