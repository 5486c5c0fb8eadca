//! The schedule of faults that a migration must live through: what fails, and at which step.
//!
//! There is one list, [`cases`], and one course of events, [`play`]. The simulated pool of the controller's tests and
//! the real processes of the cluster tests both are a [`Stage`] on which it is played:
//!
//! ```text
//! approach the step, holding it open ─▶ the fault strikes ─▶ what held the step open is let go
//!       ─▶ a silence lasts SILENCE ─▶ what failed is repaired ─▶ the stage's owner judges
//! ```
//!
//! A step that is over in a moment is held open by a fault itself: a process that would end it is frozen, or its words
//! are lost. So a case needs no luck with time, and nothing in the product knows of it.

mod approach;

pub use approach::Act;

use std::fmt;
use std::future::Future;
use std::time::Duration;

/// How long a frozen process stays frozen and a cut link cut: longer than a source waits for its target's word before
/// it asks the store (2 s), and short enough that no host is given up over it (9 s), together with the step itself.
pub const SILENCE: Duration = Duration::from_millis(3_000);

/// Most faults that hold one step open.
const MAX_HOLDS: usize = 4;

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The target waits, and the source does not reach it yet.
    Connecting,
    /// Memory is being copied.
    PreCopy,
    /// The guest stands still; not everything is sent.
    Blackout,
    /// The target holds everything, and the store has not been asked.
    Whole,
    /// The store has given the VM to the target, which does not know.
    Committed,
    /// The guest runs at the target; the source does not know.
    Running,
    /// The guest runs at the target, and some of its memory is at the source.
    PostCopy,
    /// Both VMMs are done; the source's is still there.
    CleanUp,
}

/// A process that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    /// The VMM that the guest leaves.
    SourceVmm,
    /// The VMM that the guest goes to.
    TargetVmm,
    /// The agent of the host that the guest leaves.
    SourceAgent,
    /// The agent of the host that the guest goes to.
    TargetAgent,
    /// The server, and the store within it.
    Server,
}

/// One direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Between the VMMs, what the source sends.
    SourceToTarget,
    /// Between the VMMs, what the target sends.
    TargetToSource,
    /// What the source's agent sends to the server.
    SourceToServer,
    /// What the server sends to the source's agent.
    ServerToSource,
    /// What the target's agent sends to the server.
    TargetToServer,
    /// What the server sends to the target's agent.
    ServerToTarget,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A process dies (SIGKILL). Agents and the server are started again; a VMM is not.
    Killed(Process),
    /// A process stands still (SIGSTOP) and goes on later.
    Frozen(Process),
    /// Nothing passes in one direction, which is healed later.
    Cut(Link),
}

/// A fault at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// When.
    pub step: Step,
    /// What.
    pub fault: Fault,
}

/// What is left of the guest after the repair. That exactly one copy runs goes for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on, at either end, with all of its memory.
    GoesOn,
    /// It was in the process that died, or needed it: it is started anew, with empty memory.
    StartsAnew,
    /// One of the two: it depends on whose word reaches the store first.
    Either,
}

impl Step {
    /// All of them, in the order in which they come.
    pub const ALL: [Self; 8] = [
        Self::Connecting,
        Self::PreCopy,
        Self::Blackout,
        Self::Whole,
        Self::Committed,
        Self::Running,
        Self::PostCopy,
        Self::CleanUp,
    ];

    /// How the step is reached and held open.
    pub const fn approach(self) -> &'static [Act] {
        approach::of(self)
    }

    /// The fault that stands for all of them where there is time for only one. Over all steps these are every kind of
    /// fault, each where the least is known about its effect.
    pub const fn sample(self) -> Fault {
        match self {
            Self::Connecting => Fault::Frozen(Process::TargetVmm),
            Self::PreCopy => Fault::Cut(Link::ServerToSource),
            Self::Blackout => Fault::Killed(Process::TargetAgent),
            Self::Whole => Fault::Cut(Link::TargetToServer),
            Self::Committed => Fault::Frozen(Process::SourceVmm),
            Self::Running => Fault::Cut(Link::TargetToSource),
            Self::PostCopy => Fault::Cut(Link::SourceToTarget),
            Self::CleanUp => Fault::Killed(Process::Server),
        }
    }
}

impl Process {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::SourceVmm,
        Self::TargetVmm,
        Self::SourceAgent,
        Self::TargetAgent,
        Self::Server,
    ];
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::SourceToTarget,
        Self::TargetToSource,
        Self::SourceToServer,
        Self::ServerToSource,
        Self::TargetToServer,
        Self::ServerToTarget,
    ];
}

impl Fault {
    /// Every fault there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let killed = Process::ALL.into_iter().map(Self::Killed);
        let frozen = Process::ALL.into_iter().map(Self::Frozen);
        let cut = Link::ALL.into_iter().map(Self::Cut);
        killed.chain(frozen).chain(cut)
    }

    /// Whether it lasts until it is repaired, so that there is something to wait for.
    pub const fn is_silence(self) -> bool {
        matches!(self, Self::Frozen(_) | Self::Cut(_))
    }
}

impl Case {
    /// What must be left of the guest.
    pub const fn outcome(self) -> Outcome {
        let Fault::Killed(process) = self.fault else {
            return Outcome::GoesOn;
        };
        match (process, self.step) {
            // The only copy there is.
            (
                Process::SourceVmm,
                Step::Connecting | Step::PreCopy | Step::Blackout | Step::PostCopy,
            ) => Outcome::StartsAnew,
            // The target asks for the commit while the source's agent tells that its machine is gone.
            (Process::SourceVmm, Step::Whole) => Outcome::Either,
            // The store has given the VM to the target, dead or not.
            (
                Process::TargetVmm,
                Step::Committed | Step::Running | Step::PostCopy | Step::CleanUp,
            ) => Outcome::StartsAnew,
            _ => Outcome::GoesOn,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, fault } = self;
        write!(f, "{fault:?} at {step:?}")
    }
}

/// The schedule: every fault at every step.
pub fn cases() -> impl Iterator<Item = Case> {
    Step::ALL.into_iter().flat_map(cases_at)
}

/// Every fault at one step.
pub fn cases_at(step: Step) -> impl Iterator<Item = Case> {
    Fault::all().map(move |fault| Case { step, fault })
}

/// Where a case is played: a pool with a running VM that can move.
pub trait Stage {
    /// Asks for a migration that comes past `step`.
    fn begin(&mut self, step: Step) -> impl Future<Output = ()>;
    /// Returns as soon as the migration stands at `step`; panics when it has gone past it.
    fn reach(&mut self, step: Step) -> impl Future<Output = ()>;
    /// Lets a fault happen. What it strikes may be dead or frozen already.
    fn inflict(&mut self, fault: Fault) -> impl Future<Output = ()>;
    /// Repairs it: a process that was killed is started again unless it is a VMM, a frozen one goes on, a link heals.
    /// What was frozen may have been killed meanwhile, and stays dead.
    fn lift(&mut self, fault: Fault) -> impl Future<Output = ()>;
    /// Lets time pass.
    fn endure(&mut self, time: Duration) -> impl Future<Output = ()>;
}

/// Plays a case up to the end of the repair.
pub async fn play(stage: &mut impl Stage, case: Case) {
    play_for(stage, case, Duration::ZERO, SILENCE).await;
}

/// The same where the fault strikes `late` after the step was reached, and a silence lasts `silence`.
pub async fn play_for(stage: &mut impl Stage, case: Case, late: Duration, silence: Duration) {
    let mut holds = Vec::with_capacity(MAX_HOLDS);
    for act in case.step.approach() {
        match *act {
            Act::Begin => stage.begin(case.step).await,
            Act::Reach(step) => stage.reach(step).await,
            Act::Hold(fault) => {
                stage.inflict(fault).await;
                holds.push(fault);
            }
            Act::LetGo(fault) => {
                stage.lift(fault).await;
                holds.retain(|held| *held != fault);
            }
        }
    }
    assert!(holds.len() <= MAX_HOLDS, "{holds:?}");
    if !late.is_zero() {
        stage.endure(late).await;
    }
    let held_already = holds.contains(&case.fault);
    if !held_already {
        stage.inflict(case.fault).await;
    }
    for hold in holds.into_iter().filter(|hold| *hold != case.fault) {
        stage.lift(hold).await;
    }
    if case.fault.is_silence() {
        stage.endure(silence).await;
    }
    stage.lift(case.fault).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_schedule_has_every_fault_at_every_step_once() {
        let all: BTreeSet<Case> = cases().collect();
        assert_eq!(all.len(), Step::ALL.len() * 16);
        assert_eq!(cases().count(), all.len());
    }

    #[test]
    fn the_samples_are_all_kinds_of_faults_and_none_twice() {
        let samples: BTreeSet<Fault> = Step::ALL.map(Step::sample).into();
        assert_eq!(samples.len(), Step::ALL.len());
        for kind in [
            |fault| matches!(fault, Fault::Killed(_)),
            |fault| matches!(fault, Fault::Frozen(_)),
            |fault| matches!(fault, Fault::Cut(_)),
        ] as [fn(Fault) -> bool; 3]
        {
            assert!(samples.iter().any(|fault| kind(*fault)));
        }
    }

    #[test]
    fn only_the_death_of_a_vmm_may_cost_the_guest_its_memory() {
        for case in cases() {
            let of_a_vmm = matches!(
                case.fault,
                Fault::Killed(Process::SourceVmm | Process::TargetVmm)
            );
            assert!(of_a_vmm || case.outcome() == Outcome::GoesOn, "{case}");
        }
    }

    /// What is inflicted and lifted, in order.
    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Stage for Notes {
        async fn begin(&mut self, _: Step) {
            self.0.push("begin".into());
        }
        async fn reach(&mut self, step: Step) {
            self.0.push(format!("reach {step:?}"));
        }
        async fn inflict(&mut self, fault: Fault) {
            self.0.push(format!("+ {fault:?}"));
        }
        async fn lift(&mut self, fault: Fault) {
            self.0.push(format!("- {fault:?}"));
        }
        async fn endure(&mut self, _: Duration) {
            self.0.push("silence".into());
        }
    }

    /// Runs a future that never waits.
    fn now(future: impl Future<Output = ()>) {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(std::pin::pin!(future).poll(&mut context).is_ready());
    }

    #[test]
    fn whatever_is_inflicted_is_lifted_and_only_once() {
        for case in cases() {
            let mut notes = Notes::default();
            now(play(&mut notes, case));
            let count = |sign| {
                let signed = notes.0.iter().filter(|note| note.starts_with(sign));
                signed.count()
            };
            assert_eq!(count('+'), count('-'), "{case}: {:?}", notes.0);
            assert_eq!(notes.0.last().unwrap(), &format!("- {:?}", case.fault));
            let reached = notes.0.contains(&format!("reach {:?}", case.step));
            assert!(reached, "{case}: {:?}", notes.0);
        }
    }

    #[test]
    fn a_step_is_held_open_until_the_fault_has_struck() {
        let mut notes = Notes::default();
        let case = Case {
            step: Step::Running,
            fault: Fault::Killed(Process::SourceVmm),
        };
        now(play(&mut notes, case));
        let expected = [
            "begin",
            "reach Blackout",
            "+ Frozen(TargetAgent)",
            "reach Whole",
            "+ Frozen(SourceAgent)",
            "+ Cut(TargetToSource)",
            "- Frozen(TargetAgent)",
            "reach Running",
            "+ Killed(SourceVmm)",
            "- Frozen(SourceAgent)",
            "- Cut(TargetToSource)",
            "- Killed(SourceVmm)",
        ];
        assert_eq!(notes.0, expected);
    }
}
