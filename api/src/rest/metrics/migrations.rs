//! How migrations went, as histograms.
//!
//! Finished migrations stay in the store for a while, and the view has them: they are observed when someone asks for the
//! figures, each once. Those that ended before this process began were for the process before it to tell; a counter that
//! starts again at zero must not tell them once more.

mod course;
mod post_copy;

use course::CourseFigures;
use godwit_controller::model::{ForeseenOutcome, Migration, MigrationState};
use godwit_controller::view::View;
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationPhase, MigrationProgress};
use jiff::Timestamp;
use post_copy::PostCopyFigures;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Upper bounds of the buckets: a few seconds for small guests, an hour for the largest ones over a slow link.
const DURATION_BUCKETS_S: [f64; 10] = [
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0,
];
/// Around the usual downtime limit of 300 ms.
const DOWNTIME_BUCKETS_S: [f64; 10] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 5.0];
const ERROR_BUCKETS: [f64; 8] = [0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 5.0];
/// 64 MiB to 1 TiB.
const TRANSFERRED_BUCKETS_BYTES: [f64; 8] = [
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
    17_179_869_184.0,
    68_719_476_736.0,
    274_877_906_944.0,
    1_099_511_627_776.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Migrations that are counted and still remembered by the store.
#[derive(Debug, Default)]
struct Observed {
    finished: BTreeSet<MigrationId>,
    /// Those whose packet gap is: mostly it becomes known after the end.
    gaps: BTreeSet<MigrationId>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct MigrationFigures {
    since: Timestamp,
    observed: Mutex<Observed>,
    durations: Family<OutcomeLabel, Histogram, fn() -> Histogram>,
    transferred: Family<OutcomeLabel, Histogram, fn() -> Histogram>,
    disks_transferred: Counter,
    downtime: Histogram,
    packet_gap: Histogram,
    blackout_error: Histogram,
    foreseen_error: Histogram,
    course: CourseFigures,
    post_copy: PostCopyFigures,
}

impl MigrationFigures {
    /// Tells of migrations that end at `since` or later.
    pub(super) fn since(since: Timestamp) -> Self {
        Self {
            since,
            observed: Mutex::default(),
            durations: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS_S)),
            transferred: Family::new_with_constructor(|| Histogram::new(TRANSFERRED_BUCKETS_BYTES)),
            disks_transferred: Counter::default(),
            downtime: Histogram::new(DOWNTIME_BUCKETS_S),
            packet_gap: Histogram::new(DOWNTIME_BUCKETS_S),
            blackout_error: Histogram::new(ERROR_BUCKETS),
            foreseen_error: Histogram::new(ERROR_BUCKETS),
            course: CourseFigures::new(),
            post_copy: PostCopyFigures::new(),
        }
    }

    /// Takes in what has finished since the last time.
    pub(super) fn observe(&self, view: &View) {
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let Observed { finished, gaps } = &mut *observed;
        for ids in [&mut *finished, &mut *gaps] {
            ids.retain(|id| view.migrations.contains_key(id));
        }
        let ended = view
            .migrations
            .values()
            .filter(|migration| migration.ended_at.is_some_and(|ended| ended >= self.since));
        for migration in ended {
            if is_finished(view, migration) && finished.insert(migration.id) {
                self.count(migration);
            }
            if let Some(us) = packet_gap_us(migration)
                && gaps.insert(migration.id)
            {
                self.packet_gap.observe(us as f64 / 1e6);
            }
        }
    }

    fn count(&self, migration: &Migration) {
        let label = OutcomeLabel {
            outcome: outcome(migration),
        };
        if let Some(ended) = migration.ended_at {
            let took = ended.duration_since(migration.started_at).as_secs_f64();
            self.durations.get_or_create(&label).observe(took.max(0.0));
        }
        let Some(progress) = &migration.progress else {
            return;
        };
        self.transferred
            .get_or_create(&label)
            .observe(progress.transferred_bytes.0 as f64);
        self.disks_transferred
            .inc_by(progress.disk_transferred_bytes.0);
        if let Some(us) = progress.downtime_us {
            self.downtime.observe(us as f64 / 1e6);
        }
        if let Some(error) = blackout_error(progress) {
            self.blackout_error.observe(error);
        }
        if let Some(error) = foreseen_error(migration) {
            self.foreseen_error.observe(error);
        }
        self.course.count(progress);
        if let Some(memory) = &progress.post_copy {
            self.post_copy.count(memory);
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "migration_duration",
            "From the beginning of a migration to its decision",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register_with_unit(
            "migration_transferred",
            "Bytes that a migration put on the wire",
            Unit::Bytes,
            self.transferred.clone(),
        );
        registry.register_with_unit(
            "migration_disks_transferred",
            "Bytes of disks that moved along with their VMs, arrived or not",
            Unit::Bytes,
            self.disks_transferred.clone(),
        );
        registry.register_with_unit(
            "migration_downtime",
            "Time for which a guest stood still to be moved",
            Unit::Seconds,
            self.downtime.clone(),
        );
        registry.register_with_unit(
            "migration_packet_gap",
            "Silence of a guest's network because it was moved",
            Unit::Seconds,
            self.packet_gap.clone(),
        );
        registry.register_with_unit(
            "migration_blackout_error",
            "How far the predicted blackout was from the real one, as a share of the real one",
            Unit::Other("ratio".into()),
            self.blackout_error.clone(),
        );
        registry.register_with_unit(
            "migration_foreseen_blackout_error",
            "How far the blackout that was foreseen when a migration began was from the real one, as a share of the real one",
            Unit::Other("ratio".into()),
            self.foreseen_error.clone(),
        );
        self.course.register(registry);
        self.post_copy.register(registry);
    }
}

/// Decided, and its operation has written down the source's last figures.
fn is_finished(view: &View, migration: &Migration) -> bool {
    !migration.is_open()
        && view
            .operations
            .get(&migration.operation)
            .is_none_or(|operation| operation.state.is_final())
}

fn outcome(migration: &Migration) -> &'static str {
    match (&migration.state, migration.phase) {
        (MigrationState::Committed { .. }, _) => "completed",
        (_, Some(MigrationPhase::Cancelled)) => "cancelled",
        _ => "failed",
    }
}

fn packet_gap_us(migration: &Migration) -> Option<u64> {
    migration.progress.as_ref()?.packet_gap_us
}

fn blackout_error(progress: &MigrationProgress) -> Option<f64> {
    let actual = progress.downtime_us.filter(|us| *us > 0)?;
    let predicted = progress.blackout?.predicted_us;
    Some(predicted.abs_diff(actual) as f64 / actual as f64)
}

/// Of a migration that arrived; where none was expected to, nothing was foreseen of its blackout.
fn foreseen_error(migration: &Migration) -> Option<f64> {
    let foreseen = migration
        .foreseen
        .filter(|foreseen| foreseen.outcome != ForeseenOutcome::WillNotConverge)?;
    let progress = migration.progress.as_ref()?;
    let actual = progress.downtime_us.filter(|us| *us > 0)?;
    let predicted = foreseen.blackout_ms.saturating_mul(1_000);
    Some(predicted.abs_diff(actual) as f64 / actual as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_controller::model::Foreseen;
    use godwit_wire::id::{Epoch, Generation, HostId, OperationId, VmId};
    use godwit_wire::migration::{Blackout, MigrationPolicy};
    use godwit_wire::unit::Bytes;
    use prometheus_client::encoding::text::encode;
    use std::sync::Arc;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn committed(ended_at: i64) -> Migration {
        Migration {
            id: MigrationId::fresh(),
            vm: VmId::fresh(),
            vm_name: "db-1".into(),
            source: HostId::fresh(),
            source_name: "host-1".into(),
            target: HostId::fresh(),
            target_name: "host-2".into(),
            epoch: Epoch(1),
            prepare_generation: Generation(1),
            send_generation: Generation(2),
            policy: MigrationPolicy::default(),
            disks: Vec::new(),
            operation: OperationId::fresh(),
            state: MigrationState::Committed { epoch: Epoch(2) },
            phase: Some(MigrationPhase::Completed),
            progress: Some(MigrationProgress {
                round: 3,
                transferred_bytes: Bytes(1 << 30),
                downtime_us: Some(40_000),
                blackout: Some(Blackout {
                    predicted_us: 30_000,
                    ..Blackout::default()
                }),
                ..MigrationProgress::default()
            }),
            held_back: Default::default(),
            foreseen: Some(Foreseen {
                outcome: ForeseenOutcome::Converges,
                took_ms: 7_000,
                mib: 1_024,
                blackout_ms: 60,
                throttle_percent: 0,
            }),
            started_at: at(ended_at - 7),
            ended_at: Some(at(ended_at)),
        }
    }

    fn view(migrations: &[&Migration]) -> View {
        let mut view = View::default();
        let records = migrations.iter().map(|m| (m.id, Arc::new((*m).clone())));
        view.migrations = Arc::new(records.collect());
        view
    }

    /// The sums and counts.
    fn told(figures: &MigrationFigures) -> Vec<String> {
        let mut registry = Registry::default();
        figures.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).expect("text");
        text.lines()
            .filter(|line| line.contains("_sum") || line.contains("_count"))
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn a_finished_migration_is_counted_once_however_often_it_is_seen() {
        let figures = MigrationFigures::since(at(100));
        let (one, two) = (committed(200), committed(201));
        figures.observe(&view(&[&one]));
        figures.observe(&view(&[&one]));
        expect_test::expect![[r#"
            migration_duration_seconds_sum{outcome="completed"} 7.0
            migration_duration_seconds_count{outcome="completed"} 1
            migration_transferred_bytes_sum{outcome="completed"} 1073741824.0
            migration_transferred_bytes_count{outcome="completed"} 1
            migration_downtime_seconds_sum 0.04
            migration_downtime_seconds_count 1
            migration_packet_gap_seconds_sum 0.0
            migration_packet_gap_seconds_count 0
            migration_blackout_error_ratio_sum 0.25
            migration_blackout_error_ratio_count 1
            migration_foreseen_blackout_error_ratio_sum 0.5
            migration_foreseen_blackout_error_ratio_count 1
            migration_blackout_miss_seconds_sum{actual="longer"} 0.01
            migration_blackout_miss_seconds_count{actual="longer"} 1
            migration_rounds_sum 3.0
            migration_rounds_count 1
            migration_throttle_percent_sum 0.0
            migration_throttle_percent_count 1
            migration_vcpu_stall_seconds_sum 0.0
            migration_vcpu_stall_seconds_count 0
            migration_post_copy_wait_seconds_sum 0.0
            migration_post_copy_wait_seconds_count 0
            migration_post_copy_longest_wait_seconds_sum 0.0
            migration_post_copy_longest_wait_seconds_count 0"#]]
        .assert_eq(&told(&figures).join("\n"));
        figures.observe(&view(&[&one, &two]));
        let counts = told(&figures);
        assert!(
            counts.contains(&"migration_downtime_seconds_count 2".to_owned()),
            "{counts:?}"
        );
    }

    #[test]
    fn what_ended_before_this_process_is_not_counted_again() {
        let figures = MigrationFigures::since(at(100));
        figures.observe(&view(&[&committed(99)]));
        assert!(told(&figures).contains(&"migration_downtime_seconds_count 0".to_owned()));
    }

    #[test]
    fn a_packet_gap_that_is_known_after_the_end_is_counted_once() {
        let figures = MigrationFigures::since(at(100));
        let (mut migration, mut before) = (committed(200), committed(99));
        figures.observe(&view(&[&migration, &before]));
        for migration in [&mut migration, &mut before] {
            let progress = migration.progress.as_mut().expect("it is there");
            progress.packet_gap_us = Some(45_000);
        }
        for _ in 0..2 {
            figures.observe(&view(&[&migration, &before]));
            let told = told(&figures);
            for line in [
                "migration_packet_gap_seconds_sum 0.045",
                "migration_packet_gap_seconds_count 1",
                "migration_downtime_seconds_count 1",
            ] {
                assert!(told.contains(&line.to_owned()), "{told:?}");
            }
        }
    }

    #[test]
    fn an_open_migration_is_not_counted() {
        let figures = MigrationFigures::since(at(100));
        let mut open = committed(200);
        open.state = MigrationState::Open;
        figures.observe(&view(&[&open]));
        assert!(told(&figures).contains(&"migration_downtime_seconds_count 0".to_owned()));
    }

    #[test]
    fn where_no_arrival_was_foreseen_no_blackout_was() {
        let mut migration = committed(200);
        assert_eq!(foreseen_error(&migration), Some(0.5));
        let foreseen = migration.foreseen.as_mut().expect("it is there");
        foreseen.outcome = ForeseenOutcome::WillNotConverge;
        assert_eq!(foreseen_error(&migration), None);
    }

    #[test]
    fn a_blackout_that_took_twice_as_long_as_predicted_is_half_an_error() {
        let progress = MigrationProgress {
            downtime_us: Some(20_000),
            blackout: Some(Blackout {
                predicted_us: 10_000,
                ..Blackout::default()
            }),
            ..MigrationProgress::default()
        };
        assert_eq!(blackout_error(&progress), Some(0.5));
    }
}
