//! Who may run the guest (pure).
//!
//! ```text
//! source   Copying ──done_sent──▶ InDoubt ──running | release──▶ Gone
//!             │ cancel, failure      │ │  with memory owed: ──▶ Serving ──complete──▶ Gone
//!             │                      │ abort (the store voided it)
//!             ▼                      ▼
//!          Returned ◀────────────────┘
//!
//! target   Filling ──whole──▶ Whole ──commit (the store granted it)──▶ Running
//!             │ failure, abort   │ abort
//!             ▼                  ▼
//!           Void ◀───────────────┘
//! ```
//!
//! The source may run its guest in `Copying` and `Returned`, the target in `Running`. `done_sent` is the point
//! after which the target may be granted the VM, so from there on the source cannot go back by itself. A source that
//! still owes memory (post-copy) keeps it until the target has all of it, but never runs it again.
//!
//! A succession (another process of the same host takes the machine over) is decided by the same two, with the record of
//! the host's agent in the place of the store: the predecessor is a source that is aborted or killed, the successor a
//! target that succeeds under the epoch there was.

use godwit_wire::id::Epoch;

/// What the source had sent when it sent `Done`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it.
    Sent,
    /// Not all of it; the rest follows.
    Owed,
}

/// The source's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceHandOver {
    /// The target cannot be whole yet.
    Copying,
    /// The target may be whole; only the store knows who owns the VM.
    InDoubt(Memory),
    /// The guest runs at the target, which still needs memory from here.
    Serving,
    /// The guest runs at the target.
    Gone,
    /// The guest runs here again, or never stopped.
    Returned,
}

/// The target's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetHandOver {
    /// Memory and state are arriving.
    Filling,
    /// Everything is here and verified.
    Whole,
    /// The store gave the VM to this side.
    Running(Epoch),
    /// Nothing of this may ever run.
    Void,
}

/// A step that must not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandOverError {
    /// Everything has been sent, so only the store can decide.
    #[error("everything has been sent: only the store can decide who owns the VM now")]
    TooLate,
    /// It is over already.
    #[error("the migration is over ({0})")]
    Over(&'static str),
    /// The machine is not complete.
    #[error("the machine has not arrived completely")]
    NotWhole,
    /// The grant is not newer than what the source had.
    #[error(
        "the commit carries epoch {granted}, which is not later than the source's {source_epoch}"
    )]
    StaleEpoch {
        /// In the commit.
        granted: Epoch,
        /// At the source.
        source_epoch: Epoch,
    },
}

impl SourceHandOver {
    /// `Done` is about to be sent.
    pub const fn done_sent(self, memory: Memory) -> Result<Self, HandOverError> {
        match self {
            Self::Copying => Ok(Self::InDoubt(memory)),
            Self::InDoubt(_) => Err(HandOverError::TooLate),
            Self::Serving | Self::Gone | Self::Returned => Err(self.over()),
        }
    }

    /// The operator cancels, or something failed.
    pub const fn cancel(self) -> Result<Self, HandOverError> {
        match self {
            Self::Copying | Self::Returned => Ok(Self::Returned),
            Self::InDoubt(_) => Err(HandOverError::TooLate),
            Self::Serving | Self::Gone => Err(self.over()),
        }
    }

    /// The store has voided the migration.
    pub const fn abort(self) -> Result<Self, HandOverError> {
        match self {
            Self::Copying | Self::InDoubt(_) | Self::Returned => Ok(Self::Returned),
            Self::Serving | Self::Gone => Err(self.over()),
        }
    }

    /// The target runs the guest, or the store says that it owns it.
    pub const fn gone(self) -> Result<Self, HandOverError> {
        match self {
            Self::InDoubt(Memory::Owed) | Self::Serving => Ok(Self::Serving),
            Self::InDoubt(Memory::Sent) | Self::Gone => Ok(Self::Gone),
            // The target cannot own what it cannot have: whoever says so is wrong.
            Self::Copying => Err(HandOverError::NotWhole),
            Self::Returned => Err(self.over()),
        }
    }

    /// The target, which runs the guest, has all of its memory.
    pub const fn complete(self) -> Result<Self, HandOverError> {
        match self {
            Self::Serving | Self::Gone => Ok(Self::Gone),
            Self::Copying | Self::InDoubt(_) => Err(HandOverError::NotWhole),
            Self::Returned => Err(self.over()),
        }
    }

    /// Whether this side may run the guest.
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Copying | Self::Returned)
    }

    const fn over(self) -> HandOverError {
        HandOverError::Over(match self {
            Self::Serving | Self::Gone => "the guest runs at the target",
            _ => "the guest stayed at the source",
        })
    }
}

impl TargetHandOver {
    /// Everything is held and verified.
    pub const fn whole(self) -> Result<Self, HandOverError> {
        match self {
            Self::Filling | Self::Whole => Ok(Self::Whole),
            Self::Running(_) => Err(HandOverError::Over("the guest runs here")),
            Self::Void => Err(HandOverError::Over("it was void")),
        }
    }

    /// The store granted `epoch`; `source_epoch` is what the source had. Repeating it changes nothing.
    pub fn commit(self, epoch: Epoch, source_epoch: Epoch) -> Result<Self, HandOverError> {
        match self {
            _ if epoch <= source_epoch => Err(HandOverError::StaleEpoch {
                granted: epoch,
                source_epoch,
            }),
            Self::Whole => Ok(Self::Running(epoch)),
            Self::Running(held) if held == epoch => Ok(self),
            Self::Running(_) => Err(HandOverError::Over(
                "the guest runs here under another epoch",
            )),
            Self::Filling => Err(HandOverError::NotWhole),
            Self::Void => Err(HandOverError::Over("it was void")),
        }
    }

    /// In a succession: the host's agent has written down that this process is the VM's. The host is its owner as
    /// before, so `epoch` is the predecessor's. Repeating it changes nothing.
    pub fn succeed(self, epoch: Epoch) -> Result<Self, HandOverError> {
        match self {
            Self::Whole => Ok(Self::Running(epoch)),
            Self::Running(held) if held == epoch => Ok(self),
            Self::Running(_) => Err(HandOverError::Over(
                "the guest runs here under another epoch",
            )),
            Self::Filling => Err(HandOverError::NotWhole),
            Self::Void => Err(HandOverError::Over("it was void")),
        }
    }

    /// The migration is void or failed.
    pub const fn abort(self) -> Result<Self, HandOverError> {
        match self {
            Self::Filling | Self::Whole | Self::Void => Ok(Self::Void),
            Self::Running(_) => Err(HandOverError::Over("the guest runs here")),
        }
    }

    /// Whether this side may run the guest.
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Running(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SOURCE_EPOCH: Epoch = Epoch(4);

    /// Both sides, what is on the wire between them, and the store.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        source: u8,
        target: u8,
        done_in_flight: bool,
        running_in_flight: bool,
        store: Store,
        source_dead: bool,
        target_dead: bool,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Store {
        Open,
        Committed,
        Void,
    }

    const SOURCES: [SourceHandOver; 6] = [
        SourceHandOver::Copying,
        SourceHandOver::InDoubt(Memory::Sent),
        SourceHandOver::InDoubt(Memory::Owed),
        SourceHandOver::Serving,
        SourceHandOver::Gone,
        SourceHandOver::Returned,
    ];
    const TARGETS: [TargetHandOver; 4] = [
        TargetHandOver::Filling,
        TargetHandOver::Whole,
        TargetHandOver::Running(Epoch(5)),
        TargetHandOver::Void,
    ];

    impl World {
        fn source(&self) -> SourceHandOver {
            SOURCES[self.source as usize]
        }
        fn target(&self) -> TargetHandOver {
            TARGETS[self.target as usize]
        }
        fn with_source(mut self, state: Result<SourceHandOver, HandOverError>) -> Option<Self> {
            self.source = SOURCES.iter().position(|s| Ok(*s) == state)? as u8;
            Some(self)
        }
        fn with_target(mut self, state: Result<TargetHandOver, HandOverError>) -> Option<Self> {
            self.target = TARGETS.iter().position(|t| Ok(*t) == state)? as u8;
            Some(self)
        }

        /// Every world one event away: messages may be lost, late or repeated, either side may die, the store's
        /// answer may come at any time.
        fn successors(self) -> Vec<Self> {
            let mut next = Vec::new();
            if !self.source_dead {
                for memory in [Memory::Sent, Memory::Owed] {
                    next.extend(
                        self.with_source(self.source().done_sent(memory))
                            .map(|w| Self {
                                done_in_flight: true,
                                ..w
                            }),
                    );
                }
                if self.target().may_run() {
                    next.extend(self.with_source(self.source().complete()));
                }
                next.extend(self.with_source(self.source().cancel()));
                if self.running_in_flight {
                    next.extend(self.with_source(self.source().gone()));
                }
                match self.store {
                    Store::Committed => next.extend(self.with_source(self.source().gone())),
                    Store::Void => next.extend(self.with_source(self.source().abort())),
                    // The source's question voids a migration that is still open.
                    Store::Open if matches!(self.source(), SourceHandOver::InDoubt(_)) => {
                        next.push(Self {
                            store: Store::Void,
                            ..self
                        });
                    }
                    Store::Open => {}
                }
                next.push(Self {
                    source_dead: true,
                    ..self
                });
            }
            if !self.target_dead {
                if self.done_in_flight {
                    next.extend(self.with_target(self.target().whole()));
                }
                next.extend(
                    self.with_target(self.target().abort())
                        .filter(|_| self.store != Store::Committed),
                );
                match self.store {
                    // The target asks when it is whole; the store grants only while open.
                    Store::Open if self.target() == TargetHandOver::Whole => {
                        next.push(Self {
                            store: Store::Committed,
                            ..self
                        });
                    }
                    Store::Committed => {
                        let granted = self.target().commit(SOURCE_EPOCH.next(), SOURCE_EPOCH);
                        next.extend(self.with_target(granted).map(|w| Self {
                            running_in_flight: true,
                            ..w
                        }));
                    }
                    Store::Void => next.extend(self.with_target(self.target().abort())),
                    Store::Open => {}
                }
                next.push(Self {
                    target_dead: true,
                    ..self
                });
            }
            if self.store == Store::Open {
                next.push(Self {
                    store: Store::Void,
                    ..self
                });
            }
            next
        }
    }

    #[test]
    fn in_every_interleaving_at_most_one_side_may_run() {
        let start = World {
            source: 0,
            target: 0,
            done_in_flight: false,
            running_in_flight: false,
            store: Store::Open,
            source_dead: false,
            target_dead: false,
        };
        let mut seen = BTreeSet::from([start]);
        let mut open = vec![start];
        let (mut ran_at_source, mut ran_at_target, mut served) = (0, 0, 0);
        while let Some(world) = open.pop() {
            let (source, target) = (world.source().may_run(), world.target().may_run());
            assert!(!(source && target), "both run in {world:?}");
            ran_at_source += u32::from(source);
            ran_at_target += u32::from(target);
            served += u32::from(world.source() == SourceHandOver::Serving);
            for next in world.successors() {
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        assert!(
            ran_at_source > 0 && ran_at_target > 0 && served > 0,
            "the search must reach all outcomes"
        );
        assert!(seen.len() > 50, "only {} worlds were reached", seen.len());
    }

    #[test]
    fn a_cancel_after_everything_was_sent_is_refused() {
        for memory in [Memory::Sent, Memory::Owed] {
            assert_eq!(
                SourceHandOver::InDoubt(memory).cancel(),
                Err(HandOverError::TooLate)
            );
        }
    }

    #[test]
    fn a_source_that_owes_memory_keeps_it_until_the_target_has_it() {
        let owes = SourceHandOver::InDoubt(Memory::Owed);
        assert_eq!(owes.complete(), Err(HandOverError::NotWhole));
        let serving = owes.gone().unwrap();
        assert_eq!(serving, SourceHandOver::Serving);
        assert_eq!(serving.gone(), Ok(serving));
        assert!(serving.abort().is_err() && serving.cancel().is_err());
        assert_eq!(serving.complete(), Ok(SourceHandOver::Gone));
    }

    #[test]
    fn a_commit_with_an_old_epoch_is_refused() {
        assert!(matches!(
            TargetHandOver::Whole.commit(Epoch(4), Epoch(4)),
            Err(HandOverError::StaleEpoch { .. })
        ));
        assert_eq!(
            TargetHandOver::Filling.commit(Epoch(5), Epoch(4)),
            Err(HandOverError::NotWhole)
        );
    }
}
