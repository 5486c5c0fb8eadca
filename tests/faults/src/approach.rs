//! How each step of a migration is reached, and what holds it open.

use crate::{Fault, Link, Process, Step};

/// One thing to do on the way to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The migration is asked for.
    Begin,
    /// A step is waited for.
    Reach(Step),
    /// Something fails that keeps the migration from going on; it is lifted once the case's fault has struck.
    Hold(Fault),
    /// Something that failed on the way is repaired on the way.
    LetGo(Fault),
}

const TARGET_AGENT: Fault = Fault::Frozen(Process::TargetAgent);
const SOURCE_AGENT: Fault = Fault::Frozen(Process::SourceAgent);

pub(crate) const fn of(step: Step) -> &'static [Act] {
    use Act::{Begin, Hold, LetGo, Reach};
    match step {
        Step::Connecting => &[
            Hold(Fault::Cut(Link::SourceToTarget)),
            Begin,
            Reach(Step::Connecting),
        ],
        // These last by themselves: the stage's link is slow.
        Step::PreCopy => &[Begin, Reach(Step::PreCopy)],
        Step::Blackout => &[Begin, Reach(Step::Blackout)],
        Step::PostCopy => &[Begin, Reach(Step::PostCopy)],
        // Who would ask the store stands still.
        Step::Whole => &[
            Begin,
            Reach(Step::Blackout),
            Hold(TARGET_AGENT),
            Reach(Step::Whole),
        ],
        // The question gets through, the answer does not. The agent has opened the connection for it while memory was
        // copied.
        Step::Committed => &[
            Begin,
            Reach(Step::Blackout),
            Hold(Fault::Cut(Link::ServerToTarget)),
            Reach(Step::Committed),
        ],
        // Neither the target nor the store tells the source.
        Step::Running => &[
            Begin,
            Reach(Step::Blackout),
            Hold(TARGET_AGENT),
            Reach(Step::Whole),
            Hold(SOURCE_AGENT),
            Hold(Fault::Cut(Link::TargetToSource)),
            LetGo(TARGET_AGENT),
            Reach(Step::Running),
        ],
        // Who would end the source's VMM stands still.
        Step::CleanUp => &[
            Begin,
            Reach(Step::Blackout),
            Hold(SOURCE_AGENT),
            Reach(Step::CleanUp),
        ],
    }
}
