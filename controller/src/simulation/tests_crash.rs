//! The server killed after each of its transactions, and everything failing at random.

use super::seeds::{Dice, for_each_seed};
use super::*;
use crate::intent::{NewMaintenance, Resource};
use crate::model::{MaintenanceState, ReturnPolicy};
use godwit_wire::host_api::StopMode;
use godwit_wire::id::Epoch;
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, PostCopy};
use godwit_wire::vmm_api::VmmState;

impl Pool {
    /// Everything has calmed down: no operation left, and each VM that shall run runs exactly where it belongs.
    pub(super) async fn settled(&self) {
        self.wait("everything has settled", |view| {
            view.active_operations().next().is_none()
                && view.vms.values().all(|vm| {
                    let wanted = if vm.intent.wants_vmm() {
                        VmState::Running
                    } else {
                        VmState::Stopped
                    };
                    view.vm_status(vm).state == wanted
                })
        })
        .await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        self.check();
        for vm in self.view().vms.values() {
            let owner: Vec<u128> = vm.owner.map(|host| host.0.as_u128()).into_iter().collect();
            assert_eq!(self.runs_on(vm.id), owner, "{}", vm.name);
            let copies = self.hosts.values().filter(|host| host.has(vm.id)).count();
            assert_eq!(copies, owner.len(), "{}", vm.name);
        }
        self.check_storage();
    }

    /// Lets the server die after `transactions`, runs `intent`, and starts another server. False when the intent
    /// was carried out before that many transactions.
    pub(super) async fn dies_during(&mut self, intent: Intent, transactions: u64) -> bool {
        self.life.dies_after(transactions);
        let life = self.life.clone();
        let accepted = self.submit(intent).await;
        let ended = async {
            if let Some(operation) = accepted.ok().and_then(|accepted| accepted.operation) {
                let mut changed = self.controller.changed();
                // What an operation leaves to others belongs to it.
                let under_way = |view: &View| {
                    view.active_operations()
                        .any(|op| op.id == operation || op.parent == Some(operation))
                };
                while under_way(&self.view()) {
                    if changed.changed().await.is_err() {
                        break;
                    }
                }
            } else {
                std::future::pending::<()>().await;
            }
        };
        let died = tokio::select! {
            () = life.died() => true,
            () = ended => false,
        };
        let died = died || life.is_over();
        if died {
            self.restart_server(Duration::from_millis(500), None).await;
        }
        life.dies_after(u64::MAX);
        died
    }
}

/// Kills the server after its 1st, 2nd, 3rd … transaction until it is not killed any more; returns how many
/// times it was.
async fn at_every_transaction<F>(prepare: impl Fn() -> F, intent: impl Fn(VmId) -> Intent) -> u64
where
    F: Future<Output = (Pool, VmId)>,
{
    at_every_transaction_and_then(prepare, intent, |_, _, _| ()).await
}

/// [`at_every_transaction`] with a look at every pool that has settled, told whether its server was killed.
pub(super) async fn at_every_transaction_and_then<F>(
    prepare: impl Fn() -> F,
    intent: impl Fn(VmId) -> Intent,
    look: impl Fn(&Pool, VmId, bool),
) -> u64
where
    F: Future<Output = (Pool, VmId)>,
{
    for transactions in 1..200 {
        let (mut pool, vm) = prepare().await;
        let died = pool.dies_during(intent(vm), transactions).await;
        pool.settled().await;
        look(&pool, vm, died);
        if !died {
            return transactions - 1;
        }
    }
    panic!("the operation never ends");
}

async fn one_vm() -> (Pool, VmId) {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    (pool, vm)
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_migration_resumes_with_exactly_one_owner() {
    let migrate = |vm| Intent::MigrateVm {
        vm,
        target: Some(Pool::id(2)),
        policy: MigrationPolicy::default(),
        disks: Default::default(),
    };
    let killed = at_every_transaction(one_vm, migrate).await;
    assert!(killed >= 5, "killed {killed} times");
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_an_upgrade_sends_each_command_as_it_was() {
    let upgrade = |_| Intent::UpgradeHost { host: Pool::id(1) };
    let look = |pool: &Pool, vm, died: bool| {
        let changed = pool.host(1).successions(vm);
        assert!(changed <= 1, "{changed} times");
        assert!(died || changed == 1);
    };
    let killed = at_every_transaction_and_then(one_vm, upgrade, look).await;
    assert!(killed >= 2, "killed {killed} times");
}

/// The guest goes ahead of its memory: the source's copy is needed beyond the commit.
#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_post_copy_leaves_the_guest_its_memory() {
    let look = |pool: &Pool, vm, died: bool| {
        assert!(pool.host(2).has_lost_no_memory());
        let moved = pool.runs_on(vm) == [2];
        let epoch = if moved { Epoch(2) } else { Epoch(1) };
        assert_eq!(pool.view().vms[&vm].epoch, epoch);
        assert!(died || moved);
    };
    at_every_transaction_and_then(one_vm, go_ahead, look).await;
}

fn go_ahead(vm: VmId) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(2)),
        policy: MigrationPolicy {
            post_copy: PostCopy::Allowed,
            ..MigrationPolicy::default()
        },
        disks: Default::default(),
    }
}

fn waits_for_memory(view: &View, vm: VmId) -> bool {
    view.report(&view.vms[&vm])
        .and_then(|report| report.state.as_ref())
        .is_some_and(VmmState::waits_for_memory)
}

/// A guest on host 2 that waits for memory on host 1, which is cut off, and the operation that moves it.
async fn one_vm_that_waits_for_memory() -> (Pool, VmId, OperationId) {
    let (pool, vm) = one_vm().await;
    let operation = pool.submit(go_ahead(vm)).await.unwrap().operation.unwrap();
    pool.wait("the guest goes ahead", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
    })
    .await;
    pool.host(1).cut();
    pool.wait("the guest waits", |view| waits_for_memory(view, vm))
        .await;
    (pool, vm, operation)
}

/// Where the only migration there was stands.
fn last_phase(pool: &Pool) -> Option<MigrationPhase> {
    let view = pool.view();
    let migration = view.migrations.values().next().unwrap();
    view.migration_figures(migration).phase
}

/// Both the source's agent and the link between the VMMs are gone for longer than any patience: the guest waits, and
/// goes on with its memory.
#[tokio::test(start_paused = true)]
async fn a_guest_waits_for_its_memory_as_long_as_the_source_is_away() {
    let (pool, vm, operation) = one_vm_that_waits_for_memory().await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    pool.host(1).mend();
    assert_eq!(pool.ended(operation).await, OperationState::Succeeded);
    pool.settled().await;
    assert!(pool.host(2).has_lost_no_memory());
    assert_eq!(pool.runs_on(vm), [2]);
    assert_eq!(pool.events("vm.memory-awaited"), 1);
    assert_eq!(last_phase(&pool), Some(MigrationPhase::Completed));
}

/// The source does not come back, and the operator does not wait any longer: the guest starts anew.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_memory_is_given_up_starts_anew() {
    let (pool, vm, operation) = one_vm_that_waits_for_memory().await;
    let epoch = pool.view().vms[&vm].epoch;
    pool.submit(Intent::CancelOperation { operation })
        .await
        .unwrap();
    assert_eq!(pool.ended(operation).await, OperationState::Failed);
    pool.running(vm).await;
    assert!(pool.view().vms[&vm].epoch > epoch, "it is a new start");
    assert_eq!(last_phase(&pool), Some(MigrationPhase::Failed));
    pool.host(1).mend();
    pool.settled().await;
    assert_eq!(last_phase(&pool), Some(MigrationPhase::Failed));
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_stop_a_reboot_or_a_start_resumes() {
    let mode = StopMode::Graceful { timeout_ms: 1_000 };
    assert!(at_every_transaction(one_vm, |vm| Intent::StopVm { vm, mode }).await >= 3);
    assert!(at_every_transaction(one_vm, |vm| Intent::RebootVm { vm, mode }).await >= 5);
    let killed = at_every_transaction(one_vm, |_| Intent::CreateVm(new_vm("b"))).await;
    assert!(killed >= 3, "killed {killed} times");
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_pause_resumes() {
    for transactions in 1..50 {
        let (mut pool, vm) = one_vm().await;
        let died = pool.dies_during(Intent::PauseVm { vm }, transactions).await;
        let intent = pool.view().vms[&vm].intent;
        let wanted = if intent == PowerIntent::Paused {
            VmState::Paused
        } else {
            VmState::Running
        };
        pool.wait("it is as wanted", |view| {
            view.active_operations().next().is_none()
                && view.vm_status(&view.vms[&vm]).state == wanted
        })
        .await;
        if !died {
            assert!(transactions > 2);
            return;
        }
    }
    panic!("the operation never ends");
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_failover_starts_every_vm_exactly_once() {
    for transactions in 1..=10 {
        let mut pool = Pool::of(3).await;
        for n in 0..3 {
            pool.vm(&format!("vm-{n}"), 1).await;
        }
        pool.life.dies_after(transactions);
        pool.host(1).cut();
        let life = pool.life.clone();
        let _ = tokio::time::timeout(Duration::from_secs(20), life.died()).await;
        pool.restart_server(Duration::from_millis(500), None).await;
        pool.settled_without(1).await;
        pool.host(1).mend();
        pool.settled().await;
    }
}

impl Pool {
    /// As [`settled`](Self::settled) while one host is away.
    async fn settled_without(&self, away: u128) {
        self.wait("all VMs run elsewhere", |view| {
            view.active_operations().next().is_none()
                && view.vms.values().all(|vm| {
                    vm.owner != Some(Self::id(away)) && view.vm_status(vm).state == VmState::Running
                })
        })
        .await;
        self.check();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_maintenance_drains_and_restores_all_the_same() {
    for transactions in 1..=40 {
        let mut pool = Pool::of(2).await;
        for n in 0..2 {
            pool.vm(&format!("vm-{n}"), 1).await;
        }
        let new = NewMaintenance {
            host: Pool::id(1),
            reason: "patch".into(),
            return_policy: ReturnPolicy::Exact,
            overrides: BTreeMap::new(),
        };
        let accepted = pool.submit(Intent::CreateMaintenance(new)).await.unwrap();
        let Resource::Maintenance(id) = accepted.resource else {
            panic!("not a maintenance")
        };
        pool.dies_during(Intent::StartMaintenance { maintenance: id }, transactions)
            .await;
        let state = |view: &View| view.maintenances[&id].state;
        if state(&pool.view()) == MaintenanceState::Ready {
            pool.submit(Intent::StartMaintenance { maintenance: id })
                .await
                .unwrap();
        }
        pool.wait("it is drained", |view| {
            state(view) == MaintenanceState::Drained
        })
        .await;
        assert_eq!(pool.view().vms_of(Pool::id(1)).count(), 0);
        pool.dies_during(Intent::FinishMaintenance { maintenance: id }, transactions)
            .await;
        if state(&pool.view()) == MaintenanceState::Drained {
            pool.submit(Intent::FinishMaintenance { maintenance: id })
                .await
                .unwrap();
        }
        pool.wait("it is done", |view| state(view) == MaintenanceState::Done)
            .await;
        pool.settled().await;
        assert_eq!(pool.view().vms_of(Pool::id(1)).count(), 2);
    }
}

#[test]
fn whatever_fails_at_random_no_vm_is_lost_and_none_runs_twice() {
    for_each_seed("anything fails", 25, fail_at_random);
}

async fn fail_at_random(seed: u64) {
    let mut dice = Dice::new(seed);
    let mut pool = Pool::of(4).await;
    for n in 0..6 {
        pool.vm(&format!("vm-{n}"), 1 + n % 4).await;
    }
    for _ in 0..40 {
        let host = 1 + u128::from(dice.roll(4));
        match dice.roll(10) {
            0 => pool.host(host).cut(),
            1 => pool.host(host).freeze(),
            2 => pool.host(host).reboot(),
            3 => {
                pool.restart_server(Duration::from_millis(dice.roll(12_000)), None)
                    .await
            }
            4 | 5 => {
                pool.host(host).mend();
                pool.host(host).thaw();
            }
            6 => {
                let away = dice.roll(6);
                pool.life.dies_after(1 + away);
            }
            _ => {
                let ids: Vec<VmId> = pool.view().vms.keys().copied().collect();
                let vm = ids[dice.roll(ids.len() as u64) as usize];
                let policy = MigrationPolicy::default();
                let _ = pool
                    .submit(Intent::MigrateVm {
                        vm,
                        target: None,
                        policy,
                        disks: Default::default(),
                    })
                    .await;
            }
        }
        tokio::time::sleep(Duration::from_millis(dice.roll(4_000))).await;
        pool.check();
        if pool.life.is_over() {
            pool.restart_server(Duration::from_millis(200), None).await;
        }
    }
    for host in pool.hosts.values() {
        host.mend();
        host.thaw();
    }
    pool.life.dies_after(u64::MAX);
    eprintln!(
        "seed {seed}: {} transactions in the last life",
        pool.life.transactions()
    );
    // A host that has booted anew a moment ago is heard only after the wait; until then it shows as before.
    tokio::time::sleep(godwit_wire::lease::LEASE_DURATION * 2).await;
    pool.settled().await;
}
