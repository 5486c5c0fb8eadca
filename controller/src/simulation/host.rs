//! A host: an agent that heartbeats, and VMMs that watch the lease by themselves.
//!
//! It is adversarial where the protocol allows it: a VMM stops as late as it may after its lease has ended.

mod agent;
mod disks;
mod faults;
mod handover;
mod migration;

pub(super) use faults::Way;

use super::SimHosts;
use super::crash::Life;
use super::storage::SimPool;
use crate::agents::Agents;
use crate::drive::host_driver::Duplex;
use faults::Failures;
use godwit_wire::host_api::{
    HostFacts, LeasePolicy, SetBalloon, StartVm, StopVm, UpgradeOutcome, UpgradeVm, UpgradedVm,
    VmCommand, VmReport,
};
use godwit_wire::id::{DiskId, Epoch, Generation, HostId, PoolId, SuccessionId, VmId};
use godwit_wire::migration::{MigrationPhase, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::succession::SuccessionBlackout;
use godwit_wire::unit::Bytes;
use godwit_wire::usage::VmUsage;
use godwit_wire::vmm_api::{
    DirtyRate, DirtyRateRequest, MigrationBandwidth, PauseReason, StopReason, VmmState,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use uuid::Uuid;

/// A VMM stops this long after its lease has ended: just within [`godwit_wire::lease::STOP_TIME`].
const STOPS_LATE: Duration = Duration::from_millis(1_900);

/// The plug that hosts talk to a server through.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    plugged: Arc<Mutex<Option<Plugged>>>,
    frozen: Arc<watch::Sender<bool>>,
}

type Plugged = (Agents, Arc<Life>);

impl Server {
    pub(super) fn plug(&self, agents: Agents, life: Arc<Life>) {
        *self.plugged.lock().unwrap() = Some((agents, life));
    }

    pub(super) fn unplug(&self) {
        *self.plugged.lock().unwrap() = None;
    }

    pub(super) fn get(&self) -> Option<Plugged> {
        self.plugged
            .lock()
            .unwrap()
            .clone()
            .filter(|(_, life)| !life.is_over())
    }
}

#[derive(Clone, Debug)]
struct SimVm {
    epoch: Epoch,
    generation: Generation,
    state: Option<VmmState>,
    lease: LeasePolicy,
    migration: Option<MigrationStatus>,
    /// Where it finds its disks.
    disks: Vec<(PoolId, DiskId)>,
    successions: BTreeSet<SuccessionId>,
}

#[derive(Debug)]
struct State {
    facts: HostFacts,
    vms: BTreeMap<VmId, SimVm>,
    fence: BTreeMap<VmId, Epoch>,
    /// Starts up to this epoch come too late: it was told to destroy them.
    closed: BTreeMap<VmId, Epoch>,
    obeyed: u64,
    /// Starts that are on their way, for as long as they are held up.
    held_up: Option<Vec<(VmId, StartVm)>>,
    lease_until: Option<Instant>,
    sequence: u64,
    incarnation: Uuid,
    refuses_starts: bool,
    refuses_destructions: Option<Problem>,
    destructions_refused: usize,
    hides: bool,
    /// Guests that could not go on because memory they had gone ahead of was given up.
    memory_lost: usize,
    /// How its guests dirty memory.
    dirtying: DirtyRate,
    /// What sources were told of the cost of a blackout, in order.
    told_fixed_cost_us: Vec<Option<u64>>,
    /// What sources were told that they may send, in order.
    told_bytes_per_s: Vec<(VmId, Option<u64>)>,
    /// What sources here say that they send; 0 when they do not say.
    sends_bytes_per_s: u64,
    pools: Vec<SimPool>,
}

#[derive(Debug)]
pub(super) struct SimHost {
    pub(super) id: HostId,
    name: String,
    state: Mutex<State>,
    /// Whether packets reach it.
    linked: watch::Sender<bool>,
    /// Whether the agent runs (SIGSTOP clears it); VMMs go on.
    awake: watch::Sender<bool>,
    failures: Failures,
    poke: Notify,
    server: Server,
    hosts: OnceLock<SimHosts>,
}

fn refuse(kind: &str) -> Problem {
    Problem::conflict(kind, kind.to_owned())
}

impl SimHost {
    pub(super) fn new(id: HostId, facts: HostFacts, server: Server) -> Arc<Self> {
        Arc::new(Self {
            id,
            name: facts.name.clone(),
            state: Mutex::new(State {
                facts,
                vms: BTreeMap::new(),
                fence: BTreeMap::new(),
                closed: BTreeMap::new(),
                obeyed: 0,
                held_up: None,
                lease_until: None,
                sequence: 0,
                incarnation: Uuid::from_u128(1),
                refuses_starts: false,
                refuses_destructions: None,
                destructions_refused: 0,
                hides: false,
                memory_lost: 0,
                dirtying: DirtyRate::default(),
                told_fixed_cost_us: Vec::new(),
                told_bytes_per_s: Vec::new(),
                sends_bytes_per_s: 0,
                pools: Vec::new(),
            }),
            linked: watch::Sender::new(true),
            awake: watch::Sender::new(true),
            failures: Failures::none(),
            poke: Notify::new(),
            server,
            hosts: OnceLock::new(),
        })
    }

    pub(super) fn join(self: &Arc<Self>, hosts: SimHosts) {
        self.hosts.set(hosts).unwrap();
        tokio::spawn(agent::beat_for_ever(self.clone()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap();
        state.expire(Instant::now());
        state
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether no guest here has lost memory it had gone ahead of.
    pub(super) fn has_lost_no_memory(&self) -> bool {
        self.state().memory_lost == 0
    }

    pub(super) fn cut(&self) {
        self.linked.send_replace(false);
    }

    pub(super) fn mend(&self) {
        self.linked.send_replace(true);
    }

    pub(super) fn freeze(&self) {
        self.awake.send_replace(false);
    }

    pub(super) fn thaw(&self) {
        self.awake.send_replace(true);
    }

    pub(super) fn is_linked(&self) -> bool {
        *self.linked.borrow()
    }

    /// Waits until the agent is there and can be reached.
    pub(super) async fn answering(&self) {
        let needed = [&self.linked, &self.awake, &self.failures.agent_up];
        while !needed.iter().all(|up| *up.borrow()) {
            for up in needed {
                let _ = up.subscribe().wait_for(|up| *up).await;
            }
        }
    }

    /// Power off and on: everything is gone.
    pub(super) fn reboot(&self) {
        let mut state = self.state();
        state.vms.clear();
        state.lease_until = None;
        state.facts.boot_id = Uuid::new_v4();
        state.incarnation = Uuid::new_v4();
        state.sequence = 0;
        state.obeyed = 0;
    }

    /// Kills one VMM process.
    pub(super) fn kill_vmm(&self, vm: VmId) {
        {
            let mut state = self.state();
            if state.vms.get(&vm).is_some_and(SimVm::is_arriving) {
                state.vms.remove(&vm);
            } else if let Some(vm) = state.vms.get_mut(&vm) {
                vm.state = None;
            }
        }
        self.poke.notify_one();
    }

    /// The guest powers off.
    pub(super) fn halt_guest(&self, vm: VmId) {
        if let Some(vm) = self.state().vms.get_mut(&vm) {
            vm.state = Some(VmmState::Stopped {
                reason: StopReason::GuestHalted,
            });
        }
        self.poke.notify_one();
    }

    /// From now on it cannot start VMs.
    pub(super) fn refuse_starts(&self) {
        self.state().refuses_starts = true;
    }

    /// From now on commands to destroy a VM are answered like this.
    pub(super) fn refuse_destructions(&self, problem: Option<Problem>) {
        self.state().refuses_destructions = problem;
    }

    pub(super) fn destructions_refused(&self) -> usize {
        self.state().destructions_refused
    }

    pub(super) fn facts(&self) -> HostFacts {
        self.state().facts.clone()
    }

    /// From now on starts are received and not looked at.
    pub(super) fn hold_starts_up(&self) {
        self.state().held_up = Some(Vec::new());
    }

    /// Whether the VM is here under this epoch with a machine that has not stopped.
    pub(super) fn can_be_saved(&self, vm: VmId, epoch: Epoch) -> Result<(), Problem> {
        let state = self.state();
        let here = state.vms.get(&vm).filter(|here| here.epoch == epoch);
        match here.and_then(|here| here.state.as_ref()) {
            Some(VmmState::Running | VmmState::Paused { .. }) => Ok(()),
            _ => Err(refuse("not-running")),
        }
    }

    /// Whether a start is held up; if so it is kept for later.
    pub(super) fn holds_up(&self, vm: VmId, command: &StartVm) -> bool {
        let mut state = self.state();
        let held_up = state.held_up.as_mut();
        held_up
            .map(|held_up| held_up.push((vm, command.clone())))
            .is_some()
    }

    /// Carries out the starts that were held up.
    pub(super) fn let_starts_through(&self) -> Vec<Result<VmReport, Problem>> {
        let held_up = self.state().held_up.take().unwrap_or_default();
        held_up
            .iter()
            .map(|(vm, command)| self.start_vm(*vm, command))
            .collect()
    }

    /// From now on it sees this pool.
    pub(super) fn give_pool(&self, pool: SimPool) {
        self.state().pools.push(pool);
    }

    pub(super) fn pools(&self) -> Vec<SimPool> {
        self.state().pools.clone()
    }

    pub(super) fn pool(&self, id: PoolId) -> Result<SimPool, Problem> {
        let found = self.pools().into_iter().find(|pool| pool.id == id);
        found.ok_or_else(|| Problem::not_found("storage pool", id))
    }

    /// A VM's disk cannot be written any more, or again.
    pub(super) fn stall(&self, vm: VmId, state: VmmState) {
        if let Some(vm) = self.state().vms.get_mut(&vm) {
            vm.state = Some(state);
        }
        self.poke.notify_one();
    }

    /// From now on its reports lack all VMs.
    pub(super) fn hide_vms(&self) {
        self.state().hides = true;
    }

    pub(super) fn runs(&self, vm: VmId, now: Instant) -> bool {
        self.running(now).contains(&vm)
    }

    pub(super) fn has(&self, vm: VmId) -> bool {
        self.state().vms.contains_key(&vm)
    }

    pub(super) fn running(&self, now: Instant) -> Vec<VmId> {
        let mut state = self.state.lock().unwrap();
        state.expire(now);
        if !self.vmms_are_awake() {
            return Vec::new();
        }
        let running =
            |(id, vm): (&VmId, &SimVm)| (vm.state == Some(VmmState::Running)).then_some(*id);
        state.vms.iter().filter_map(running).collect()
    }

    // ---- commands -------------------------------------------------------------------------------------------

    fn admit(
        &self,
        vm: VmId,
        epoch: Epoch,
        generation: Generation,
    ) -> Result<MutexGuard<'_, State>, Problem> {
        let state = self.state();
        if state.fence.get(&vm).is_some_and(|seen| epoch < *seen) {
            return Err(refuse("stale-epoch"));
        }
        let newer = |known: &SimVm| known.epoch == epoch && generation < known.generation;
        if state.vms.get(&vm).is_some_and(newer) {
            return Err(refuse("stale-generation"));
        }
        Ok(state)
    }

    pub(super) fn start_vm(&self, vm: VmId, command: &StartVm) -> Result<VmReport, Problem> {
        self.check_disks(&command.spec)?;
        let mut state = self.admit(vm, command.epoch, command.generation)?;
        let closed = state.closed.get(&vm);
        if closed.is_some_and(|closed| command.epoch <= *closed) {
            return Err(refuse("stale-epoch"));
        }
        if state.refuses_starts {
            return Err(refuse("no-kvm"));
        }
        state.fence.insert(vm, command.epoch);
        let same =
            |known: &SimVm| known.epoch == command.epoch && known.generation == command.generation;
        if !state.vms.get(&vm).is_some_and(same) {
            let running = match command.lease {
                LeasePolicy::Watched if !state.lease_held(Instant::now()) => VmmState::Paused {
                    reason: PauseReason::LeaseExpired,
                },
                _ => VmmState::Running,
            };
            state.vms.insert(
                vm,
                SimVm {
                    epoch: command.epoch,
                    generation: command.generation,
                    state: Some(running),
                    lease: command.lease,
                    migration: None,
                    disks: disks::of(&command.spec),
                    successions: BTreeSet::new(),
                },
            );
        }
        self.poke.notify_one();
        let report = state.report(vm).unwrap();
        drop(state);
        self.write_disks(vm);
        Ok(report)
    }

    fn set(
        &self,
        vm: VmId,
        epoch: Epoch,
        generation: Generation,
        change: impl FnOnce(&mut SimVm, bool) -> Result<(), Problem>,
    ) -> Result<VmReport, Problem> {
        let mut state = self.admit(vm, epoch, generation)?;
        let held = state.lease_held(Instant::now());
        let known = state.vms.get_mut(&vm).filter(|known| known.epoch == epoch);
        let known = known.ok_or_else(|| Problem::not_found("VM", vm))?;
        known.generation = generation;
        change(known, held)?;
        self.poke.notify_one();
        Ok(state.report(vm).unwrap())
    }

    pub(super) fn stop_vm(&self, vm: VmId, command: &StopVm) -> Result<VmReport, Problem> {
        self.set(vm, command.epoch, command.generation, |vm, _| {
            vm.state = Some(VmmState::Stopped {
                reason: StopReason::Killed,
            });
            Ok(())
        })
    }

    pub(super) fn pause_vm(&self, vm: VmId, command: &VmCommand) -> Result<VmReport, Problem> {
        self.set(vm, command.epoch, command.generation, |vm, _| {
            vm.state = Some(VmmState::Paused {
                reason: PauseReason::Requested,
            });
            Ok(())
        })
    }

    pub(super) fn set_balloon(&self, vm: VmId, command: &SetBalloon) -> Result<VmReport, Problem> {
        self.set(vm, command.epoch, command.generation, |_, _| Ok(()))
    }

    pub(super) fn resume_vm(&self, vm: VmId, command: &VmCommand) -> Result<VmReport, Problem> {
        self.set(vm, command.epoch, command.generation, |vm, held| {
            vm.run(held)
        })
    }

    /// Repeated with the same succession, it changes nothing.
    pub(super) fn upgrade_vm(&self, vm: VmId, command: &UpgradeVm) -> Result<UpgradedVm, Problem> {
        let mut state = self.state();
        let known = state
            .vms
            .get_mut(&vm)
            .ok_or_else(|| Problem::not_found("VM", vm))?;
        if known.epoch != command.epoch {
            return Err(Problem::conflict("stale-epoch", "another epoch"));
        }
        known.successions.insert(command.succession);
        Ok(UpgradedVm {
            outcome: UpgradeOutcome::Upgraded,
            pid: 1,
            blackout: Some(SuccessionBlackout {
                total_us: 7_000,
                ..SuccessionBlackout::default()
            }),
        })
    }

    /// How often a VM has changed its VMM here.
    pub(super) fn successions(&self, vm: VmId) -> usize {
        let state = self.state();
        state.vms.get(&vm).map_or(0, |vm| vm.successions.len())
    }

    pub(super) fn dirty_rate(
        &self,
        vm: VmId,
        ask: &DirtyRateRequest,
    ) -> Result<DirtyRate, Problem> {
        assert_eq!(ask.problems(), []);
        let state = self.state();
        let known = state
            .vms
            .get(&vm)
            .ok_or_else(|| Problem::not_found("VM", vm))?;
        match &known.migration {
            Some(status) if !status.phase.is_final() => Err(refuse("migrating")),
            _ => Ok(state.dirtying.clone()),
        }
    }

    /// From now on its guests dirty memory like that.
    pub(super) fn dirty_like(&self, dirtying: DirtyRate) {
        self.state().dirtying = dirtying;
    }

    /// What its VMMs were told of the cost of a blackout when they were told to send.
    pub(super) fn told_fixed_cost_us(&self) -> Vec<Option<u64>> {
        self.state().told_fixed_cost_us.clone()
    }

    /// From now on, sources here say that they send so much.
    pub(super) fn sends_at(&self, bytes_per_s: u64) {
        self.state().sends_bytes_per_s = bytes_per_s;
    }

    /// What sources here were told that they may send, in order.
    pub(super) fn told_bytes_per_s(&self) -> Vec<(VmId, Option<u64>)> {
        self.state().told_bytes_per_s.clone()
    }

    pub(super) fn set_migration_bandwidth(
        &self,
        vm: VmId,
        command: &MigrationBandwidth,
    ) -> Result<VmReport, Problem> {
        let mut state = self.state();
        let known = state
            .vms
            .get(&vm)
            .and_then(|known| known.migration.as_ref())
            .filter(|known| known.migration == command.migration);
        let status = known.ok_or_else(|| Problem::not_found("migration", command.migration))?;
        if matches!(
            status.phase,
            MigrationPhase::Blackout | MigrationPhase::AwaitingCommit
        ) {
            return Err(refuse("handing-over"));
        }
        state.told_bytes_per_s.push((vm, command.max_bytes_per_s));
        Ok(state.report(vm).unwrap())
    }

    pub(super) fn destroy(&self, vm: VmId, epoch: Epoch) -> Result<(), Problem> {
        let mut state = self.state();
        if let Some(problem) = state.refuses_destructions.clone() {
            state.destructions_refused += 1;
            return Err(problem);
        }
        state.destroy(vm, epoch);
        self.poke.notify_one();
        Ok(())
    }

    pub(super) fn serial(&self, vm: VmId) -> Result<Box<dyn Duplex>, Problem> {
        match self.state().vms.contains_key(&vm) {
            true => Ok(Box::new(tokio::io::duplex(64).0)),
            false => Err(Problem::not_found("VM", vm)),
        }
    }
}

impl SimVm {
    fn enter(&mut self, phase: MigrationPhase) {
        if let Some(status) = &mut self.migration {
            status.phase = phase;
            status.sequence += 1;
        }
    }

    /// A VMM looks at its lease before it lets vCPUs run.
    fn run(&mut self, lease_held: bool) -> Result<(), Problem> {
        if self.lease == LeasePolicy::Watched && !lease_held {
            self.state = Some(VmmState::Paused {
                reason: PauseReason::LeaseExpired,
            });
            return Err(refuse("lease-expired"));
        }
        self.state = Some(VmmState::Running);
        Ok(())
    }
}

impl State {
    fn lease_held(&self, now: Instant) -> bool {
        self.lease_until.is_some_and(|until| now < until)
    }

    fn destroy(&mut self, vm: VmId, epoch: Epoch) {
        if self.vms.get(&vm).is_some_and(|known| known.epoch <= epoch) {
            self.vms.remove(&vm);
        }
        let closed = self.closed.entry(vm).or_insert(epoch);
        *closed = epoch.max(*closed);
    }

    fn expire(&mut self, now: Instant) {
        let over = self
            .lease_until
            .is_none_or(|until| now >= until + STOPS_LATE);
        for vm in self.vms.values_mut() {
            if over && vm.lease == LeasePolicy::Watched && vm.state == Some(VmmState::Running) {
                vm.state = Some(VmmState::Paused {
                    reason: PauseReason::LeaseExpired,
                });
            }
        }
    }

    fn report(&self, id: VmId) -> Option<VmReport> {
        let vm = self.vms.get(&id)?;
        Some(VmReport {
            vm: id,
            epoch: vm.epoch,
            generation: vm.generation,
            state: vm.state.clone(),
            usage: VmUsage {
                cpu_percent: 5.0,
                rss_bytes: Bytes(512 << 20),
                exits_per_s: 1.0,
                dirty_bytes_per_s: 0,
            },
            migration: vm.migration.clone(),
            devices: None,
        })
    }
}
