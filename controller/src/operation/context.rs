//! What executors have in common: changing their operation, and sending a command until there is an answer.

use super::Ended;
use crate::core::Core;
use crate::drive::host_driver::HostAddress;
use crate::ledger::{Draft, Turn};
use crate::model::{Liveness, Operation, OperationState, StepState, Vm};
use crate::view::View;
use godwit_channel::CallError;
use godwit_wire::id::{HostId, OperationId, VmId};
use godwit_wire::problem::Problem;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Pause after the store failed.
pub(super) const STORE_PAUSE: Duration = Duration::from_secs(1);
/// First pause after a host did not answer; doubles up to [`LAST_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(super) const LAST_PAUSE: Duration = Duration::from_secs(2);

/// An executor's operation.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) core: &'a Arc<Core>,
    pub(super) id: OperationId,
}

/// What became of a command.
#[derive(Debug)]
pub(super) enum Sent<T> {
    /// Carried out.
    Answer(T),
    /// Refused; it has not been carried out.
    Refused(Problem),
    /// The host is given up for lost; whether it was carried out is not known.
    HostLost,
    /// The caller's reason to stop came up; whether it was carried out is not known.
    Interrupted,
}

/// How an operation ends.
#[derive(Clone, Debug)]
pub(super) enum Conclusion {
    /// Done; with a word for the last step.
    Succeeded(String),
    /// Not done.
    Failed(Problem),
    /// Called off.
    Cancelled(String),
}

impl<'a> Context<'a> {
    pub(super) fn new(core: &'a Arc<Core>, id: OperationId) -> Self {
        Self { core, id }
    }

    pub(super) fn view(&self) -> Arc<View> {
        self.core.view()
    }

    /// The operation's record; an executor's operation cannot vanish before it has ended.
    pub(super) fn operation(&self) -> Result<Arc<Operation>, Ended> {
        self.view()
            .operations
            .get(&self.id)
            .cloned()
            .ok_or(Ended::GaveUp)
    }

    /// Changes the operation and whatever belongs to it in one transaction; `decide` sees the latest records.
    pub(super) async fn change<T>(
        &self,
        decide: impl FnMut(&View, &mut Draft<'_>, &mut Operation) -> T,
    ) -> Result<T, Ended> {
        let mut turn = self.core.ledger.turn().await;
        self.change_in(&mut turn, decide).await
    }

    /// As [`change`](Self::change), in a turn that has been taken already.
    pub(super) async fn change_in<T>(
        &self,
        turn: &mut Turn<'_>,
        mut decide: impl FnMut(&View, &mut Draft<'_>, &mut Operation) -> T,
    ) -> Result<T, Ended> {
        let changed = turn
            .change(|view, draft| {
                let before = view
                    .operations
                    .get(&self.id)
                    .filter(|op| !op.state.is_final());
                let before = before.ok_or_else(|| Problem::not_found("operation", self.id))?;
                let mut operation = before.as_ref().clone();
                if operation.state == OperationState::Pending {
                    operation.state = OperationState::Running;
                }
                let decision = decide(view, draft, &mut operation);
                if operation != **before {
                    draft.put_operation(operation);
                }
                Ok(decision)
            })
            .await;
        changed.map_err(|problem| {
            tracing::warn!(operation = %self.id, %problem, "the operation's record could not be changed");
            Ended::GaveUp
        })
    }

    /// The VM the operation holds.
    pub(super) fn vm(view: &View, id: VmId) -> Option<Vm> {
        view.vms.get(&id).map(|vm| vm.as_ref().clone())
    }

    /// Sends a command until it is answered, the host is lost, or `interrupted` finds a reason to stop.
    pub(super) async fn send<T, F>(
        &self,
        host: HostId,
        command: impl Fn(HostAddress) -> F,
        mut interrupted: impl FnMut(&View) -> bool,
    ) -> Sent<T>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            let Some(address) = self.core.address(host) else {
                return Sent::HostLost;
            };
            let stopped = self.core.until(|view| {
                if view.liveness(host) == Liveness::RestartAllowed
                    || !view.hosts.contains_key(&host)
                {
                    return Some(Sent::HostLost);
                }
                interrupted(view).then_some(Sent::Interrupted)
            });
            let answered = async {
                match command(address).await {
                    Ok(answer) => Some(Sent::Answer(answer)),
                    Err(CallError::Problem { problem, .. }) => Some(Sent::Refused(problem)),
                    Err(error) => {
                        let name = self.view().host_name(host);
                        tracing::warn!(operation = %self.id, host = name, %error, "no answer; trying again");
                        tokio::time::sleep(pause).await;
                        None
                    }
                }
            };
            let sent = tokio::select! {
                biased;
                stopped = stopped => return stopped,
                sent = answered => sent,
            };
            if let Some(sent) = sent {
                return sent;
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Writes how the operation ends, and lets go of the VM. `vm` is the VM as it shall be.
    pub(super) fn conclude(
        draft: &mut Draft<'_>,
        operation: &mut Operation,
        vm: Option<Vm>,
        conclusion: Conclusion,
    ) {
        let now = draft.now();
        operation.ended_at = Some(now);
        match conclusion {
            Conclusion::Succeeded(detail) => {
                operation.end_step(StepState::Done, Some(detail), now);
                operation.state = OperationState::Succeeded;
            }
            Conclusion::Failed(problem) => {
                operation.end_step(StepState::Failed, Some(problem.detail.clone()), now);
                operation.state = OperationState::Failed;
                operation.error = Some(problem);
            }
            Conclusion::Cancelled(detail) => {
                operation.end_step(StepState::Failed, Some(detail), now);
                operation.state = OperationState::Cancelled;
            }
        }
        if let Some(mut vm) = vm {
            vm.operation = None;
            vm.migration = None;
            draft.put_vm(vm);
        }
    }
}

/// For commands that nothing interrupts.
pub(super) fn never(_: &View) -> bool {
    false
}
