//! Why a host does not take a VM: every rejection has a name, its operands and a remedy.

use crate::model::HostState;
use godwit_wire::id::{HostId, PoolId};
use godwit_wire::machine::CpuMismatch;
use godwit_wire::unit::{Bytes, Mib};
use serde::{Deserialize, Serialize};

/// A host and why it was turned down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRejection {
    /// Which host.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// Why not.
    pub rejection: Rejection,
}

/// Why a host does not take a VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Rejection {
    /// It takes no VMs in its state.
    #[error("the host is {}", state.name())]
    NotUp {
        /// Its state.
        state: HostState,
    },
    /// It has missed heartbeats; it may be about to become unreachable.
    #[error("heartbeats of the host are missing")]
    Silent,
    /// The VM is there already.
    #[error("the VM is on this host already")]
    AlreadyHere,
    /// It does not have enough memory left for guests.
    #[error("{needed} needed, {free} of {capacity} free")]
    Memory {
        /// Guest memory and overhead of the VM.
        needed: Mib,
        /// Not promised to others.
        free: Mib,
        /// For guests in all.
        capacity: Mib,
    },
    /// Its cores would be promised too often.
    #[error("{needed} vCPUs needed, {committed} of {limit} promised already")]
    Vcpus {
        /// Of the VM.
        needed: u32,
        /// Promised already.
        committed: u32,
        /// Cores × overcommit.
        limit: u32,
    },
    /// It has as many VMs as a host may have.
    #[error("the host has {count} VMs, the limit is {limit}")]
    TooManyVms {
        /// VMs it has.
        count: usize,
        /// Most a host may have.
        limit: usize,
    },
    /// Its CPU cannot run the guest.
    #[error("{mismatch}")]
    Cpu {
        /// How it differs.
        mismatch: CpuMismatch,
    },
    /// It does not have a storage pool that the VM's disks are in.
    #[error("the host does not have the storage pool {name}")]
    NoPool {
        /// Which pool.
        pool: PoolId,
        /// Its name.
        name: String,
    },
    /// It does not have a storage pool that the running VM's disks are in, and nobody asked for them to move along.
    #[error(
        "the host does not have the storage pool {name}, and disks do not move along unless asked to"
    )]
    DisksStay {
        /// Which pool.
        pool: PoolId,
        /// Its name.
        name: String,
    },
    /// Disks shall move along into a pool that it does not have.
    #[error("the host has no storage pool {name} that disks could move to")]
    NoSuchPool {
        /// What was asked for.
        name: String,
    },
    /// None of its storage pools has room for a disk that would move along.
    #[error(
        "no storage pool of the host takes {disk} of {needed}: the most that is free is {free}"
    )]
    NoRoomForDisk {
        /// Name of the disk in the machine.
        disk: String,
        /// Its whole size.
        needed: Bytes,
        /// Free in the roomiest pool that may be used.
        free: Bytes,
    },
    /// A disk would have to move along and cannot.
    #[error("the host does not have the storage pool {name}, and {disk} cannot move along: {tie}")]
    DiskTied {
        /// Name of the disk in the machine.
        disk: String,
        /// Name of the pool it is in.
        name: String,
        /// What holds it.
        tie: DiskTie,
    },
    /// It has the storage pool and cannot use it.
    #[error("the host cannot use the storage pool {name}: {trouble}")]
    PoolInTrouble {
        /// Which pool.
        pool: PoolId,
        /// Its name.
        name: String,
        /// Why.
        trouble: String,
    },
    /// It failed with this VM a moment ago.
    #[error("an attempt on this host has just failed")]
    JustFailed,
}

/// What holds a disk in its pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "tie", rename_all = "snake_case")]
pub enum DiskTie {
    /// Another VM has it too.
    #[error("{vm} has it too")]
    Shared {
        /// Name of that VM.
        vm: String,
    },
    /// The VM only reads it; what is only read is not copied.
    #[error("it is attached for reading only")]
    ReadOnly,
    /// It is not known how large it is.
    #[error("it is not ready")]
    NotReady,
}

impl Rejection {
    /// What the operator can do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::NotUp { state: HostState::Joining } => "wait for the host's first heartbeat".into(),
            Self::NotUp { state: HostState::Cordoned } => "uncordon the host".into(),
            Self::NotUp { state: HostState::Maintenance } => "finish the host's maintenance".into(),
            Self::NotUp { .. } | Self::Silent => {
                "bring the host or its agent back, or mend the network between it and the server".into()
            }
            Self::AlreadyHere => "choose another host".into(),
            Self::Memory { needed, free, .. } => {
                format!("free {} on the host, or make the VM smaller", Mib(needed.0.saturating_sub(free.0)))
            }
            Self::Vcpus { .. } => "move a VM off the host, or give the VM fewer vCPUs".into(),
            Self::TooManyVms { .. } => "move a VM off the host".into(),
            Self::Cpu { mismatch: CpuMismatch::LevelTooLow { offered, .. } } => {
                format!("set the VM's CPU to {} (it must be off for that)", offered.name())
            }
            Self::Cpu { mismatch: CpuMismatch::SignatureDiffers { .. } } => {
                "stop the VM and start it there, or give it a named CPU level so that it can move live".into()
            }
            Self::Cpu { .. } => {
                "choose a host with the same kind of CPU, or stop the VM and start it there".into()
            }
            Self::NoPool { name, .. } => {
                format!("move the disk to a shared pool, or give the host the directory of {name}")
            }
            Self::DisksStay { name, .. } => format!(
                "move the VM with its disks (`godwit vm migrate NAME --with-disks`), move the disk to a shared pool, or give the host the directory of {name}"
            ),
            Self::NoSuchPool { .. } => {
                "name a pool that the host has, or leave the pool out".into()
            }
            Self::NoRoomForDisk { needed, free, .. } => format!(
                "make room for {} in a storage pool of the host",
                Bytes(needed.0.saturating_sub(free.0))
            ),
            Self::DiskTied { name, .. } => {
                format!("move the disk to a shared pool, or give the host the directory of {name}")
            }
            Self::PoolInTrouble { .. } => "mend the pool's file system on the host".into(),
            Self::JustFailed => "look at the event of that failure, mend its cause and try again".into(),
        }
    }
}

/// All rejections in one line, for problem details and events.
pub fn summary(rejections: &[HostRejection]) -> String {
    if rejections.is_empty() {
        return "the pool has no hosts".into();
    }
    rejections
        .iter()
        .map(|r| format!("{}: {}", r.host_name, r.rejection))
        .collect::<Vec<_>>()
        .join("; ")
}

/// The remedies, each once.
pub fn remedies(rejections: &[HostRejection]) -> String {
    if rejections.is_empty() {
        return "join a host".into();
    }
    let mut lines: Vec<String> = Vec::new();
    for rejected in rejections {
        let remedy = format!("{}: {}", rejected.host_name, rejected.rejection.remedy());
        if !lines.contains(&remedy) {
            lines.push(remedy);
        }
    }
    lines.join("; ")
}
