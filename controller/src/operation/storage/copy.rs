//! Erasing what a migration has left of a disk where the disk is not.
//!
//! ```text
//! wait for a host with the pool, and until the copy is not needed ─▶ tell it ─▶ erased, or not that copy any more
//!        ▲                                                              │ refused: something still has the file open,
//!        └──────── pause ───────────────────────────────────────────────┘          or the pool is in trouble
//! ```
//! The host may be away for as long as it likes. What must never happen is that the disk itself is erased. So the command
//! names the copy that it means by the migration which that was made for (`None`: the original), the pool has this on
//! record beside the disk, and refuses to erase any other. A disk that comes back comes in a copy made for a migration of
//! its own, so a command that is carried out however late, or twice, finds its own copy or does nothing. That nothing is
//! sent while the disk's record, or an open migration, names the pool, and that no migration takes the disk into the pool
//! before this operation has ended, keeps the two from working against each other; it is not what protects the disk.
//!
//! After a commit the copy at the source is kept until the VM was seen to work where it is now: what arrived may be
//! impossible to open there, and then this copy is the only one that is left.

use super::note_deletion;
use crate::model::{Subject, Vm, Work};
use crate::operation::Ended;
use crate::operation::context::{Conclusion, Context, FIRST_PAUSE, Sent};
use crate::view::View;
use godwit_wire::id::{DiskId, HostId, MigrationId, PoolId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::ANOTHER_COPY;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use std::time::Duration;

/// Times a host is asked again after it has refused.
const MAX_REFUSALS: u32 = 100;
/// Longest pause after a refusal; the first ones are shorter.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);

/// What is left, and by whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    pub(super) disk: DiskId,
    pub(super) pool: PoolId,
    pub(super) host: HostId,
    /// What the copy was made for; another one is not meant.
    pub(super) made_for: Option<MigrationId>,
    /// The VM that must have been seen with the disk where it is now.
    pub(super) once_used_by: Option<VmId>,
}

/// Whether a host has refused because what it has is not the copy that was named.
pub(in crate::operation) fn is_another_copy(problem: &Problem) -> bool {
    problem.kind == ANOTHER_COPY
}

/// Whether a VM is where it belongs and has opened its disks there.
fn works(view: &View, vm: &Vm) -> bool {
    let state = view.report(vm).and_then(|report| report.state.as_ref());
    match state {
        Some(VmmState::Running) => true,
        Some(VmmState::Paused { reason }) => {
            !matches!(reason, PauseReason::Storage { .. } | PauseReason::HandOver)
        }
        _ => false,
    }
}

/// What to do next.
enum Next {
    Tell(HostId),
    GiveUp(Problem),
}

impl Left {
    /// `None` while there is nothing to do but wait.
    fn next(&self, view: &View) -> Option<Next> {
        if view.belongs_in(self.disk, self.pool) {
            let detail = format!("the disk is in {} again", view.pool_name(self.pool));
            return Some(Next::GiveUp(Problem::conflict("in-use", detail)));
        }
        let able: Vec<HostId> = view
            .pool(self.pool)
            .map(|pool| pool.able_hosts().collect())
            .unwrap_or_default();
        let host = able
            .iter()
            .find(|host| **host == self.host)
            .or(able.first());
        if let Some(host) = host {
            return self.is_dispensable(view).then_some(Next::Tell(*host));
        }
        (!view.hosts.contains_key(&self.host)).then(|| {
            let detail = "the host that has it is not in the pool any more";
            Next::GiveUp(Problem::conflict("host-gone", detail))
        })
    }

    /// Whether nobody can need it any more: the disk works where it is now, or is not wanted at all.
    fn is_dispensable(&self, view: &View) -> bool {
        let Some(vm) = self.once_used_by else {
            return true;
        };
        !view.disks.contains_key(&self.disk) || view.vms.get(&vm).is_none_or(|vm| works(view, vm))
    }
}

pub(super) async fn erase_copy(context: &Context<'_>, left: &Left) -> Result<(), Ended> {
    note_deletion(context, left.pool).await?;
    let erased = erase(context, left).await;
    context
        .change(|view, draft, operation| {
            let Work::EraseCopy { disk, pool, .. } = &operation.work else {
                return;
            };
            let name = view.pool_name(*pool);
            let subject = Subject::disk(*disk, &operation.subject.name);
            let actor = &operation.actor;
            let conclusion = match &erased {
                Ok(()) => {
                    let message = format!("what {} had left in {name} is erased", subject.name);
                    draft.info("disk.copy_erased", subject, actor, message);
                    Conclusion::Succeeded("erased".into())
                }
                Err(problem) => {
                    let message = format!(
                        "what {} has left in {name} stays there: {}",
                        subject.name, problem.detail
                    );
                    draft.error("disk.copy_left", subject, actor, message);
                    Conclusion::Failed(problem.clone())
                }
            };
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

async fn erase(context: &Context<'_>, left: &Left) -> Result<(), Problem> {
    let driver = &context.core.driver;
    let (mut refusals, mut pause) = (0, FIRST_PAUSE);
    loop {
        let host = match context.core.until(|view| left.next(view)).await {
            Next::Tell(host) => host,
            Next::GiveUp(problem) => return Err(problem),
        };
        let told = context.send(
            host,
            |to| driver.erase_copy(to, left.pool, left.disk, left.made_for),
            |view| view.belongs_in(left.disk, left.pool),
        );
        match told.await {
            Sent::Answer(()) => return Ok(()),
            Sent::Refused(problem) if is_another_copy(&problem) => {
                tracing::info!(operation = %context.id, %host, %problem, "what was to be erased is gone already");
                return Ok(());
            }
            // Also that it does not see the pool any more: then nothing was erased.
            Sent::Refused(problem) => {
                refusals += 1;
                if refusals >= MAX_REFUSALS {
                    return Err(problem.with_remedy(
                        "mend what it failed on; the next move of the disk into that pool erases it first",
                    ));
                }
                tracing::info!(operation = %context.id, %host, %problem, "erasure refused; trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            Sent::HostLost | Sent::Interrupted => {}
        }
    }
}
