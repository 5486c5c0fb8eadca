//! Whether this machine can run guests.

use std::fs::File;
use std::io;

const KVM_DEVICE: &str = "/dev/kvm";

/// Why this machine cannot run guests.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device.
    #[error(
        "this machine has no {KVM_DEVICE}\n  remedy: load the module kvm_intel or kvm_amd; if that fails, enable virtualization in the firmware, or nested virtualization where this machine is itself a guest\n  without it: `tests/run lab try` in a checkout starts a pool of emulated hosts"
    )]
    Missing,
    /// The device is not for this user.
    #[error(
        "{KVM_DEVICE} is not accessible for this user\n  remedy: sudo usermod -aG kvm $USER, then log in again"
    )]
    Forbidden,
    /// Something else.
    #[error("cannot open {KVM_DEVICE}\n  remedy: check that the kernel's KVM modules work (dmesg)")]
    Unusable(#[source] io::Error),
}

/// Opens the device as a VMM would.
pub(super) fn check_kvm() -> Result<(), KvmError> {
    match File::options().read(true).write(true).open(KVM_DEVICE) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Forbidden,
            _ => KvmError::Unusable(error),
        }),
    }
}
