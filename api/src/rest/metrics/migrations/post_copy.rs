//! What guests paid for having gone ahead of their memory.

use godwit_wire::migration::PostCopyProgress;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// From a few pages over a fast link to a guest that hardly ran.
const WAIT_BUCKETS_S: [f64; 8] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0];
/// From one page over a fast link to a link that was broken for a while.
const LONGEST_WAIT_BUCKETS_S: [f64; 9] = [0.000_5, 0.001, 0.002, 0.005, 0.02, 0.1, 0.5, 5.0, 60.0];

/// See the module.
#[derive(Debug)]
pub(super) struct PostCopyFigures {
    wait: Histogram,
    longest_wait: Histogram,
    wanted_pages: Counter,
    interruptions: Counter,
}

impl PostCopyFigures {
    pub(super) fn new() -> Self {
        Self {
            wait: Histogram::new(WAIT_BUCKETS_S),
            longest_wait: Histogram::new(LONGEST_WAIT_BUCKETS_S),
            wanted_pages: Counter::default(),
            interruptions: Counter::default(),
        }
    }

    pub(super) fn count(&self, memory: &PostCopyProgress) {
        self.wait.observe(memory.waited_us as f64 / 1e6);
        self.longest_wait
            .observe(memory.longest_wait_us as f64 / 1e6);
        self.wanted_pages.inc_by(memory.wanted_pages);
        self.interruptions.inc_by(memory.interruptions.into());
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "migration_post_copy_wait",
            "Time for which a guest's accesses waited for memory that had not followed yet, all together",
            Unit::Seconds,
            self.wait.clone(),
        );
        registry.register_with_unit(
            "migration_post_copy_longest_wait",
            "The longest time for which an access of a guest waited for memory that had not followed yet",
            Unit::Seconds,
            self.longest_wait.clone(),
        );
        registry.register(
            "migration_post_copy_wanted_pages",
            "Pages that guests touched before they had followed",
            self.wanted_pages.clone(),
        );
        registry.register(
            "migration_post_copy_interruptions",
            "Times that the connections over which memory followed broke and were made again",
            self.interruptions.clone(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;

    #[test]
    fn waits_pages_and_interruptions_add_up_over_guests() {
        let figures = PostCopyFigures::new();
        for wanted_pages in [30, 12] {
            figures.count(&PostCopyProgress {
                wanted_pages,
                waited_us: 250_000,
                longest_wait_us: 125_000,
                interruptions: 1,
                ..PostCopyProgress::default()
            });
        }
        let mut registry = Registry::default();
        figures.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).expect("text");
        for line in [
            "migration_post_copy_wait_seconds_sum 0.5",
            "migration_post_copy_longest_wait_seconds_sum 0.25",
            "migration_post_copy_longest_wait_seconds_count 2",
            "migration_post_copy_wanted_pages_total 42",
            "migration_post_copy_interruptions_total 2",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} in\n{text}");
        }
    }
}
