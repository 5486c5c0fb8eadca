//! Guest memory, also while it is arriving, and the lease page.

mod absent;
mod kept;
mod lease_page;
mod pending;
mod populate;
mod presence;
mod program;
mod ram;
mod userfault;
mod watched;

pub use absent::{Absent, AbsentError};
pub use lease_page::{LeasePage, LeasePageError, boot_time_ns};
pub use pending::{Claim, Pending};
pub use presence::Presence;
pub use program::release_start_pages;
pub use ram::{GuestRam, RamError, Segment};
pub use watched::Watched;
