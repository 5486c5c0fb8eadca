//! Guest memory and the lease page.

mod lease_page;
mod program;
mod ram;

pub use lease_page::{LeasePage, LeasePageError, boot_time_ns};
pub use program::release_start_pages;
pub use ram::{GuestRam, RamError, Segment};
