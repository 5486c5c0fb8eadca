//! What can go wrong with KVM.

use std::io;

/// A failed KVM call, with what was attempted.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error("/dev/kvm does not exist")]
    NoDevice,
    /// `/dev/kvm` may not be opened.
    #[error("no permission to open /dev/kvm")]
    NoPermission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// Not the stable API.
    #[error("KVM speaks API version {0} instead of 12")]
    ApiVersion(i32),
    /// A capability every machine needs is missing.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// An ioctl failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A model-specific register does not take the value it had at the source.
    #[error("MSR {index:#x} cannot be set to {wanted:#x} on this host (it stays {present:#x?})")]
    Msr {
        /// Register.
        index: u32,
        /// Value the guest had.
        wanted: u64,
        /// Value on this host, if readable.
        present: Option<u64>,
    },
    /// The vCPU's registers contradict each other, see [`super::is_settled`].
    #[error("a vCPU stands where its state cannot be read")]
    Unsettled,
    /// The host's TSC runs at another rate and cannot be scaled.
    #[error(
        "the guest's TSC runs at {guest_khz} kHz, the host's at {host_khz} kHz, and it cannot be scaled"
    )]
    TscRate {
        /// Rate the guest knows.
        guest_khz: u32,
        /// Rate of this host.
        host_khz: u32,
    },
}

impl KvmError {
    pub(crate) fn open(error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => Self::NoDevice,
            libc::EACCES | libc::EPERM => Self::NoPermission,
            errno => Self::Open(io::Error::from_raw_os_error(errno)),
        }
    }

    pub(crate) fn during(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            call,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }

    /// What the operator can do about it.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::NoDevice => {
                "enable hardware virtualization in the firmware and load kvm_intel or kvm_amd (modprobe), or run on a host that has it"
            }
            Self::NoPermission => {
                "run as root or add the user to the group that owns /dev/kvm (usually `kvm`)"
            }
            Self::TscRate { .. } => {
                "choose a target with the same TSC rate or one whose KVM can scale it"
            }
            Self::Msr { .. } => {
                "choose a target with the same CPU, or a lower CPU baseline for the VM"
            }
            Self::Unsettled => "let the machine run for a moment and try again",
            _ => {
                "check the kernel log (dmesg) and the kernel's version; Linux 5.10 or newer is needed"
            }
        }
    }
}
