//! Host memory as a bench needs it: of the kind that the manual advises for hosts, and really there.

use crate::host_setting::{HostSetting, current};
use crate::report::Report;
use godwit_wire::unit::Mib;
use std::hint::black_box;

/// Huge pages for shared memory. QEMU's guests here have theirs anyway: its memory is anonymous, and kernels give that
/// huge pages unless told otherwise.
const SHARED_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const ANONYMOUS_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// Free pages of this order and above are given back to the host, where this machine is a guest that does so.
const REPORTED_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
/// An order of which no page is ever free. Kernels that take none above the largest keep reporting.
const UNREPORTED: &str = "11";
/// What a guest takes beside the data it was filled with.
const GUEST_ITSELF: Mib = Mib(256);

/// Whoever asks for huge pages gets them, and memory that was freed stays here, until this is dropped.
pub(crate) struct HostMemory {
    _huge_pages: HostSetting,
    _reporting: HostSetting,
}

impl HostMemory {
    /// Changes what this user may change, and says in the report how things are then.
    pub(crate) fn prepare(report: &mut Report) -> Self {
        let prepared = Self {
            _huge_pages: HostSetting::change(SHARED_HUGE_PAGES, &["advise", "always", "force"]),
            _reporting: HostSetting::change(REPORTED_ORDER, &[UNREPORTED]),
        };
        for (name, path) in [
            ("huge_pages_shared", SHARED_HUGE_PAGES),
            ("huge_pages_anonymous", ANONYMOUS_HUGE_PAGES),
            ("free_pages_reported_from_order", REPORTED_ORDER),
        ] {
            report.option(name, current(path).unwrap_or_else(|| "none".into()));
        }
        prepared
    }
}

/// Touches as much memory as the target of a guest with `fill` of data will take, and frees it.
///
/// A host may itself be a guest whose free memory has gone back to its own host; touching it again then costs several
/// times what copying into it does. Whoever moves next would pay for who rested before, so all start alike.
pub(crate) fn warm(fill: Mib) {
    let bytes = fill.bytes().0 + GUEST_ITSELF.bytes().0;
    drop(black_box(vec![0x5a_u8; bytes as usize]));
}
