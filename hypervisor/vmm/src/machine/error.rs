//! What can go wrong with a machine.

use crate::kvm::KvmError;
use crate::memory::{LeasePageError, RamError};
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
    /// The kernel is not what this machine boots.
    #[error("not an uncompressed 64-bit ELF kernel ({reason})")]
    NotAKernel {
        /// Field of the spec.
        field: &'static str,
        /// What the loader found.
        reason: String,
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
    /// A saved machine that does not fit this one.
    #[error("the saved machine cannot be restored here: {0}")]
    BadState(String),
}

impl MachineError {
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
            Self::File { field, .. } => Problem::invalid(vec![FieldProblem::new(
                at(field),
                chain,
                "check that the file exists on this host and may be read",
            )]),
            Self::NotAKernel { field, .. } => Problem::invalid(vec![FieldProblem::new(
                at(field),
                chain,
                "give a vmlinux (ELF, x86-64), not a bzImage or a compressed file",
            )]),
            Self::NoRoom { .. } => Problem::invalid(vec![FieldProblem::new(
                at("memory_mib"),
                chain,
                "give the guest more memory or use a smaller initial RAM disk",
            )]),
            Self::Lease(_) => Problem::invalid(vec![FieldProblem::new(
                "lease",
                chain,
                "give the lease page that this host's agent keeps",
            )]),
            _ => Problem::internal(chain),
        }
    }
}
