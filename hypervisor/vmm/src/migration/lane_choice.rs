//! How many lanes are to carry pages, from what they were seen to carry (pure).
//!
//! ```text
//!               ┌─── carry more ────┐
//!               ▼                   │          ┌─ carry as much ─┐
//! measuring ─▶ twice as many lanes ─┘          ▼                 │
//!     ▲          └─ carry no more ─▶ back, and one lane fewer ───┘
//!     │                                        │ carry less
//!     └────────── the rate falls ── settled ◀──┘ back
//! ```
//!
//! The number doubles, so that a fast link is full soon; what was too much is taken back lane by lane, which costs
//! nothing while fewer carry the same.

use godwit_wire::unit::PAGE_BYTES;
use std::time::Duration;

/// So many windows tell what a number of lanes carries.
const READING_WINDOWS: usize = 3;
/// So many are not looked at first, and after the number has changed: a connection fills buffers, then gets up to speed.
const RAMP_WINDOWS: u32 = 2;
/// More lanes must carry this many times as much, and in each window more than before in any: that is over the noise.
const WORTHWHILE_GAIN: f64 = 1.10;
/// Fewer lanes must still carry this share. Nearer to 1 than the gain, so that none is added and removed in turn.
const BEARABLE_SHARE: f64 = 0.95;
/// Below this share of what was carried the rate has fallen,
const FALLEN_SHARE: f64 = 0.8;
/// if that is so for this many windows on end.
const FALLEN_WINDOWS: u32 = 5;
/// Weight of a window in what a settled number is expected to carry, when it carries more.
const RISING_WEIGHT: f64 = 0.25;
/// A bandwidth limit that is used to this share is what holds the lanes back.
const HELD_BACK_SHARE: f64 = 0.9;

/// What was sent within a round for a while, by exactly the lanes that were to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Pages sent with their content.
    pub(super) content_pages: u64,
    /// Pages without: they are zero, or the target has them.
    pub(super) bare_pages: u64,
    /// What went on the wire.
    pub(super) wire_bytes: u64,
    /// Most bytes per second that were allowed there; absent without a limit.
    pub(super) limit_bytes_per_s: Option<u64>,
    /// How long it was looked at.
    pub(super) took: Duration,
}

/// What a window says.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    /// Nothing of the link: memory was looked at rather than sent.
    Nothing,
    /// That more lanes would carry no more: bandwidth is limited.
    HeldBack,
    /// How much guest memory went per second, so what compression gains is in it.
    Carried { bytes_per_s: f64 },
}

impl Window {
    fn says(&self) -> Says {
        let seconds = self.took.as_secs_f64().max(1e-6);
        let on_the_wire = self.wire_bytes as f64 / seconds;
        let held_back = |limit| on_the_wire >= limit as f64 * HELD_BACK_SHARE;
        if self.limit_bytes_per_s.is_some_and(held_back) {
            Says::HeldBack
        } else if self.content_pages == 0 || self.content_pages < self.bare_pages {
            Says::Nothing
        } else {
            let bytes = (self.content_pages * PAGE_BYTES) as f64;
            Says::Carried {
                bytes_per_s: bytes / seconds,
            }
        }
    }
}

/// What a number of lanes carries, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    least: f64,
    median: f64,
    most: f64,
}

impl Reading {
    fn of(mut rates: [f64; READING_WINDOWS]) -> Self {
        rates.sort_by(f64::total_cmp);
        Self {
            least: rates[0],
            median: rates[READING_WINDOWS / 2],
            most: rates[READING_WINDOWS - 1],
        }
    }

    fn clearly_beats(&self, other: &Self) -> bool {
        self.median >= other.median * WORTHWHILE_GAIN && self.least > other.most
    }
}

/// Where the search stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Search {
    /// What the present lanes carry is not known.
    Measuring,
    /// Whether they carry more than `fewer` lanes did.
    Adding { fewer: u8, carried: Reading },
    /// Whether they carry as much as it was with the number that was found best, though they are one fewer than `more`.
    Removing { more: u8, carried: Reading },
    /// It is over.
    Settled {
        /// What the present lanes carry, in bytes per second.
        expected: f64,
        /// Windows on end that carried far less.
        fallen_windows: u32,
    },
}

/// The number of lanes at work, and what is known of others.
#[derive(Clone, Debug)]
pub(super) struct LaneChoice {
    /// From 1 to `most`.
    lanes: u8,
    most: u8,
    search: Search,
    ramp_windows: u32,
    rates: Vec<f64>,
}

impl LaneChoice {
    /// `first` lanes of `most`, until something is known.
    pub(super) fn new(first: u8, most: u8) -> Self {
        assert!((1..=most).contains(&first), "some of the lanes work");
        Self {
            lanes: first,
            most,
            search: Search::Measuring,
            ramp_windows: RAMP_WINDOWS,
            rates: Vec::with_capacity(READING_WINDOWS),
        }
    }

    /// How many lanes are to work from here on, after what the present ones did.
    pub(super) fn observe(&mut self, window: Window) -> u8 {
        match window.says() {
            Says::Nothing => {}
            Says::HeldBack => {
                self.call_off();
            }
            Says::Carried { .. } if self.ramp_windows > 0 => self.ramp_windows -= 1,
            Says::Carried { bytes_per_s } => self.note(bytes_per_s),
        }
        self.lanes
    }

    /// Ends a search that is under way; the number that was found best so far.
    pub(super) fn call_off(&mut self) -> u8 {
        self.rates.clear();
        match &mut self.search {
            Search::Measuring => {}
            Search::Adding { fewer: best, .. } | Search::Removing { more: best, .. } => {
                let best = *best;
                self.search = Search::Measuring;
                self.work_with(best);
            }
            Search::Settled { fallen_windows, .. } => *fallen_windows = 0,
        }
        self.lanes
    }

    fn note(&mut self, bytes_per_s: f64) {
        if let Search::Settled {
            expected,
            fallen_windows,
        } = &mut self.search
        {
            if bytes_per_s >= *expected * FALLEN_SHARE {
                *fallen_windows = 0;
                *expected += (bytes_per_s - *expected).max(0.0) * RISING_WEIGHT;
                return;
            }
            *fallen_windows += 1;
            if *fallen_windows == FALLEN_WINDOWS {
                self.search = Search::Measuring;
            }
            return;
        }
        self.rates.push(bytes_per_s);
        if let Ok(rates) = self.rates.as_slice().try_into() {
            self.rates.clear();
            self.judge(Reading::of(rates));
        }
    }

    fn judge(&mut self, reading: Reading) {
        match self.search {
            Search::Measuring => self.add(reading),
            Search::Adding { carried, .. } if reading.clearly_beats(&carried) => self.add(reading),
            Search::Adding { fewer, carried } => {
                self.work_with(fewer);
                self.remove(carried);
            }
            Search::Removing { carried, .. }
                if reading.median >= carried.median * BEARABLE_SHARE =>
            {
                self.remove(carried);
            }
            Search::Removing { more, carried } => {
                self.work_with(more);
                self.settle(carried);
            }
            Search::Settled { .. } => unreachable!("readings are taken while searching"),
        }
    }

    /// Tries more lanes than those that `carried` so much.
    fn add(&mut self, carried: Reading) {
        if self.lanes == self.most {
            return self.remove(carried);
        }
        let fewer = self.lanes;
        self.search = Search::Adding { fewer, carried };
        self.work_with(fewer.saturating_mul(2).min(self.most));
    }

    /// Tries one lane fewer than carry as much as `carried`.
    fn remove(&mut self, carried: Reading) {
        if self.lanes == 1 {
            return self.settle(carried);
        }
        let more = self.lanes;
        self.search = Search::Removing { more, carried };
        self.work_with(more - 1);
    }

    fn settle(&mut self, carried: Reading) {
        self.search = Search::Settled {
            expected: carried.median,
            fallen_windows: 0,
        };
    }

    fn work_with(&mut self, lanes: u8) {
        self.lanes = lanes;
        self.ramp_windows = RAMP_WINDOWS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOOK: Duration = Duration::from_millis(100);
    const GBIT: f64 = 125e6;
    /// One number of lanes is known by then.
    const ONE_READING: usize = RAMP_WINDOWS as usize + READING_WINDOWS;
    /// More than any search takes.
    const LONG: usize = 120;

    fn carrying(bytes_per_s: f64) -> Window {
        let bytes = bytes_per_s * TOOK.as_secs_f64();
        Window {
            content_pages: (bytes / PAGE_BYTES as f64) as u64,
            bare_pages: 0,
            wire_bytes: bytes as u64,
            limit_bytes_per_s: None,
            took: TOOK,
        }
    }

    /// Each lane adds 1 Gbit/s, up to `knee` of them.
    fn link(knee: u8) -> impl Fn(u8) -> f64 {
        move |lanes| f64::from(lanes.min(knee)) * GBIT
    }

    /// Lets it look at `windows` windows of a link; the number it then works with.
    fn run(choice: &mut LaneChoice, windows: usize, carries: impl Fn(u8) -> f64) -> u8 {
        for _ in 0..windows {
            let bytes_per_s = carries(choice.lanes);
            choice.observe(carrying(bytes_per_s));
        }
        choice.lanes
    }

    fn places() -> impl Strategy<Value = (u8, u8)> {
        (1u8..=8).prop_flat_map(|most| (1..=most, Just(most)))
    }

    #[test]
    fn one_lane_that_saturates_its_link_is_left_alone_with_it() {
        assert_eq!(run(&mut LaneChoice::new(8, 8), LONG, link(1)), 1);
        assert_eq!(run(&mut LaneChoice::new(2, 8), LONG, link(1)), 1);
    }

    #[test]
    fn lanes_are_added_as_long_as_each_brings_more() {
        assert_eq!(run(&mut LaneChoice::new(1, 8), LONG, link(4)), 4);
        assert_eq!(run(&mut LaneChoice::new(2, 8), LONG, link(4)), 4);
        assert_eq!(run(&mut LaneChoice::new(2, 8), LONG, link(100)), 8);
    }

    #[test]
    fn lanes_that_get_in_each_others_way_are_taken_back() {
        let crowded = |lanes| match lanes {
            0..=3 => f64::from(lanes) * GBIT,
            more => (6.0 - f64::from(more) * 0.5) * GBIT,
        };
        assert_eq!(run(&mut LaneChoice::new(1, 8), LONG, crowded), 4);
    }

    #[test]
    fn a_link_that_became_worse_is_probed_again() {
        let mut choice = LaneChoice::new(2, 8);
        let one_fills_it = |_| 5.0 * GBIT;
        assert_eq!(run(&mut choice, LONG, one_fills_it), 1);
        assert_eq!(run(&mut choice, LONG, link(5)), 5);
    }

    #[test]
    fn a_moment_of_less_does_not_start_a_search() {
        let mut choice = LaneChoice::new(4, 8);
        run(&mut choice, LONG, link(4));
        let moment = FALLEN_WINDOWS as usize - 1;
        assert_eq!(run(&mut choice, moment, |_| GBIT), 4);
        run(&mut choice, 1, link(4));
        assert_eq!(run(&mut choice, moment, |_| GBIT), 4);
        assert!(matches!(choice.search, Search::Settled { .. }));
    }

    #[test]
    fn a_limit_that_holds_the_lanes_back_ends_the_search_where_it_was_best() {
        let limited = Window {
            limit_bytes_per_s: Some(GBIT as u64),
            ..carrying(GBIT * 0.99)
        };
        let mut choice = LaneChoice::new(2, 8);
        assert_eq!(run(&mut choice, ONE_READING, link(8)), 4);
        for _ in 0..LONG {
            assert_eq!(choice.observe(limited), 2);
        }
        let roomy = |lanes| Window {
            limit_bytes_per_s: Some(100 * GBIT as u64),
            ..carrying(link(8)(lanes))
        };
        for _ in 0..LONG {
            choice.observe(roomy(choice.lanes));
        }
        assert_eq!(choice.lanes, 8);
    }

    #[test]
    fn a_limit_does_not_pass_for_a_rate_that_fell() {
        let mut choice = LaneChoice::new(4, 8);
        run(&mut choice, LONG, link(4));
        let limited = Window {
            limit_bytes_per_s: Some(GBIT as u64),
            ..carrying(GBIT)
        };
        for _ in 0..LONG {
            assert_eq!(choice.observe(limited), 4);
        }
    }

    #[test]
    fn memory_that_is_mostly_zero_says_nothing() {
        let mut choice = LaneChoice::new(2, 8);
        for content_pages in [0, 10, 99] {
            let window = Window {
                content_pages,
                bare_pages: 100,
                ..carrying(GBIT)
            };
            for _ in 0..LONG {
                assert_eq!(choice.observe(window), 2);
            }
        }
    }

    #[test]
    fn what_was_found_best_is_known_while_others_are_tried() {
        let mut choice = LaneChoice::new(2, 8);
        assert_eq!(choice.call_off(), 2);
        assert_eq!(run(&mut choice, ONE_READING, link(3)), 4);
        assert_eq!(choice.call_off(), 2);
        let mut settled = LaneChoice::new(2, 8);
        assert_eq!(run(&mut settled, LONG, link(3)), 3);
        assert_eq!(settled.call_off(), 3);
    }

    proptest! {
        #[test]
        fn without_noise_the_fewest_lanes_are_found_that_carry_everything(
            (first, most) in places(),
            knee in 1u8..=10,
        ) {
            let mut choice = LaneChoice::new(first, most);
            prop_assert_eq!(run(&mut choice, LONG, link(knee)), knee.min(most));
            // And it stays with them.
            for _ in 0..LONG {
                prop_assert_eq!(run(&mut choice, 1, link(knee)), knee.min(most));
            }
        }

        #[test]
        fn noise_costs_little_and_adds_no_lane_to_a_full_link(
            (first, most) in places(),
            knee in 1u8..=10,
            noise in prop::collection::vec(-0.04..0.04, LONG),
        ) {
            let mut choice = LaneChoice::new(first, most);
            for off in noise {
                let bytes_per_s = link(knee)(choice.lanes) * (1.0 + off);
                choice.observe(carrying(bytes_per_s));
            }
            // Wherever it stands: a number that is only being tried does not count.
            let best = choice.call_off();
            let most_carried = link(knee)(most);
            prop_assert!(link(knee)(best) >= most_carried * 0.85, "{best} of {knee}");
            prop_assert!(knee > first || best <= first, "{best} of {knee}");
        }

        #[test]
        fn whatever_is_seen_some_lanes_work_and_no_more_than_there_are(
            (first, most) in places(),
            windows in prop::collection::vec(
                (0u64..100_000, 0u64..100_000, 0u64..1_000_000_000, prop::option::of(0u64..2_000_000_000), 0u64..1_000),
                0..200,
            ),
        ) {
            let mut choice = LaneChoice::new(first, most);
            for (content_pages, bare_pages, wire_bytes, limit_bytes_per_s, took_ms) in windows {
                let lanes = choice.observe(Window {
                    content_pages,
                    bare_pages,
                    wire_bytes,
                    limit_bytes_per_s,
                    took: Duration::from_millis(took_ms),
                });
                prop_assert!((1..=most).contains(&lanes));
            }
            prop_assert!((1..=most).contains(&choice.call_off()));
        }
    }
}
