//! Which request is allowed in which state (pure).
//!
//! ```text
//!           create                boot                 pause, lease over, fault, hand-over
//!   Empty ─────────▶ Created ──────────▶ Running ◀────────────────────────────────────────▶ Paused
//!     │                                     │   resume (not from a fault or a hand-over)       │
//!     │ incoming              commit        │                                                  │
//!     └──────────▶ Incoming ───────────────▶┤ guest halts, kill, release                       │
//!                      │ abort              ▼                                                  │
//!                      └───────────────▶ Stopped ◀──────────────────────────────────────────────┘
//! ```

use godwit_wire::id::Epoch;
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{PauseReason, VmmState};

/// A request that changes the machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Build,
    Boot,
    Pause,
    Resume,
    Stop,
    Kill,
    SendAway,
    Snapshot,
    Succeed,
}

/// What an allowed request means now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Do it.
    Act,
    /// It is so already: answer, change nothing.
    AlreadySo,
}

impl Request {
    const fn verb(self) -> &'static str {
        match self {
            Self::Build => "be built",
            Self::Boot => "boot",
            Self::Pause => "be paused",
            Self::Resume => "be resumed",
            Self::Stop => "be asked to stop",
            Self::Kill => "be killed",
            Self::SendAway => "be migrated",
            Self::Snapshot => "be saved",
            Self::Succeed => "be taken over",
        }
    }
}

fn describe(state: &VmmState) -> String {
    match state {
        VmmState::Empty => "there is no machine yet".into(),
        VmmState::Created => "it has not been booted".into(),
        VmmState::Running => "it is running".into(),
        VmmState::Incoming => "it is arriving".into(),
        VmmState::Stopped { .. } => "it has stopped".into(),
        VmmState::Paused { reason } => match reason {
            PauseReason::Requested => "it is paused".into(),
            PauseReason::LeaseExpired => {
                "it stopped itself because its host's lease ran out".into()
            }
            PauseReason::HandOver => "it is being handed over".into(),
            PauseReason::Storage { disk, detail } => {
                format!("it waits because disk {disk} cannot be written: {detail}")
            }
            PauseReason::Memory { detail } => {
                format!("it waits for memory from its former host: {detail}")
            }
            PauseReason::Fault { detail } => format!("it cannot go on: {detail}"),
        },
    }
}

/// Judges `request` in `state`.
pub(super) fn admit(request: Request, state: &VmmState) -> Result<Admission, Problem> {
    use Request as R;
    use VmmState as S;
    let act = Ok(Admission::Act);
    let already = Ok(Admission::AlreadySo);
    match (request, state) {
        (R::Build, S::Empty) | (R::Boot, S::Created) | (R::Pause, S::Running) => act,
        (R::Boot | R::Resume, S::Running)
        | (
            R::Pause,
            S::Paused {
                reason: PauseReason::Requested,
            },
        ) => already,
        (
            R::Resume,
            S::Paused {
                reason:
                    PauseReason::Requested | PauseReason::LeaseExpired | PauseReason::Storage { .. },
            },
        ) => act,
        (R::Stop, S::Running) => act,
        (R::Stop | R::Kill, S::Stopped { .. }) | (R::Kill, S::Empty) => already,
        (R::Kill, _) => act,
        (
            R::SendAway | R::Snapshot | R::Succeed,
            S::Running
            | S::Paused {
                reason: PauseReason::Requested,
            },
        ) => act,
        (request, state) => Err(Problem::conflict(
            "wrong-state",
            format!(
                "the machine cannot {} because {}",
                request.verb(),
                describe(state)
            ),
        )),
    }
}

/// Judges the epoch of a command against the machine's.
pub(super) fn admit_epoch(command: Epoch, machine: Epoch) -> Result<(), Problem> {
    match command.cmp(&machine) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(Problem::conflict(
            "stale-epoch",
            format!("the command has epoch {command} and the machine runs under epoch {machine}"),
        )
        .with_remedy("ask the control plane who owns the VM now")),
        std::cmp::Ordering::Greater => Err(Problem::conflict(
            "unknown-epoch",
            format!("the command has epoch {command}, which is later than the machine's {machine}"),
        )
        .with_remedy("the machine here is from an earlier ownership: kill it and start it anew")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::vmm_api::StopReason;

    fn paused(reason: PauseReason) -> VmmState {
        VmmState::Paused { reason }
    }

    #[test]
    fn a_machine_in_hand_over_takes_no_orders_but_kill() {
        let state = paused(PauseReason::HandOver);
        for request in [
            Request::Boot,
            Request::Pause,
            Request::Resume,
            Request::Stop,
            Request::SendAway,
        ] {
            assert!(admit(request, &state).is_err(), "{request:?}");
        }
        assert_eq!(admit(Request::Kill, &state), Ok(Admission::Act));
    }

    #[test]
    fn repeating_a_command_changes_nothing() {
        assert_eq!(
            admit(Request::Resume, &VmmState::Running),
            Ok(Admission::AlreadySo)
        );
        assert_eq!(
            admit(Request::Pause, &paused(PauseReason::Requested)),
            Ok(Admission::AlreadySo)
        );
        let stopped = VmmState::Stopped {
            reason: StopReason::Killed,
        };
        assert_eq!(admit(Request::Kill, &stopped), Ok(Admission::AlreadySo));
    }

    #[test]
    fn a_faulted_machine_cannot_be_resumed_and_says_why() {
        let problem = admit(
            Request::Resume,
            &paused(PauseReason::Fault {
                detail: "triple".into(),
            }),
        )
        .unwrap_err();
        assert_eq!(problem.status, 409);
        assert!(problem.detail.contains("triple"));
    }

    #[test]
    fn a_machine_that_waits_for_storage_can_be_told_to_try_again() {
        let state = paused(PauseReason::Storage {
            disk: "root".into(),
            detail: "no space".into(),
        });
        assert_eq!(admit(Request::Resume, &state), Ok(Admission::Act));
        assert!(
            admit(Request::SendAway, &state)
                .unwrap_err()
                .detail
                .contains("no space")
        );
    }

    #[test]
    fn older_and_newer_epochs_are_refused_by_name() {
        assert_eq!(admit_epoch(Epoch(3), Epoch(3)), Ok(()));
        assert_eq!(
            admit_epoch(Epoch(2), Epoch(3)).unwrap_err().kind,
            "stale-epoch"
        );
        assert_eq!(
            admit_epoch(Epoch(4), Epoch(3)).unwrap_err().kind,
            "unknown-epoch"
        );
    }
}
