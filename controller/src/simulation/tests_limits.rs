//! What migrations may do, and what hosts and links may be used for.

use super::*;
use crate::intent::VmChange;
use crate::model::PostCopyPermission;
use godwit_wire::migration::{MigrationPolicy, PostCopy};

fn migrate(vm: VmId, target: u128, post_copy: PostCopy) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(target)),
        policy: MigrationPolicy {
            post_copy,
            ..MigrationPolicy::default()
        },
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
