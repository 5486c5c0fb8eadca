//! The pool as planners see it: small values that can be changed step by step while a plan is made.

use crate::model::limits::VCPUS_PER_CORE;
use crate::model::{DisksOnMove, HostState, Liveness, Snapshot, Vm};
use crate::plan::along::{Along, PoolPicture, along};
use crate::view::{Observed, View, attachments, vm_memory};
use godwit_wire::host_api::MAX_VMS_PER_HOST;
use godwit_wire::id::{HostId, PoolId, VmId};
use godwit_wire::machine::{CpuBaseline, CpuFacts};
use godwit_wire::storage::PoolReport;
use godwit_wire::unit::{Bytes, Mib};
use std::collections::BTreeMap;

/// A host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPicture {
    /// Which.
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// What it is to the pool.
    pub state: HostState,
    /// Whether its heartbeats come as they should.
    pub heard: bool,
    /// Its CPU.
    pub cpu: CpuFacts,
    /// Logical CPUs.
    pub cores: u32,
    /// Memory for guests.
    pub memory: Mib,
    /// Memory promised.
    pub memory_committed: Mib,
    /// vCPUs promised.
    pub vcpus_committed: u32,
    /// VMs it has or is about to receive.
    pub vms: usize,
    /// Busy share of all cores together, 0 to 100.
    pub cpu_percent: f64,
    /// Storage pools it sees.
    pub pools: BTreeMap<PoolId, PoolPicture>,
}

/// What placement needs to know of a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Which.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Memory with overhead.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u32,
    /// CPU level.
    pub baseline: CpuBaseline,
    /// Signature of the CPU it must go on seeing; `None` when it boots.
    pub running_on: Option<String>,
    /// Where it is.
    pub here: Option<HostId>,
    /// CPU it uses, in percent of one core.
    pub cpu_percent: f64,
    /// Storage pools its disks are in, by name.
    pub pools: BTreeMap<PoolId, String>,
    /// What may move along, where the host does not see those pools; `None` when the disks stay.
    pub along: Option<Along>,
}

/// All hosts.
pub type Hosts = BTreeMap<HostId, HostPicture>;

impl HostPicture {
    /// Memory not promised to anyone.
    pub fn memory_free(&self) -> Mib {
        Mib(self.memory.0.saturating_sub(self.memory_committed.0))
    }

    /// Most vCPUs it may promise.
    pub fn vcpu_limit(&self) -> u32 {
        self.cores.saturating_mul(VCPUS_PER_CORE)
    }

    /// Most VMs it may have.
    pub const fn vm_limit(&self) -> usize {
        MAX_VMS_PER_HOST
    }

    /// The picture after the VM has come.
    pub fn add(&mut self, demand: &Demand) {
        self.memory_committed = Mib(self.memory_committed.0 + demand.memory.0);
        self.vcpus_committed += demand.vcpus;
        self.vms += 1;
        self.cpu_percent += demand.cpu_percent / f64::from(self.cores.max(1));
    }

    /// The picture after the VM has left.
    pub fn remove(&mut self, demand: &Demand) {
        self.memory_committed = Mib(self.memory_committed.0.saturating_sub(demand.memory.0));
        self.vcpus_committed = self.vcpus_committed.saturating_sub(demand.vcpus);
        self.vms = self.vms.saturating_sub(1);
        self.cpu_percent =
            (self.cpu_percent - demand.cpu_percent / f64::from(self.cores.max(1))).max(0.0);
    }
}

fn pools(observed: &Observed, promised: &BTreeMap<PoolId, Bytes>) -> BTreeMap<PoolId, PoolPicture> {
    let picture = |report: &PoolReport| PoolPicture {
        name: report.name.clone(),
        trouble: report.trouble.clone(),
        free: Bytes(
            report
                .free_bytes
                .0
                .saturating_sub(promised.get(&report.pool).map_or(0, |bytes| bytes.0)),
        ),
    };
    let reports = observed.pools.iter();
    reports
        .map(|report| (report.pool, picture(report)))
        .collect()
}

/// Room promised to disks that are on their way into a pool. What of them is there already counts twice, which errs on
/// the safe side.
fn promised(view: &View) -> BTreeMap<PoolId, Bytes> {
    let mut promised: BTreeMap<PoolId, Bytes> = BTreeMap::new();
    for disk in view.open_migrations().flat_map(|m| &m.disks) {
        let bytes = promised.entry(disk.to).or_default();
        *bytes = Bytes(bytes.0.saturating_add(disk.bytes.0));
    }
    promised
}

/// All hosts of a view.
pub fn hosts(view: &View) -> Hosts {
    let promised = promised(view);
    let picture = |id: HostId| {
        let host = view.hosts.get(&id)?;
        let committed = view.committed(id);
        let observed = view.observed.get(&id);
        let heard = observed.is_some_and(|o| o.heard_at.is_some() && o.liveness == Liveness::Up);
        Some(HostPicture {
            id,
            name: host.name().to_owned(),
            state: view.host_state(host),
            heard,
            cpu: host.facts.cpu.clone(),
            cores: host.facts.cores,
            memory: host.facts.guest_memory_mib,
            memory_committed: committed.memory_mib,
            vcpus_committed: committed.vcpus,
            vms: committed.vms,
            cpu_percent: view.host_usage(id).cpu_percent,
            pools: observed
                .map(|observed| pools(observed, &promised))
                .unwrap_or_default(),
        })
    };
    view.hosts
        .keys()
        .filter_map(|id| Some((*id, picture(*id)?)))
        .collect()
}

/// A VM that boots: it may see whatever CPU it finds.
pub fn booting(view: &View, vm: &Vm) -> Demand {
    Demand {
        vm: vm.id,
        name: vm.name.clone(),
        memory: vm_memory(vm),
        vcpus: u32::from(vm.spec.vcpus),
        baseline: vm.spec.cpu,
        running_on: None,
        here: None,
        cpu_percent: 0.0,
        pools: attachments(&vm.spec)
            .map(|attached| (attached.pool, view.pool_name(attached.pool)))
            .collect(),
        along: None,
    }
}

/// A VM that goes on from where it was saved: with the CPU it had, on a host that sees the snapshot.
pub fn restoring(view: &View, vm: &Vm, snapshot: &Snapshot) -> Demand {
    let mut demand = booting(view, vm);
    demand.running_on = snapshot.booted_on.clone();
    let pool = snapshot.pool;
    demand.pools.insert(pool, view.pool_name(pool));
    demand
}

/// A VM that moves while it runs.
pub fn moving(view: &View, vm: &Vm) -> Demand {
    Demand {
        running_on: vm.booted_on.clone(),
        here: vm.owner,
        cpu_percent: view.vm_usage(vm).cpu_percent,
        ..booting(view, vm)
    }
}

/// A VM that moves while it runs, its disks with it if they may.
pub fn moving_with(view: &View, vm: &Vm, disks: &DisksOnMove) -> Demand {
    Demand {
        along: along(view, vm, disks),
        ..moving(view, vm)
    }
}
