//! Making, growing and deleting what is in the storage pools.
//!
//! ```text
//! wait for a host with the pool ─▶ tell it ─▶ ask until it is done ─▶ ready
//!            ▲                        │ refused, failed, called off: written down, erased, record dropped
//!            └──── host lost ─────────┘
//! ```
//! Every command may be repeated: a resumed executor tells the host again and gets the present state.

mod copy;
mod disk;
mod image;

pub(super) use copy::is_another_copy;
pub(crate) use disk::begin_deletion;
pub(super) use disk::{disk_made, disk_reason, erase_disk, make_disk, release_origin};

use super::Ended;
use super::context::{Conclusion, Context, FIRST_PAUSE, LAST_PAUSE, Sent, never};
use crate::drive::host_driver::HostAddress;
use crate::ledger::Draft;
use crate::model::{Operation, Subject, Work};
use crate::view::View;
use godwit_channel::CallError;
use godwit_wire::id::{HostId, OperationId, PoolId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::WorkState;
use std::future::Future;

/// Times a host is told anew because it had forgotten what it was doing.
const MAX_ATTEMPTS: u32 = 3;
/// Times a deletion is tried that the host refuses because something still has the file open.
const MAX_ERASURES: u32 = 5;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match carry_out(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

async fn carry_out(context: &Context<'_>) -> Result<(), Ended> {
    match context.operation()?.work {
        Work::CreateImage { image, wanted } => image::create_image(context, image, wanted).await,
        Work::DeleteImage { image } => image::delete_image(context, image).await,
        Work::CreateDisk { disk } => disk::create_disk(context, disk).await,
        Work::GrowDisk { disk, bytes } => disk::grow_disk(context, disk, bytes).await,
        Work::DeleteDisk { disk } => disk::delete_disk(context, disk).await,
        Work::EraseCopy {
            disk,
            pool,
            host,
            made_for,
            once_used_by,
            ..
        } => {
            let left = copy::Left {
                disk,
                pool,
                host,
                made_for,
                once_used_by,
            };
            copy::erase_copy(context, &left).await
        }
        _ => Err(Ended::GaveUp),
    }
}

fn called_off(view: &View, id: OperationId) -> bool {
    let operation = view.operations.get(&id);
    operation.is_some_and(|operation| operation.cancel.is_some())
}

/// Waits for a host that can work on the pool; `None` when the operation is called off first.
async fn able_host(
    context: &Context<'_>,
    pool: PoolId,
    wanted: Option<HostId>,
) -> Result<Option<HostId>, Ended> {
    let able = |view: &View| {
        let pool = view.pool(pool)?;
        pool.able_hosts()
            .find(|host| wanted.is_none_or(|wanted| wanted == *host))
    };
    if let Some(host) = able(&context.view()) {
        return Ok(Some(host));
    }
    context
        .change(|view, draft, operation| {
            let name = view.pool_name(pool);
            let detail = format!("until a host can use the storage pool {name}");
            operation.begin_step("wait", detail, draft.now());
        })
        .await?;
    let found = context.core.until(|view| {
        if called_off(view, context.id) {
            return Some(None);
        }
        able(view).map(Some)
    });
    Ok(found.await)
}

/// As [`able_host`], for what must be done whether it is called off or not.
async fn any_host(context: &Context<'_>, pool: PoolId) -> HostId {
    let able = |view: &View| view.pool(pool)?.able_hosts().next();
    context.core.until(able).await
}

/// What became of a piece of work.
#[derive(Debug)]
pub(super) enum Outcome<R> {
    Ready(R),
    Failed(Problem),
    CalledOff,
    /// The host fell silent or has forgotten the work.
    Lost,
}

/// Tells a host, then asks it until it is done. `watch` sees every report and may find a reason to fail.
pub(super) async fn follow<R, B, P>(
    context: &Context<'_>,
    host: HostId,
    begin: impl Fn(HostAddress) -> B,
    poll: impl Fn(HostAddress) -> P,
    state: impl Fn(&R) -> WorkState,
    mut watch: impl FnMut(&R) -> Option<Problem>,
) -> Outcome<R>
where
    B: Future<Output = Result<R, CallError>>,
    P: Future<Output = Result<R, CallError>>,
{
    let id = context.id;
    let interrupted = |view: &View| called_off(view, id);
    let mut sent = context.send(host, begin, interrupted).await;
    let mut pause = FIRST_PAUSE;
    loop {
        let report = match sent {
            Sent::Answer(report) => report,
            Sent::Refused(Problem { status: 404, .. }) if pause > FIRST_PAUSE => {
                return Outcome::Lost;
            }
            Sent::Refused(problem) => return Outcome::Failed(problem),
            Sent::HostLost => return Outcome::Lost,
            Sent::Interrupted => return Outcome::CalledOff,
        };
        match state(&report) {
            WorkState::Ready => return Outcome::Ready(report),
            WorkState::Failed { reason } => {
                let problem = Problem::conflict("storage-failed", reason);
                return Outcome::Failed(problem);
            }
            WorkState::Working { .. } => {}
        }
        if let Some(problem) = watch(&report) {
            return Outcome::Failed(problem);
        }
        let stop = context.core.until(|view| interrupted(view).then_some(()));
        tokio::select! {
            () = stop => {}
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LAST_PAUSE / 2);
        sent = context.send(host, &poll, interrupted).await;
    }
}

/// For work whose reports need no watching.
pub(super) fn unwatched<R>(_: &R) -> Option<Problem> {
    None
}

fn given_up(what: &str) -> Problem {
    Problem::conflict(
        "storage-failed",
        format!("hosts keep forgetting {what}: they restart, or lose the storage pool"),
    )
    .with_remedy("look at the hosts' logs, then try again")
}

/// Erases what there is of something in a pool; an error is the host's refusal.
pub(super) async fn erase<F>(
    context: &Context<'_>,
    pool: PoolId,
    delete: impl Fn(HostAddress) -> F,
) -> Result<(), Problem>
where
    F: Future<Output = Result<(), CallError>>,
{
    let mut refusals = 0;
    loop {
        let host = any_host(context, pool).await;
        match context.send(host, &delete, never).await {
            Sent::Answer(()) | Sent::Refused(Problem { status: 404, .. }) => return Ok(()),
            Sent::Refused(problem) => {
                refusals += 1;
                if refusals >= MAX_ERASURES {
                    return Err(problem);
                }
                tracing::warn!(operation = %context.id, %host, %problem, "deletion refused; trying again");
                tokio::time::sleep(LAST_PAUSE).await;
            }
            Sent::HostLost | Sent::Interrupted => {}
        }
    }
}

/// Why something was not made, as its record keeps it until it is erased.
pub(super) fn reason(problem: &Problem) -> String {
    problem.detail.clone()
}

/// Tells that something could not be made, or was not wanted any more.
pub(super) fn not_made(
    draft: &mut Draft<'_>,
    operation: &Operation,
    kind: &str,
    subject: Subject,
    reason: String,
    erased: &Result<(), Problem>,
) -> Conclusion {
    let mut detail = format!("{} was not made: {reason}", subject.name);
    if let Err(problem) = erased {
        detail = format!("{detail}; what there is of it could not be deleted: {problem}");
    }
    if operation.cancel.is_some() {
        draft.info(kind, subject, &operation.actor, &detail);
        return Conclusion::Cancelled(detail);
    }
    draft.error(kind, subject, &operation.actor, &detail);
    Conclusion::Failed(
        Problem::conflict("storage-failed", detail)
            .with_remedy("mend what it failed on, then try again"),
    )
}

pub(super) async fn note_deletion(context: &Context<'_>, pool: PoolId) -> Result<(), Ended> {
    context
        .change(|view, draft, operation| {
            let detail = format!("from {}", view.pool_name(pool));
            operation.begin_step("delete", detail, draft.now());
        })
        .await
}

pub(super) fn deleted(
    draft: &mut Draft<'_>,
    operation: &Operation,
    what: &str,
    name: &str,
    subject: Subject,
    erased: &Result<(), Problem>,
) -> Conclusion {
    let actor = &operation.actor;
    match erased {
        Ok(()) => {
            let kind = format!("{what}.deleted");
            draft.info(&kind, subject, actor, format!("{what} {name} deleted"));
            Conclusion::Succeeded("deleted".into())
        }
        Err(problem) => {
            let message = format!("{what} {name} could not be deleted: {}", problem.detail);
            draft.error(&format!("{what}.delete_failed"), subject, actor, message);
            Conclusion::Failed(problem.clone())
        }
    }
}
