//! A whole pool in one process and in simulated time: the real controller, and hosts that run the heartbeat and
//! migration protocols over memory instead of KVM and TLS.
//!
//! While a pool lives, a watchman checks every 20 ms that no VM runs twice.

mod crash;

mod driver;

mod host;

mod seeds;

mod storage;

mod tests;

mod tests_crash;

mod tests_disks;

mod tests_failover;

mod tests_faults;

mod tests_forecast;

mod tests_limits;

mod tests_maintenance;

mod tests_snapshots;

mod tests_storage;

use crate::controller::Controller;
use crate::core::Settings;
use crate::intent::{Accepted, Intent, NewVm};
use crate::model::{
    Actor, Disk, DiskState, Host, HostState, MaintenancePolicy, OperationState, PowerIntent,
    VmState,
};
use crate::store::Store;
use crate::store::memory::MemoryStore;
use crate::view::View;
use crash::{CrashStore, Life};
use driver::SimDriver;
use godwit_wire::host_api::{HostFacts, LeasePolicy};
use godwit_wire::id::{HostId, OperationId, PoolId, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, CpuFacts, MachineSpec, MachineType};
use godwit_wire::problem::Problem;
use godwit_wire::unit::Mib;
use host::{Server, SimHost};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use storage::SimPool;
use tokio::time::Instant;
use uuid::Uuid;

/// Longest any test waits for something, in simulated time.
const PATIENCE: Duration = Duration::from_secs(300);

/// The pool that all hosts see; host 1 has the pool after it for itself, and so on.
const SHARED: PoolId = PoolId(Uuid::from_u128(0x5707_0000));

/// Hosts by id.
type SimHosts = Arc<BTreeMap<HostId, Arc<SimHost>>>;

/// A pool.
struct Pool {
    store: Arc<MemoryStore>,
    hosts: SimHosts,
    server: Server,
    controller: Controller,
    life: Arc<Life>,
    twice: Arc<Mutex<Option<String>>>,
}

fn operator() -> Actor {
    Actor::new("operator")
}

fn facts(number: u128, name: &str, memory: u64) -> HostFacts {
    HostFacts {
        name: name.into(),
        address: ([127, 0, 0, 1], 7_000 + number as u16).into(),
        cpu: CpuFacts {
            level: CpuBaseline::V3,
            signature: "sim".into(),
            model: "sim".into(),
        },
        cores: 4,
        memory_mib: Mib(memory + 1024),
        guest_memory_mib: Mib(memory),
        kernel: "sim".into(),
        version: "0".into(),
        boot_id: Uuid::from_u128(0xb007_0000 + number),
    }
}

impl Pool {
    /// A pool of `count` hosts with 4 GiB for guests each, all of them up.
    async fn of(count: u128) -> Self {
        Self::with(count, None).await
    }

    /// As [`of`](Self::of); the server dies after so many transactions from now on.
    async fn with(count: u128, dies_after: Option<u64>) -> Self {
        let store = Arc::new(MemoryStore::new());
        let facts: Vec<_> = (1..=count)
            .map(|n| facts(n, &format!("host-{n}"), 4096))
            .collect();
        enrol(&store, &facts).await;
        let server = Server::default();
        let hosts: SimHosts = Arc::new(
            facts
                .into_iter()
                .enumerate()
                .map(|(n, facts)| (HostId(Uuid::from_u128(n as u128 + 1)), facts))
                .map(|(id, facts)| (id, SimHost::new(id, facts, server.clone())))
                .collect(),
        );
        let shared = SimPool::new(SHARED, "shared");
        for (number, host) in hosts.values().enumerate() {
            host.give_pool(shared.clone());
            let own = PoolId(Uuid::from_u128(SHARED.0.as_u128() + 1 + number as u128));
            host.give_pool(SimPool::new(own, &format!("local-{}", number + 1)));
            host.join(hosts.clone());
        }
        let twice = Arc::new(Mutex::new(None));
        tokio::spawn(watchman(hosts.clone(), twice.clone()));
        let (controller, life) = boot(&store, &hosts, &server, dies_after);
        let pool = Self {
            store,
            hosts,
            server,
            controller,
            life,
            twice,
        };
        if dies_after.is_none() {
            pool.wait("all hosts are up", |view| {
                view.hosts
                    .values()
                    .all(|host| view.host_state(host) == HostState::Up)
            })
            .await;
        }
        pool
    }

    /// The pool that only this host sees.
    fn local(number: u128) -> PoolId {
        PoolId(Uuid::from_u128(SHARED.0.as_u128() + number))
    }

    /// The pools hold what the records say and nothing else; so do the keys that make addresses and writers unique.
    fn check_storage(&self) {
        let view = self.view();
        let (mut disks, mut images) = (BTreeSet::new(), BTreeSet::new());
        for pool in self.hosts.values().flat_map(|host| host.pools()) {
            disks.extend(pool.disks());
            images.extend(pool.images());
        }
        let known: BTreeSet<_> = view.disks.keys().copied().collect();
        assert_eq!(disks, known, "disks in the pools and in the records");
        let known: BTreeSet<_> = view.images.keys().copied().collect();
        assert_eq!(images, known, "images in the pools and in the records");
        for disk in view.disks.values() {
            assert_eq!((&disk.state, disk.operation), (&DiskState::Ready, None));
            self.check_disk(&view, disk);
        }
        let held = |prefix: &str| self.store.list(prefix).unwrap().0.len();
        let specs = || view.vms.values().map(|vm| &vm.spec);
        let leases: usize = specs().map(|spec| crate::view::leases(spec).count()).sum();
        assert_eq!(held("lease/"), leases, "leases");
        let attached: usize = specs()
            .map(|spec| crate::view::attachments(spec).count())
            .sum();
        assert_eq!(held("attachment/"), attached, "attachments");
    }

    /// A disk has one file, where its record and the machine that has it say; a VM that runs finds it written.
    fn check_disk(&self, view: &View, disk: &Disk) {
        let pools = self.hosts.values().flat_map(|host| host.pools());
        let pools: BTreeMap<PoolId, SimPool> = pools.map(|pool| (pool.id, pool)).collect();
        let files: Vec<PoolId> = pools
            .values()
            .filter(|pool| pool.disks().contains(&disk.id))
            .map(|pool| pool.id)
            .collect();
        assert_eq!(files, [disk.pool], "files of {}", disk.name);
        for vm in view.vms.values() {
            let mut attached = crate::view::attachments(&vm.spec);
            if let Some(attached) = attached.find(|attached| attached.disk == disk.id) {
                assert_eq!(
                    attached.pool, disk.pool,
                    "where {} finds {}",
                    vm.name, disk.name
                );
                let written = pools[&disk.pool].is_written(disk.id);
                assert!(written || vm.owner.is_none(), "{} is blank", disk.name);
            }
        }
    }

    fn server_now(&self) -> (crate::agents::Agents, Arc<Life>) {
        self.server.get().expect("a server is there")
    }

    fn host(&self, number: u128) -> &Arc<SimHost> {
        &self.hosts[&HostId(Uuid::from_u128(number))]
    }

    fn id(number: u128) -> HostId {
        HostId(Uuid::from_u128(number))
    }

    /// Kills the server and starts another on the same store; nothing of the old one acts any more.
    async fn restart_server(&mut self, away: Duration, dies_after: Option<u64>) {
        self.stop_server().await;
        tokio::time::sleep(away).await;
        self.start_server(dies_after);
    }

    async fn stop_server(&mut self) {
        self.life.end();
        self.server.unplug();
        self.controller.shutdown().await;
    }

    fn start_server(&mut self, dies_after: Option<u64>) {
        (self.controller, self.life) = boot(&self.store, &self.hosts, &self.server, dies_after);
    }

    async fn submit(&self, intent: Intent) -> Result<Accepted, Problem> {
        self.controller.submit(intent, &operator()).await
    }

    /// Creates a running VM of 512 MiB on a host.
    async fn vm(&self, name: &str, host: u128) -> VmId {
        self.vm_with(name, host, |_| {}).await
    }

    async fn vm_with(&self, name: &str, host: u128, change: impl FnOnce(&mut NewVm)) -> VmId {
        let mut new = new_vm(name);
        new.host = Some(Self::id(host));
        change(&mut new);
        let accepted = self.submit(Intent::CreateVm(new)).await.expect("accepted");
        self.succeeds(accepted).await;
        let id = self.view().find_vm(name).expect("created").id;
        self.running(id).await;
        id
    }

    fn view(&self) -> Arc<View> {
        self.controller.view()
    }

    /// Waits until a view is as wanted.
    async fn wait(&self, what: &str, mut wanted: impl FnMut(&View) -> bool) {
        let mut changed = self.controller.changed();
        let waiting = async {
            while !wanted(&self.view()) {
                changed.changed().await.expect("the controller lives");
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            let view = self.view();
            for vm in view.vms.values() {
                eprintln!(
                    "{} {:?} {:?} op {:?}",
                    vm.name,
                    vm.owner,
                    view.vm_status(vm),
                    vm.operation
                );
            }
            for operation in view.active_operations() {
                eprintln!("{operation:#?}");
            }
            panic!("waited in vain until {what}");
        }
        self.check();
    }

    async fn running(&self, vm: VmId) {
        self.wait("the VM runs", |view| {
            view.vms
                .get(&vm)
                .is_some_and(|vm| view.vm_status(vm).state == VmState::Running)
        })
        .await;
    }

    /// Waits until an operation has ended.
    async fn ended(&self, operation: OperationId) -> OperationState {
        self.wait("the operation ends", |view| {
            view.operations[&operation].state.is_final()
        })
        .await;
        self.view().operations[&operation].state
    }

    async fn succeeds(&self, accepted: Accepted) {
        let operation = accepted.operation.expect("it takes an operation");
        let state = self.ended(operation).await;
        assert_eq!(
            state,
            OperationState::Succeeded,
            "{:#?}",
            self.view().operations[&operation]
        );
    }

    /// Where the store says the VM is.
    fn owner(&self, vm: VmId) -> Option<u128> {
        self.view().vms[&vm].owner.map(|host| host.0.as_u128())
    }

    /// Hosts on which the VM's vCPUs run at this instant.
    fn runs_on(&self, vm: VmId) -> Vec<u128> {
        self.hosts
            .values()
            .filter(|host| host.runs(vm, Instant::now()))
            .map(|host| host.id.0.as_u128())
            .collect()
    }

    /// Fails if any VM has run twice so far.
    fn check(&self) {
        if let Some(what) = self.twice.lock().unwrap().as_ref() {
            panic!("{what}");
        }
    }

    fn events(&self, kind: &str) -> usize {
        let events = self.controller.events_after(0, usize::MAX).unwrap();
        events.iter().filter(|event| event.kind == kind).count()
    }
}

fn new_vm(name: &str) -> NewVm {
    NewVm {
        name: name.into(),
        spec: MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: 1,
            memory_mib: Mib(512),
            boot: Boot::Pilot,
            cpu: CpuBaseline::V2,
            devices: Default::default(),
        },
        devices: Default::default(),
        intent: PowerIntent::Running,
        host: None,
        lease: LeasePolicy::Watched,
        maintenance_policy: MaintenancePolicy::Migrate,
        post_copy: Default::default(),
    }
}

/// Writes the hosts as if they had joined.
async fn enrol(store: &Arc<MemoryStore>, facts: &[HostFacts]) {
    let ledger = crate::ledger::Ledger::open(store.clone(), crate::ledger::Blocking::Here).unwrap();
    let written = ledger.change(|_, draft| {
        for (number, facts) in facts.iter().enumerate() {
            draft.put_host(Host {
                id: HostId(Uuid::from_u128(number as u128 + 1)),
                facts: facts.clone(),
                cordon: None,
                maintenance: None,
                joined_at: Timestamp::now(),
                first_heard_at: None,
                migration_bandwidth: None,
                link_bandwidth: BTreeMap::new(),
            });
        }
        Ok(())
    });
    written.await.unwrap();
}

fn boot(
    store: &Arc<MemoryStore>,
    hosts: &SimHosts,
    server: &Server,
    dies_after: Option<u64>,
) -> (Controller, Arc<Life>) {
    let life = Life::new(dies_after);
    let store: Arc<dyn Store> = Arc::new(CrashStore::new(store.clone(), life.clone()));
    let driver = Arc::new(SimDriver::new(hosts.clone(), life.clone()));
    let (controller, agents) = Controller::simulated(
        store,
        driver,
        Settings {
            migrations_per_host: 2,
        },
    );
    server.plug(agents, life.clone());
    (controller, life)
}

/// The promise above all others, checked all the time.
async fn watchman(hosts: SimHosts, twice: Arc<Mutex<Option<String>>>) {
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = Instant::now();
        let mut seen: BTreeMap<VmId, HostId> = BTreeMap::new();
        for host in hosts.values() {
            for vm in host.running(now) {
                if let Some(other) = seen.insert(vm, host.id) {
                    let what = format!("{vm} runs on {other} and on {}", host.id);
                    twice.lock().unwrap().get_or_insert(what);
                }
            }
        }
    }
}
