//! Guest memory and the lease page.

mod lease_page;
mod ram;

pub use lease_page::{LeasePage, LeasePageError, boot_time_ns};
pub use ram::{GuestRam, RamError, Segment};
