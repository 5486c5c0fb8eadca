//! A machine: memory, vCPUs and devices together, and what can be done to them as one.

mod acpi;
mod attachments;
mod boot;
mod boot_params;
mod config_pages;
mod devices;
mod error;
pub mod layout;
mod memory_bus;
mod power_button;
mod run;
mod throttle;
mod vcpu;

pub use error::MachineError;
pub use run::{Machine, MachineParts, SavedMachine};
pub use throttle::{Throttle, Throttling};
pub use vcpu::{MachineEvent, VcpuStats};
