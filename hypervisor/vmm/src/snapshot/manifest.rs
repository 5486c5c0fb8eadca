//! What a snapshot says about itself, and why one is refused.

use crate::kvm::KvmError;
use crate::machine::MachineError;
use crate::memory::RamError;
use godwit_wire::cpu::GuestCpu;
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::problem::{FieldProblem, Problem};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Version of the format.
pub(super) const VERSION: u32 = 1;
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const STATE: &str = "state.cbor";
pub(super) const MEMORY: &str = "memory";
pub(super) const PIECES: &str = "pieces";
/// Unit of checksums and of loading.
pub(super) const PIECE_BYTES: u64 = 1 << 20;
/// Bytes of one checksum in the table.
pub(super) const CHECKSUM_BYTES: usize = 16;
/// Longest manifest that is read.
pub(super) const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// The machine.
    pub spec: MachineSpec,
    /// CPU of the host it was taken on.
    pub cpu: CpuFacts,
    /// What the guest saw of it.
    pub guest_cpu: GuestCpu,
    /// When guest time was sampled: nanoseconds since 1970.
    pub saved_at_unix_ns: u64,
    /// vCPUs and devices.
    pub state: FileSeal,
    /// Guest memory; its content is sealed piece by piece.
    pub memory_bytes: u64,
    /// Checksums of the pieces.
    pub pieces: FileSeal,
    /// The file with guest memory as it was left. A later addition: without it the file is not known again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_file: Option<FileIdentity>,
}

/// What changes when a file is written, replaced or copied. The kernel sets the change time; no call sets it to a
/// time of the caller's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Number on its file system.
    pub inode: u64,
    /// Time of the last change of content or attributes: nanoseconds since 1970.
    pub changed_unix_ns: u64,
}

/// Size and XXH3-128 of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSeal {
    /// Length.
    pub bytes: u64,
    /// 32 hex digits.
    pub xxh3: String,
}

/// The manifest as it is in its file. The seal is of its text, so that fields which a later version adds are covered
/// and yet no obstacle.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    manifest: Box<RawValue>,
    seal: String,
}

/// Only what tells versions apart, which every version has.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

pub(super) fn checksum(bytes: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes))
}

impl FileSeal {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            xxh3: checksum(bytes),
        }
    }
}

impl FileIdentity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        let (seconds, nanoseconds) = (metadata.ctime() as u64, metadata.ctime_nsec() as u64);
        Self {
            inode: metadata.ino(),
            changed_unix_ns: seconds.saturating_mul(1_000_000_000) + nanoseconds,
        }
    }
}

impl Manifest {
    /// The manifest's file.
    pub(super) fn encode(self) -> Result<Vec<u8>, SnapshotError> {
        let unreadable = |error: serde_json::Error| SnapshotError::Encode(error.to_string());
        let manifest = serde_json::value::to_raw_value(&self).map_err(unreadable)?;
        let seal = checksum(manifest.get().as_bytes());
        serde_json::to_vec(&Sealed { manifest, seal }).map_err(unreadable)
    }

    /// Reads a manifest's file and believes nothing in it that its seal does not cover.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let damaged = |detail: String| SnapshotError::Damaged {
            file: MANIFEST,
            detail,
        };
        let unreadable = |error: serde_json::Error| damaged(error.to_string());
        let sealed: Sealed = serde_json::from_slice(bytes).map_err(unreadable)?;
        let text = sealed.manifest.get();
        let VersionOnly { version } = serde_json::from_str(text).map_err(unreadable)?;
        if version != VERSION {
            return Err(SnapshotError::Version { found: version });
        }
        if checksum(text.as_bytes()) != sealed.seal {
            return Err(damaged("it is not what was written".into()));
        }
        serde_json::from_str(text).map_err(unreadable)
    }
}

/// A snapshot cannot be taken or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The place is taken.
    #[error("{} exists and is not an empty directory", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be written or read.
    #[error("{what} {}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no manifest.
    #[error("{} has no manifest: it is no snapshot, or one that was never finished", .0.display())]
    Unfinished(PathBuf),
    /// Written by another version.
    #[error("it has format {found} and this program knows {VERSION}")]
    Version {
        /// The version it names.
        found: u32,
    },
    /// A file is not what was written.
    #[error("its file {file} is damaged: {detail}")]
    Damaged {
        /// Which.
        file: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// A piece of memory is not what was written.
    #[error("guest memory at offset {offset:#x} of its file memory is damaged")]
    DamagedMemory {
        /// Where in the file.
        offset: u64,
    },
    /// Guest memory cannot be brought in.
    #[error("{what}")]
    Fill {
        /// What is in the way.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something cannot be written down.
    #[error("the machine cannot be encoded: {0}")]
    Encode(String),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The dirty log.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl SnapshotError {
    /// What is wrong, and everything that led to it.
    pub(crate) fn chain(&self) -> String {
        let mut chain = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            chain = format!("{chain}: {error}");
            source = error.source();
        }
        chain
    }

    /// The same as an API problem.
    pub fn problem(&self) -> Problem {
        let chain = self.chain();
        let directory = |remedy: &str| {
            Problem::invalid(vec![FieldProblem::new("directory", chain.clone(), remedy)])
        };
        match self {
            Self::NotEmpty(_) => directory("choose a directory that does not exist yet"),
            Self::Io { .. } => {
                directory("check that the directory can be written or read and has room")
            }
            Self::Unfinished(_) => directory("take the snapshot again"),
            Self::Version { .. } => directory("restore it with the program that took it"),
            Self::Damaged { .. } | Self::DamagedMemory { .. } => {
                directory("restore from a sound copy")
            }
            Self::Machine(error) => error.problem("spec"),
            Self::Fill { .. } | Self::Encode(_) | Self::Ram(_) | Self::Kvm(_) => {
                Problem::internal(chain)
            }
        }
    }
}
