//! What an agent does about a machine that another VMM of this host is to take over, or has taken over. Pure.
//!
//! ```text
//! record names the predecessor ──successor is whole──▶ record names the successor
//!    │ anything fails, the agent dies                     │ anything fails, the agent dies
//!    ▼                                                    ▼
//! successor killed, then predecessor told to go on     predecessor killed; successor told to run
//! ```
//!
//! The record decides, and whoever it does not name is killed before the other one is told anything by an agent that
//! did not see all of it. So the guest never runs in both, and a predecessor never runs once a successor may have.

use godwit_wire::succession::{SuccessionPhase, SuccessionRole, SuccessionStatus};

/// What the VMM that the record names has to be told, once no other is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// Nothing.
    Nothing,
    /// It has no successor: it goes on as before.
    GoOn,
    /// It has taken the machine over: it runs.
    Run,
}

/// Judges the word of the VMM that the record names.
pub(crate) fn settlement(status: Option<&SuccessionStatus>) -> Settlement {
    let Some(status) = status else {
        return Settlement::Nothing;
    };
    match (status.role, status.phase) {
        (
            SuccessionRole::Predecessor,
            SuccessionPhase::Prepared | SuccessionPhase::Blackout | SuccessionPhase::Ready,
        ) => Settlement::GoOn,
        (SuccessionRole::Successor, SuccessionPhase::Ready) => Settlement::Run,
        // The record names a successor only when it has been whole.
        (SuccessionRole::Successor, SuccessionPhase::Prepared | SuccessionPhase::Blackout)
        | (_, SuccessionPhase::Completed | SuccessionPhase::Failed) => Settlement::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::id::SuccessionId;

    fn judged(role: SuccessionRole, phase: SuccessionPhase) -> Settlement {
        settlement(Some(&SuccessionStatus {
            succession: SuccessionId::fresh(),
            role,
            phase,
            blackout: None,
            reason: None,
        }))
    }

    #[test]
    fn a_predecessor_the_record_names_goes_on_however_far_it_has_come() {
        for phase in [
            SuccessionPhase::Prepared,
            SuccessionPhase::Blackout,
            SuccessionPhase::Ready,
        ] {
            assert_eq!(
                judged(SuccessionRole::Predecessor, phase),
                Settlement::GoOn,
                "{phase:?}"
            );
        }
    }

    #[test]
    fn a_successor_runs_only_when_it_is_whole() {
        use SuccessionRole::Successor;
        assert_eq!(judged(Successor, SuccessionPhase::Ready), Settlement::Run);
        for phase in [
            SuccessionPhase::Prepared,
            SuccessionPhase::Blackout,
            SuccessionPhase::Failed,
        ] {
            assert_eq!(judged(Successor, phase), Settlement::Nothing, "{phase:?}");
        }
    }

    #[test]
    fn what_is_over_needs_no_word() {
        assert_eq!(settlement(None), Settlement::Nothing);
        for role in [SuccessionRole::Predecessor, SuccessionRole::Successor] {
            assert_eq!(judged(role, SuccessionPhase::Failed), Settlement::Nothing);
            assert_eq!(
                judged(role, SuccessionPhase::Completed),
                Settlement::Nothing
            );
        }
    }
}
