//! How the controller reaches hosts, and how it keeps track of who it hears.

pub mod host_driver;

pub mod tls_driver;

pub(crate) mod pulses;
