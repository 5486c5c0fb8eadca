//! A machine: memory, vCPUs and devices together, and what can be done to them as one.

mod acpi;
mod boot;
mod boot_params;
mod error;
mod run;
mod vcpu;

pub use error::MachineError;
pub use run::{Machine, MachineParts, SavedMachine};
pub use vcpu::{MachineEvent, VcpuStats};
