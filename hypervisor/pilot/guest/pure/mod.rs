//! Pieces without hardware, compiled into the guest and, with their tests, on the host.

pub mod boot_arguments;
pub mod command;
pub mod constants;
pub mod gap;
pub mod memory_map;
pub mod page_pattern;
pub mod text;
