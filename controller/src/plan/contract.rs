//! What a live migration will do, said before it begins: how long it takes, how much goes over the wire and for how
//! long the guest stands still, or why it will not get below the downtime limit and what would help.
//!
//! A migration is followed round by round under the same rules by which its source decides
//! ([`convergence`](godwit_wire::migration::convergence)); only the measurements are foreseen: what a round takes from
//! the rate of the link, and what the guest dirties meanwhile from a sample of it.

use crate::model::{PostCopyPermission, Vm};
use crate::plan::dirtying::Dirtying;
use crate::plan::estimate::{CONNECTING, Figures, figures};
use crate::plan::fairness::share_of;
use crate::plan::forecast::{Because, Course, Forecast, Remedy, Verdict};
use crate::plan::traffic::Flow;
use crate::view::View;
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::convergence::{Decision, DiskOutcome, RoundOutcome};
use godwit_wire::migration::{MigrationPolicy, PostCopy, Verify};
use godwit_wire::unit::{Bytes, Mib};
use std::time::Duration;

/// What each round takes beside its pages.
const ROUND_COST: Duration = Duration::from_millis(3);
/// Rounds followed; a migration that needs more is not worth waiting for.
const MAX_ROUNDS: u32 = 300;
/// Longest downtime limit that is proposed.
const MAX_PROPOSED_LIMIT_MS: u64 = 60_000;
/// A proposed limit is so much above what would just do, because no forecast is exact.
const LIMIT_MARGIN: f64 = 1.1;
/// Throttles that are proposed.
const THROTTLES_PERCENT: [u8; 7] = [25, 50, 75, 80, 90, 95, 99];
/// How much faster a link that is proposed may be.
const FASTER: [u64; 6] = [2, 3, 4, 8, 16, 32];
/// How much longer a deadline that is proposed may be.
const LATER: [u64; 7] = [2, 3, 4, 8, 16, 32, 64];

/// All that a forecast is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Circumstances {
    /// Memory the guest has touched.
    pub resident: Bytes,
    /// Size of the disks that move along. No more than that is sent of them; what they have never held costs nothing.
    pub disks: Bytes,
    /// How it dirties memory.
    pub dirtying: Dirtying,
    /// What earlier migrations showed of the link and the hosts.
    pub figures: Figures,
    /// Whether post-copy may be proposed.
    pub post_copy: PostCopyPermission,
}

/// Foresees the migration of a VM under `policy`.
pub fn foresee(circumstances: &Circumstances, policy: &MigrationPolicy) -> Forecast {
    let (end, course) = follow(circumstances, policy);
    let verdict = match end {
        End::Paused => Verdict::Converges(course),
        End::WentAhead => Verdict::GoesAhead(course),
        End::GivenUp | End::OutOfTime => Verdict::WillNot {
            course,
            because: because(circumstances, policy, end, course),
            options: options(circumstances, policy),
        },
    };
    Forecast {
        verdict,
        limit_ms: policy.downtime_limit_ms,
        resident: circumstances.resident,
        disks: circumstances.disks,
        dirtying: circumstances.dirtying.clone(),
        figures: circumstances.figures,
    }
}

/// Foresees the migration of `vm` to `target` with so much of disks; `dirtying` is a fresh sample, if there is one.
pub fn foresee_move(
    view: &View,
    vm: &Vm,
    target: HostId,
    policy: &MigrationPolicy,
    disks: Bytes,
    dirtying: Option<Dirtying>,
) -> Forecast {
    let usage = view.vm_usage(vm);
    let whole = vm.spec.memory_mib.bytes();
    let resident = match usage.rss_bytes {
        Bytes(0) => whole,
        resident => resident.min(whole),
    };
    let source = vm.owner.unwrap_or(target);
    let newcomer = Flow {
        migration: MigrationId(uuid::Uuid::nil()),
        source,
        target,
        limit: policy.max_bandwidth_bytes_per_s,
        bytes_per_s: None,
    };
    // What hosts and links leave it beside the others is a limit as good as its own.
    let policy = &MigrationPolicy {
        max_bandwidth_bytes_per_s: share_of(view, newcomer, vm.migration),
        ..policy.clone()
    };
    let circumstances = Circumstances {
        resident,
        disks,
        dirtying: dirtying.unwrap_or_else(|| Dirtying::last_known(usage.dirty_bytes_per_s)),
        figures: figures(view, source, target, policy),
        post_copy: vm.post_copy,
    };
    foresee(&circumstances, policy)
}

/// How a migration ends before its last pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Paused,
    WentAhead,
    GivenUp,
    OutOfTime,
}

/// Follows a migration up to its end.
fn follow(circumstances: &Circumstances, policy: &MigrationPolicy) -> (End, Course) {
    let Circumstances {
        resident,
        disks,
        dirtying,
        figures,
        ..
    } = circumstances;
    let limit = policy.max_bandwidth_bytes_per_s.unwrap_or(u64::MAX);
    let bytes_per_s = figures.bytes_per_s.min(limit).max(1);
    let deadline = policy.deadline_s.map(Duration::from_secs);
    // Disks and memory go over the same link: whatever their order, both together take this long.
    let mut elapsed = CONNECTING + time_for(disks.0, bytes_per_s);
    let mut sent = 0u64;
    let (mut rest, mut throttle_percent) = (resident.0, 0);
    let post_copy = match policy.verify {
        Verify::Frames => policy.post_copy,
        Verify::WholeMemory => PostCopy::Forbidden,
    };
    for round in 1.. {
        let took = ROUND_COST + time_for(rest, bytes_per_s);
        elapsed += took;
        sent = sent.saturating_add(rest);
        let runs = took.mul_f64(f64::from(100 - throttle_percent.min(99)) / 100.0);
        let previous_rest_bytes = rest;
        rest = dirtying.after(runs).0.min(resident.0);
        let outcome = RoundOutcome {
            round,
            elapsed,
            took,
            rest_bytes: rest,
            previous_rest_bytes,
            disks: DiskOutcome::default(),
            bytes_per_s,
            fixed_cost: Duration::from_micros(figures.fixed_us),
            throttle_percent,
            post_copy,
        };
        let blackout = outcome.predicted_blackout();
        let course = |last_pass: Duration, sent_bytes: u64, blackout: Duration| Course {
            seconds: (elapsed + last_pass).as_secs_f64(),
            mib: Mib(sent_bytes.div_ceil(1 << 20)),
            blackout_ms: whole_ms(blackout),
            throttle_percent,
            rounds: round,
            rest: Bytes(rest),
        };
        // A round that is under way when the time is over is broken off.
        if deadline.is_some_and(|deadline| elapsed > deadline) {
            return (End::OutOfTime, course(Duration::ZERO, sent, blackout));
        }
        let whole = sent.saturating_add(rest);
        match outcome.decide(policy) {
            Decision::Pause => return (End::Paused, course(blackout, whole, blackout)),
            Decision::GoAhead => {
                let pass = time_for(rest, bytes_per_s);
                return (End::WentAhead, course(pass, whole, outcome.fixed_cost));
            }
            Decision::OutOfTime => {
                return (End::OutOfTime, course(Duration::ZERO, sent, blackout));
            }
            Decision::GiveUp => return (End::GivenUp, course(Duration::ZERO, sent, blackout)),
            _ if round >= MAX_ROUNDS => {
                return (End::GivenUp, course(Duration::ZERO, sent, blackout));
            }
            Decision::Throttle { percent } => throttle_percent = percent,
            Decision::AnotherRound | Decision::SlowDisks { .. } => {}
        }
    }
    unreachable!("the rounds are limited")
}

fn time_for(bytes: u64, bytes_per_s: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bytes_per_s.max(1) as f64)
}

fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX)
}

fn arrives(circumstances: &Circumstances, policy: &MigrationPolicy) -> Option<Course> {
    match follow(circumstances, policy) {
        (End::Paused | End::WentAhead, course) => Some(course),
        _ => None,
    }
}

fn because(
    circumstances: &Circumstances,
    policy: &MigrationPolicy,
    end: End,
    course: Course,
) -> Because {
    let limit_ms = policy.downtime_limit_ms;
    let fixed_ms = whole_ms(Duration::from_micros(circumstances.figures.fixed_us));
    if fixed_ms >= limit_ms {
        return Because::FixedCost { fixed_ms, limit_ms };
    }
    if let (End::OutOfTime, Some(deadline_s)) = (end, policy.deadline_s)
        && let Some(needed) = arrives(circumstances, &without_deadline(policy))
    {
        return Because::Deadline {
            deadline_s,
            needed_s: needed.seconds.ceil() as u64,
        };
    }
    if let Some(needed) = arrives(circumstances, &with_rounds(policy)) {
        return Because::Rounds {
            max_rounds: policy.max_rounds,
            needed: needed.rounds,
        };
    }
    let limit = policy.max_bandwidth_bytes_per_s.unwrap_or(u64::MAX);
    Because::DirtiesTooFast {
        dirty_bytes_per_s: circumstances.dirtying.bytes_per_s,
        bytes_per_s: circumstances.figures.bytes_per_s.min(limit),
        rest: course.rest,
        blackout_ms: course.blackout_ms,
        limit_ms,
        throttle_percent: course.throttle_percent,
    }
}

fn without_deadline(policy: &MigrationPolicy) -> MigrationPolicy {
    MigrationPolicy {
        deadline_s: None,
        ..policy.clone()
    }
}

fn with_rounds(policy: &MigrationPolicy) -> MigrationPolicy {
    MigrationPolicy {
        max_rounds: policy.max_rounds.max(MAX_ROUNDS),
        ..policy.clone()
    }
}

/// Each of them alone makes the migration arrive, by the same reckoning.
fn options(circumstances: &Circumstances, policy: &MigrationPolicy) -> Vec<Remedy> {
    let helps = |policy: &MigrationPolicy| arrives(circumstances, policy).is_some();
    let mut options = Vec::new();
    if policy.post_copy == PostCopy::Forbidden
        && circumstances.post_copy == PostCopyPermission::Allowed
        && policy.verify == Verify::Frames
        && helps(&MigrationPolicy {
            post_copy: PostCopy::Allowed,
            ..policy.clone()
        })
    {
        options.push(Remedy::AllowPostCopy);
    }
    options.extend(higher_limit(&helps, policy));
    let throttle = THROTTLES_PERCENT.into_iter().find(|percent| {
        *percent > policy.max_throttle_percent
            && helps(&MigrationPolicy {
                max_throttle_percent: *percent,
                ..policy.clone()
            })
    });
    options.extend(throttle.map(|percent| Remedy::AllowThrottling { percent }));
    options.extend(more_bandwidth(circumstances, policy));
    options.extend(arrives(circumstances, &with_rounds(policy)).map(|course| {
        Remedy::AllowRounds {
            rounds: course.rounds,
        }
    }));
    if let Some(deadline_s) = policy.deadline_s {
        let later = LATER
            .into_iter()
            .map(|times| deadline_s.saturating_mul(times))
            .find(|deadline_s| {
                helps(&MigrationPolicy {
                    deadline_s: Some(*deadline_s),
                    ..policy.clone()
                })
            });
        options.extend(later.map(|deadline_s| Remedy::AllowTime { deadline_s }));
    }
    options
}

/// The lowest limit that does, and a little more.
fn higher_limit(
    helps: &impl Fn(&MigrationPolicy) -> bool,
    policy: &MigrationPolicy,
) -> Option<Remedy> {
    let does = |limit_ms: u64| {
        helps(&MigrationPolicy {
            downtime_limit_ms: limit_ms,
            ..policy.clone()
        })
    };
    let (mut low, mut high) = (policy.downtime_limit_ms, MAX_PROPOSED_LIMIT_MS);
    if low >= high || !does(high) {
        return None;
    }
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if does(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    let roomy = ((high as f64 * LIMIT_MARGIN).ceil() as u64)
        .next_multiple_of(10)
        .min(MAX_PROPOSED_LIMIT_MS);
    let limit_ms = if does(roomy) { roomy } else { high };
    Some(Remedy::RaiseDowntimeLimit { limit_ms })
}

fn more_bandwidth(circumstances: &Circumstances, policy: &MigrationPolicy) -> Option<Remedy> {
    let link = circumstances.figures.bytes_per_s.max(1);
    let allowed = policy.max_bandwidth_bytes_per_s.unwrap_or(u64::MAX);
    let now = link.min(allowed);
    let with = |bytes_per_s: u64| {
        let faster = Circumstances {
            figures: Figures {
                bytes_per_s,
                ..circumstances.figures
            },
            ..circumstances.clone()
        };
        let unlimited = MigrationPolicy {
            max_bandwidth_bytes_per_s: None,
            ..policy.clone()
        };
        arrives(&faster, &unlimited).is_some()
    };
    let bytes_per_s = FASTER
        .into_iter()
        .map(|times| now.saturating_mul(times))
        .find(|bytes_per_s| with(*bytes_per_s))?;
    if allowed < link && bytes_per_s <= link {
        return Some(Remedy::RaiseBandwidthLimit { bytes_per_s });
    }
    Some(Remedy::FasterLink { bytes_per_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::estimate::Basis;
    use godwit_wire::vmm_api::{DirtyRate, DirtyReading};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn figures_of(bytes_per_s: u64, fixed_ms: u64) -> Figures {
        Figures {
            bytes_per_s,
            bytes_per_s_from: Basis::Assumed,
            fixed_us: fixed_ms * 1_000,
            fixed_from: Basis::Assumed,
        }
    }

    /// A guest of 1 GiB over a link of 100 MiB/s.
    fn guest(dirtying: Dirtying) -> Circumstances {
        Circumstances {
            resident: Bytes(1024 * MIB),
            disks: Bytes(0),
            dirtying,
            figures: figures_of(100 * MIB, 12),
            post_copy: PostCopyPermission::Allowed,
        }
    }

    /// Writes `mib_per_s` over a working set, as a sample of one second shows it.
    fn writing(mib_per_s: u64, working_set_mib: u64) -> Dirtying {
        let series = [62_500, 125_000, 250_000, 500_000, 1_000_000].map(|after_us| DirtyReading {
            after_us,
            bytes: (mib_per_s * MIB * after_us / 1_000_000).min(working_set_mib * MIB),
        });
        Dirtying::sampled(DirtyRate {
            bytes_per_s: series[4].bytes,
            series: series.to_vec(),
            vcpus: Vec::new(),
        })
    }

    fn unthrottled() -> MigrationPolicy {
        MigrationPolicy {
            max_throttle_percent: 0,
            ..MigrationPolicy::default()
        }
    }

    fn remedies(forecast: &Forecast) -> Vec<Remedy> {
        match &forecast.verdict {
            Verdict::WillNot { options, .. } => options.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_idle_guest_converges_with_the_fixed_cost_alone() {
        let forecast = foresee(&guest(Dirtying::last_known(0)), &MigrationPolicy::default());
        let Verdict::Converges(course) = forecast.verdict else {
            panic!("{forecast:?}");
        };
        assert_eq!(
            (course.mib, course.blackout_ms, course.throttle_percent),
            (Mib(1024), 12, 0)
        );
        assert!((10.0..12.0).contains(&course.seconds), "{course:?}");
        assert_eq!(course.rounds, 1);
    }

    #[test]
    fn disks_that_move_along_take_time_and_leave_the_blackout_as_it_is() {
        let alone = guest(Dirtying::last_known(0));
        let with_disks = Circumstances {
            disks: Bytes(5_000 * MIB),
            ..alone.clone()
        };
        let policy = MigrationPolicy::default();
        let course = |circumstances: &Circumstances| match foresee(circumstances, &policy).verdict {
            Verdict::Converges(course) => course,
            other => panic!("{other:?}"),
        };
        let (alone, with_disks) = (course(&alone), course(&with_disks));
        assert!((with_disks.seconds - alone.seconds - 50.0).abs() < 0.01);
        assert_eq!(
            (with_disks.mib, with_disks.blackout_ms),
            (alone.mib, alone.blackout_ms)
        );
    }

    #[test]
    fn a_guest_that_writes_the_same_memory_over_and_over_has_a_small_rest_however_fast_it_is() {
        // 400 MiB/s is four times the link, but all of it goes into 10 MiB.
        let forecast = foresee(&guest(writing(400, 10)), &unthrottled());
        let Verdict::Converges(course) = forecast.verdict else {
            panic!("{forecast:?}");
        };
        assert!((100..=125).contains(&course.blackout_ms), "{course:?}");
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_slowed_down_where_that_is_enough() {
        let forecast = foresee(&guest(writing(160, 512)), &MigrationPolicy::default());
        let Verdict::Converges(course) = forecast.verdict else {
            panic!("{forecast:?}");
        };
        assert!(course.throttle_percent >= 50, "{course:?}");
        assert!(course.blackout_ms <= 300);
    }

    #[test]
    fn a_guest_that_will_not_converge_is_told_why_and_what_would_help() {
        let forecast = foresee(&guest(writing(160, 512)), &unthrottled());
        let Verdict::WillNot {
            because, options, ..
        } = &forecast.verdict
        else {
            panic!("{forecast:?}");
        };
        assert!(
            matches!(
                because,
                Because::DirtiesTooFast {
                    dirty_bytes_per_s,
                    limit_ms: 300,
                    throttle_percent: 0,
                    ..
                } if *dirty_bytes_per_s == 160 * MIB
            ),
            "{because:?}"
        );
        assert!(options.contains(&Remedy::AllowPostCopy), "{options:?}");
        assert!(
            options.iter().any(
                |option| matches!(option, Remedy::AllowThrottling { percent } if *percent >= 50)
            ),
            "{options:?}"
        );
        assert!(
            options
                .iter()
                .any(|option| matches!(option, Remedy::FasterLink { .. })),
            "{options:?}"
        );
        let words = forecast.to_string();
        assert!(
            words.starts_with(
                "will not converge under the limit of 300 ms because the guest dirties 160.0 MiB/s"
            ),
            "{words}"
        );
    }

    #[test]
    fn a_guest_that_may_go_ahead_does_so_instead() {
        let policy = MigrationPolicy {
            post_copy: PostCopy::Allowed,
            ..unthrottled()
        };
        let forecast = foresee(&guest(writing(160, 512)), &policy);
        let Verdict::GoesAhead(course) = forecast.verdict else {
            panic!("{forecast:?}");
        };
        assert_eq!(course.blackout_ms, 12);
        assert!(course.rest > Bytes(0));
    }

    #[test]
    fn a_limit_below_the_fixed_cost_cannot_be_kept_and_the_way_out_is_a_higher_one() {
        let policy = MigrationPolicy {
            downtime_limit_ms: 10,
            ..MigrationPolicy::default()
        };
        let forecast = foresee(&guest(Dirtying::last_known(0)), &policy);
        let Verdict::WillNot {
            because, options, ..
        } = &forecast.verdict
        else {
            panic!("{forecast:?}");
        };
        assert_eq!(
            *because,
            Because::FixedCost {
                fixed_ms: 12,
                limit_ms: 10
            }
        );
        assert!(
            options.contains(&Remedy::RaiseDowntimeLimit { limit_ms: 20 }),
            "{options:?}"
        );
        assert!(
            !options
                .iter()
                .any(|option| matches!(option, Remedy::FasterLink { .. })),
            "no link makes the fixed cost smaller: {options:?}"
        );
    }

    #[test]
    fn a_deadline_that_is_too_short_is_named_with_what_it_would_take() {
        let policy = MigrationPolicy {
            deadline_s: Some(5),
            ..MigrationPolicy::default()
        };
        let forecast = foresee(&guest(Dirtying::last_known(0)), &policy);
        let Verdict::WillNot { because, .. } = &forecast.verdict else {
            panic!("{forecast:?}");
        };
        assert!(
            matches!(because, Because::Deadline { deadline_s: 5, needed_s } if *needed_s >= 10),
            "{because:?}"
        );
        assert!(remedies(&forecast).contains(&Remedy::AllowTime { deadline_s: 15 }));
    }

    #[test]
    fn too_few_rounds_are_named_with_how_many_it_takes() {
        let policy = MigrationPolicy {
            max_rounds: 1,
            ..unthrottled()
        };
        let forecast = foresee(&guest(writing(60, 4096)), &policy);
        let Verdict::WillNot { because, .. } = &forecast.verdict else {
            panic!("{forecast:?}");
        };
        let Because::Rounds {
            max_rounds: 1,
            needed,
        } = because
        else {
            panic!("{because:?}");
        };
        assert!(remedies(&forecast).contains(&Remedy::AllowRounds { rounds: *needed }));
    }

    #[test]
    fn a_limit_on_the_bandwidth_that_is_in_the_way_can_be_raised() {
        let policy = MigrationPolicy {
            max_bandwidth_bytes_per_s: Some(30 * MIB),
            ..unthrottled()
        };
        let forecast = foresee(&guest(writing(40, 4096)), &policy);
        assert!(
            remedies(&forecast)
                .iter()
                .any(|option| matches!(option, Remedy::RaiseBandwidthLimit { .. })),
            "{forecast:?}"
        );
    }

    #[test]
    fn post_copy_is_not_proposed_for_a_vm_that_forbids_it() {
        let mut circumstances = guest(writing(160, 512));
        let proposed = remedies(&foresee(&circumstances, &unthrottled()));
        assert!(proposed.contains(&Remedy::AllowPostCopy), "{proposed:?}");
        circumstances.post_copy = PostCopyPermission::Forbidden;
        let proposed = remedies(&foresee(&circumstances, &unthrottled()));
        assert!(!proposed.contains(&Remedy::AllowPostCopy), "{proposed:?}");
    }

    fn any_guest() -> impl Strategy<Value = Circumstances> {
        (1u64..4096, 0u64..2000, 1u64..4096, 1u64..2000, 1u64..200).prop_map(
            |(resident, rate, set, link, fixed_ms)| Circumstances {
                resident: Bytes(resident * MIB),
                disks: Bytes(0),
                dirtying: writing(rate, set),
                figures: figures_of(link * MIB, fixed_ms),
                post_copy: PostCopyPermission::Allowed,
            },
        )
    }

    fn any_policy() -> impl Strategy<Value = MigrationPolicy> {
        (
            1u64..2_000,
            1u32..40,
            0u8..100,
            any::<bool>(),
            prop::option::of(1u64..600),
        )
            .prop_map(
                |(limit, rounds, throttle, ahead, deadline_s)| MigrationPolicy {
                    downtime_limit_ms: limit,
                    max_rounds: rounds,
                    max_throttle_percent: throttle,
                    post_copy: if ahead {
                        PostCopy::Allowed
                    } else {
                        PostCopy::Forbidden
                    },
                    deadline_s,
                    ..MigrationPolicy::default()
                },
            )
    }

    proptest! {
        #[test]
        fn what_converges_stays_below_the_limit_and_within_the_rounds(
            guest in any_guest(), policy in any_policy()
        ) {
            let forecast = foresee(&guest, &policy);
            if let Verdict::Converges(course) = forecast.verdict {
                prop_assert!(course.blackout_ms <= policy.downtime_limit_ms);
                prop_assert!(course.rounds <= policy.max_rounds);
                prop_assert!(course.throttle_percent <= policy.max_throttle_percent);
            }
        }

        #[test]
        fn each_option_alone_makes_it_arrive(guest in any_guest(), policy in any_policy()) {
            let forecast = foresee(&guest, &policy);
            let Verdict::WillNot { options, .. } = forecast.verdict else {
                return Ok(());
            };
            for option in options {
                let (mut guest, mut policy) = (guest.clone(), policy.clone());
                match &option {
                    Remedy::AllowPostCopy => policy.post_copy = PostCopy::Allowed,
                    Remedy::RaiseDowntimeLimit { limit_ms } => policy.downtime_limit_ms = *limit_ms,
                    Remedy::AllowThrottling { percent } => policy.max_throttle_percent = *percent,
                    Remedy::RaiseBandwidthLimit { bytes_per_s } => {
                        policy.max_bandwidth_bytes_per_s = Some(*bytes_per_s);
                    }
                    Remedy::FasterLink { bytes_per_s } => {
                        policy.max_bandwidth_bytes_per_s = None;
                        guest.figures.bytes_per_s = *bytes_per_s;
                    }
                    Remedy::AllowRounds { rounds } => policy.max_rounds = *rounds,
                    Remedy::AllowTime { deadline_s } => policy.deadline_s = Some(*deadline_s),
                }
                prop_assert!(arrives(&guest, &policy).is_some(), "{option}");
            }
        }

        #[test]
        fn a_guest_that_dirties_nothing_converges_unless_the_cost_or_the_time_forbids(
            mut guest in any_guest(), policy in any_policy()
        ) {
            guest.dirtying = Dirtying::last_known(0);
            let forecast = foresee(&guest, &policy);
            if policy.deadline_s.is_none()
                && guest.figures.fixed_us <= policy.downtime_limit_ms * 1_000
            {
                prop_assert!(matches!(forecast.verdict, Verdict::Converges(_)), "{forecast:?}");
            }
        }
    }
}
