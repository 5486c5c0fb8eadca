//! A virtual machine: what is wanted of it and who owns it.

use super::Placed;
use godwit_wire::host_api::LeasePolicy;
use godwit_wire::id::{Epoch, Generation, HostId, MaintenanceId, MigrationId, OperationId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::migration::PostCopy;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A VM as stored. `owner` and `epoch` change only by compare-and-swap (DESIGN: never twice, barrier 1):
///
/// ```text
/// owner None ── start: epoch+1 ──▶ owner H ── migration commit, failover: epoch+1 ──▶ owner T
///      ▲                              │
///      └──── stopped, proven gone ────┘ (epoch stays)
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Identity.
    pub id: VmId,
    /// Unique among the living.
    pub name: String,
    /// The machine.
    pub spec: MachineSpec,
    /// Whether it stops when its host loses contact.
    pub lease: LeasePolicy,
    /// What happens to it when its host is maintained.
    pub maintenance_policy: MaintenancePolicy,
    /// Whether a migration may let the guest go ahead of its memory, whoever asks for it.
    #[serde(default)]
    pub post_copy: PostCopyPermission,
    /// What the operator wants.
    pub intent: PowerIntent,
    /// The only host that may run it.
    pub owner: Option<HostId>,
    /// Grows by one with every gain of an owner.
    pub epoch: Epoch,
    /// Hosts it was taken from while they were silent, with the epoch it had there: a command may still reach
    /// them, and until they have confirmed its destruction they are told to destroy it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_behind: BTreeMap<HostId, Epoch>,
    /// Latest generation given to a command.
    pub generation: Generation,
    /// Where it belongs: where it was first placed, or last moved to by hand.
    pub home: Option<HostId>,
    /// The operation that is changing it; nobody else may meanwhile.
    pub operation: Option<OperationId>,
    /// The maintenance that stopped it and will start it again; until then it stays off.
    #[serde(default)]
    pub held_by: Option<MaintenanceId>,
    /// The migration under way.
    pub migration: Option<MigrationId>,
    /// Why it is not as wanted.
    pub trouble: Option<Trouble>,
    /// CPU signature of the host it was booted on; binds `host` baseline guests.
    pub booted_on: Option<String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
}

/// What the operator wants a VM to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerIntent {
    /// Run.
    Running,
    /// Be off.
    Stopped,
    /// Exist, but stand still.
    Paused,
}

impl PowerIntent {
    /// Whether a VMM process is wanted.
    pub const fn wants_vmm(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// What to do with a VM whose host is maintained. Whatever the policy (but `block`), a VM that can move live
/// does; the policy says what happens to one that cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaintenancePolicy {
    /// Move live, or the maintenance is blocked.
    #[default]
    Migrate,
    /// Else stop it and start it on another host.
    RestartElsewhere,
    /// Else stop it and start it again when the maintenance is over.
    StopAndReturn,
    /// Never touch it: the operator must deal with it first.
    Block,
}

/// Whether migrations of a VM may use post-copy. Until the memory of a guest that went ahead has followed, the loss of
/// either host loses the running guest; there are guests that nobody may expose to that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostCopyPermission {
    /// Those that are asked to.
    #[default]
    Allowed,
    /// None, whoever asks.
    Forbidden,
}

impl PostCopyPermission {
    /// What is left of a policy's wish.
    pub const fn grant(self, asked: PostCopy) -> PostCopy {
        match self {
            Self::Allowed => asked,
            Self::Forbidden => PostCopy::Forbidden,
        }
    }
}

/// Why a VM is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Trouble {
    /// It could not be started.
    StartFailed {
        /// Why.
        reason: String,
        /// Attempts in a row.
        attempts: u32,
        /// Whether the controller tries again.
        retry: Retry,
    },
    /// No host takes it; tried again whenever the pool changes.
    NoRoom {
        /// Every host with its rejection.
        reason: String,
    },
    /// The guest stopped by itself.
    Halted,
}

/// Whether the controller tries again by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// After a pause that grows with the attempts.
    Later,
    /// Only the operator does.
    Never,
}

/// What a VM is doing, put together from its record and what its host says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Wanted, but no host has it yet.
    Pending,
    /// Being started.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// On its way to another host.
    Migrating,
    /// Being stopped.
    Stopping,
    /// Off.
    Stopped,
    /// Not as wanted, and the controller will not change that by itself.
    Failed,
    /// Its host is silent.
    Unreachable,
    /// Its host is silent and it may not be started elsewhere without proof that the host is off.
    AwaitingFence,
}

impl Vm {
    /// Gives the VM to `host` under the next epoch.
    pub fn give_to(&mut self, host: HostId) {
        self.owner = Some(host);
        self.epoch = self.epoch.next();
    }

    /// Takes the VM from its owner without having heard that nothing of it is left there.
    pub fn leave_behind(&mut self) {
        if let Some(owner) = self.owner.take() {
            self.left_behind.insert(owner, self.epoch);
        }
    }

    /// Where the next command goes, and the counters it is sent with; `None` when nobody has the VM.
    pub fn address_next(&mut self) -> Option<Placed> {
        Some(Placed {
            host: self.owner?,
            epoch: self.epoch,
            generation: self.next_generation(),
        })
    }

    /// The generation for the next command; a repeated command keeps the one it was given.
    pub fn next_generation(&mut self) -> Generation {
        self.generation = self.generation.next();
        self.generation
    }
}
