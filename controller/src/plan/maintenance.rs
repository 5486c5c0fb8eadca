//! The dry run of emptying a host: every move with its target and cost, and every blocker with its remedy.

use crate::model::rejection::{remedies, summary};
use crate::model::{
    Blocker, BlockerKind, HostRejection, HostState, MaintenancePlan, MaintenancePolicy, MoveAction,
    PlannedMove, VmState,
};
use crate::plan::estimate::{self, Estimate, Figures};
use crate::plan::picture::{self, Demand, Hosts};
use crate::plan::placement::{Among, choose};
use crate::view::View;
use godwit_wire::id::{HostId, MaintenanceId, OperationId, VmId};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Bytes;
use std::collections::BTreeMap;

/// A VM that has to leave.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaving {
    /// What it needs while it runs.
    pub demand: Demand,
    /// What to do if it cannot move live.
    pub policy: MaintenancePolicy,
    /// What it is doing.
    pub state: VmState,
    /// The operation that is changing it.
    pub operation: Option<OperationId>,
    /// Its memory on the host.
    pub resident: Bytes,
    /// How fast it dirties memory.
    pub dirty_bytes_per_s: u64,
}

/// All that a plan is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct DrainInput {
    /// The host to be emptied.
    pub host: HostId,
    /// The maintenance asking, if one is; another one on the host is a blocker.
    pub asking: Option<MaintenanceId>,
    /// The maintenance the host is in.
    pub in_maintenance: Option<MaintenanceId>,
    /// The pool.
    pub hosts: Hosts,
    /// The VMs of the host.
    pub leaving: Vec<Leaving>,
    /// Rate and fixed cost to expect.
    pub figures: Figures,
}

impl DrainInput {
    /// From a view; `overrides` replace the VMs' own policies.
    pub fn of(
        view: &View,
        host: HostId,
        asking: Option<MaintenanceId>,
        overrides: &BTreeMap<VmId, MaintenancePolicy>,
    ) -> Self {
        let leaving = view.vms_of(host).map(|vm| {
            let usage = view.vm_usage(vm);
            Leaving {
                demand: picture::moving(view, vm),
                policy: overrides
                    .get(&vm.id)
                    .copied()
                    .unwrap_or(vm.maintenance_policy),
                state: view.vm_status(vm).state,
                operation: vm.operation,
                resident: if usage.rss_bytes.0 > 0 {
                    usage.rss_bytes
                } else {
                    vm.spec.memory_mib.bytes()
                },
                dirty_bytes_per_s: usage.dirty_bytes_per_s,
            }
        });
        Self {
            host,
            asking,
            in_maintenance: view.hosts.get(&host).and_then(|host| host.maintenance),
            hosts: picture::hosts(view),
            leaving: leaving.collect(),
            figures: estimate::pool_figures(view),
        }
    }
}

/// Plans to empty a host. The largest VMs are placed first, because they fit in the fewest places.
pub fn plan_drain(input: &DrainInput) -> MaintenancePlan {
    let mut hosts = input.hosts.clone();
    let mut plan = MaintenancePlan {
        blockers: host_blockers(input),
        ..MaintenancePlan::default()
    };
    let mut leaving: Vec<&Leaving> = input.leaving.iter().collect();
    leaving.sort_by_key(|vm| (std::cmp::Reverse(vm.demand.memory), vm.demand.vm));
    for vm in leaving {
        match plan_one(input, &hosts, vm) {
            Err(blocker) => plan.blockers.push(*blocker),
            Ok((action, to, estimate)) => {
                if let Some(from) = hosts.get_mut(&input.host) {
                    from.remove(&vm.demand);
                }
                if let Some(to) = to.and_then(|to| hosts.get_mut(&to)) {
                    to.add(&vm.demand);
                }
                plan.total_s += estimate.seconds;
                plan.moves.push(PlannedMove {
                    vm: vm.demand.vm,
                    vm_name: vm.demand.name.clone(),
                    action,
                    to,
                    to_name: to
                        .and_then(|to| hosts.get(&to))
                        .map(|host| host.name.clone()),
                    predicted_s: estimate.seconds,
                    predicted_mib: estimate.mib.0,
                    predicted_blackout_ms: estimate.blackout_ms,
                    reserve_after_mib: failover_reserve_mib(&hosts, input.host),
                });
            }
        }
    }
    plan
}

fn host_blockers(input: &DrainInput) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    let mut block = |kind, detail: String, remedy: &str| {
        blockers.push(Blocker {
            vm: None,
            vm_name: None,
            kind,
            detail,
            remedy: remedy.into(),
        });
    };
    let Some(host) = input.hosts.get(&input.host) else {
        return blockers;
    };
    if !input.leaving.is_empty() && (!host.heard || host.state == HostState::Unreachable) {
        block(
            BlockerKind::HostSilent,
            format!(
                "{} does not answer, so nothing can be moved off it",
                host.name
            ),
            "wait until the host is back; failover starts its VMs elsewhere by itself",
        );
    }
    if let Some(other) = input
        .in_maintenance
        .filter(|other| Some(*other) != input.asking)
    {
        block(
            BlockerKind::OtherMaintenance { maintenance: other },
            format!("{} is in maintenance {other}", host.name),
            "finish or cancel that maintenance first",
        );
    }
    blockers
}

type Planned = (MoveAction, Option<HostId>, Estimate);

fn plan_one(input: &DrainInput, hosts: &Hosts, vm: &Leaving) -> Result<Planned, Box<Blocker>> {
    let block = |kind, detail: String, remedy: String| {
        let (vm, vm_name) = (Some(vm.demand.vm), Some(vm.demand.name.clone()));
        Err(Box::new(Blocker {
            vm,
            vm_name,
            kind,
            detail,
            remedy,
        }))
    };
    if vm.policy == MaintenancePolicy::Block {
        let remedy = "move or stop it by hand, or override its policy for this maintenance";
        return block(
            BlockerKind::PolicyBlocks,
            "its maintenance policy is block".into(),
            remedy.into(),
        );
    }
    if let Some(operation) = vm.operation {
        let remedy = "wait until it ends, or cancel it".to_owned();
        return block(
            BlockerKind::Busy { operation },
            format!("operation {operation} is changing it"),
            remedy,
        );
    }
    let live = vm.state == VmState::Running || vm.state == VmState::Paused;
    if live {
        let choice = choose(hosts, &vm.demand, Among::default());
        if let Some((to, _)) = choice.best {
            let limit = MigrationPolicy::default().downtime_limit_ms;
            let estimate = estimate::live(vm.resident, vm.dirty_bytes_per_s, &input.figures, limit);
            return Ok((MoveAction::Migrate, Some(to), estimate));
        }
        if vm.policy == MaintenancePolicy::Migrate {
            return no_room(vm, choice.rejections);
        }
    } else if vm.policy == MaintenancePolicy::Migrate {
        let remedy = "bring it back to running, or stop it".to_owned();
        let detail = format!("it is {:?}, so it cannot move live", vm.state).to_lowercase();
        return block(BlockerKind::NotRunning { state: vm.state }, detail, remedy);
    }
    if vm.policy == MaintenancePolicy::StopAndReturn {
        return Ok((MoveAction::StopAndReturn, None, estimate::restart()));
    }
    let booting = Demand {
        running_on: None,
        ..vm.demand.clone()
    };
    let choice = choose(hosts, &booting, Among::default());
    match choice.best {
        Some((to, _)) => Ok((MoveAction::RestartElsewhere, Some(to), estimate::restart())),
        None => no_room(vm, choice.rejections),
    }
}

fn no_room(vm: &Leaving, rejections: Vec<HostRejection>) -> Result<Planned, Box<Blocker>> {
    let others: Vec<HostRejection> = rejections
        .into_iter()
        .filter(|rejected| Some(rejected.host) != vm.demand.here)
        .collect();
    Err(Box::new(Blocker {
        vm: Some(vm.demand.vm),
        vm_name: Some(vm.demand.name.clone()),
        detail: format!("no host takes it: {}", summary(&others)),
        remedy: remedies(&others),
        kind: BlockerKind::NoRoom { rejections: others },
    }))
}

/// Memory left if the host with most committed memory failed, `leaving` being gone anyway: negative when not
/// every VM could be started again.
fn failover_reserve_mib(hosts: &Hosts, leaving: HostId) -> i64 {
    let up: Vec<_> = hosts
        .values()
        .filter(|host| host.id != leaving && host.state == HostState::Up && host.heard)
        .collect();
    let free = |without: HostId| -> i64 {
        up.iter()
            .filter(|host| host.id != without)
            .map(|host| host.memory_free().0.cast_signed())
            .sum()
    };
    up.iter()
        .map(|lost| free(lost.id) - lost.memory_committed.0.cast_signed())
        .min()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::placement::tests::{any_demands, any_pool, demand, host};
    use godwit_wire::unit::Mib;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn leaving(demand: Demand, policy: MaintenancePolicy) -> Leaving {
        let resident = demand.memory.bytes();
        Leaving {
            demand,
            policy,
            state: VmState::Running,
            operation: None,
            resident,
            dirty_bytes_per_s: 0,
        }
    }

    fn input(hosts: Hosts, host: HostId, vms: Vec<Leaving>) -> DrainInput {
        let here = |mut vm: Leaving| {
            vm.demand.here = Some(host);
            vm
        };
        DrainInput {
            host,
            asking: None,
            in_maintenance: None,
            hosts,
            leaving: vms.into_iter().map(here).collect(),
            figures: Figures::assumed(),
        }
    }

    fn render(plan: &MaintenancePlan) -> String {
        let mut text = String::new();
        for m in &plan.moves {
            text += &format!(
                "{} {:?} to {} in {:.1} s, {} MiB, blackout {} ms, reserve {} MiB\n",
                m.vm_name,
                m.action,
                m.to_name.as_deref().unwrap_or("-"),
                m.predicted_s,
                m.predicted_mib,
                m.predicted_blackout_ms,
                m.reserve_after_mib
            );
        }
        for b in &plan.blockers {
            text += &format!(
                "{} blocked: {}: {} ({})\n",
                b.vm_name.as_deref().unwrap_or("host"),
                b.kind.name(),
                b.detail,
                b.remedy
            );
        }
        text
    }

    #[test]
    fn a_plan_names_every_move_and_every_blocker() {
        let hosts: Hosts = [host(1, 4096, 4), host(2, 2048, 4), host(3, 1024, 4)]
            .map(|h| (h.id, h))
            .into();
        let first = *hosts.keys().next().unwrap();
        let mut host_cpu = leaving(demand(5, 128, 1), MaintenancePolicy::RestartElsewhere);
        host_cpu.demand.baseline = godwit_wire::machine::CpuBaseline::Host;
        host_cpu.demand.running_on = Some("other".into());
        let plan = plan_drain(&input(
            hosts,
            first,
            vec![
                leaving(demand(1, 512, 1), MaintenancePolicy::Migrate),
                leaving(demand(2, 1500, 1), MaintenancePolicy::Migrate),
                leaving(demand(3, 3000, 1), MaintenancePolicy::StopAndReturn),
                leaving(demand(4, 256, 1), MaintenancePolicy::Block),
                host_cpu,
                leaving(demand(6, 2000, 1), MaintenancePolicy::Migrate),
            ],
        ));
        expect_test::expect![[r#"
            vm-3 StopAndReturn to - in 10.0 s, 0 MiB, blackout 10000 ms, reserve 1024 MiB
            vm-6 Migrate to host-2 in 20.5 s, 2000 MiB, blackout 10 ms, reserve -976 MiB
            vm-1 Migrate to host-3 in 5.6 s, 512 MiB, blackout 10 ms, reserve -1488 MiB
            vm-5 RestartElsewhere to host-3 in 10.0 s, 0 MiB, blackout 10000 ms, reserve -1616 MiB
            vm-2 blocked: no_room: no host takes it: host-2: 1500 MiB needed, 48 MiB of 2048 MiB free; host-3: 1500 MiB needed, 1024 MiB of 1024 MiB free (host-2: free 1452 MiB on the host, or make the VM smaller; host-3: free 476 MiB on the host, or make the VM smaller)
            vm-4 blocked: policy_blocks: its maintenance policy is block (move or stop it by hand, or override its policy for this maintenance)
        "#]]
        .assert_eq(&render(&plan));
    }

    proptest! {
        #[test]
        fn a_plan_never_overcommits_nor_uses_the_leaving_or_a_down_host(
            hosts in any_pool(), demands in any_demands(), pick in any::<prop::sample::Index>()
        ) {
            prop_assume!(!hosts.is_empty());
            let leaving_host = *pick.get(&hosts.keys().copied().collect::<Vec<_>>());
            let vms: Vec<_> = demands.into_iter().map(|d| leaving(d, MaintenancePolicy::Migrate)).collect();
            let count = vms.len();
            let input = input(hosts, leaving_host, vms);
            let plan = plan_drain(&input);
            prop_assert_eq!(&plan, &plan_drain(&input), "deterministic");
            let blocked = plan.blockers.iter().filter(|blocker| blocker.vm.is_some()).count();
            prop_assert_eq!(plan.moves.len() + blocked, count, "every VM is moved or a blocker");
            let mut hosts = input.hosts.clone();
            for planned in &plan.moves {
                let to = planned.to.unwrap();
                prop_assert!(to != leaving_host);
                let vm = input.leaving.iter().find(|vm| vm.demand.vm == planned.vm).unwrap();
                let host = hosts.get_mut(&to).unwrap();
                prop_assert!(host.state == HostState::Up && host.heard);
                host.add(&vm.demand);
                prop_assert!(host.memory_committed <= host.memory);
                prop_assert!(host.vcpus_committed <= host.vcpu_limit());
            }
        }
    }

    #[test]
    fn a_silent_host_and_another_maintenance_block() {
        let mut silent = host(1, 4096, 4);
        silent.heard = false;
        let hosts: Hosts = [silent, host(2, 2048, 4)].map(|h| (h.id, h)).into();
        let first = *hosts.keys().next().unwrap();
        let mut input = input(
            hosts,
            first,
            vec![leaving(demand(1, 64, 1), MaintenancePolicy::Migrate)],
        );
        input.in_maintenance = Some(MaintenanceId(Uuid::from_u128(9)));
        let kinds: Vec<_> = plan_drain(&input)
            .blockers
            .iter()
            .map(|b| b.kind.name())
            .collect();
        assert_eq!(kinds, ["host_silent", "other_maintenance"]);
        let _ = Mib(0);
    }
}
