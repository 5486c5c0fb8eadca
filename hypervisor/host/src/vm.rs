//! One VM on this host: one driver task owns everything about it.
//!
//! ```text
//!             StartVm                      StopVm, guest halts
//!   absent ───────────▶ owned, live ───────────────────────────▶ owned, ended ──StartVm──▶ owned, live
//!     ▲ ▲                │    ▲  │ process dies unasked               │   ▲
//!     │ │     migration  │    │  └───────────▶ owned, lost (None) ────┼───┘
//!     │ │     completed  │    │ granted, VMM told                     │
//!     │ └────────────────┘    │                                       │
//!     │  PrepareIncoming   receiving ──refused, failed, cancelled──▶ absent
//!     └────────────────────────────── DELETE, Destroy ◀───────────────┘
//! ```
//!
//! Every change is written to `vm.json` before it is acted on. What fails leaves either the state before it or, where
//! a process may have been half started, nothing: the half is killed. The agent may die at any point; its successor
//! goes on from the record and the processes it finds (see [`adoption`](crate::adoption)).

// These modules are one state machine over several files: each extends the driver by one concern.
mod arriving;
mod attach;
mod driver;
mod handover;
mod ledger;
mod observe;
mod receiving;
mod registry;
mod room;
mod saving;
mod sending;
mod start;
mod stop;
mod upgrade;

#[cfg(test)]
pub(crate) mod tests;

pub(crate) use registry::{Adopted, Context, Registry, adopt};

use godwit_wire::host_api::{
    CancelMigration, PrepareIncoming, SetBalloon, StartOutgoing, StartVm, StopVm, UpgradeVm,
    UpgradedVm, VmCommand, VmReport,
};
use godwit_wire::id::{Epoch, SnapshotId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{SnapshotReport, TakeSnapshot};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{IncomingReady, MigrationBandwidth};
use tokio::sync::oneshot;

/// Where an answer goes; a caller that has gone away does not stop the work.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Problem>>;

/// A disk of a machine that shall be larger.
#[derive(Clone, Debug)]
pub(crate) struct Resize {
    /// Name of the disk in the spec.
    pub(crate) disk: String,
    pub(crate) bytes: Bytes,
}

/// What a driver can be told.
#[derive(Debug)]
pub(crate) enum Command {
    Start(StartVm, Reply<VmReport>),
    Stop(StopVm, Reply<VmReport>),
    Pause(VmCommand, Reply<VmReport>),
    Resume(VmCommand, Reply<VmReport>),
    Balloon(SetBalloon, Reply<VmReport>),
    Prepare(PrepareIncoming, Reply<IncomingReady>),
    Send(StartOutgoing, Reply<VmReport>),
    Cancel(CancelMigration, Reply<VmReport>),
    /// A migration away from here shall send at another pace.
    Bandwidth(MigrationBandwidth, Reply<VmReport>),
    /// The machine shall run in a VMM of this agent's program.
    Upgrade(UpgradeVm, Reply<UpgradedVm>),
    /// A disk of the machine shall be larger.
    Resize(Resize, Reply<()>),
    /// The machine shall be saved.
    Snapshot((SnapshotId, TakeSnapshot), Reply<SnapshotReport>),
    /// Kill what has at most this epoch and forget it.
    Destroy(Epoch, Reply<()>),
    /// The server's order after a lease had run out.
    ResumeAfterLease(Epoch),
    /// The agent ends and takes its VMMs along.
    KillProcess(Reply<()>),
}
