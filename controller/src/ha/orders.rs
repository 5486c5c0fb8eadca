//! What a host is told in answer to its report: copies to destroy, and VMs that may run again.
//!
//! The owner of a VM is never told to destroy it here: after a commit the target still reports the source's
//! epoch for a moment, and what it holds then is the only copy.

use crate::model::MigrationState;
use crate::view::View;
use godwit_wire::host_api::{Order, VmReport};
use godwit_wire::id::{Epoch, HostId, VmId};
use godwit_wire::migration::PostCopy;
use godwit_wire::vmm_api::{PauseReason, VmmState};

/// Whether the host was given up for lost before this report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was heard all the time.
    Steady,
    /// It comes back after its VMs could have been started elsewhere.
    Returning,
}

/// What follows from a report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// For the host, destructions first.
    pub orders: Vec<Order>,
    /// VMs the store knows nothing of, or less than the host does: a sign of a store restored from a backup.
    /// They are left alone and the operator is told.
    pub foreign: Vec<VmId>,
}

/// Judges a host's report. `deleted` gives the last epoch of a VM that was deleted.
pub fn judge<'a>(
    view: &View,
    host: HostId,
    reports: impl IntoIterator<Item = &'a VmReport>,
    standing: Standing,
    deleted: impl Fn(VmId) -> Option<Epoch>,
) -> Judgement {
    let mut judgement = Judgement::default();
    let mut resumes = Vec::new();
    for report in reports {
        let (vm, epoch) = (report.vm, report.epoch);
        match about(view, host, report, standing, &deleted) {
            Verdict::Leave => {}
            Verdict::Destroy => judgement.orders.push(Order::Destroy { vm, epoch }),
            Verdict::Resume => resumes.push(Order::Resume { vm, epoch }),
            Verdict::Foreign => judgement.foreign.push(vm),
        }
    }
    judgement.orders.extend(resumes);
    judgement
}

enum Verdict {
    Leave,
    Destroy,
    Resume,
    Foreign,
}

fn about(
    view: &View,
    host: HostId,
    report: &VmReport,
    standing: Standing,
    deleted: &impl Fn(VmId) -> Option<Epoch>,
) -> Verdict {
    let Some(vm) = view.vms.get(&report.vm) else {
        return match deleted(report.vm) {
            Some(last) if report.epoch <= last => Verdict::Destroy,
            _ => Verdict::Foreign,
        };
    };
    if report.epoch > vm.epoch {
        return Verdict::Foreign;
    }
    let migration = vm.migration.and_then(|id| view.migrations.get(&id));
    if vm.owner == Some(host) {
        let expired = report.state
            == Some(VmmState::Paused {
                reason: PauseReason::LeaseExpired,
            });
        // While a migration is undecided or being cleaned up, its own protocol decides who runs. One that was
        // committed has decided, though the guest's memory may still follow.
        let decided = migration
            .is_none_or(|migration| matches!(migration.state, MigrationState::Committed { .. }));
        return match expired && report.epoch == vm.epoch && decided {
            true => Verdict::Resume,
            false => Verdict::Leave,
        };
    }
    match migration {
        Some(migration) if migration.is_open() && migration.target == host => Verdict::Leave,
        // Its executor collects the source's figures, then releases it.
        Some(migration) if migration.source == host && standing == Standing::Steady => {
            Verdict::Leave
        }
        // Whatever became of the host meanwhile, it may have memory that the guest needs; the executor knows when not.
        Some(migration)
            if migration.source == host && migration.policy.post_copy == PostCopy::Allowed =>
        {
            Verdict::Leave
        }
        _ => Verdict::Destroy,
    }
}
