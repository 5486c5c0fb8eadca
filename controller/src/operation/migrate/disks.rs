//! Disks that move along: blank ones are made at the target before it is prepared, and what is left of them in one of
//! the two pools is erased when the migration has been decided.
//!
//! ```text
//! held by the operation ─▶ erased and made blank at the target ─▶ written down as made ─▶ the target is prepared …
//!                                                                                              │
//!                            committed: the records name the new pool, the old files are erased ─┤
//!                            void: the records stay, the target's files are erased ──────────────┘
//! ```
//! Which of the two it is the migration's record says alone; the erasures are operations of their own, written in the
//! transaction that ends this one, because a host that left something may be away for long.

use super::begin::way_in_words;
use super::drive::Why;
use crate::ledger::Draft;
use crate::model::{
    BlankDisk, DisksOnMove, Migration, MigrationState, MovingDisk, Operation, Subject, Vm, Work,
};
use crate::operation::context::{Context, Sent};
use crate::operation::fresh;
use crate::operation::storage::{Outcome, follow, is_another_copy, unwatched};
use crate::plan::along::{along, destinations};
use crate::plan::picture;
use crate::view::View;
use godwit_wire::id::HostId;
use godwit_wire::problem::Problem;
use godwit_wire::storage::{CreateDisk, DiskOrigin, DiskReport};

/// Whether the target has what it needs of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blanks {
    /// All are there.
    Made,
    /// A reason to stop came up.
    Interrupted,
}

/// The disks that move along to `target`, and where they go. Empty also when they cannot, which placement has said.
pub(super) fn chosen(view: &View, vm: &Vm, target: HostId, disks: &DisksOnMove) -> Vec<MovingDisk> {
    let (hosts, along) = (picture::hosts(view), along(view, vm, disks));
    let (Some(host), Some(along)) = (hosts.get(&target), along) else {
        return Vec::new();
    };
    let found = destinations(&host.pools, &along).unwrap_or_default();
    let moving = found.iter().map(|to| MovingDisk {
        disk: to.disk.disk,
        name: to.disk.name.clone(),
        from: to.disk.pool,
        to: to.pool,
        bytes: to.disk.bytes,
        format: to.disk.format,
        base: to.disk.base,
        made_for: view.disks.get(&to.disk.disk).and_then(|disk| disk.made_for),
        blank: BlankDisk::Wanted,
    });
    moving.collect()
}

/// Nothing else may change the disks from now on, and the target is about to be told of them.
pub(super) fn hold(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    migration: &Migration,
) {
    for moving in &migration.disks {
        if let Some(mut disk) = draft.disk(moving.disk) {
            disk.operation = Some(operation.id);
            draft.put_disk(disk);
        }
    }
    let disks: Vec<String> = migration
        .disks
        .iter()
        .map(|disk| {
            let pool = view.pool_name_at(migration.target, disk.to);
            format!("{} of {} in {pool}", disk.name, disk.bytes)
        })
        .collect();
    let detail = format!("{}: {}", migration.target_name, disks.join(", "));
    operation.begin_step("make room for disks", detail, draft.now());
}

/// Makes the blank disks, once. Repeating it is safe until they are written down as made: before that the target is
/// not told to receive.
pub(super) async fn make_blanks(
    context: &Context<'_>,
    migration: &Migration,
    over: impl Fn(&View) -> bool,
) -> Result<Blanks, Why> {
    let wanted = |disk: &&MovingDisk| disk.blank == BlankDisk::Wanted;
    let mut made = false;
    for disk in migration.disks.iter().filter(wanted) {
        if make_blank(context, migration, disk, &over).await? == Blanks::Interrupted {
            return Ok(Blanks::Interrupted);
        }
        made = true;
    }
    if made {
        note_made(context, migration).await?;
    }
    Ok(Blanks::Made)
}

async fn make_blank(
    context: &Context<'_>,
    migration: &Migration,
    disk: &MovingDisk,
    over: impl Fn(&View) -> bool,
) -> Result<Blanks, Why> {
    let (driver, pool, id) = (&context.core.driver, disk.to, disk.disk);
    let failed = |what: &str| {
        let (target, name) = (&migration.target_name, &disk.name);
        Why::failed(format!("{target} cannot make room for {name}: {what}"))
    };
    let found = context.send(migration.target, |to| driver.disk(to, pool, id), &over);
    match found.await {
        Sent::Refused(Problem { status: 404, .. }) => {}
        Sent::Refused(problem) => return Err(failed(&problem.detail)),
        Sent::HostLost => return Err(failed("it is silent")),
        Sent::Interrupted => return Ok(Blanks::Interrupted),
        // Made before, and nobody was told to write to it since.
        Sent::Answer(report) if report.made_for == Some(migration.id) => {}
        // What an earlier migration has left there is not blank.
        Sent::Answer(report) => {
            let delete = |to| driver.erase_copy(to, pool, id, report.made_for);
            match context.send(migration.target, delete, &over).await {
                Sent::Answer(()) => {}
                // What is there instead is looked at when it is to be made.
                Sent::Refused(problem) if is_another_copy(&problem) => {}
                Sent::Refused(problem) => return Err(failed(&problem.detail)),
                Sent::HostLost => return Err(failed("it is silent")),
                Sent::Interrupted => return Ok(Blanks::Interrupted),
            }
        }
    }
    let command = CreateDisk {
        bytes: Some(disk.bytes),
        format: disk.format,
        from: DiskOrigin::Blank,
        made_for: Some(migration.id),
    };
    let making = follow(
        context,
        migration.target,
        |to| driver.create_disk(to, pool, id, &command),
        |to| driver.disk(to, pool, id),
        |report: &DiskReport| report.state.clone(),
        unwatched,
    );
    match making.await {
        Outcome::Ready(report)
            if report.made_for != Some(migration.id)
                || report.virtual_bytes != disk.bytes
                || report.base.is_some() =>
        {
            Err(failed("it has another disk there"))
        }
        Outcome::Ready(_) => Ok(Blanks::Made),
        Outcome::Failed(problem) => Err(failed(&problem.detail)),
        Outcome::Lost => Err(failed("it is silent")),
        Outcome::CalledOff => Ok(Blanks::Interrupted),
    }
}

async fn note_made(context: &Context<'_>, migration: &Migration) -> Result<(), Why> {
    let noted = context.change(|view, draft, operation| {
        let record = view.migrations.get(&migration.id);
        // Decided meanwhile, it is not touched any more.
        if let Some(record) = record.filter(|record| record.is_open()) {
            let mut record = record.as_ref().clone();
            for disk in &mut record.disks {
                disk.blank = BlankDisk::Made;
            }
            draft.put_migration(record);
            let detail = way_in_words(migration);
            operation.begin_step("prepare the target", detail, draft.now());
        }
    });
    noted.await.map_err(|_| Why::failed("the store failed"))
}

/// The end of a migration, whichever: its disks are free again, and what is left of them where they are not is erased.
pub(super) fn let_go_of_disks(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &Operation,
    migration: &Migration,
) {
    for moving in &migration.disks {
        let (pool, host, made_for) = match migration.state {
            MigrationState::Committed { .. } => (moving.from, migration.source, moving.made_for),
            MigrationState::Void { .. } => (moving.to, migration.target, Some(migration.id)),
            // Both may still be needed.
            MigrationState::Open => return,
        };
        let Some(mut disk) = draft.disk(moving.disk) else {
            continue;
        };
        if disk.operation == Some(operation.id) {
            disk.operation = None;
        }
        // Only what the record does not name: never the disk itself.
        if disk.pool != pool {
            let committed = matches!(migration.state, MigrationState::Committed { .. });
            let work = Work::EraseCopy {
                disk: disk.id,
                pool,
                host,
                made_for,
                once_used_by: committed.then_some(migration.vm),
                base: moving.base.filter(|_| committed),
            };
            let subject = Subject::disk(disk.id, &disk.name);
            let parent = Some(operation.id);
            let erasure = fresh(work, subject, &operation.actor, parent, draft.now());
            draft.put_operation(erasure);
        } else {
            tracing::error!(
                migration = %migration.id, disk = disk.name, pool = view.pool_name(pool),
                "a disk is where its migration says it is not; nothing is erased"
            );
        }
        draft.put_disk(disk);
    }
}
