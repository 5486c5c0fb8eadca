//! Making, growing and deleting what is in the storage pools.
//!
//! ```text
//! wait for a host with the pool ─▶ tell it ─▶ ask until it is done ─▶ ready
//!            ▲                        │ refused, failed, called off: written down, erased, record dropped
//!            └──── host lost ─────────┘
//! ```
//! Every command may be repeated: a resumed executor tells the host again and gets the present state.

use super::Ended;
use super::context::{Conclusion, Context, FIRST_PAUSE, LAST_PAUSE, Sent, never};
use crate::drive::host_driver::HostAddress;
use crate::ledger::Draft;
use crate::model::{
    Actor, Disk, DiskState, Image, ImageState, Operation, StepState, Subject, Work,
};
use crate::operation::fresh;
use crate::view::View;
use godwit_channel::CallError;
use godwit_wire::id::{DiskId, HostId, ImageId, OperationId, PoolId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{
    CreateDisk, DiskOrigin, DiskReport, GrowDisk, ImageReport, ImportImage, ImportSource, WorkState,
};
use godwit_wire::unit::Bytes;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// Times a host is told anew because it had forgotten what it was doing.
const MAX_ATTEMPTS: u32 = 3;
/// Times a deletion is tried that the host refuses because something still has the file open.
const MAX_ERASURES: u32 = 5;
/// How long an upload may stand still before it is given up.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(300);

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match carry_out(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

async fn carry_out(context: &Context<'_>) -> Result<(), Ended> {
    match context.operation()?.work {
        Work::CreateImage { image, wanted } => create_image(context, image, wanted).await,
        Work::DeleteImage { image } => delete_image(context, image).await,
        Work::CreateDisk { disk } => create_disk(context, disk).await,
        Work::GrowDisk { disk, bytes } => grow_disk(context, disk, bytes).await,
        Work::DeleteDisk { disk } => delete_disk(context, disk).await,
        _ => Err(Ended::GaveUp),
    }
}

/// Begins to delete a disk that nobody has.
pub(crate) fn begin_deletion(
    draft: &mut Draft<'_>,
    mut disk: Disk,
    actor: &Actor,
    parent: Option<OperationId>,
) -> OperationId {
    let work = Work::DeleteDisk { disk: disk.id };
    let subject = Subject::disk(disk.id, &disk.name);
    let operation = fresh(work, subject, actor, parent, draft.now());
    let id = operation.id;
    disk.operation = Some(id);
    draft.put_operation(operation);
    draft.put_disk(disk);
    id
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
async fn follow<R, B, P>(
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
fn unwatched<R>(_: &R) -> Option<Problem> {
    None
}

fn given_up(what: &str) -> Problem {
    Problem::conflict(
        "storage-failed",
        format!("hosts keep forgetting {what}: they restart, or lose the storage pool"),
    )
    .with_remedy("look at the hosts' logs, then try again")
}

/// Makes a disk; its record says what.
pub(super) async fn make_disk(
    context: &Context<'_>,
    id: DiskId,
) -> Result<Outcome<DiskReport>, Ended> {
    let view = context.view();
    let disk = view.disks.get(&id).ok_or(Ended::GaveUp)?;
    let command = CreateDisk {
        bytes: disk.bytes,
        format: disk.format,
        from: disk.origin.clone(),
    };
    let (pool, driver) = (disk.pool, &context.core.driver);
    for _ in 0..MAX_ATTEMPTS {
        let Some(host) = able_host(context, pool, None).await? else {
            return Ok(Outcome::CalledOff);
        };
        context
            .change(|view, draft, operation| {
                let name = format!("create disk {}", disk.name);
                let detail = format!("in {} at {}", view.pool_name(pool), view.host_name(host));
                operation.begin_step(name, detail, draft.now());
            })
            .await?;
        let outcome = follow(
            context,
            host,
            |to| driver.create_disk(to, pool, id, &command),
            |to| driver.disk(to, pool, id),
            |report: &DiskReport| report.state.clone(),
            unwatched,
        )
        .await;
        if !matches!(outcome, Outcome::Lost) {
            return Ok(outcome);
        }
    }
    Ok(Outcome::Failed(given_up(&disk.name)))
}

/// Writes that a disk is there.
pub(super) fn disk_made(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &Operation,
    id: DiskId,
    report: &DiskReport,
) {
    let Some(mut disk) = draft.disk(id) else {
        return;
    };
    disk.state = DiskState::Ready;
    disk.bytes = Some(report.virtual_bytes);
    disk.format = report.format;
    disk.operation = None;
    let message = format!(
        "disk {} of {} made in {}",
        disk.name,
        report.virtual_bytes,
        view.pool_name(disk.pool)
    );
    let subject = Subject::disk(id, &disk.name);
    draft.info("disk.created", subject, &operation.actor, message);
    draft.put_disk(disk);
}

/// Lets go of what disks were made from.
pub(super) fn release_origin(draft: &mut Draft<'_>, operation: OperationId, disk: &Disk) {
    if let DiskOrigin::Disk { disk: origin } = disk.origin
        && let Some(mut origin) = draft.disk(origin)
        && origin.operation == Some(operation)
    {
        origin.operation = None;
        draft.put_disk(origin);
    }
}

/// Erases what there is of something in a pool; an error is the host's refusal.
async fn erase<F>(
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

/// Erases what there is of a disk.
pub(super) async fn erase_disk(
    context: &Context<'_>,
    pool: PoolId,
    disk: DiskId,
) -> Result<(), Problem> {
    let driver = &context.core.driver;
    erase(context, pool, |to| driver.delete_disk(to, pool, disk)).await
}

/// Why something was not made, as its record keeps it until it is erased.
fn reason(problem: &Problem) -> String {
    problem.detail.clone()
}

async fn create_disk(context: &Context<'_>, id: DiskId) -> Result<(), Ended> {
    let record = |view: &View| view.disks.get(&id).cloned().ok_or(Ended::GaveUp);
    let mut problem = None;
    if record(&context.view())?.state == DiskState::Creating {
        match make_disk(context, id).await? {
            Outcome::Ready(report) => {
                return context
                    .change(|view, draft, operation| {
                        disk_made(view, draft, operation, id, &report);
                        if let Some(disk) = draft.disk(id) {
                            release_origin(draft, operation.id, &disk);
                        }
                        let done = Conclusion::Succeeded("made".into());
                        Context::conclude(draft, operation, None, done);
                    })
                    .await;
            }
            Outcome::Failed(why) => problem = Some(why),
            Outcome::CalledOff | Outcome::Lost => {}
        }
        context
            .change(|_, draft, operation| {
                if let Some(mut disk) = draft.disk(id) {
                    let reason = problem.as_ref().map_or("called off".into(), reason);
                    operation.end_step(StepState::Failed, Some(reason.clone()), draft.now());
                    disk.state = DiskState::Failed { reason };
                    draft.put_disk(disk);
                }
            })
            .await?;
    }
    let disk = record(&context.view())?;
    let erased = erase_disk(context, disk.pool, id).await;
    context
        .change(|view, draft, operation| {
            let Some(disk) = view.disks.get(&id) else {
                return;
            };
            release_origin(draft, operation.id, disk);
            draft.delete_disk(disk);
            let conclusion = not_made(
                draft,
                operation,
                "disk.create_failed",
                Subject::disk(id, &disk.name),
                disk_reason(disk),
                &erased,
            );
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

pub(super) fn disk_reason(disk: &Disk) -> String {
    match &disk.state {
        DiskState::Failed { reason } => reason.clone(),
        _ => "called off".into(),
    }
}

/// Tells that something could not be made, or was not wanted any more.
fn not_made(
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

/// The host that must be told of a larger disk: the one where a VM runs with it, else any with the pool.
fn runs_with(view: &View, disk: DiskId) -> Option<HostId> {
    let users = view.users_of(disk).iter();
    users
        .filter_map(|(vm, _)| view.vms.get(vm))
        .find_map(|vm| vm.owner)
}

async fn grow_disk(context: &Context<'_>, id: DiskId, bytes: Bytes) -> Result<(), Ended> {
    let view = context.view();
    let disk = view.disks.get(&id).ok_or(Ended::GaveUp)?;
    let (pool, driver, command) = (disk.pool, &context.core.driver, GrowDisk { bytes });
    let host = match runs_with(&view, id) {
        Some(host) => host,
        None => any_host(context, pool).await,
    };
    context
        .change(|view, draft, operation| {
            operation.begin_step(
                "grow",
                format!("to {bytes} at {}", view.host_name(host)),
                draft.now(),
            );
        })
        .await?;
    let outcome = follow(
        context,
        host,
        |to| driver.grow_disk(to, pool, id, &command),
        |to| driver.disk(to, pool, id),
        |report: &DiskReport| report.state.clone(),
        unwatched,
    )
    .await;
    context
        .change(|view, draft, operation| {
            let Some(mut disk) = draft.disk(id) else {
                return;
            };
            disk.operation = None;
            let subject = Subject::disk(id, &disk.name);
            let conclusion = match &outcome {
                Outcome::Ready(report) => {
                    disk.bytes = Some(report.virtual_bytes);
                    let message = format!("{} has {} now", disk.name, report.virtual_bytes);
                    draft.info("disk.grown", subject, &operation.actor, &message);
                    Conclusion::Succeeded(message)
                }
                Outcome::Failed(problem) => {
                    let message = format!("{} did not grow: {}", disk.name, problem.detail);
                    draft.error("disk.grow_failed", subject, &operation.actor, message);
                    Conclusion::Failed(problem.clone())
                }
                // A VM that has the disk must not wait for a host that may never come back.
                Outcome::CalledOff | Outcome::Lost => {
                    let name = view.host_name(host);
                    let detail = format!("{name} fell silent while {} was growing", disk.name);
                    draft.error("disk.grow_failed", subject, &operation.actor, &detail);
                    Conclusion::Failed(
                        Problem::conflict("host-silent", detail).with_remedy("grow it again"),
                    )
                }
            };
            draft.put_disk(disk);
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

async fn delete_disk(context: &Context<'_>, id: DiskId) -> Result<(), Ended> {
    let view = context.view();
    let pool = view.disks.get(&id).ok_or(Ended::GaveUp)?.pool;
    note_deletion(context, pool).await?;
    let erased = erase_disk(context, pool, id).await;
    context
        .change(|_, draft, operation| {
            let Some(mut disk) = draft.disk(id) else {
                return;
            };
            let subject = Subject::disk(id, &disk.name);
            let name = disk.name.clone();
            if erased.is_ok() {
                draft.delete_disk(&disk);
            } else {
                disk.operation = None;
                draft.put_disk(disk);
            }
            let conclusion = deleted(draft, operation, "disk", &name, subject, &erased);
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

async fn delete_image(context: &Context<'_>, id: ImageId) -> Result<(), Ended> {
    let view = context.view();
    let pool = view.images.get(&id).ok_or(Ended::GaveUp)?.pool;
    note_deletion(context, pool).await?;
    let driver = &context.core.driver;
    let erased = erase(context, pool, |to| driver.delete_image(to, pool, id)).await;
    context
        .change(|view, draft, operation| {
            let Some(image) = view.images.get(&id) else {
                return;
            };
            let subject = Subject::image(id, &image.name);
            if erased.is_ok() {
                draft.delete_image(image);
            } else {
                let mut image = image.as_ref().clone();
                image.operation = None;
                draft.put_image(image);
            }
            let conclusion = deleted(draft, operation, "image", &image.name, subject, &erased);
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

async fn note_deletion(context: &Context<'_>, pool: PoolId) -> Result<(), Ended> {
    context
        .change(|view, draft, operation| {
            let detail = format!("from {}", view.pool_name(pool));
            operation.begin_step("delete", detail, draft.now());
        })
        .await
}

fn deleted(
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

async fn create_image(
    context: &Context<'_>,
    id: ImageId,
    wanted: Option<HostId>,
) -> Result<(), Ended> {
    let record = |view: &View| view.images.get(&id).cloned().ok_or(Ended::GaveUp);
    if !matches!(
        record(&context.view())?.state,
        ImageState::Failed { .. } | ImageState::Ready
    ) {
        let mut problem = None;
        match import(context, id, wanted).await? {
            Outcome::Ready(report) => {
                return context
                    .change(|view, draft, operation| {
                        image_ready(view, draft, operation, id, &report);
                    })
                    .await;
            }
            Outcome::Failed(why) => problem = Some(why),
            Outcome::CalledOff => {}
            Outcome::Lost => problem = Some(given_up("the image")),
        }
        context
            .change(|view, draft, operation| {
                if let Some(image) = view.images.get(&id) {
                    let mut image = image.as_ref().clone();
                    let reason = problem.as_ref().map_or("called off".into(), reason);
                    operation.end_step(StepState::Failed, Some(reason.clone()), draft.now());
                    image.state = ImageState::Failed { reason };
                    draft.put_image(image);
                }
            })
            .await?;
    }
    let image = record(&context.view())?;
    let (pool, driver) = (image.pool, &context.core.driver);
    let erased = erase(context, pool, |to| driver.delete_image(to, pool, id)).await;
    context
        .change(|view, draft, operation| {
            let Some(image) = view.images.get(&id) else {
                return;
            };
            let reason = match &image.state {
                ImageState::Failed { reason } => reason.clone(),
                _ => "called off".into(),
            };
            draft.delete_image(image);
            let conclusion = not_made(
                draft,
                operation,
                "image.import_failed",
                Subject::image(id, &image.name),
                reason,
                &erased,
            );
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

fn image_ready(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    id: ImageId,
    report: &ImageReport,
) {
    let Some(image) = view.images.get(&id) else {
        return;
    };
    let image = Image {
        state: ImageState::Ready,
        format: Some(report.format),
        virtual_bytes: report.virtual_bytes,
        file_bytes: report.file_bytes,
        sha256: Some(report.sha256.clone()),
        operation: None,
        ..image.as_ref().clone()
    };
    let message = format!(
        "image {} of {} imported into {}",
        image.name,
        image.virtual_bytes,
        view.pool_name(image.pool)
    );
    let subject = Subject::image(id, &image.name);
    draft.info("image.created", subject, &operation.actor, message);
    draft.put_image(image);
    Context::conclude(
        draft,
        operation,
        None,
        Conclusion::Succeeded("ready".into()),
    );
}

/// Tells a host to import, and waits until it has. The bytes of an upload go past this executor: whoever brings
/// them finds the host in the image's record.
async fn import(
    context: &Context<'_>,
    id: ImageId,
    wanted: Option<HostId>,
) -> Result<Outcome<ImageReport>, Ended> {
    let driver = &context.core.driver;
    for _ in 0..MAX_ATTEMPTS {
        let view = context.view();
        let image = view.images.get(&id).ok_or(Ended::GaveUp)?;
        let (pool, state) = (image.pool, image.state.clone());
        let receiving = match state {
            ImageState::Uploading { host } => Some(host),
            _ => None,
        };
        let Some(host) = able_host(context, pool, receiving.or(wanted)).await? else {
            return Ok(Outcome::CalledOff);
        };
        let command = ImportImage {
            source: image.source.clone(),
            format: image.format,
            sha256: image.sha256.clone(),
        };
        let upload = matches!(command.source, ImportSource::Upload { .. });
        context
            .change(|view, draft, operation| {
                let step = if upload { "receive" } else { "import" };
                let detail = format!("into {} at {}", view.pool_name(pool), view.host_name(host));
                operation.begin_step(step, detail, draft.now());
            })
            .await?;
        if upload {
            let begun = context
                .send(
                    host,
                    |to| driver.import_image(to, pool, id, &command),
                    |view| called_off(view, context.id),
                )
                .await;
            if matches!(begun, Sent::Answer(_)) {
                note_receiver(context, id, host).await?;
            }
        }
        let mut latest = (Bytes(0), Instant::now());
        let outcome = follow(
            context,
            host,
            |to| driver.import_image(to, pool, id, &command),
            |to| driver.image(to, pool, id),
            |report: &ImageReport| report.state.clone(),
            |report: &ImageReport| {
                if let WorkState::Working { done_bytes, .. } = report.state
                    && done_bytes != latest.0
                {
                    latest = (done_bytes, Instant::now());
                }
                let detail = format!("no bytes came for {} s", UPLOAD_PATIENCE.as_secs());
                let stuck = upload && latest.1.elapsed() >= UPLOAD_PATIENCE;
                stuck.then(|| Problem::conflict("upload-stopped", detail))
            },
        )
        .await;
        match outcome {
            // Whoever sends the bytes has to begin anew, too.
            Outcome::Lost if upload => {
                let name = context.view().host_name(host);
                let detail = format!("{name} fell silent while it received the image");
                return Ok(Outcome::Failed(
                    Problem::conflict("host-silent", detail).with_remedy("upload it again"),
                ));
            }
            Outcome::Lost => {}
            outcome => return Ok(outcome),
        }
    }
    Ok(Outcome::Lost)
}

async fn note_receiver(context: &Context<'_>, id: ImageId, host: HostId) -> Result<(), Ended> {
    let known = |view: &View| {
        let image = view.images.get(&id);
        image.is_none_or(|image| image.state == ImageState::Uploading { host })
    };
    if known(&context.view()) {
        return Ok(());
    }
    context
        .change(|view, draft, _| {
            if let Some(image) = view.images.get(&id) {
                let mut image = image.as_ref().clone();
                image.state = ImageState::Uploading { host };
                draft.put_image(image);
            }
        })
        .await
}
