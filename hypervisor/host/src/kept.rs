//! Memory of VMs that have moved away, kept for their return.
//!
//! ```text
//! moved away ──keep──▶ kept ──take: the VM comes home──▶ its new VMM's
//!                        │ too old; the memory is needed; the VM starts afresh; the agent ends
//!                        ▼
//!                     given up
//! ```
//!
//! What is kept is a memfd and nothing else: there is no machine, no vCPU, no disk, and no process that could run the
//! guest. It is content, and never believed to be current: when the VM comes home, its source compares it page by page
//! with what the guest has now. Whatever is lost of it costs time and nothing else. So it belongs to the agent's process
//! alone and is written down nowhere: an agent that ends, however, gives all of it up.
//!
//! It takes only memory that no VM has been promised, and makes way at once for one that starts or arrives.

mod memory;
mod room;

pub(crate) use memory::HeldMemory;

use crate::process::VmmProcess;
use crate::procfs;
use godwit_wire::devices::MemoryBacking;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::KeptMemory;
use room::{Demand, Item, superfluous};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often it is looked at whether what is kept has become too old, or the host short of memory.
const LOOK: Duration = Duration::from_secs(1);

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepPolicy {
    /// For how long; zero keeps nothing.
    pub(crate) keep: Duration,
    /// How much at most.
    pub(crate) most: Option<Bytes>,
    /// Memory that guests may use in all.
    pub(crate) guest_memory: Bytes,
}

/// Memory of one VM that has moved away.
#[derive(Debug)]
pub(crate) struct Kept {
    memory: HeldMemory,
    /// Epoch under which it was here.
    epoch: Epoch,
    size: Mib,
    bytes: Bytes,
    /// The VMM it was used by.
    former: VmmProcess,
    since: Instant,
}

impl Kept {
    /// Memory that `former` had for a VM of `spec` under `epoch`.
    pub(crate) fn new(
        memory: HeldMemory,
        epoch: Epoch,
        spec: &MachineSpec,
        former: VmmProcess,
    ) -> Self {
        Self {
            bytes: memory.resident(),
            memory,
            epoch,
            size: spec.memory_mib,
            former,
            since: Instant::now(),
        }
    }

    /// The VMM that used it. Until that is gone nobody else may.
    pub(crate) const fn former(&self) -> &VmmProcess {
        &self.former
    }

    /// Host memory that it takes.
    pub(crate) const fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// How a VMM finds it as long as this is held.
    pub(crate) fn place(&self) -> Option<KeptMemory> {
        self.memory.place()
    }

    /// The memory alone.
    pub(crate) fn into_memory(self) -> HeldMemory {
        self.memory
    }
}

/// All that is kept on this host.
#[derive(Debug)]
pub(crate) struct KeptMemories {
    policy: KeepPolicy,
    inner: Mutex<Inner>,
    /// Held by whoever gives something up, until the host has it back: who comes next must see that.
    turn: tokio::sync::Mutex<()>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    kept: BTreeMap<VmId, Kept>,
    /// Memory that VMs here have been promised.
    promised: BTreeMap<VmId, Bytes>,
}

impl KeptMemories {
    pub(crate) fn new(policy: KeepPolicy) -> Self {
        Self {
            policy,
            inner: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Takes hold of the memory of a VM that is about to move away, if it shall be kept. Pages of 2 MiB are not: their
    /// pool is small and meant for VMs that are here.
    pub(crate) fn hold(&self, process: &VmmProcess, spec: &MachineSpec) -> Option<HeldMemory> {
        let may_be_kept = spec.devices.memory_backing == MemoryBacking::Standard;
        if self.policy.keep.is_zero() || !may_be_kept {
            return None;
        }
        HeldMemory::of(process)
            .inspect_err(|error| {
                tracing::debug!(pid = process.id().pid, %error, "a guest's memory cannot be held");
            })
            .ok()
            .flatten()
    }

    /// Keeps the memory of a VM that has moved away.
    pub(crate) fn keep(&self, vm: VmId, kept: Kept) {
        tracing::info!(%vm, epoch = %kept.epoch, bytes = %kept.bytes, "the VM's memory is kept for its return");
        let mut inner = self.inner();
        // It has left: its memory is what is kept, and nothing beside that is promised to it.
        inner.promised.remove(&vm);
        inner.kept.insert(vm, kept);
        drop(inner);
        self.changed.notify_one();
    }

    /// The memory of a VM that comes home, where it has `epoch` at its source. What is not of an earlier stay, or not
    /// of this machine, is given up.
    pub(crate) fn take(&self, vm: VmId, epoch: Epoch, spec: &MachineSpec) -> Option<Kept> {
        let kept = self.inner().kept.remove(&vm)?;
        let fits = kept.epoch < epoch
            && kept.size == spec.memory_mib
            && spec.devices.memory_backing == MemoryBacking::Standard;
        if !fits {
            tracing::info!(%vm, here = %kept.epoch, %epoch, size = %kept.size, "kept memory does not fit the VM that comes");
        }
        fits.then_some(kept)
    }

    /// Gives up what is kept of a VM.
    pub(crate) fn forget(&self, vm: VmId) {
        self.forget_before(vm, Epoch(u64::MAX));
    }

    /// Gives up what is kept of a VM from before `epoch`.
    pub(crate) fn forget_before(&self, vm: VmId, epoch: Epoch) {
        let mut inner = self.inner();
        if inner.kept.get(&vm).is_some_and(|kept| kept.epoch < epoch) {
            inner.kept.remove(&vm);
        }
    }

    /// Notes what a VM here may use; `None` when it is not here, or has no machine.
    pub(crate) fn promise(&self, vm: VmId, memory: Option<Mib>) {
        let promised = &mut self.inner().promised;
        match memory {
            Some(memory) => promised.insert(vm, memory.bytes()),
            None => promised.remove(&vm),
        };
    }

    /// A VM is about to take `memory`, of which it has `already` some: what is kept makes way for it. Completes when
    /// the host has that memory back.
    pub(crate) async fn make_room(&self, vm: VmId, memory: Mib, already: Bytes) {
        self.promise(vm, Some(memory));
        let needed = memory.bytes().0.saturating_sub(already.0);
        // What was given up a moment ago may be exactly what it needs.
        if let Err(error) = tokio::task::spawn_blocking(memory::wait_for_given_up).await {
            tracing::warn!(%error, "memory that was given up is not waited for");
        }
        self.shrink(Bytes(needed)).await;
    }

    /// Host memory that is kept.
    pub(crate) fn bytes(&self) -> Bytes {
        held(&self.inner())
    }

    /// Looks after what is kept until the handle is dropped.
    pub(crate) fn watch(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        let memories = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                if memories.bytes() == Bytes(0) {
                    memories.changed.notified().await;
                } else {
                    tokio::select! {
                        () = tokio::time::sleep(LOOK) => {}
                        () = memories.changed.notified() => {}
                    }
                }
                memories.shrink(Bytes(0)).await;
            }
        }))
    }

    /// Gives up what is too old or does not fit any more, with `needed` about to be taken.
    async fn shrink(&self, needed: Bytes) {
        let _turn = self.turn.lock().await;
        if self.inner().kept.is_empty() {
            return;
        }
        let memory = procfs::memory();
        let given_up = self.remove_superfluous(memory, needed);
        if given_up.is_empty() {
            return;
        }
        let gone = tokio::task::spawn_blocking(move || {
            given_up.into_iter().for_each(HeldMemory::give_up);
        });
        if let Err(error) = gone.await {
            tracing::error!(%error, "kept memory could not be given up");
        }
    }

    fn remove_superfluous(&self, memory: procfs::Memory, needed: Bytes) -> Vec<HeldMemory> {
        let mut inner = self.inner();
        let demand = Demand {
            most: self.policy.most,
            guest_memory: self.policy.guest_memory,
            promised: Bytes(inner.promised.values().map(|bytes| bytes.0).sum()),
            held: held(&inner),
            total: memory.total,
            available: memory.available,
            needed,
        };
        let items = inner.kept.iter().map(|(vm, kept)| Item {
            vm: *vm,
            bytes: kept.bytes,
            age: kept.since.elapsed(),
        });
        let given_up = superfluous(items.collect(), self.policy.keep, demand.room());
        let removed = given_up.into_iter().filter_map(|vm| {
            let kept = inner.kept.remove(&vm)?;
            tracing::info!(%vm, bytes = %kept.bytes, age = ?kept.since.elapsed(), room = %demand.room(), "kept memory is given up");
            Some(kept.into_memory())
        });
        removed.collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every critical section leaves the maps whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn held(inner: &Inner) -> Bytes {
    Bytes(inner.kept.values().map(|kept| kept.bytes.0).sum())
}

#[cfg(test)]
pub(crate) mod tests;
