//! The machines that ours is measured against.

mod qemu;
mod qmp;

pub(crate) use qemu::{DEFAULT_BYTES_PER_S, Mode, Qemu};

use crate::report::Report;

/// Names a Cloud Hypervisor that somebody wants measured too.
const CLOUD_HYPERVISOR_ENV: &str = "PEER_CLOUD_HYPERVISOR";

/// Why QEMU takes no part.
pub(crate) const QEMU_MISSING: &str = "qemu-system-x86_64 is not installed";

/// No bench can move the guest of a Cloud Hypervisor yet. That is a fault where somebody asks for it, whatever is
/// waived: what was asked for must not be missing quietly.
pub(crate) fn cloud_hypervisor(report: &mut Report) {
    match std::env::var_os(CLOUD_HYPERVISOR_ENV) {
        Some(program) => report.fault(format!(
            "cloud_hypervisor is not measured: {CLOUD_HYPERVISOR_ENV} names {}, but no bench can move its guest yet",
            program.display()
        )),
        None => report.option("cloud_hypervisor_missing", "no bench can move its guest yet"),
    }
}
