//! What can go wrong with a machine.

use crate::kvm::KvmError;
use crate::memory::{LeasePageError, RamError};
use godwit_devices::device::DeviceError;
use godwit_wire::problem::{FieldProblem, Problem};
use std::io;
use std::path::PathBuf;

/// A machine cannot be built, booted, stopped, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM said no.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A file of the boot spec cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// Field of the spec.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else than a file with content has the name.
    #[error("{} {found}", path.display())]
    WrongFile {
        /// Field of the spec.
        field: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The kernel is not what this machine boots.
    #[error("neither a 64-bit Linux bzImage nor an uncompressed x86-64 ELF: {reason}")]
    NotAKernel {
        /// Field of the spec.
        field: &'static str,
        /// What the loader found.
        reason: String,
    },
    /// The kernel alone does not fit.
    #[error(
        "the kernel needs memory up to {needed_bytes:#x} and the machine's first stretch ends at {memory_bytes:#x}"
    )]
    KernelTooLarge {
        /// First address behind what the kernel needs.
        needed_bytes: u64,
        /// First address behind the memory there is.
        memory_bytes: u64,
    },
    /// The kernel takes no command line of that length.
    #[error("the command line has {bytes} bytes and this kernel takes {limit}")]
    CommandLineTooLong {
        /// Length given.
        bytes: usize,
        /// Longest the kernel's header allows.
        limit: usize,
    },
    /// Kernel and initial RAM disk do not fit.
    #[error(
        "the initial RAM disk of {initrd_bytes} bytes does not fit into guest memory behind the kernel"
    )]
    NoRoom {
        /// Size of the initrd.
        initrd_bytes: u64,
    },
    /// The lease page cannot be used.
    #[error("the lease page cannot be used")]
    Lease(#[from] LeasePageError),
    /// The operating system refused something.
    #[error("{what}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A vCPU thread is gone.
    #[error("vCPU {0} does not answer")]
    VcpuGone(u8),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Something the spec names cannot be found on this host.
    #[error("{detail}")]
    Attachment {
        /// Field of the spec.
        field: String,
        /// What is missing.
        detail: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A saved machine that does not fit this one.
    #[error("the saved machine cannot be restored here: {0}")]
    BadState(String),
}

impl MachineError {
    /// Whether the host has no memory for the machine now.
    pub const fn lacks_memory(&self) -> bool {
        matches!(self, Self::Ram(RamError::NotEnough { .. }))
    }

    /// The same as an API problem, with the field at fault and the remedy.
    pub fn problem(&self, prefix: &str) -> Problem {
        let at = |field: &str| format!("{prefix}.{field}");
        let chain = {
            let mut text = self.to_string();
            let mut source = std::error::Error::source(self);
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            text
        };
        match self {
            Self::Kvm(error) => {
                Problem::new(503, "kvm-unavailable", "KVM cannot run this machine", chain)
                    .with_remedy(error.remedy())
            }
            Self::Ram(RamError::NotEnough { .. }) => Problem::invalid(vec![FieldProblem::new(
                at("memory_mib"),
                chain,
                "give the guest less memory or choose a host with more",
            )]),
            Self::Ram(RamError::HugePages { needed, .. }) => {
                Problem::invalid(vec![FieldProblem::new(
                    at("memory_backing"),
                    chain,
                    format!(
                        "reserve more on the host (sysctl vm.nr_hugepages, {} for this guest) or use standard pages",
                        needed.0 / 2
                    ),
                )])
            }
            Self::File { field, .. } => Problem::invalid(vec![FieldProblem::new(
                at(field),
                chain,
                "check that the file exists on this host and may be read",
            )]),
            Self::NotAKernel { field, .. } => Problem::invalid(vec![FieldProblem::new(
                at(field),
                chain,
                "give a kernel as distributions install it (vmlinuz), or an uncompressed vmlinux",
            )]),
            Self::WrongFile { field, .. } => Problem::invalid(vec![FieldProblem::new(
                at(field),
                chain,
                "give the path of a file",
            )]),
            Self::KernelTooLarge { needed_bytes, .. } => Problem::invalid(vec![FieldProblem::new(
                at("memory_mib"),
                chain,
                format!(
                    "give the guest more than {} MiB of memory or use a smaller kernel",
                    needed_bytes.div_ceil(1 << 20)
                ),
            )]),
            Self::CommandLineTooLong { limit, .. } => Problem::invalid(vec![FieldProblem::new(
                at("boot.cmdline"),
                chain,
                format!("keep it at {limit} bytes or less"),
            )]),
            Self::NoRoom { .. } => Problem::invalid(vec![FieldProblem::new(
                at("memory_mib"),
                chain,
                "give the guest more memory or use a smaller initial RAM disk",
            )]),
            Self::Attachment { field, remedy, .. } => {
                Problem::invalid(vec![FieldProblem::new(at(field), chain, *remedy)])
            }
            Self::Device(DeviceError::Held { .. }) => Problem::conflict("device-held", chain)
                .with_remedy("stop the machine that holds it, or let the control plane decide who owns the VM"),
            Self::Device(DeviceError::Host { .. } | DeviceError::Unusable { .. }) => Problem::new(
                422,
                "device-unusable",
                "A device of the machine cannot be had on this host",
                chain,
            ),
            Self::Lease(_) => Problem::invalid(vec![FieldProblem::new(
                "lease",
                chain,
                "give the lease page that this host's agent keeps",
            )]),
            _ => Problem::internal(chain),
        }
    }
}
