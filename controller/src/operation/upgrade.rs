//! New programs under running VMs: the agent of a host hands its VMs, one after the other, to VMMs of its own program.
//!
//! ```text
//! vm: waiting ──[succession written]──▶ running ──agent──▶ done | current | failed
//!        └── gone from the host: skipped     └── gone from the host meanwhile: skipped
//! ```
//! A VM stays its host's, under its epoch, and is not held by this operation: whatever else is asked of it waits at the
//! agent, which carries out one command to a VM after the other. A cancel lets the VM under way finish.

use super::Ended;
use super::context::{Conclusion, Context, Sent};
use crate::model::{Operation, StepState, Subject, UpgradeState, UpgradeTask, Work};
use crate::view::View;
use godwit_wire::host_api::{UpgradeOutcome, UpgradeVm, UpgradedVm};
use godwit_wire::id::{HostId, SuccessionId, VmId};
use godwit_wire::problem::Problem;

/// Failures told in an operation's error; all of them are in its steps and in the event log.
const MAX_FAILURES_TOLD: usize = 5;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match upgrade(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

/// What to do next.
enum Next {
    Send(HostId, VmId, UpgradeVm),
    Ended,
}

async fn upgrade(context: &Context<'_>) -> Result<(), Ended> {
    let driver = &context.core.driver;
    loop {
        let next = context
            .change(|view, draft, operation| {
                let next = next(view, operation, draft.now());
                if let Next::Ended = next {
                    let conclusion = conclusion(operation);
                    Context::conclude(draft, operation, None, conclusion);
                }
                next
            })
            .await?;
        let Next::Send(host, vm, command) = next else {
            return Ok(());
        };
        let gone = |view: &View| !is_on(view, vm, host);
        let sent = context
            .send(host, |to| driver.upgrade_vm(to, vm, &command), gone)
            .await;
        note(context, host, vm, sent).await?;
    }
}

fn is_on(view: &View, vm: VmId, host: HostId) -> bool {
    view.vms.get(&vm).is_some_and(|vm| vm.owner == Some(host))
}

/// The VM under way, or the next that waits. Everything a resumed executor needs is written before it is sent.
fn next(view: &View, operation: &mut Operation, now: jiff::Timestamp) -> Next {
    let cancelled = operation.cancel.is_some();
    let Work::Upgrade { host, vms } = &mut operation.work else {
        return Next::Ended;
    };
    let host = *host;
    for task in vms.iter_mut() {
        if task.state == UpgradeState::Waiting {
            let vm = view.vms.get(&task.vm).filter(|vm| vm.owner == Some(host));
            task.state = match vm {
                _ if cancelled => UpgradeState::Skipped {
                    reason: "it was called off".into(),
                },
                None => UpgradeState::Skipped {
                    reason: "it is not there any more".into(),
                },
                Some(vm) => UpgradeState::Running {
                    succession: SuccessionId::fresh(),
                    epoch: vm.epoch,
                },
            };
        }
        if let UpgradeState::Running { succession, epoch } = task.state {
            let (vm, name) = (task.vm, task.vm_name.clone());
            operation.begin_step(format!("upgrade {name}"), String::new(), now);
            return Next::Send(host, vm, UpgradeVm { epoch, succession });
        }
    }
    Next::Ended
}

/// Writes down what became of a VM.
async fn note(
    context: &Context<'_>,
    host: HostId,
    vm: VmId,
    sent: Sent<UpgradedVm>,
) -> Result<(), Ended> {
    let (state, word) = match sent {
        Sent::Answer(upgraded) => judged(upgraded),
        Sent::Refused(problem) => failed(problem.to_string()),
        Sent::HostLost => failed("its host fell silent".into()),
        Sent::Interrupted => {
            let reason = "it left the host meanwhile".to_owned();
            (
                UpgradeState::Skipped {
                    reason: reason.clone(),
                },
                reason,
            )
        }
    };
    context
        .change(|view, draft, operation| {
            let actor = operation.actor.clone();
            let Work::Upgrade { vms, .. } = &mut operation.work else {
                return;
            };
            let Some(task) = vms.iter_mut().find(|task| task.vm == vm) else {
                return;
            };
            task.state = state.clone();
            let name = task.vm_name.clone();
            let (subject, host) = (Subject::vm(vm, &name), view.host_name(host));
            let ended = match &state {
                UpgradeState::Failed { reason } => {
                    let message = format!("{name} stays in its VMM on {host}: {reason}");
                    draft.warning("vm.upgrade_failed", subject, &actor, message);
                    StepState::Failed
                }
                UpgradeState::Done { .. } => {
                    let message = format!("{name} runs in a new VMM on {host}: {word}");
                    draft.info("vm.upgraded", subject, &actor, message);
                    StepState::Done
                }
                _ => StepState::Done,
            };
            let now = draft.now();
            operation.end_step(ended, Some(word.clone()), now);
        })
        .await
}

fn judged(upgraded: UpgradedVm) -> (UpgradeState, String) {
    let blackout_us = upgraded.blackout.map(|blackout| blackout.total_us);
    match upgraded.outcome {
        UpgradeOutcome::Current => (
            UpgradeState::Current,
            "it runs in a VMM of this program already".into(),
        ),
        UpgradeOutcome::Upgraded => {
            let word = match blackout_us {
                Some(us) => format!("it stood still for {:.3} ms", us as f64 / 1e3),
                None => "it stood still for a moment".into(),
            };
            (UpgradeState::Done { blackout_us }, word)
        }
    }
}

fn failed(reason: String) -> (UpgradeState, String) {
    (
        UpgradeState::Failed {
            reason: reason.clone(),
        },
        reason,
    )
}

fn conclusion(operation: &Operation) -> Conclusion {
    let Work::Upgrade { vms, .. } = &operation.work else {
        return Conclusion::Succeeded(String::new());
    };
    let count =
        |wanted: fn(&UpgradeState) -> bool| vms.iter().filter(|task| wanted(&task.state)).count();
    let failures: Vec<String> = vms.iter().filter_map(failure).collect();
    let done = count(|state| matches!(state, UpgradeState::Done { .. }));
    let current = count(|state| *state == UpgradeState::Current);
    let detail = format!("{done} VMs run in new VMMs, {current} did before");
    if operation.cancel.is_some() {
        return Conclusion::Cancelled(detail);
    }
    if failures.is_empty() {
        return Conclusion::Succeeded(detail);
    }
    let told = failures.len().min(MAX_FAILURES_TOLD);
    let problem = Problem::conflict(
        "upgrade-incomplete",
        format!(
            "{detail}; {} stay where they are: {}",
            failures.len(),
            failures[..told].join("; ")
        ),
    );
    Conclusion::Failed(problem.with_remedy("they run on as before; look at the steps, and repeat"))
}

fn failure(task: &UpgradeTask) -> Option<String> {
    match &task.state {
        UpgradeState::Failed { reason } => Some(format!("{}: {reason}", task.vm_name)),
        _ => None,
    }
}
