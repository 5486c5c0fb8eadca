//! Lets as many lanes work as carry the most, where the operator has not said how many.

use crate::migration::lane_choice::{LaneChoice, Window};
use crate::migration::places::Places;
use crate::migration::round::Sent;
use godwit_wire::migration::MAX_LANES;
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lanes that are opened where their number is left to the source: no more than a link needs. Each costs a handshake and
/// a thread at either end, and memory once it works.
const OPENED_LANES: u8 = 8;
/// What is sent is looked at for so long at a time.
const WINDOW: Duration = Duration::from_millis(100);

/// The lanes of a migration, and how many of them work.
pub(super) struct LanesAtWork {
    pub(super) places: Arc<Places>,
    /// Absent where the operator asked for a number.
    choosing: Option<Mutex<Choosing>>,
}

struct Choosing {
    choice: LaneChoice,
    /// The window under way.
    window: Option<Begun>,
}

#[derive(Clone, Copy)]
struct Begun {
    round: u32,
    at: Instant,
    before: Sent,
}

impl LanesAtWork {
    /// `asked` lanes, all at work; 0 leaves both numbers to the source.
    pub(super) fn new(asked: u8) -> Self {
        let (first, opened) = match asked {
            0 => (one_per_cpu(), OPENED_LANES),
            asked => {
                let lanes = asked.min(MAX_LANES);
                (lanes, lanes)
            }
        };
        let choosing = (asked == 0).then(|| {
            Mutex::new(Choosing {
                choice: LaneChoice::new(first, opened),
                window: None,
            })
        });
        Self {
            places: Arc::new(Places::new(first.into(), opened.into())),
            choosing,
        }
    }

    /// Lanes to open.
    pub(super) fn opened(&self) -> u8 {
        self.places.lanes() as u8
    }

    /// Lanes at work now.
    pub(super) fn at_work(&self) -> u8 {
        self.places.at_work() as u8
    }

    /// Looks at what was sent so far, in a round under way while the guest runs, with this limit in bytes per second.
    /// Says how many lanes work from now on if that is another number.
    pub(super) fn look(&self, round: u32, sent: Sent, limit: Option<u64>) -> Option<u8> {
        let mut choosing = self.choosing()?;
        let now = Begun {
            round,
            at: Instant::now(),
            before: sent,
        };
        if !self.places.are_kept() {
            choosing.window = None;
            return None;
        }
        let begun = *choosing.window.get_or_insert(now);
        if begun.round != round {
            choosing.window = Some(now);
            return None;
        }
        let took = now.at - begun.at;
        if took < WINDOW {
            return None;
        }
        choosing.window = Some(now);
        let lanes = choosing.choice.observe(window(begun, sent, limit, took));
        self.work_with(lanes)
    }

    /// The guest is about to stand still, or to go ahead: what is left goes over the lanes that were found best. All
    /// of them would not be faster: the others are connections that have not got up to speed, and each holds a slice
    /// that everybody waits for at the end. And it is these lanes' rate that the blackout was predicted with.
    pub(super) fn settle(&self) -> Option<u8> {
        let lanes = self.choosing()?.choice.call_off();
        self.work_with(lanes)
    }

    fn work_with(&self, lanes: u8) -> Option<u8> {
        (lanes != self.at_work()).then(|| {
            self.places.open(lanes.into());
            lanes
        })
    }

    fn choosing(&self) -> Option<MutexGuard<'_, Choosing>> {
        let choosing = self.choosing.as_ref()?;
        Some(choosing.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Where nothing is known of the link, CPUs are what lanes need.
fn one_per_cpu() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    cpus.min(OPENED_LANES.into()) as u8
}

fn window(begun: Begun, sent: Sent, limit_bytes_per_s: Option<u64>, took: Duration) -> Window {
    let before = begun.before;
    Window {
        content_pages: sent.content() - before.content(),
        bare_pages: sent.bare() - before.bare(),
        wire_bytes: sent.bytes - before.bytes,
        limit_bytes_per_s,
        took,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_that_the_operator_asked_for_is_opened_and_works() {
        for asked in [1, 5, MAX_LANES] {
            let lanes = LanesAtWork::new(asked);
            assert_eq!((lanes.at_work(), lanes.opened()), (asked, asked));
            assert_eq!(lanes.look(1, Sent::default(), None), None);
            assert_eq!(lanes.settle(), None);
            assert_eq!(lanes.at_work(), asked);
        }
        assert_eq!(LanesAtWork::new(MAX_LANES + 1).opened(), MAX_LANES);
    }

    #[test]
    fn a_source_that_chooses_begins_with_a_lane_for_each_cpu() {
        let lanes = LanesAtWork::new(0);
        assert_eq!(lanes.at_work(), one_per_cpu());
        assert!(lanes.at_work() <= lanes.opened() && lanes.opened() <= MAX_LANES);
    }

    #[test]
    fn a_window_is_what_was_sent_since_it_began() {
        let sent = |pages, bytes| Sent {
            content_pages: pages,
            zero_pages: 2 * pages,
            kept_pages: 3 * pages,
            bytes,
            ..Sent::default()
        };
        let begun = Begun {
            round: 1,
            at: Instant::now(),
            before: sent(10, 1_000),
        };
        let expected = Window {
            content_pages: 5,
            bare_pages: 25,
            wire_bytes: 500,
            limit_bytes_per_s: Some(7),
            took: WINDOW,
        };
        assert_eq!(window(begun, sent(15, 1_500), Some(7), WINDOW), expected);
    }
}
