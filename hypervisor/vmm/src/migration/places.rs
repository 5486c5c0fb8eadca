//! How many lanes take work at a time. The others rest until they are needed or the round has nothing left to give, and
//! then end it with them: a round is over when every lane has said so.

use super::disks::DiskSlice;
use super::round::{Round, Slice};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Places for lanes at work; those with the lowest numbers have them.
#[derive(Debug)]
pub(super) struct Places {
    lanes: usize,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    /// From 1, so that somebody works.
    open: usize,
    /// Lanes that wait for a place.
    resting: usize,
    /// Whether the round under way has nothing left to give.
    drained: bool,
}

impl Places {
    /// Places for the first `open` of `lanes` lanes.
    pub(super) fn new(open: usize, lanes: usize) -> Self {
        assert!((1..=lanes).contains(&open), "some of the lanes work");
        Self {
            lanes,
            inner: Mutex::new(Inner {
                open,
                resting: 0,
                drained: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// How many lanes there are.
    pub(super) const fn lanes(&self) -> usize {
        self.lanes
    }

    /// How many of them work.
    pub(super) fn at_work(&self) -> usize {
        self.lock().open
    }

    /// From now on so many do. One that loses its place first finishes the slice it has.
    pub(super) fn open(&self, places: usize) {
        assert!((1..=self.lanes).contains(&places), "some of the lanes work");
        self.lock().open = places;
        self.changed.notify_all();
    }

    /// A round begins: none of its lanes has started yet.
    pub(super) fn begin(&self) {
        self.lock().drained = false;
    }

    /// The round gives nothing more, or was called off: no lane rests any longer.
    pub(super) fn drain(&self) {
        self.lock().drained = true;
        self.changed.notify_all();
    }

    /// Whether exactly those lanes work that have a place: what is sent then is what they carry.
    pub(super) fn are_kept(&self) -> bool {
        let inner = self.lock();
        !inner.drained && inner.resting == self.lanes - inner.open
    }

    fn wait_for(&self, lane: usize) {
        let mut inner = self.lock();
        inner.resting += 1;
        while lane >= inner.open && !inner.drained {
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.resting -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How one lane comes by its work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn<'a> {
    places: &'a Places,
    lane: usize,
}

impl<'a> Turn<'a> {
    /// That of the lane with this number, from 0.
    pub(super) const fn new(places: &'a Places, lane: usize) -> Self {
        Self { places, lane }
    }

    /// The next slice of `round`, which is waited for while this lane has no place; `None` when none is left.
    pub(super) fn take(self, round: &Round) -> Option<Slice> {
        self.places.wait_for(self.lane);
        self.take_next(round)
    }

    /// The same of the disks of `round`, after which its memory is still to be given.
    pub(super) fn take_disk(self, round: &Round) -> Option<DiskSlice> {
        self.places.wait_for(self.lane);
        if round.is_stopped() {
            self.places.drain();
            return None;
        }
        round.take_disk()
    }

    /// The next slice of `round`; `None` also while this lane has no place.
    pub(super) fn take_at_once(self, round: &Round) -> Option<Slice> {
        if self.lane < self.places.at_work() {
            self.take_next(round)
        } else {
            None
        }
    }

    fn take_next(self, round: &Round) -> Option<Slice> {
        let slice = if round.is_stopped() {
            None
        } else {
            round.take()
        };
        if slice.is_none() {
            self.places.drain();
        }
        slice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::DirtyBitmap;
    use crate::migration::round::Guest;
    use std::sync::mpsc;
    use std::thread;

    const LANES: usize = 4;
    const PAGES: u64 = 1 << 14;

    fn full_round() -> Round {
        let dirty = DirtyBitmap::new(vec![u64::MAX; PAGES as usize / 64], PAGES);
        Round::new(1, Guest::Paused, vec![dirty], LANES)
    }

    /// What a lane takes to the end of the round, in pages.
    fn work(turn: Turn<'_>, round: &Round) -> u64 {
        std::iter::from_fn(|| turn.take(round))
            .map(|slice| slice.pages.end - slice.pages.start)
            .sum()
    }

    #[test]
    fn a_lane_without_a_place_ends_its_round_with_the_others_and_nothing_is_left() {
        for open in 1..=LANES {
            let places = Places::new(open, LANES);
            // Round after round, as a crew does.
            for _ in 0..3 {
                let round = full_round();
                places.begin();
                let taken: Vec<u64> = thread::scope(|scope| {
                    let lanes = [0, 1, 2, 3].map(|lane| {
                        let (places, round) = (&places, &round);
                        scope.spawn(move || work(Turn::new(places, lane), round))
                    });
                    lanes.map(|lane| lane.join().expect("it ends")).into()
                });
                assert_eq!(taken.iter().sum::<u64>(), PAGES);
                assert!(taken[open..].iter().all(|pages| *pages == 0), "{taken:?}");
                assert_eq!(round.take(), None);
            }
        }
    }

    #[test]
    fn a_lane_that_is_given_a_place_takes_work_of_the_round_under_way() {
        let (places, round) = (Places::new(1, 2), full_round());
        places.begin();
        thread::scope(|scope| {
            let (take, taken) = mpsc::channel();
            let (places, round) = (&places, &round);
            let second = scope.spawn(move || {
                let turn = Turn::new(places, 1);
                take.send(turn.take(round)).expect("somebody listens");
                work(turn, round)
            });
            let first = Turn::new(places, 0);
            assert!(first.take(round).is_some());
            places.open(2);
            assert!(taken.recv().expect("it takes something").is_some());
            work(first, round);
            second.join().expect("it ends");
        });
        assert_eq!(round.take(), None);
    }

    #[test]
    fn a_lane_that_loses_its_place_finishes_what_it_has_and_takes_nothing_more() {
        let (places, round) = (Places::new(2, 2), full_round());
        places.begin();
        let (first, second) = (Turn::new(&places, 0), Turn::new(&places, 1));
        assert!(places.are_kept());
        assert!(second.take(&round).is_some());
        places.open(1);
        // It still has that one.
        assert!(!places.are_kept());
        assert_eq!(second.take_at_once(&round), None);
        thread::scope(|scope| {
            let rests = scope.spawn(|| work(second, &round));
            while !places.are_kept() {
                thread::yield_now();
            }
            assert!(work(first, &round) > 0);
            assert_eq!(rests.join().expect("it ends"), 0);
        });
        assert!(!places.are_kept());
    }

    #[test]
    fn a_round_that_is_called_off_keeps_no_lane_waiting() {
        let (places, round) = (Places::new(1, 2), full_round());
        places.begin();
        thread::scope(|scope| {
            let rests = scope.spawn(|| Turn::new(&places, 1).take(&round));
            round.stop();
            places.drain();
            assert_eq!(rests.join().expect("it ends"), None);
        });
        assert_eq!(Turn::new(&places, 0).take(&round), None);
    }
}
