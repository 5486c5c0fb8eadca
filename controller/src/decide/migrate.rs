//! Intents to move a VM live.

use super::Decision;
use super::vm::{begin, place, running_vm};
use crate::intent::Resource;
use crate::ledger::Draft;
use crate::model::moving_disk::total;
use crate::model::{Actor, DisksOnMove, MigrateCause, Vm, VmState, Work};
use crate::plan::along::destinations;
use crate::plan::contract::foresee_move;
use crate::plan::picture;
use crate::view::View;
use godwit_wire::id::{HostId, VmId};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::problem::{FieldProblem, Problem};

/// How a VM shall move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way<'a> {
    /// Only there.
    pub(super) target: Option<HostId>,
    /// Limits.
    pub(super) policy: &'a MigrationPolicy,
    /// What becomes of disks that the target does not see.
    pub(super) disks: &'a DisksOnMove,
}

pub(super) fn migrate(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    way: &Way<'_>,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let (mut vm, source) = running_vm(view, id)?;
    check_post_copy(&vm, way.policy)?;
    let state = view.vm_status(&vm).state;
    if !matches!(state, VmState::Running | VmState::Paused) {
        let detail = format!("{} is {state:?}, so it cannot move live", vm.name).to_lowercase();
        return Err(Problem::conflict("not-running", detail));
    }
    let demand = picture::moving_with(view, &vm, way.disks);
    let placement = place(view, &demand, way.target)?;
    let hosts = picture::hosts(view);
    let along = demand.along.as_ref().zip(hosts.get(&placement.host));
    let moving = along
        .and_then(|(along, host)| destinations(&host.pools, along).ok())
        .unwrap_or_default();
    let work = Work::Migrate {
        vm: id,
        wanted: way.target,
        policy: way.policy.clone(),
        disks: way.disks.clone(),
        cause: MigrateCause::ByHand,
        migration: None,
    };
    let operation = begin(draft, &mut vm, work, actor);
    // From what is known; whoever only asks has the guest watched, too.
    let bytes = total(moving.iter().map(|to| to.disk.bytes));
    let forecast = foresee_move(view, &vm, placement.host, way.policy, bytes, None);
    let effect = format!(
        "{} moves from {} to {}",
        vm.name,
        view.host_name(source),
        placement.host_name
    );
    draft.put_vm(vm);
    let mut decision = Decision::new(Resource::Vm(id), Some(operation), effect);
    let along = moving.iter().map(|to| {
        format!(
            "its disk {} of {} moves along, from the storage pool {} to {}",
            to.disk.name,
            to.disk.bytes,
            to.disk.pool_name,
            view.pool_name_at(placement.host, to.pool)
        )
    });
    decision.preview.effects.extend(along);
    decision.preview.placement = Some(placement);
    decision.preview.forecast = Some(forecast);
    Ok(decision)
}

/// What the operator has forbidden once and for all is not granted for one migration.
fn check_post_copy(vm: &Vm, policy: &MigrationPolicy) -> Result<(), Problem> {
    if vm.post_copy.grant(policy.post_copy) == policy.post_copy {
        return Ok(());
    }
    Err(Problem::invalid(vec![FieldProblem::new(
        "policy.allow_postcopy",
        format!("post-copy is forbidden for {}", vm.name),
        format!(
            "leave it out, or allow it first: godwit vm set {} --post-copy allowed",
            vm.name
        ),
    )]))
}
