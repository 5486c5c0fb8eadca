//! What migrations consisted of: rounds, pages by kind, what the guest paid for it, and how far the prediction of the
//! blackout was off.

use godwit_wire::migration::MigrationProgress;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Up to the usual limit of 30 rounds.
const ROUND_BUCKETS: [f64; 8] = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0];
/// A guest that was not slowed down is in the first.
const THROTTLE_BUCKETS_PERCENT: [f64; 7] = [0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0];
/// From a few periods of the throttle to minutes of a guest that is hard to catch up with.
const STALL_BUCKETS_S: [f64; 8] = [0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 300.0];
/// From what nobody notices to what breaks the usual limit of 300 ms.
const MISS_BUCKETS_S: [f64; 8] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Which way a prediction was wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActualLabel {
    actual: &'static str,
}

/// See the module.
#[derive(Debug)]
pub(super) struct CourseFigures {
    blackout_miss: Family<ActualLabel, Histogram, fn() -> Histogram>,
    rounds: Histogram,
    pages: Family<KindLabel, Counter>,
    throttle: Histogram,
    stall: Histogram,
}

impl CourseFigures {
    pub(super) fn new() -> Self {
        Self {
            blackout_miss: Family::new_with_constructor(|| Histogram::new(MISS_BUCKETS_S)),
            rounds: Histogram::new(ROUND_BUCKETS),
            pages: Family::default(),
            throttle: Histogram::new(THROTTLE_BUCKETS_PERCENT),
            stall: Histogram::new(STALL_BUCKETS_S),
        }
    }

    pub(super) fn count(&self, progress: &MigrationProgress) {
        if let Some((actual, miss_us)) = blackout_miss(progress) {
            self.blackout_miss
                .get_or_create(&ActualLabel { actual })
                .observe(miss_us as f64 / 1e6);
        }
        if progress.round > 0 {
            self.rounds.observe(progress.round.into());
        }
        for (kind, pages) in [
            ("content", progress.content_pages),
            ("zero", progress.zero_pages),
            ("kept", progress.kept_pages),
        ] {
            self.pages.get_or_create(&KindLabel { kind }).inc_by(pages);
        }
        self.throttle.observe(progress.throttle_percent.into());
        for stalled_us in &progress.stalled_us {
            self.stall.observe(*stalled_us as f64 / 1e6);
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "migration_blackout_miss",
            "Time by which the real blackout was longer or shorter than predicted when the guest was paused",
            Unit::Seconds,
            self.blackout_miss.clone(),
        );
        registry.register(
            "migration_rounds",
            "Rounds that a migration took, the last pass included",
            self.rounds.clone(),
        );
        registry.register(
            "migration_pages",
            "Pages that migrations dealt with, by what was sent of them: their content, that they are zero, or nothing because the target had kept them",
            self.pages.clone(),
        );
        registry.register_with_unit(
            "migration_throttle",
            "How much a guest was slowed down in the end so that the copy caught up",
            Unit::Other("percent".into()),
            self.throttle.clone(),
        );
        registry.register_with_unit(
            "migration_vcpu_stall",
            "Time for which a vCPU of a guest that was slowed down was kept from running",
            Unit::Seconds,
            self.stall.clone(),
        );
    }
}

/// Which way the prediction at the moment of the pause was wrong, and by how many microseconds.
fn blackout_miss(progress: &MigrationProgress) -> Option<(&'static str, u64)> {
    let actual = progress.downtime_us.filter(|us| *us > 0)?;
    let predicted = progress.blackout?.predicted_us;
    let way = match actual > predicted {
        true => "longer",
        false => "shorter",
    };
    Some((way, predicted.abs_diff(actual)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::migration::Blackout;
    use prometheus_client::encoding::text::encode;

    #[test]
    fn pages_are_told_by_kind_and_stalls_by_vcpu() {
        let figures = CourseFigures::new();
        let progress = MigrationProgress {
            content_pages: 3,
            zero_pages: 2,
            kept_pages: 1,
            throttle_percent: 50,
            stalled_us: vec![0, 2_000_000],
            ..MigrationProgress::default()
        };
        figures.count(&progress);
        figures.count(&progress);
        let mut registry = Registry::default();
        figures.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).expect("text");
        for line in [
            "migration_pages_total{kind=\"content\"} 6",
            "migration_pages_total{kind=\"zero\"} 4",
            "migration_pages_total{kind=\"kept\"} 2",
            "migration_vcpu_stall_seconds_sum 4.0",
            "migration_vcpu_stall_seconds_count 4",
            "migration_throttle_percent_sum 100.0",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn a_miss_says_which_way_it_went() {
        let blackout = |predicted_us, downtime_us| MigrationProgress {
            downtime_us,
            blackout: Some(Blackout {
                predicted_us,
                ..Blackout::default()
            }),
            ..MigrationProgress::default()
        };
        assert_eq!(blackout_miss(&blackout(30, Some(40))), Some(("longer", 10)));
        assert_eq!(
            blackout_miss(&blackout(50, Some(40))),
            Some(("shorter", 10))
        );
        assert_eq!(blackout_miss(&blackout(50, None)), None);
    }
}
