//! Which VMs come back when a host's maintenance is over.

use crate::model::{Maintenance, MoveAction, MoveState, MoveTask, MovedState, ReturnPolicy, Vm};
use crate::plan::picture::{self, Demand, Hosts};
use crate::plan::placement::{admit, score};
use crate::view::View;
use godwit_wire::id::{HostId, VmId};
use std::collections::BTreeMap;

/// Most moves of one rebalance: each costs the guests a little, and the pool's load changes meanwhile.
pub const MAX_REBALANCE_MOVES: usize = 64;
/// How much better a VM must be off on the returning host to be worth a move.
pub const REBALANCE_GAIN: f64 = 0.05;

/// What to do, and which VMs stay where they are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RestorePlan {
    /// VMs that move or start.
    pub tasks: Vec<MoveTask>,
    /// VMs that stay, and why.
    pub stays: BTreeMap<VmId, String>,
}

/// Plans the return after `maintenance`.
pub fn plan_restore(view: &View, maintenance: &Maintenance, policy: ReturnPolicy) -> RestorePlan {
    let mut plan = RestorePlan::default();
    for moved in maintenance
        .moved
        .iter()
        .filter(|moved| moved.state == MovedState::Away)
    {
        let Some(vm) = view.vms.get(&moved.vm) else {
            plan.stays.insert(moved.vm, "it was deleted".into());
            continue;
        };
        let task = |action, to| MoveTask {
            vm: vm.id,
            vm_name: vm.name.clone(),
            action,
            to,
            attempts: 0,
            state: MoveState::Waiting,
        };
        if moved.action == MoveAction::StopAndReturn {
            match stopped_stays(vm, maintenance) {
                Some(reason) => drop(plan.stays.insert(vm.id, reason)),
                None => plan
                    .tasks
                    .push(task(MoveAction::StopAndReturn, Some(maintenance.host))),
            }
            continue;
        }
        match moved_stays(vm, maintenance.host, moved.to, policy) {
            Some(reason) => drop(plan.stays.insert(vm.id, reason)),
            None => plan
                .tasks
                .push(task(MoveAction::Migrate, Some(maintenance.host))),
        }
    }
    if policy == ReturnPolicy::Rebalance {
        plan.tasks.extend(rebalance(view, maintenance.host));
    }
    plan
}

fn stopped_stays(vm: &Vm, maintenance: &Maintenance) -> Option<String> {
    (vm.held_by != Some(maintenance.id))
        .then(|| "it was started or stopped by hand meanwhile".into())
}

fn moved_stays(vm: &Vm, home: HostId, to: Option<HostId>, policy: ReturnPolicy) -> Option<String> {
    match policy {
        ReturnPolicy::None => Some("VMs stay where they are".into()),
        ReturnPolicy::Rebalance => Some("the load decides which VMs come".into()),
        ReturnPolicy::Exact if vm.owner == Some(home) => Some("it is back already".into()),
        ReturnPolicy::Exact if vm.owner.is_none() => Some("it is off".into()),
        ReturnPolicy::Exact if vm.home != Some(home) => {
            Some("it was moved by hand meanwhile".into())
        }
        // Failover may have moved it on; it still belongs home.
        ReturnPolicy::Exact => to.is_none().then(|| "it was not moved".into()),
    }
}

fn rebalance(view: &View, host: HostId) -> Vec<MoveTask> {
    let mut hosts = picture::hosts(view);
    let demands: BTreeMap<VmId, Demand> = view
        .vms
        .values()
        .filter(|vm| vm.owner.is_some_and(|owner| owner != host) && vm.operation.is_none())
        .filter(|vm| view.vm_status(vm).state == crate::model::VmState::Running)
        .map(|vm| (vm.id, picture::moving(view, vm)))
        .collect();
    // The caller uncordons the host in the same step as it starts these moves.
    if let Some(host) = hosts.get_mut(&host) {
        host.state = crate::model::HostState::Up;
    }
    pick(&mut hosts, demands, host)
}

fn pick(hosts: &mut Hosts, mut demands: BTreeMap<VmId, Demand>, host: HostId) -> Vec<MoveTask> {
    let mut tasks = Vec::new();
    while tasks.len() < MAX_REBALANCE_MOVES {
        let gain = |demand: &Demand| {
            let (from, to) = (hosts.get(&demand.here?)?, hosts.get(&host)?);
            admit(to, demand).ok()?;
            let mut without = from.clone();
            without.remove(demand);
            Some(score(to, demand) - score(&without, demand)).filter(|gain| *gain > REBALANCE_GAIN)
        };
        let best = demands
            .values()
            .filter_map(|demand| Some((gain(demand)?, demand)))
            .max_by(|(a, x), (b, y)| a.total_cmp(b).then(y.vm.cmp(&x.vm)))
            .map(|(_, demand)| demand.clone());
        let Some(best) = best else { break };
        demands.remove(&best.vm);
        if let Some(from) = best.here.and_then(|here| hosts.get_mut(&here)) {
            from.remove(&best);
        }
        if let Some(to) = hosts.get_mut(&host) {
            to.add(&best);
        }
        tasks.push(MoveTask {
            vm: best.vm,
            vm_name: best.name,
            action: MoveAction::Migrate,
            to: Some(host),
            attempts: 0,
            state: MoveState::Waiting,
        });
    }
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::placement::tests::{demand, host};

    #[test]
    fn a_rebalance_moves_vms_until_the_hosts_are_about_even() {
        let mut full = host(1, 4096, 4);
        let mut demands = BTreeMap::new();
        for number in 1..=6 {
            let mut vm = demand(number, 512, 1);
            vm.here = Some(full.id);
            full.add(&vm);
            demands.insert(vm.vm, vm);
        }
        let empty = host(2, 4096, 4);
        let id = empty.id;
        let mut hosts: Hosts = [full, empty].map(|h| (h.id, h)).into();
        let tasks = pick(&mut hosts, demands, id);
        assert_eq!(tasks.len(), 3);
        let left: Vec<_> = hosts.values().map(|host| host.vms).collect();
        assert_eq!(left, [3, 3]);
    }
}
