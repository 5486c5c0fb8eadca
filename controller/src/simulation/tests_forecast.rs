//! What is said of a migration before it begins.

use super::*;
use crate::model::{ForeseenOutcome, Operation};
use crate::plan::dirtying::DirtySource;
use crate::plan::forecast::{Because, Remedy, Verdict};
use godwit_wire::migration::{MigrationPolicy, PostCopy};
use godwit_wire::vmm_api::{DirtyRate, DirtyReading};

const GIB: u64 = 1 << 30;

fn migrate(vm: VmId, target: u128, policy: MigrationPolicy) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(target)),
        policy,
        disks: Default::default(),
    }
}

/// Never writes the same page twice.
fn restless() -> DirtyRate {
    DirtyRate {
        bytes_per_s: GIB,
        series: vec![
            DirtyReading {
                after_us: 500_000,
                bytes: GIB / 2,
            },
            DirtyReading {
                after_us: 1_000_000,
                bytes: GIB,
            },
        ],
        vcpus: Vec::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_watches_the_guest_and_changes_nothing() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let preview = pool
        .controller
        .foresee(&migrate(vm, 2, MigrationPolicy::default()))
        .await
        .unwrap();
    let forecast = preview.forecast.unwrap();
    assert!(
        matches!(forecast.verdict, Verdict::Converges(_)),
        "{forecast:?}"
    );
    assert_eq!(forecast.dirtying.source, DirtySource::Sampled);
    let view = pool.view();
    assert!(view.migrations.is_empty() && view.vms[&vm].migration.is_none());
    let kinds = |operation: &Operation| operation.work.kind() != "migrate";
    assert!(view.operations.values().all(|operation| kinds(operation)));
    assert_eq!((pool.owner(vm), pool.runs_on(vm)), (Some(1), vec![1]));
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_of_a_restless_guest_says_why_it_will_not_converge_and_what_would_help() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.host(1).dirty_like(restless());
    let policy = MigrationPolicy {
        max_throttle_percent: 0,
        ..MigrationPolicy::default()
    };
    let preview = pool
        .controller
        .foresee(&migrate(vm, 2, policy.clone()))
        .await
        .unwrap();
    let Some(Verdict::WillNot {
        because, options, ..
    }) = preview.forecast.map(|forecast| forecast.verdict)
    else {
        panic!("a guest that outruns the link must not be said to converge");
    };
    assert!(
        matches!(
            because,
            Because::DirtiesTooFast {
                dirty_bytes_per_s: GIB,
                ..
            }
        ),
        "{because:?}"
    );
    assert!(options.contains(&Remedy::AllowPostCopy), "{options:?}");

    let ahead = MigrationPolicy {
        post_copy: PostCopy::Allowed,
        ..policy
    };
    let preview = pool
        .controller
        .foresee(&migrate(vm, 2, ahead))
        .await
        .unwrap();
    let verdict = preview.forecast.unwrap().verdict;
    assert!(matches!(verdict, Verdict::GoesAhead(_)), "{verdict:?}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_be_watched_is_judged_by_what_is_known() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.host(1).cut();
    let intent = migrate(vm, 2, MigrationPolicy::default());
    let preview = pool.controller.foresee(&intent).await.unwrap();
    assert_eq!(
        preview.forecast.unwrap().dirtying.source,
        DirtySource::LastKnown
    );
    pool.host(1).mend();
}

#[tokio::test(start_paused = true)]
async fn what_was_foreseen_is_kept_with_the_migration_and_what_it_showed_is_told_to_the_next() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let policy = MigrationPolicy::default();
    let moved = pool.submit(migrate(vm, 2, policy.clone())).await.unwrap();
    pool.succeeds(moved).await;
    let view = pool.view();
    let first = view.migrations.values().next().unwrap();
    let foreseen = first.foreseen.unwrap();
    assert_eq!(
        (foreseen.outcome, foreseen.blackout_ms),
        (ForeseenOutcome::Converges, 10)
    );
    assert_eq!(pool.host(1).told_fixed_cost_us(), [None]);

    for host in [1, 2, 1] {
        let moved = pool
            .submit(migrate(vm, host, policy.clone()))
            .await
            .unwrap();
        pool.succeeds(moved).await;
    }
    // Three tell: all but the 5 ms of the last pass.
    assert_eq!(pool.host(1).told_fixed_cost_us(), [None, None]);
    assert_eq!(pool.host(2).told_fixed_cost_us(), [None, Some(35_000)]);
    let view = pool.view();
    let latest = view.migrations.values().next_back().unwrap();
    assert_eq!(latest.foreseen.unwrap().blackout_ms, 35);
    pool.running(vm).await;
    pool.check();
}
