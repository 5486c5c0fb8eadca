//! How long a migration will take, from sizes and from what earlier migrations showed.

use crate::model::{HeldBack, Migration, MigrationState};
use crate::view::View;
use godwit_wire::id::HostId;
use godwit_wire::migration::convergence::{EXPECTED_FIXED_COST, fixed_cost};
use godwit_wire::migration::{MigrationPolicy, Verify};
use godwit_wire::unit::{Bytes, Mib};
use serde::Serialize;
use std::time::Duration;

/// Transfer rate assumed before any migration has been measured.
pub const ASSUMED_BYTES_PER_S: u64 = 100 << 20;
/// Connecting, building the machine, handing over.
pub const CONNECTING: Duration = Duration::from_millis(500);
/// Stopping a guest and booting it again.
const RESTART_S: f64 = 10.0;
/// Latest migrations looked at for the measured figures.
const MEASURED: usize = 16;
/// Fewest migrations between two hosts that say more than all others together, and fewest anywhere that say what a blackout
/// costs.
const TELLING: usize = 3;
/// A migration that sent less says little about the link.
const TELLING_BYTES: u64 = 16 << 20;
/// A migration that was faster than this share of its bandwidth limit was held back by it.
const HELD_BACK_PERCENT: u128 = 80;
/// Rounds a prediction follows.
const MAX_ROUNDS: u32 = 30;

/// What a move costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Time from start to end.
    pub seconds: f64,
    /// Memory on the wire.
    pub mib: Mib,
    /// Time the guest stands still.
    pub blackout_ms: u64,
}

/// What to reckon with between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Guest memory that goes over the link.
    pub bytes_per_s: u64,
    /// Where that is from.
    pub bytes_per_s_from: Basis,
    /// What a blackout takes beside sending the rest.
    pub fixed_us: u64,
    /// Where that is from.
    pub fixed_from: Basis,
}

/// Where a figure is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Earlier migrations from the same host to the same host, with as many connections.
    Lanes,
    /// Earlier migrations from the same host to the same host.
    Pair,
    /// Earlier migrations between any hosts.
    Pool,
    /// Nothing has been measured yet.
    Assumed,
}

impl Figures {
    /// What the source is told of the fixed cost; nothing where it knows as much itself.
    pub fn learned_fixed_us(&self) -> Option<u64> {
        (self.fixed_from != Basis::Assumed).then_some(self.fixed_us)
    }
}

/// What to reckon with for a migration from `source` to `target`: medians of what the latest ones between the same
/// hosts showed, else of the pool's latest, else what is assumed.
pub fn figures(view: &View, source: HostId, target: HostId, policy: &MigrationPolicy) -> Figures {
    let pair = |migration: &Migration| migration.source == source && migration.target == target;
    let lanes = |migration: &Migration| pair(migration) && migration.policy.lanes == policy.lanes;
    let measured = |basis, figures: Vec<u64>, fewest| {
        (figures.len() >= fewest).then(|| (median(figures), basis))
    };
    let (bytes_per_s, bytes_per_s_from) =
        measured(Basis::Lanes, latest(view, lanes, telling_rate), TELLING)
            .or_else(|| measured(Basis::Pair, latest(view, pair, telling_rate), TELLING))
            .or_else(|| measured(Basis::Pool, latest(view, |_| true, telling_rate), 1))
            .or_else(|| measured(Basis::Pool, latest(view, |_| true, rate), 1))
            .unwrap_or((ASSUMED_BYTES_PER_S, Basis::Assumed));
    // One that was slow for once would make the next predictions wrong by as much.
    let (learned_us, fixed_from) = measured(Basis::Pair, latest(view, pair, fixed_us), TELLING)
        .or_else(|| measured(Basis::Pool, latest(view, |_| true, fixed_us), TELLING))
        .map_or((None, Basis::Assumed), |(us, basis)| (Some(us), basis));
    Figures {
        bytes_per_s,
        bytes_per_s_from,
        fixed_us: fixed_cost(learned_us, policy.downtime_limit_ms).as_micros() as u64,
        fixed_from,
    }
}

/// What to reckon with where the other host is not known yet.
pub fn pool_figures(view: &View) -> Figures {
    let nobody = HostId(uuid::Uuid::nil());
    figures(view, nobody, nobody, &MigrationPolicy::default())
}

/// The most that migrations which `counts` and had the link for themselves have shown it to carry, in bytes per second.
pub fn link_capacity(view: &View, counts: impl Fn(&Migration) -> bool) -> Option<u64> {
    let alone = |migration: &Migration| migration.held_back == HeldBack::No && counts(migration);
    let shown = latest(view, alone, telling_rate);
    shown
        .iter()
        .copied()
        .max()
        .filter(|_| shown.len() >= TELLING)
}

/// What the latest migrations showed that `counts`.
fn latest(
    view: &View,
    counts: impl Fn(&Migration) -> bool,
    figure: impl Fn(&Migration) -> Option<u64>,
) -> Vec<u64> {
    view.migrations
        .values()
        .rev()
        .filter(|migration| counts(migration))
        .filter_map(|migration| figure(migration))
        .take(MEASURED)
        .collect()
}

fn median(mut figures: Vec<u64>) -> u64 {
    figures.sort_unstable();
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Transfer rate that a migration showed, unless a limit held it back.
fn rate(migration: &Migration) -> Option<u64> {
    let progress = migration.progress.as_ref()?;
    let average = progress.transferred_bytes.0.saturating_mul(1_000) / progress.elapsed_ms.max(1);
    let rate = match progress.rate_bytes_per_s {
        0 => average,
        rate => rate,
    };
    let limit = migration.policy.max_bandwidth_bytes_per_s;
    let free =
        limit.is_none_or(|limit| u128::from(rate) * 100 < u128::from(limit) * HELD_BACK_PERCENT);
    (rate > 0 && free).then_some(rate)
}

fn telling_rate(migration: &Migration) -> Option<u64> {
    let sent = migration.progress.as_ref()?.transferred_bytes.0;
    rate(migration).filter(|_| sent >= TELLING_BYTES)
}

/// What the blackout of a migration took beside sending the rest. A hash over all of memory is not part of the usual
/// cost.
fn fixed_us(migration: &Migration) -> Option<u64> {
    let arrived = matches!(migration.state, MigrationState::Committed { .. });
    let usual = migration.policy.verify == Verify::Frames;
    migration
        .progress
        .as_ref()
        .filter(|_| arrived && usual)?
        .fixed_cost_us()
}

/// A live migration of `resident` bytes by a guest that dirties `dirty_per_s`.
///
/// Each round sends what the round before left dirty; the blackout sends what is left once that fits the limit.
pub fn live(
    resident: Bytes,
    dirty_per_s: u64,
    figures: &Figures,
    downtime_limit_ms: u64,
) -> Estimate {
    let bandwidth = figures.bytes_per_s.max(1) as f64;
    let limit_s = downtime_limit_ms as f64 / 1_000.0;
    let (mut left, mut sent, mut seconds) = (resident.0 as f64, 0.0, CONNECTING.as_secs_f64());
    for round in 0..MAX_ROUNDS {
        if round > 0 && left / bandwidth <= limit_s {
            break;
        }
        let round_s = left / bandwidth;
        sent += left;
        seconds += round_s;
        left = (dirty_per_s as f64 * round_s).min(resident.0 as f64);
    }
    let blackout_s = left / bandwidth;
    Estimate {
        seconds: seconds + blackout_s,
        mib: Mib(((sent + left) / f64::from(1 << 20)).ceil() as u64),
        blackout_ms: (blackout_s * 1_000.0 + figures.fixed_us as f64 / 1_000.0).ceil() as u64,
    }
}

/// Stopping a guest and booting it again.
pub fn restart() -> Estimate {
    Estimate {
        seconds: RESTART_S,
        mib: Mib(0),
        blackout_ms: (RESTART_S * 1_000.0) as u64,
    }
}

impl Figures {
    /// Before anything has been measured.
    pub const fn assumed() -> Self {
        Self {
            bytes_per_s: ASSUMED_BYTES_PER_S,
            bytes_per_s_from: Basis::Assumed,
            fixed_us: EXPECTED_FIXED_COST.as_micros() as u64,
            fixed_from: Basis::Assumed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::id::MigrationId;
    use godwit_wire::migration::{Blackout, MigrationProgress};
    use std::sync::Arc;
    use uuid::Uuid;

    fn host(number: u128) -> HostId {
        HostId(Uuid::from_u128(number))
    }

    fn moved(number: u128, (source, target): (u128, u128), rate: u64, fixed_us: u64) -> Migration {
        let progress = MigrationProgress {
            transferred_bytes: Bytes(1 << 30),
            rate_bytes_per_s: rate,
            blackout: Some(Blackout {
                commit_us: fixed_us,
                ..Blackout::default()
            }),
            ..MigrationProgress::default()
        };
        Migration {
            id: MigrationId(Uuid::from_u128(number)),
            ..Migration::committed(host(source), host(target), progress)
        }
    }

    fn view(migrations: Vec<Migration>) -> View {
        let mut view = View::default();
        let records = migrations.into_iter().map(|m| (m.id, Arc::new(m)));
        view.migrations = Arc::new(records.collect());
        view
    }

    fn between(view: &View, source: u128, target: u128) -> Figures {
        figures(
            view,
            host(source),
            host(target),
            &MigrationPolicy::default(),
        )
    }

    #[test]
    fn without_migrations_the_usual_is_assumed_and_the_source_is_told_nothing() {
        let figures = between(&View::default(), 1, 2);
        assert_eq!(figures, Figures::assumed());
        assert_eq!(figures.learned_fixed_us(), None);
    }

    #[test]
    fn what_the_same_hosts_showed_counts_once_it_is_enough() {
        let far = |n| moved(n, (1, 2), 50 << 20, 40_000);
        let near = |n| moved(n, (1, 3), 900 << 20, 4_000);
        let few = view(vec![near(1), near(2), near(3), far(4), far(5)]);
        let figures = between(&few, 1, 2);
        assert_eq!(
            (figures.bytes_per_s_from, figures.fixed_from),
            (Basis::Pool, Basis::Pool)
        );
        assert_eq!((figures.bytes_per_s, figures.fixed_us), (900 << 20, 4_000));

        let enough = view(vec![near(1), near(2), near(3), far(4), far(5), far(6)]);
        let figures = between(&enough, 1, 2);
        assert_eq!(
            (figures.bytes_per_s_from, figures.fixed_from),
            (Basis::Lanes, Basis::Pair)
        );
        assert_eq!((figures.bytes_per_s, figures.fixed_us), (50 << 20, 40_000));
        assert_eq!(figures.learned_fixed_us(), Some(40_000));
        // The way back was never taken.
        assert_eq!(between(&enough, 2, 1).fixed_from, Basis::Pool);
    }

    #[test]
    fn migrations_that_say_nothing_are_left_out() {
        let mut held_back = moved(1, (1, 2), 10 << 20, 9_000);
        held_back.policy.max_bandwidth_bytes_per_s = Some(10 << 20);
        held_back.policy.verify = Verify::WholeMemory;
        let mut void = moved(2, (1, 2), 70 << 20, 8_000);
        void.state = MigrationState::Void { reason: "x".into() };
        let figures = between(&view(vec![held_back, void]), 1, 2);
        assert_eq!(figures.bytes_per_s, 70 << 20);
        assert_eq!(figures.fixed_from, Basis::Assumed);
    }

    #[test]
    fn a_migration_that_shared_the_link_does_not_show_what_it_carries() {
        let alone = |n, rate| moved(n, (1, 2), rate, 4_000);
        let mut shared = alone(4, 900 << 20);
        shared.held_back = HeldBack::Yes;
        let from_1 = |migration: &Migration| migration.source == host(1);
        let few = view(vec![alone(1, 80 << 20), alone(2, 90 << 20), shared.clone()]);
        assert_eq!(link_capacity(&few, from_1), None);
        let enough = view(vec![
            alone(1, 80 << 20),
            alone(2, 90 << 20),
            alone(3, 70 << 20),
            shared,
        ]);
        assert_eq!(link_capacity(&enough, from_1), Some(90 << 20));
    }

    #[test]
    fn a_cost_beyond_reason_is_not_handed_on() {
        let slow = |n| moved(n, (1, 2), 1, 9_000_000);
        let once = between(&view(vec![slow(1), slow(2)]), 1, 2);
        assert_eq!(once.fixed_from, Basis::Assumed);
        let figures = between(&view(vec![slow(1), slow(2), slow(3)]), 1, 2);
        assert_eq!(figures.fixed_us, 150_000, "half the limit of 300 ms");
    }

    #[test]
    fn an_idle_guest_is_sent_once_and_a_dirtying_one_more() {
        let figures = Figures::assumed();
        let idle = live(Mib(1024).bytes(), 0, &figures, 300);
        assert_eq!((idle.mib, idle.blackout_ms), (Mib(1024), 10));
        let dirtying = live(Mib(1024).bytes(), 50 << 20, &figures, 300);
        assert!(dirtying.mib > idle.mib && dirtying.seconds > idle.seconds);
        assert!(dirtying.blackout_ms <= 310);
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_wire_is_predicted_to_stand_still_for_long() {
        let hopeless = live(Mib(1024).bytes(), 200 << 20, &Figures::assumed(), 300);
        assert!(hopeless.blackout_ms > 5_000);
    }
}
