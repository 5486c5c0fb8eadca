//! Wanted against observed, VM by VM: what to begin next.

use crate::model::rejection::summary;
use crate::model::{Liveness, PowerIntent, Retry, StartCause, Trouble, Vm};
use crate::plan::picture::{self, Demand, Hosts};
use crate::plan::placement::{Among, choose, room, storage};
use crate::view::View;
use godwit_wire::host_api::LeasePolicy;
use godwit_wire::id::{HostId, VmId};
use godwit_wire::vmm_api::{PauseReason, StopReason, VmmState};

/// Heartbeats in a row that must lack a VM before it counts as gone: one may have been sent before the host
/// heard of the VM.
pub const MISSING_HEARTBEATS: u32 = 3;

/// Something to begin.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Place it and start it.
    Start {
        /// Which VM.
        vm: VmId,
        /// Only there.
        wanted: Option<HostId>,
        /// Why.
        cause: StartCause,
    },
    /// It shall run and no host takes it; tell the operator once.
    NoRoom {
        /// Which VM.
        vm: VmId,
        /// Every host with its rejection.
        reason: String,
    },
    /// Its guest powered off: take that as the operator's wish and free its host.
    Halted {
        /// Which VM.
        vm: VmId,
    },
    /// It runs and shall not.
    Stop {
        /// Which VM.
        vm: VmId,
    },
    /// It runs and shall stand still.
    Pause {
        /// Which VM.
        vm: VmId,
    },
    /// It stands still and shall run.
    Resume {
        /// Which VM.
        vm: VmId,
    },
}

/// All that is to be begun now. `may_restart` says whether a VM's pause between automatic restarts is over.
pub fn plan_reconcile(view: &View, may_restart: impl Fn(VmId) -> bool) -> Vec<Action> {
    let mut hosts = picture::hosts(view);
    let free = view
        .vms
        .values()
        .filter(|vm| vm.operation.is_none() && vm.held_by.is_none());
    free.filter_map(|vm| match vm.owner {
        None => without_owner(view, vm, &mut hosts, &may_restart),
        Some(owner) => with_owner(view, vm, owner, &mut hosts, &may_restart),
    })
    .collect()
}

fn without_owner(
    view: &View,
    vm: &Vm,
    hosts: &mut Hosts,
    may_restart: &impl Fn(VmId) -> bool,
) -> Option<Action> {
    if !vm.intent.wants_vmm() {
        return None;
    }
    match &vm.trouble {
        Some(Trouble::StartFailed {
            retry: Retry::Never,
            ..
        }) => None,
        Some(Trouble::StartFailed { .. }) if !may_restart(vm.id) => None,
        _ => place(view, vm, hosts, StartCause::Wanted),
    }
}

/// Asks placement first, so that an operation is only begun when it can do something. The room is taken in this
/// round's picture; the operation itself chooses again.
fn place(view: &View, vm: &Vm, hosts: &mut Hosts, cause: StartCause) -> Option<Action> {
    let demand = picture::booting(view, vm);
    let choice = choose(hosts, &demand, Among::default());
    match choice.best {
        Some((host, _)) => {
            hosts.get_mut(&host)?.add(&demand);
            Some(Action::Start {
                vm: vm.id,
                wanted: None,
                cause,
            })
        }
        None => {
            let reason = summary(&choice.rejections);
            let known =
                matches!(&vm.trouble, Some(Trouble::NoRoom { reason: told }) if *told == reason);
            (!known).then_some(Action::NoRoom { vm: vm.id, reason })
        }
    }
}

fn with_owner(
    view: &View,
    vm: &Vm,
    owner: HostId,
    hosts: &mut Hosts,
    may_restart: &impl Fn(VmId) -> bool,
) -> Option<Action> {
    // A host that refused to stop it is not asked again at once.
    let stop = may_restart(vm.id).then_some(Action::Stop { vm: vm.id });
    if view.liveness(owner) == Liveness::RestartAllowed {
        return match (vm.intent.wants_vmm(), vm.lease) {
            (_, LeasePolicy::Unwatched) => None,
            (false, LeasePolicy::Watched) => stop,
            (true, LeasePolicy::Watched) => {
                place(view, vm, hosts, StartCause::HostSilent { host: owner })
            }
        };
    }
    let observed = view
        .observed
        .get(&owner)
        .filter(|observed| observed.heard_at.is_some())?;
    if observed.liveness.is_silent() {
        return None;
    }
    let Some(report) = view.report(vm) else {
        let missing = observed.missing.get(&vm.id).copied().unwrap_or(0) >= MISSING_HEARTBEATS;
        // Not a proof that its process is gone: only its own host can make sure of that.
        let again = Action::Start {
            vm: vm.id,
            wanted: Some(owner),
            cause: StartCause::Crashed { host: owner },
        };
        return match vm.intent.wants_vmm() {
            true => (missing && may_restart(vm.id)).then_some(again),
            false => stop,
        };
    };
    match (&report.state, vm.intent) {
        (_, PowerIntent::Stopped) => stop,
        (
            Some(VmmState::Stopped {
                reason: StopReason::GuestHalted,
            }),
            _,
        ) => may_restart(vm.id).then_some(Action::Halted { vm: vm.id }),
        (None | Some(VmmState::Stopped { .. }), _) => may_restart(vm.id).then_some(Action::Start {
            vm: vm.id,
            wanted: None,
            cause: StartCause::Crashed { host: owner },
        }),
        (Some(VmmState::Running), PowerIntent::Paused) => Some(Action::Pause { vm: vm.id }),
        (
            Some(VmmState::Paused {
                reason: PauseReason::Requested,
            }),
            PowerIntent::Running,
        ) => Some(Action::Resume { vm: vm.id }),
        _ => None,
    }
}

/// Where a VM whose process is gone starts again: on its own host if that takes VMs, else elsewhere, else on
/// its own host after all (it was promised room there).
pub fn place_after_crash(hosts: &Hosts, demand: &Demand, host: HostId) -> Option<HostId> {
    let mut hosts = hosts.clone();
    hosts.get_mut(&host)?.remove(demand);
    let at_home = choose(
        &hosts,
        demand,
        Among {
            only: Some(host),
            failed: &[],
        },
    );
    if let Some((home, _)) = at_home.best {
        return Some(home);
    }
    choose(&hosts, demand, Among::default())
        .best
        .map(|(elsewhere, _)| elsewhere)
        .or_else(|| {
            hosts
                .get(&host)
                .filter(|home| {
                    home.heard && storage(home, demand).is_ok() && room(home, demand).is_ok()
                })
                .map(|home| home.id)
        })
}
