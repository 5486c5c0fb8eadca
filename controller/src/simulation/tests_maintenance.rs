//! Maintenance and evacuation.

use super::*;
use crate::intent::{NewMaintenance, Resource};
use crate::model::{
    MaintenanceState, MoveAction, MovedState, RestoreOnCancel, ReturnPolicy, UpgradeState, Work,
};
use godwit_wire::id::MaintenanceId;
use godwit_wire::migration::MigrationPolicy;

fn of_host(host: u128, return_policy: ReturnPolicy) -> NewMaintenance {
    NewMaintenance {
        host: Pool::id(host),
        reason: "patch".into(),
        return_policy,
        overrides: BTreeMap::new(),
    }
}

impl Pool {
    async fn planned(&self, new: NewMaintenance) -> MaintenanceId {
        let accepted = self.submit(Intent::CreateMaintenance(new)).await.unwrap();
        let Resource::Maintenance(id) = accepted.resource else {
            panic!("not a maintenance")
        };
        id
    }

    async fn state_is(&self, id: MaintenanceId, state: MaintenanceState) {
        self.wait(&format!("the maintenance is {state:?}"), |view| {
            view.maintenances[&id].state == state
        })
        .await;
    }

    fn host_state(&self, host: u128) -> HostState {
        let view = self.view();
        view.host_state(&view.hosts[&Self::id(host)])
    }
}

#[tokio::test(start_paused = true)]
async fn a_maintenance_drains_a_host_and_brings_its_vms_home() {
    let pool = Pool::of(3).await;
    let mut vms = Vec::new();
    for n in 0..4 {
        vms.push(pool.vm(&format!("vm-{n}"), 1).await);
    }
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    let plan = pool.view().maintenances[&id].plan.clone();
    assert_eq!((plan.moves.len(), plan.blockers.len()), (4, 0));
    assert_eq!(pool.view().maintenances[&id].state, MaintenanceState::Ready);

    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    assert_eq!(pool.host_state(1), HostState::Cordoned);
    pool.state_is(id, MaintenanceState::Drained).await;
    assert_eq!(pool.host_state(1), HostState::Maintenance);
    for vm in &vms {
        pool.running(*vm).await;
        assert_ne!(pool.owner(*vm), Some(1));
    }
    assert_eq!(
        pool.submit(Intent::UncordonHost { host: Pool::id(1) })
            .await
            .unwrap_err()
            .kind,
        "in-maintenance"
    );

    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Done).await;
    assert_eq!(pool.host_state(1), HostState::Up);
    for vm in &vms {
        pool.running(*vm).await;
        assert_eq!((pool.owner(*vm), pool.runs_on(*vm)), (Some(1), vec![1]));
    }
    let record = pool.view().maintenances[&id].clone();
    assert!(
        record
            .moved
            .iter()
            .all(|moved| moved.state == MovedState::Returned)
    );
    assert_eq!(record.moved.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_reboots_under_maintenance_shows_as_working_and_can_be_finished() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    pool.host(1).cut();
    pool.state_is(id, MaintenanceState::Working).await;
    assert_eq!(
        pool.events("host.unreachable"),
        0,
        "silence is expected now"
    );
    // Finishing before the host is back waits for it.
    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Verifying).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    pool.host(1).reboot();
    pool.host(1).mend();
    pool.state_is(id, MaintenanceState::Done).await;
    pool.running(vm).await;
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_does_not_answer_is_not_taken_back() {
    let pool = Pool::of(2).await;
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    pool.host(1).cut();
    pool.state_is(id, MaintenanceState::Working).await;
    let finish = pool
        .submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    assert_eq!(
        pool.ended(finish.operation.unwrap()).await,
        OperationState::Failed
    );
    let record = pool.view().maintenances[&id].clone();
    assert_eq!(record.state, MaintenanceState::Working);
    assert!(
        record
            .detail
            .as_ref()
            .is_some_and(|detail| detail.contains("does not answer"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_maintenance_finishes_the_moves_in_flight_uncordons_and_restores() {
    for restore in [RestoreOnCancel::Restore, RestoreOnCancel::Stay] {
        let pool = Pool::of(2).await;
        for n in 0..5 {
            pool.vm(&format!("vm-{n}"), 1).await;
        }
        let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
        let drain = pool
            .submit(Intent::StartMaintenance { maintenance: id })
            .await
            .unwrap()
            .operation
            .unwrap();
        pool.wait("moves are in flight", |view| {
            view.open_migrations().count() == 2
        })
        .await;
        pool.submit(Intent::CancelMaintenance {
            maintenance: id,
            restore,
        })
        .await
        .unwrap();
        assert_eq!(
            pool.view().maintenances[&id].state,
            MaintenanceState::Cancelling
        );
        assert_eq!(pool.ended(drain).await, OperationState::Cancelled);
        pool.state_is(id, MaintenanceState::Cancelled).await;
        assert_eq!(pool.host_state(1), HostState::Up);
        let home = pool
            .view()
            .vms
            .values()
            .filter(|vm| vm.owner == Some(Pool::id(1)))
            .count();
        let voids = pool
            .view()
            .migrations
            .values()
            .filter(|m| m.state.name() == "void")
            .count();
        assert_eq!(voids, 0, "moves in flight are finished");
        assert_eq!(
            home,
            if restore == RestoreOnCancel::Restore {
                5
            } else {
                3
            }
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_moved_by_hand_during_a_maintenance_stays() {
    let pool = Pool::of(3).await;
    let (a, b) = (pool.vm("a", 1).await, pool.vm("b", 1).await);
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    let to = 5 - pool.owner(a).unwrap();
    let policy = MigrationPolicy::default();
    let by_hand = Intent::MigrateVm {
        vm: a,
        target: Some(Pool::id(to)),
        policy,
        disks: Default::default(),
    };
    pool.succeeds(pool.submit(by_hand).await.unwrap()).await;
    pool.running(a).await;
    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Done).await;
    assert_eq!((pool.owner(a), pool.owner(b)), (Some(to), Some(1)));
    let record = pool.view().maintenances[&id].clone();
    let stayed = record.moved.iter().find(|moved| moved.vm == a).unwrap();
    assert!(matches!(&stayed.state, MovedState::Stayed { reason } if reason.contains("by hand")));
}

#[tokio::test(start_paused = true)]
async fn a_return_policy_of_none_leaves_vms_where_they_are() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let id = pool.planned(of_host(1, ReturnPolicy::None)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Done).await;
    assert_eq!(pool.owner(vm), Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_rebalance_evens_the_load_out() {
    let pool = Pool::of(2).await;
    let id = pool.planned(of_host(1, ReturnPolicy::Rebalance)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    for n in 0..6 {
        pool.vm(&format!("vm-{n}"), 2).await;
    }
    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Done).await;
    let home = pool
        .view()
        .vms
        .values()
        .filter(|vm| vm.owner == Some(Pool::id(1)))
        .count();
    assert_eq!(home, 3);
}

#[tokio::test(start_paused = true)]
async fn a_blocked_maintenance_does_not_start_and_names_its_blockers() {
    let pool = Pool::of(2).await;
    let vm = pool
        .vm_with("pinned", 1, |new| {
            new.maintenance_policy = MaintenancePolicy::Block
        })
        .await;
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    assert_eq!(
        pool.view().maintenances[&id].state,
        MaintenanceState::Blocked
    );
    let problem = pool
        .submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap_err();
    assert_eq!(problem.kind, "maintenance-blocked");
    assert_eq!(problem.fields[0].field, "pinned");
    assert_eq!(pool.host_state(1), HostState::Up);
    let second = pool
        .submit(Intent::CreateMaintenance(of_host(1, ReturnPolicy::Exact)))
        .await
        .unwrap_err();
    assert_eq!(second.kind, "in-maintenance");

    let restore = RestoreOnCancel::Stay;
    pool.submit(Intent::CancelMaintenance {
        maintenance: id,
        restore,
    })
    .await
    .unwrap();
    let mut new = of_host(1, ReturnPolicy::Exact);
    new.overrides.insert(vm, MaintenancePolicy::Migrate);
    let id = pool.planned(new).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    assert_eq!(pool.owner(vm), Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_fits_nowhere_blocks_or_stops_and_returns_by_its_policy() {
    let pool = Pool::of(2).await;
    let big = |policy| {
        move |new: &mut NewVm| (new.spec.memory_mib, new.maintenance_policy) = (Mib(3000), policy)
    };
    pool.vm_with("other", 2, big(MaintenancePolicy::Migrate))
        .await;
    let vm = pool
        .vm_with("big", 1, big(MaintenancePolicy::Migrate))
        .await;
    let preview = pool
        .controller
        .preview(&Intent::CreateMaintenance(of_host(1, ReturnPolicy::Exact)))
        .unwrap();
    let plan = preview.plan.unwrap();
    assert_eq!(plan.blockers[0].kind.name(), "no_room");
    assert!(plan.blockers[0].detail.contains("host-2"));

    let mut new = of_host(1, ReturnPolicy::Exact);
    new.overrides.insert(vm, MaintenancePolicy::StopAndReturn);
    let id = pool.planned(new).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    assert!(pool.runs_on(vm).is_empty());
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(
        pool.owner(vm),
        None,
        "it is held down until the maintenance is over"
    );
    assert_eq!(
        pool.view().maintenances[&id].moved[0].action,
        MoveAction::StopAndReturn
    );
    pool.submit(Intent::FinishMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Done).await;
    pool.running(vm).await;
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_fails_while_it_is_drained_loses_no_vm() {
    let pool = Pool::of(3).await;
    let mut vms = Vec::new();
    for n in 0..4 {
        vms.push(pool.vm(&format!("vm-{n}"), 1).await);
    }
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    pool.host(1).cut();
    pool.state_is(id, MaintenanceState::Drained).await;
    for vm in vms {
        pool.running(vm).await;
        assert_ne!(pool.owner(vm), Some(1));
        assert_eq!(pool.runs_on(vm).len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_evacuation_empties_a_host_that_stays_cordoned() {
    let pool = Pool::of(3).await;
    for n in 0..4 {
        pool.vm(&format!("vm-{n}"), 1).await;
    }
    pool.vm_with("pinned", 1, |new| {
        new.maintenance_policy = MaintenancePolicy::Block
    })
    .await;
    let evacuate = Intent::EvacuateHost {
        host: Pool::id(1),
        reason: "failing disk".into(),
    };
    pool.succeeds(pool.submit(evacuate).await.unwrap()).await;
    assert_eq!(pool.view().vms_of(Pool::id(1)).count(), 0);
    assert_eq!(pool.host_state(1), HostState::Cordoned);
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_reaches_every_vm_of_a_host_and_tells_what_became_of_each() {
    let pool = Pool::of(2).await;
    let mut vms = Vec::new();
    for n in 0..3 {
        vms.push(pool.vm(&format!("vm-{n}"), 1).await);
    }
    let elsewhere = pool.vm("elsewhere", 2).await;
    let host = Pool::id(1);
    let accepted = pool.submit(Intent::UpgradeHost { host }).await.unwrap();
    pool.succeeds(accepted).await;
    for vm in &vms {
        assert_eq!(pool.host(1).successions(*vm), 1);
        assert_eq!((pool.owner(*vm), pool.runs_on(*vm)), (Some(1), vec![1]));
    }
    assert_eq!(pool.host(2).successions(elsewhere), 0);
    assert_eq!(pool.events("vm.upgraded"), 3);
    let view = pool.view();
    let operation = &view.operations[&accepted.operation.unwrap()];
    let Work::Upgrade { vms, .. } = &operation.work else {
        panic!("not an upgrade")
    };
    let done = UpgradeState::Done {
        blackout_us: Some(7_000),
    };
    assert!(vms.iter().all(|task| task.state == done), "{vms:?}");
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn a_silent_host_is_not_upgraded() {
    let pool = Pool::of(2).await;
    let host = Pool::id(1);
    pool.host(1).cut();
    pool.wait("the host is silent", |view| view.liveness(host).is_silent())
        .await;
    let refused = pool.submit(Intent::UpgradeHost { host }).await.unwrap_err();
    assert_eq!(refused.kind, "host-silent");
}

#[tokio::test(start_paused = true)]
async fn the_maintenance_of_a_dead_host_can_be_called_off() {
    let pool = Pool::of(2).await;
    let id = pool.planned(of_host(1, ReturnPolicy::Exact)).await;
    pool.submit(Intent::StartMaintenance { maintenance: id })
        .await
        .unwrap();
    pool.state_is(id, MaintenanceState::Drained).await;
    pool.host(1).cut();
    pool.state_is(id, MaintenanceState::Working).await;
    let cancel = Intent::CancelMaintenance {
        maintenance: id,
        restore: RestoreOnCancel::Stay,
    };
    let cancel = pool.submit(cancel).await.unwrap();
    pool.succeeds(cancel).await;
    pool.state_is(id, MaintenanceState::Cancelled).await;
    assert_eq!(pool.view().hosts[&Pool::id(1)].maintenance, None);
    let host = Pool::id(1);
    pool.submit(Intent::RemoveHost { host }).await.unwrap();
}
