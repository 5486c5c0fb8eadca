//! The silence that a hand-over makes in the guest's network: from the last frame that passed any of its cards at the
//! source, either way, to the first that does at the target.
//!
//! ```text
//! source   last frame ─── pause ─── Done ──┐
//!              └─────── age ──────────┘    │ on its way: not known, and so much the gap is told too short
//! target                                   └─▶ comes ─── commit ─── runs ─── first frame
//! ```
//!
//! Nobody waits for the first frame: the card notes it, and whoever asks for the gap finds it.

use godwit_devices::net::FrameTimes;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// A frame must have passed within this time before the pause: a network that is quiet anyway has no gap to tell of. So
/// short that the odd frame for all does not make it lively.
const LIVELY: Duration = Duration::from_millis(100);

/// When the last frame passed the source's `cards`, if that was shortly before the guest was told to pause at
/// `pause_ns`, or later; all on CLOCK_BOOTTIME.
pub(super) fn last_frame_ns(cards: &[Arc<FrameTimes>], pause_ns: u64) -> Option<u64> {
    let latest_ns = cards.iter().filter_map(|card| card.latest_ns()).max()?;
    is_lively(latest_ns, pause_ns).then_some(latest_ns)
}

fn is_lively(latest_ns: u64, pause_ns: u64) -> bool {
    Duration::from_nanos(pause_ns.saturating_sub(latest_ns)) <= LIVELY
}

/// The gap, seen from the target.
#[derive(Debug)]
pub(super) struct PacketGap {
    cards: Vec<Arc<FrameTimes>>,
    /// When the last frame passed at the source, on this host's CLOCK_BOOTTIME.
    opened_ns: OnceLock<u64>,
}

impl PacketGap {
    /// The gap that ends with the first frame that passes one of `cards`, all of which have yet to be used.
    pub(super) const fn until_first_of(cards: Vec<Arc<FrameTimes>>) -> Self {
        Self {
            cards,
            opened_ns: OnceLock::new(),
        }
    }

    /// At `now_ns` the source's word came that its last frame passed `age_ns` ago.
    pub(super) fn opened(&self, age_ns: u64, now_ns: u64) {
        // A source may say any age; it says so once.
        let _ = self.opened_ns.set(now_ns.saturating_sub(age_ns));
    }

    /// How long it was, in microseconds; `None` as long as it lasts, and where it never began.
    pub(super) fn length_us(&self) -> Option<u64> {
        let first_ns = self.cards.iter().filter_map(|card| card.first_ns()).min()?;
        Some(first_ns.saturating_sub(*self.opened_ns.get()?) / 1_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards() -> Vec<Arc<FrameTimes>> {
        vec![Arc::default(), Arc::default()]
    }

    #[test]
    fn only_a_network_on_which_a_frame_passed_shortly_before_has_a_gap() {
        let lively_ns = 100_000_000;
        assert!(is_lively(5 * lively_ns, 6 * lively_ns));
        assert!(!is_lively(5 * lively_ns, 6 * lively_ns + 1));
        // While the devices came to rest.
        assert!(is_lively(5 * lively_ns, 4 * lively_ns));
    }

    #[test]
    fn the_last_frame_of_any_card_counts() {
        let cards = cards();
        assert_eq!(last_frame_ns(&cards, 0), None);
        cards[0].note();
        let first = cards[0].latest_ns().unwrap();
        cards[1].note();
        let last = cards[1].latest_ns().unwrap();
        assert_eq!(last_frame_ns(&cards, last), Some(last.max(first)));
        let much_later = last + 100_000_001;
        assert_eq!(last_frame_ns(&cards, much_later), None);
    }

    #[test]
    fn a_gap_is_known_when_the_first_frame_has_passed_and_stays_as_it_is() {
        let cards = cards();
        let gap = PacketGap::until_first_of(cards.clone());
        gap.opened(7_000, 10_000);
        assert_eq!(gap.length_us(), None);
        cards[1].note();
        let first_ns = cards[1].first_ns().unwrap();
        assert_eq!(gap.length_us(), Some((first_ns - 3_000) / 1_000));
        cards[1].note();
        cards[0].note();
        assert_eq!(gap.length_us(), Some((first_ns - 3_000) / 1_000));
    }

    #[test]
    fn after_a_quiet_network_and_an_older_source_there_is_no_gap() {
        let cards = cards();
        let gap = PacketGap::until_first_of(cards.clone());
        cards[0].note();
        assert_eq!(gap.length_us(), None);
    }

    #[test]
    fn an_age_that_cannot_be_harms_nothing() {
        let cards = cards();
        let gap = PacketGap::until_first_of(cards.clone());
        gap.opened(u64::MAX, 1);
        cards[0].note();
        assert_eq!(gap.length_us(), Some(cards[0].first_ns().unwrap() / 1_000));
    }
}
