//! Pausing, resuming and the balloon: one command, written before it is sent.

use super::Ended;
use super::context::{Conclusion, Context, Sent, never};
use crate::model::{Placed, PowerIntent, Subject, Work};
use godwit_wire::host_api::{SetBalloon, VmCommand};
use godwit_wire::id::VmId;
use godwit_wire::problem::Problem;
use godwit_wire::unit::Mib;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match command(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Power {
    Pause,
    Resume,
    Balloon(Mib),
}

impl Power {
    const fn step(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Balloon(_) => "balloon",
        }
    }

    const fn event(self) -> (&'static str, &'static str) {
        match self {
            Self::Pause => ("vm.paused", "paused"),
            Self::Resume => ("vm.resumed", "resumed"),
            Self::Balloon(_) => ("vm.balloon", "was asked to live with other memory"),
        }
    }

    /// What the operator is taken to want after a refusal; else the same command would be given for ever.
    const fn fallback(self) -> Option<PowerIntent> {
        match self {
            Self::Pause => Some(PowerIntent::Running),
            Self::Resume => Some(PowerIntent::Paused),
            Self::Balloon(_) => None,
        }
    }
}

async fn command(context: &Context<'_>) -> Result<(), Ended> {
    let operation = context.operation()?;
    let (id, power) = match operation.work {
        Work::Pause { vm, .. } => (vm, Power::Pause),
        Work::Resume { vm, .. } => (vm, Power::Resume),
        Work::Balloon { vm, keep, .. } => (vm, Power::Balloon(keep)),
        _ => return Err(Ended::GaveUp),
    };
    let Some(sent) = address(context, id, power).await? else {
        let problem = Problem::conflict("not-running", "the VM is off");
        return conclude(context, id, power, Err(problem)).await;
    };
    let driver = &context.core.driver;
    let command = VmCommand {
        epoch: sent.epoch,
        generation: sent.generation,
    };
    let answer = match power {
        Power::Pause => {
            context
                .send(sent.host, |to| driver.pause_vm(to, id, &command), never)
                .await
        }
        Power::Resume => {
            context
                .send(sent.host, |to| driver.resume_vm(to, id, &command), never)
                .await
        }
        Power::Balloon(keep_mib) => {
            let command = SetBalloon {
                epoch: sent.epoch,
                generation: sent.generation,
                keep_mib,
            };
            context
                .send(sent.host, |to| driver.set_balloon(to, id, &command), never)
                .await
        }
    };
    let result = match answer {
        Sent::Answer(_) => Ok(()),
        Sent::Refused(problem) => Err(problem),
        Sent::HostLost | Sent::Interrupted => {
            Err(Problem::conflict("host-silent", "its host fell silent"))
        }
    };
    conclude(context, id, power, result).await
}

async fn address(context: &Context<'_>, id: VmId, power: Power) -> Result<Option<Placed>, Ended> {
    context
        .change(|view, draft, operation| {
            let mut vm = Context::vm(view, id)?;
            let (Work::Pause { sent, .. }
            | Work::Resume { sent, .. }
            | Work::Balloon { sent, .. }) = &mut operation.work
            else {
                return None;
            };
            if sent.is_none() {
                let placed = vm.address_next()?;
                *sent = Some(placed);
                operation.begin_step(
                    power.step(),
                    format!("on {}", view.host_name(placed.host)),
                    draft.now(),
                );
                draft.put_vm(vm);
                return Some(placed);
            }
            *sent
        })
        .await
}

async fn conclude(
    context: &Context<'_>,
    id: VmId,
    power: Power,
    result: Result<(), Problem>,
) -> Result<(), Ended> {
    context
        .change(|view, draft, operation| {
            let mut vm = Context::vm(view, id);
            let conclusion = match &result {
                Ok(()) => {
                    if let Some(vm) = &vm {
                        let (kind, word) = power.event();
                        let message = format!("{} {word}", vm.name);
                        draft.info(
                            kind,
                            Subject::vm(vm.id, &vm.name),
                            &operation.actor,
                            message,
                        );
                    }
                    Conclusion::Succeeded(String::new())
                }
                Err(problem) => {
                    if let Some(vm) = vm.as_mut().filter(|_| problem.kind != "host-silent")
                        && let Some(intent) = power.fallback()
                    {
                        vm.intent = intent;
                    }
                    Conclusion::Failed(problem.clone())
                }
            };
            Context::conclude(draft, operation, vm, conclusion);
        })
        .await
}
