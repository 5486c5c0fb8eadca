//! Importing and deleting images.

use super::{
    MAX_ATTEMPTS, Outcome, able_host, called_off, deleted, erase, follow, given_up, not_made,
    note_deletion, reason,
};
use crate::ledger::Draft;
use crate::model::{Image, ImageState, Operation, StepState, Subject};
use crate::operation::Ended;
use crate::operation::context::{Conclusion, Context, Sent};
use crate::view::View;
use godwit_wire::id::{HostId, ImageId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{ImageReport, ImportImage, ImportSource, WorkState};
use godwit_wire::unit::Bytes;
use std::time::Duration;
use tokio::time::Instant;

/// How long an upload may stand still before it is given up.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(300);

pub(super) async fn delete_image(context: &Context<'_>, id: ImageId) -> Result<(), Ended> {
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

pub(super) async fn create_image(
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
