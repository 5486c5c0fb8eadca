//! All drivers of this agent: who asks for a VM finds its driver here.

use super::driver::Driver;
use super::ledger::unwritable;
use super::{Command, Reply};
use crate::args::PortRange;
use crate::board::Board;
use crate::control::ControlPlane;
use crate::kept::KeptMemories;
use crate::network::Networks;
use crate::process::VmmProcess;
use crate::record::{StateDirectory, VmRecord};
use crate::storage::Storage;
use crate::sys::AfterAgent;
use godwit_wire::id::{Epoch, HostId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::VmmInfo;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

/// Commands that may wait for one VM; more are refused.
pub(super) const MAX_WAITING_COMMANDS: usize = 32;

/// What every driver of this agent shares.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) host: HostId,
    pub(crate) state: StateDirectory,
    pub(crate) boot_id: Uuid,
    pub(crate) program: PathBuf,
    pub(crate) after_agent: AfterAgent,
    /// Where VMMs listen for incoming migrations.
    pub(crate) migration_address: IpAddr,
    /// On which ports; on any free one if nothing is said.
    pub(crate) migration_ports: Option<PortRange>,
    pub(crate) control: ControlPlane,
    pub(crate) board: Board,
    pub(crate) storage: Arc<Storage>,
    pub(crate) networks: Arc<Networks>,
    pub(crate) kept: Arc<KeptMemories>,
    /// Where drivers run.
    pub(crate) runtime: tokio::runtime::Handle,
}

/// All drivers of this agent.
#[derive(Debug)]
pub(crate) struct Registry {
    context: Arc<Context>,
    drivers: Mutex<Drivers>,
}

#[derive(Debug, Default)]
pub(super) struct Drivers {
    pub(super) by_vm: BTreeMap<VmId, Handle>,
    /// How many have ended: a fence read before one did may be out of date.
    pub(super) ended: u64,
}

#[derive(Debug)]
pub(super) struct Handle {
    pub(super) inbox: mpsc::Sender<Command>,
    /// Cuts short whatever the driver is waiting for.
    pub(super) doom: watch::Sender<Doom>,
    #[cfg(test)]
    pub(super) task: tokio::task::JoinHandle<()>,
}

/// Orders to destroy that were given.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Doom {
    /// How many.
    pub(super) orders: u64,
    /// Highest epoch that must go.
    pub(super) epoch: Epoch,
}

impl Registry {
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self {
            context,
            drivers: Mutex::new(Drivers::default()),
        })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Has a command carried out by the VM's driver, which is started if there is none.
    pub(crate) async fn ask<T>(
        self: &Arc<Self>,
        vm: VmId,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, Problem> {
        let (reply, answer) = oneshot::channel();
        self.tell(vm, command(reply))?;
        answer
            .await
            .unwrap_or_else(|_| Err(Problem::internal(format!("the driver of VM {vm} ended"))))
    }

    /// Hands a command to the VM's driver.
    pub(crate) fn tell(self: &Arc<Self>, vm: VmId, command: Command) -> Result<(), Problem> {
        let mut drivers = self.drivers();
        while !drivers.by_vm.contains_key(&vm) {
            let ended = drivers.ended;
            drop(drivers);
            // The disk is not waited for under the lock.
            let fence = self.context.state.read_fence(vm);
            let fence = fence.map_err(|error| unwritable(&error))?;
            drivers = self.drivers();
            if drivers.ended == ended
                && let Entry::Vacant(place) = drivers.by_vm.entry(vm)
            {
                place.insert(Driver::spawn(self, vm, fence.unwrap_or_default(), None));
            }
        }
        let handle = drivers
            .by_vm
            .get(&vm)
            .expect("it was there or has just been inserted, under this lock");
        let doomed = match &command {
            Command::Destroy(epoch, _) => Some(*epoch),
            _ => None,
        };
        handle
            .inbox
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(_) => {
                    let detail = format!("{MAX_WAITING_COMMANDS} commands are waiting for VM {vm}");
                    Problem::new(503, "busy", "Busy", detail)
                }
                TrySendError::Closed(_) => {
                    Problem::internal(format!("the driver of VM {vm} has failed"))
                        .with_remedy("restart the agent: its VMs run on")
                }
            })?;
        if let Some(epoch) = doomed {
            handle.doom.send_modify(|doom| {
                *doom = Doom {
                    orders: doom.orders + 1,
                    epoch: doom.epoch.max(epoch),
                };
            });
        }
        Ok(())
    }

    /// VMs with a driver.
    pub(crate) fn vms(&self) -> Vec<VmId> {
        self.drivers().by_vm.keys().copied().collect()
    }

    /// As if the agent had been killed: no driver does anything any more.
    #[cfg(test)]
    pub(crate) async fn abort_drivers(&self) {
        self.drivers()
            .by_vm
            .values()
            .for_each(|handle| handle.task.abort());
        while !self
            .drivers()
            .by_vm
            .values()
            .all(|handle| handle.task.is_finished())
        {
            tokio::task::yield_now().await;
        }
    }

    pub(super) fn drivers(&self) -> MutexGuard<'_, Drivers> {
        // Every critical section leaves the map whole.
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VM that a former agent has left.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) record: VmRecord,
    /// Its process, if it lives.
    pub(crate) process: Option<VmmProcess>,
    /// What its VMM says, if it answers.
    pub(crate) info: Option<Box<VmmInfo>>,
}

/// Starts the driver of a VM that a former agent has left.
pub(crate) fn adopt(registry: &Arc<Registry>, adopted: Adopted) {
    let (vm, fence) = (adopted.record.vm, adopted.record.fence);
    let handle = Driver::spawn(registry, vm, fence, Some(adopted));
    registry.drivers().by_vm.insert(vm, handle);
}
