//! The machines that ours is measured against.

mod qemu;
mod qmp;

pub(crate) use qemu::{DEFAULT_BYTES_PER_S, Mode, Qemu};

use crate::report::Report;

/// Names a Cloud Hypervisor to be measured too.
const CLOUD_HYPERVISOR_ENV: &str = "PEER_CLOUD_HYPERVISOR";

/// Says loudly that a peer does not take part.
pub(crate) fn is_missing(report: &mut Report, peer: &str, why: &str) {
    println!("*** {peer} IS NOT MEASURED: {why}");
    report.option(format!("{peer}_missing"), why);
}

/// Cloud Hypervisor takes part where its program is named.
pub(crate) fn cloud_hypervisor(report: &mut Report) {
    if std::env::var_os(CLOUD_HYPERVISOR_ENV).is_none() {
        is_missing(
            report,
            "cloud_hypervisor",
            &format!("{CLOUD_HYPERVISOR_ENV} does not name its program"),
        );
    }
}
