//! Which commands may still be carried out (DESIGN: never twice, barrier 1). Pure.
//!
//! ```text
//!            epoch raised                       close(epoch)
//! Open(e) ───────────────▶ Open(e')   Open(e) ───────────────▶ Closed(e)
//! Closed(e) ─────────────▶ Open(e')   for e' > e
//! ```
//!
//! An agent remembers, for every VM it has ever been told about, the highest epoch it heard of, the generation it
//! has got to within it, and whether the VM's stay here under that epoch is over. A command that arrives late, be it
//! by hours and after a restart of the agent, is refused.

use godwit_wire::id::{Epoch, Generation, VmId};
use godwit_wire::problem::Problem;
use serde::{Deserialize, Serialize};

/// Whether a VM may still be started here under the present epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stay {
    /// It may.
    #[default]
    Open,
    /// It was destroyed, has moved away, or is owned elsewhere: only a later epoch brings it back.
    Closed,
}

/// How far the commands to one VM have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fence {
    /// Highest epoch heard of.
    pub(crate) epoch: Epoch,
    /// Latest generation carried out in that epoch.
    pub(crate) generation: Option<Generation>,
    /// See [`Stay`].
    pub(crate) stay: Stay,
}

/// A command that is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// To be carried out; the fence has moved.
    New,
    /// Carried out before: to be answered again.
    Repeat,
}

/// A command that came too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stale {
    /// Its epoch is older than one already heard of.
    Epoch { given: Epoch, known: Epoch },
    /// The VM's stay here under this epoch is over.
    Closed { epoch: Epoch },
    /// Its generation is older than one already carried out.
    Generation {
        given: Generation,
        known: Generation,
    },
}

impl Stale {
    pub(crate) fn problem(self, vm: VmId) -> Problem {
        match self {
            Self::Epoch { given, known } => Problem::conflict(
                "stale-epoch",
                format!(
                    "the command to VM {vm} has epoch {given}, and this host has heard of epoch {known}"
                ),
            ),
            Self::Closed { epoch } => Problem::conflict(
                "stale-epoch",
                format!(
                    "the stay of VM {vm} on this host under epoch {epoch} is over; only a later epoch starts it"
                ),
            ),
            Self::Generation { given, known } => Problem::conflict(
                "stale-generation",
                format!(
                    "the command to VM {vm} has generation {given}, and generation {known} was carried out"
                ),
            ),
        }
    }
}

impl Fence {
    /// Judges a command that makes the VM run here.
    pub(crate) fn admit_start(
        &mut self,
        epoch: Epoch,
        generation: Generation,
    ) -> Result<Admission, Stale> {
        if epoch == self.epoch && self.stay == Stay::Closed {
            return Err(Stale::Closed { epoch });
        }
        self.admit(epoch, generation)
    }

    /// Judges any other command. One that only prepares to receive the VM does not mind a closed stay: it can lead
    /// to a running VM only through a commit, which brings a later epoch.
    pub(crate) fn admit(
        &mut self,
        epoch: Epoch,
        generation: Generation,
    ) -> Result<Admission, Stale> {
        if epoch < self.epoch {
            return Err(Stale::Epoch {
                given: epoch,
                known: self.epoch,
            });
        }
        if epoch == self.epoch
            && let Some(known) = self.generation
        {
            if generation < known {
                return Err(Stale::Generation {
                    given: generation,
                    known,
                });
            }
            if generation == known {
                return Ok(Admission::Repeat);
            }
        }
        self.raise(epoch);
        self.generation = Some(generation);
        Ok(Admission::New)
    }

    /// Takes note of an epoch; a later one opens a new stay.
    pub(crate) fn raise(&mut self, epoch: Epoch) {
        if epoch > self.epoch {
            *self = Self {
                epoch,
                generation: None,
                stay: Stay::Open,
            };
        }
    }

    /// Ends the stay under `epoch` and every earlier one. A later one is not touched.
    pub(crate) fn close(&mut self, epoch: Epoch) {
        self.raise(epoch);
        if epoch == self.epoch {
            self.stay = Stay::Closed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn e(epoch: u64) -> Epoch {
        Epoch(epoch)
    }

    const fn g(generation: u64) -> Generation {
        Generation(generation)
    }

    #[test]
    fn an_older_epoch_and_an_older_generation_are_refused_and_the_same_is_a_repeat() {
        let mut fence = Fence::default();
        assert_eq!(fence.admit_start(e(3), g(5)), Ok(Admission::New));
        assert_eq!(fence.admit(e(3), g(5)), Ok(Admission::Repeat));
        assert_eq!(
            fence.admit(e(3), g(4)),
            Err(Stale::Generation {
                given: g(4),
                known: g(5)
            })
        );
        assert_eq!(
            fence.admit(e(2), g(9)),
            Err(Stale::Epoch {
                given: e(2),
                known: e(3)
            })
        );
        assert_eq!(fence.admit(e(4), g(1)), Ok(Admission::New));
    }

    #[test]
    fn a_start_that_arrives_after_the_destruction_is_refused() {
        let mut fence = Fence::default();
        fence.admit_start(e(1), g(1)).unwrap();
        fence.close(e(1));
        assert_eq!(
            fence.admit_start(e(1), g(1)),
            Err(Stale::Closed { epoch: e(1) })
        );
        assert_eq!(
            fence.admit_start(e(1), g(7)),
            Err(Stale::Closed { epoch: e(1) })
        );
        assert_eq!(fence.admit_start(e(2), g(1)), Ok(Admission::New));
    }

    #[test]
    fn a_host_the_vm_has_left_can_receive_it_again() {
        let mut fence = Fence::default();
        fence.admit_start(e(1), g(1)).unwrap();
        fence.close(e(1));
        // It runs elsewhere under epoch 2, comes back, fails to, and comes back again.
        assert_eq!(fence.admit(e(2), g(2)), Ok(Admission::New));
        fence.close(e(2));
        assert_eq!(fence.admit(e(2), g(3)), Ok(Admission::New));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Start(u64, u64),
        Other(u64, u64),
        Close(u64),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            (0..6u64, 0..6u64).prop_map(|(epoch, generation)| Event::Start(epoch, generation)),
            (0..6u64, 0..6u64).prop_map(|(epoch, generation)| Event::Other(epoch, generation)),
            (0..6u64).prop_map(Event::Close),
        ];
        proptest::collection::vec(event, 0..60)
    }

    proptest! {
        #[test]
        fn whatever_arrives_in_whatever_order_time_never_runs_backwards(events in events()) {
            let mut fence = Fence::default();
            let mut latest: Option<(u64, u64)> = None;
            let mut closed: Option<u64> = None;
            for event in events {
                match event {
                    Event::Start(epoch, generation) => {
                        if fence.admit_start(e(epoch), g(generation)) == Ok(Admission::New) {
                            prop_assert!(latest < Some((epoch, generation)));
                            prop_assert!(closed < Some(epoch));
                            latest = Some((epoch, generation));
                        }
                    }
                    Event::Other(epoch, generation) => {
                        if fence.admit(e(epoch), g(generation)) == Ok(Admission::New) {
                            prop_assert!(latest < Some((epoch, generation)));
                            latest = Some((epoch, generation));
                        }
                    }
                    Event::Close(epoch) => {
                        fence.close(e(epoch));
                        closed = closed.max(Some(epoch));
                    }
                }
                prop_assert!(Some(fence.epoch.0) >= latest.map(|(epoch, _)| epoch));
                prop_assert!(closed.is_none() || Some(fence.epoch.0) >= closed);
            }
        }
    }
}
