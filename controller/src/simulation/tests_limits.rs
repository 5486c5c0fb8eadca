//! What migrations may do, and what hosts and links may be used for.

use super::*;
use crate::intent::{BandwidthLimit, HostChange, VmChange};
use crate::model::{DisksOnMove, HeldBack, PostCopyPermission};
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, PostCopy};

fn migrate(vm: VmId, target: u128, post_copy: PostCopy) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(target)),
        policy: MigrationPolicy {
            post_copy,
            ..MigrationPolicy::default()
        },
        disks: DisksOnMove::SharedOnly,
    }
}

#[tokio::test(start_paused = true)]
async fn a_move_that_asks_for_post_copy_is_refused_where_the_vm_forbids_it() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("db-1", 1).await;
    let forbid = VmChange {
        post_copy: Some(PostCopyPermission::Forbidden),
        ..VmChange::default()
    };
    pool.submit(Intent::ChangeVm { vm, change: forbid })
        .await
        .expect("a running VM can be told so");
    let problem = pool
        .submit(migrate(vm, 2, PostCopy::Allowed))
        .await
        .expect_err("it is forbidden");
    let field = &problem.fields[0];
    assert_eq!(field.field, "policy.allow_postcopy");
    assert!(field.remedy.contains("godwit vm set db-1"), "{field:?}");
    let moved = pool
        .submit(migrate(vm, 2, PostCopy::Forbidden))
        .await
        .expect("any other move is taken");
    pool.succeeds(moved).await;
    assert_eq!(pool.owner(vm), Some(2));
    pool.check();
}

const MIB: u64 = 1 << 20;

fn limit_host(host: u128, limit: BandwidthLimit) -> Intent {
    Intent::ChangeHost {
        host: Pool::id(host),
        change: HostChange {
            migration_bandwidth: Some(limit),
            ..HostChange::default()
        },
    }
}

fn plain(vm: VmId, target: u128) -> Intent {
    migrate(vm, target, PostCopy::Forbidden)
}

/// What the sources on a host were told last, by VM.
fn told(pool: &Pool, host: u128) -> BTreeMap<VmId, Option<u64>> {
    pool.host(host).told_bytes_per_s().into_iter().collect()
}

#[tokio::test(start_paused = true)]
async fn migrations_share_what_their_host_may_send_and_one_that_is_alone_has_all_of_it() {
    let pool = Pool::of(3).await;
    let (first, second) = (pool.vm("a", 1).await, pool.vm("b", 1).await);
    pool.submit(limit_host(1, BandwidthLimit::BytesPerS(100 * MIB)))
        .await
        .unwrap();
    let one = pool.submit(plain(first, 2)).await.unwrap();
    pool.wait("it is told to send", |_| {
        told(&pool, 1).get(&first) == Some(&Some(100 * MIB))
    })
    .await;
    pool.wait("it is half way", |view| {
        let sent = |m| view.migration_figures(m).progress.transferred_bytes.0;
        view.moving().any(|m| sent(m) >= 256 * MIB)
    })
    .await;
    let other = pool.submit(plain(second, 3)).await.unwrap();
    pool.wait("both have half", |_| {
        let told = told(&pool, 1);
        [first, second]
            .iter()
            .all(|vm| told.get(vm) == Some(&Some(50 * MIB)))
    })
    .await;
    pool.succeeds(one).await;
    pool.succeeds(other).await;
    let last = told(&pool, 1)[&second];
    assert_eq!(last, Some(100 * MIB), "the first left it its half");
    let view = pool.view();
    let held_back = |m: &Arc<crate::model::Migration>| m.held_back == HeldBack::Yes;
    assert!(view.migrations.values().all(held_back));
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn a_source_that_falls_silent_keeps_its_share_because_it_may_still_send() {
    let pool = Pool::of(3).await;
    let (silent, other) = (pool.vm("a", 1).await, pool.vm("b", 2).await);
    pool.submit(limit_host(3, BandwidthLimit::BytesPerS(100 * MIB)))
        .await
        .unwrap();
    let _ = pool.submit(plain(silent, 3)).await.unwrap();
    pool.wait("it sends", |view| {
        let phase = |m| view.migration_figures(m).phase;
        view.moving()
            .any(|m| phase(m) == Some(MigrationPhase::PreCopy))
    })
    .await;
    pool.host(1).cut();
    pool.wait("its host is silent", |view| {
        view.liveness(Pool::id(1)).is_silent()
    })
    .await;
    let _ = pool.submit(plain(other, 3)).await.unwrap();
    pool.wait("the other is told to send", |_| {
        !pool.host(2).told_bytes_per_s().is_empty()
    })
    .await;
    let first = pool.host(2).told_bytes_per_s()[0];
    assert_eq!(first, (other, Some(50 * MIB)));
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_lifted_frees_the_migrations_that_run() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.submit(limit_host(2, BandwidthLimit::BytesPerS(10 * MIB)))
        .await
        .unwrap();
    let moved = pool.submit(plain(vm, 2)).await.unwrap();
    pool.wait("what the target may receive counts", |_| {
        told(&pool, 1).get(&vm) == Some(&Some(10 * MIB))
    })
    .await;
    pool.submit(limit_host(2, BandwidthLimit::None))
        .await
        .unwrap();
    pool.wait("nothing limits it", |_| {
        told(&pool, 1).get(&vm) == Some(&None)
    })
    .await;
    pool.succeeds(moved).await;
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_would_never_let_a_migration_end_is_refused_with_its_field() {
    let pool = Pool::of(2).await;
    let problem = pool
        .submit(limit_host(1, BandwidthLimit::BytesPerS(1_000)))
        .await
        .expect_err("too little");
    assert_eq!(problem.fields[0].field, "migration_bandwidth_bytes_per_s");
    let own_link = Intent::ChangeHost {
        host: Pool::id(1),
        change: HostChange {
            link_bandwidth: BTreeMap::from([(Pool::id(1), BandwidthLimit::BytesPerS(10 * MIB))]),
            ..HostChange::default()
        },
    };
    let problem = pool.submit(own_link).await.expect_err("no link");
    assert_eq!(problem.fields[0].field, "link_bandwidth");
}

#[tokio::test(start_paused = true)]
async fn a_link_has_one_limit_whichever_of_its_hosts_it_is_set_at() {
    let pool = Pool::of(2).await;
    let link = |host, other, limit| Intent::ChangeHost {
        host: Pool::id(host),
        change: HostChange {
            link_bandwidth: BTreeMap::from([(Pool::id(other), limit)]),
            ..HostChange::default()
        },
    };
    let (one, two) = (Pool::id(1), Pool::id(2));
    pool.submit(link(2, 1, BandwidthLimit::BytesPerS(10 * MIB)))
        .await
        .unwrap();
    assert_eq!(pool.view().link_bandwidth(one, two), Some(10 * MIB));
    assert_eq!(pool.view().links_of(two)[&one], 10 * MIB);
    pool.submit(link(1, 2, BandwidthLimit::None)).await.unwrap();
    assert_eq!(pool.view().link_bandwidth(two, one), None);
}

/// A pool in which three migrations have shown that the link from host 1 to host 2 carries 100 MiB/s, and four more VMs
/// on host 1.
async fn measured() -> (Pool, Vec<VmId>) {
    let pool = Pool::of(2).await;
    pool.host(1).sends_at(100 * MIB);
    for number in 0..3 {
        let vm = pool.vm(&format!("gone-{number}"), 1).await;
        let moved = pool.submit(plain(vm, 2)).await.unwrap();
        pool.succeeds(moved).await;
    }
    let mut vms = Vec::new();
    for number in 0..4 {
        vms.push(pool.vm(&format!("a-{number}"), 1).await);
    }
    (pool, vms)
}

#[tokio::test(start_paused = true)]
async fn further_migrations_begin_as_long_as_those_that_run_leave_the_link_under_used() {
    let (pool, vms) = measured().await;
    pool.host(1).sends_at(10 * MIB);
    let mut accepted = Vec::new();
    for vm in vms {
        accepted.push(pool.submit(plain(vm, 2)).await.unwrap());
    }
    pool.wait("all four run at the same time", |view| {
        view.open_migrations().count() == 4
    })
    .await;
    for moved in accepted {
        pool.succeeds(moved).await;
    }
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn a_migration_waits_for_a_link_that_is_used_up_and_says_so() {
    let (pool, vms) = measured().await;
    let mut accepted = Vec::new();
    for vm in &vms[..3] {
        accepted.push(pool.submit(plain(*vm, 2)).await.unwrap());
    }
    let third = accepted[2].operation.unwrap();
    pool.wait("the third says what it waits for", |view| {
        let step = view.operations[&third].steps.last();
        step.is_some_and(|step| {
            let (begins, ends) = ("host-1 already sends at ", " of 838.9 Mbit/s");
            step.name == "wait" && step.detail.starts_with(begins) && step.detail.ends_with(ends)
        })
    })
    .await;
    for moved in accepted {
        pool.succeeds(moved).await;
    }
    pool.check();
}
