//! Whether this machine can run guests.

use godwit_vmm::kvm;

const KVM_DEVICE: &str = "/dev/kvm";
/// What is left without it.
const WITHOUT: &str =
    "without it: `godwit demo --lab` in a checkout starts a pool of emulated hosts";

/// Why this machine cannot run guests.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device.
    #[error(
        "this machine has no {KVM_DEVICE}\n  remedy: load the module kvm_intel or kvm_amd; if that fails, enable virtualization in the firmware, or nested virtualization where this machine is itself a guest\n  {WITHOUT}"
    )]
    Missing,
    /// The device is not for this user.
    #[error(
        "{KVM_DEVICE} is not accessible for this user\n  remedy: sudo usermod -aG kvm $USER, then log in again\n  {WITHOUT}"
    )]
    Forbidden,
    /// The device is there and no VM comes of it.
    #[error(
        "{KVM_DEVICE} is there, but no VM can be created with it\n  remedy: check that the kernel's KVM modules work (dmesg) and that no other hypervisor holds the CPU\n  {WITHOUT}"
    )]
    Unusable(#[source] kvm::KvmError),
}

/// Creates a VM as a VMM would, and drops it.
pub(super) fn check_kvm() -> Result<(), KvmError> {
    kvm::open()
        .and_then(|kvm| kvm::create_vm(&kvm))
        .map(drop)
        .map_err(|error| match error {
            kvm::KvmError::NoDevice => KvmError::Missing,
            kvm::KvmError::NoPermission => KvmError::Forbidden,
            other => KvmError::Unusable(other),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_cannot_run_guests_is_told_of_the_lab() {
        for error in [
            KvmError::Missing,
            KvmError::Forbidden,
            KvmError::Unusable(kvm::KvmError::ApiVersion(11)),
        ] {
            let text = error.to_string();
            assert!(text.contains("demo --lab"), "{text}");
        }
    }
}
