//! `/v1/pools`, `/v1/images` and `/v1/disks`.

use super::devices;
use super::extract::{
    By, ChangeQuery, Outcome, Refused, answer, carry_out, disk_named, host_named, image_named,
    submit, unknown_in_field,
};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{
    CreateDisk, CreateImage, Disk, DiskAccepted, DryRun, GrowDisk, Image, ImageAccepted,
    ImageSource, List, Pool,
};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{Intent, NewDisk, NewImage};
use godwit_controller::view::View;
use godwit_wire::id::{DiskId, ImageId, PoolId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::{ImportSource, MAX_DISK};
use godwit_wire::unit;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// How long the sender of an image may be silent.
const UPLOAD_SILENCE: Duration = Duration::from_secs(60);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list_pools))
        .routes(routes!(list_images, create_image))
        .routes(routes!(show_image, delete_image))
        .routes(routes!(upload))
        .routes(routes!(list_disks, create_disk))
        .routes(routes!(show_disk, delete_disk))
        .routes(routes!(grow_disk))
}

fn invalid(problem: FieldProblem) -> Refusal {
    Refusal(Problem::invalid(vec![problem]))
}

fn pool_in_field(view: &View, name: Option<&str>) -> Result<Option<PoolId>, Refusal> {
    name.map(|name| devices::pool(view, "pool", name).map_err(invalid))
        .transpose()
}

/// Lists storage pools.
#[utoipa::path(get, path = "/v1/pools", tag = "storage", params(PageQuery), responses((status = 200, body = List<Pool>), Refused))]
async fn list_pools(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Pool>>, Refusal> {
    let view = api.controller.view();
    let pools: BTreeMap<PoolId, Arc<_>> = view
        .pools()
        .into_iter()
        .map(|(id, pool)| (id, Arc::new(pool)))
        .collect();
    page(&query, &view, &pools, |pool| convert::pool(&view, pool)).map(Json)
}

/// Lists images.
#[utoipa::path(get, path = "/v1/images", tag = "storage", params(PageQuery), responses((status = 200, body = List<Image>), Refused))]
async fn list_images(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Image>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.images, |image| {
        convert::image(&view, image)
    })
    .map(Json)
}

/// Imports an image from a file on a host, or makes ready to receive it.
#[utoipa::path(
    post, path = "/v1/images", tag = "storage", params(ChangeQuery), request_body = CreateImage,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation imports it; one that is uploaded waits for its content.", body = ImageAccepted),
        Refused
    )
)]
async fn create_image(
    State(api): State<Api>,
    by: By,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateImage>,
) -> Result<Response, Refusal> {
    let view = api.controller.view();
    let (source, host) = match body.source {
        ImageSource::Path { path, host } => (ImportSource::Path { path: path.into() }, host),
        ImageSource::Upload { bytes } => (
            ImportSource::Upload {
                bytes: unit::Bytes(bytes),
            },
            None,
        ),
    };
    let host = match host {
        None => None,
        Some(name) => match host_named(&view, &name) {
            Ok(host) => Some(host.id),
            Err(_) => return Err(unknown_in_field("source.host", "host", &name)),
        },
    };
    let intent = Intent::CreateImage(NewImage {
        name: body.name,
        pool: pool_in_field(&view, body.pool.as_deref())?,
        host,
        source,
        format: body.format.map(devices::format),
        sha256: body.sha256,
    });
    carry_out(&api, &by, query, intent).await
}

/// Shows an image.
#[utoipa::path(get, path = "/v1/images/{image}", tag = "storage", params(("image" = String, Path, description = "Id or name")), responses((status = 200, body = Image), Refused))]
async fn show_image(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
) -> Result<Json<Image>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::image(&view, image_named(&view, &name)?)))
}

/// Deletes an image that no disk is based on.
#[utoipa::path(
    delete, path = "/v1/images/{image}", tag = "storage", params(("image" = String, Path, description = "Id or name"), ChangeQuery),
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation deletes it.", body = ImageAccepted),
        Refused
    )
)]
async fn delete_image(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let image: ImageId = image_named(&api.controller.view(), &name)?.id;
    carry_out(&api, &by, query, Intent::DeleteImage { image }).await
}

/// Sends the bytes of an image that is uploaded, as many as were announced. They go straight to the host that keeps
/// them.
#[utoipa::path(
    put, path = "/v1/images/{image}/content", tag = "storage", params(("image" = String, Path, description = "Id or name")),
    request_body(content = String, content_type = "application/octet-stream", description = "The bytes; `Content-Length` is required."),
    responses((status = 200, description = "All of it has arrived; the operation ends when it is ready to use.", body = Image), Refused)
)]
async fn upload(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Image>, Refusal> {
    let id = image_named(&api.controller.view(), &name)?.id;
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok())
        .filter(|length| *length > 0 && *length <= MAX_DISK.0);
    let Some(length) = length else {
        let detail = format!("give its Content-Length, from 1 B to {MAX_DISK}");
        let title = "The length of the image is not known";
        return Err(Refusal(Problem::new(411, "length-required", title, detail)));
    };
    let content = Body::from_stream(lively(body));
    api.controller.upload_image(id, length, content).await?;
    let view = api.controller.view();
    let image = view.images.get(&id);
    let image = image.ok_or_else(|| Refusal(Problem::not_found("image", &name)))?;
    Ok(Json(convert::image(&view, image)))
}

/// The same bytes, cut off when nothing comes for [`UPLOAD_SILENCE`]. HTTP sees to it that no more than the announced
/// length comes.
fn lively(body: Body) -> impl futures_util::Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some(body.into_data_stream()), |content| async move {
        let mut content = content?;
        match tokio::time::timeout(UPLOAD_SILENCE, content.next()).await {
            Ok(Some(Ok(bytes))) => Some((Ok(bytes), Some(content))),
            Ok(Some(Err(error))) => Some((Err(io::Error::other(error)), None)),
            Ok(None) => None,
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
        }
    })
}

/// Lists disks.
#[utoipa::path(get, path = "/v1/disks", tag = "storage", params(PageQuery), responses((status = 200, body = List<Disk>), Refused))]
async fn list_disks(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Disk>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.disks, |disk| {
        convert::disk(&view, disk)
    })
    .map(Json)
}

/// Makes a disk.
#[utoipa::path(
    post, path = "/v1/disks", tag = "storage", params(ChangeQuery), request_body = CreateDisk,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation makes it.", body = DiskAccepted),
        Refused
    )
)]
async fn create_disk(
    State(api): State<Api>,
    by: By,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateDisk>,
) -> Result<Response, Refusal> {
    let view = api.controller.view();
    let from = devices::origin(&view, "", body.image.as_deref(), body.clone_of.as_deref());
    let intent = Intent::CreateDisk(NewDisk {
        name: body.name,
        pool: pool_in_field(&view, body.pool.as_deref())?,
        bytes: body.bytes.map(unit::Bytes),
        format: body.format.map(devices::format),
        from: from.map_err(invalid)?,
    });
    match submit(&api, &by, query, intent).await? {
        Outcome::DryRun(response) => Ok(response),
        Outcome::Accepted(accepted) => Ok(answer(&api, accepted, StatusCode::CREATED)),
    }
}

/// Shows a disk.
#[utoipa::path(get, path = "/v1/disks/{disk}", tag = "storage", params(("disk" = String, Path, description = "Id or name")), responses((status = 200, body = Disk), Refused))]
async fn show_disk(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
) -> Result<Json<Disk>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::disk(&view, disk_named(&view, &name)?)))
}

/// Makes a disk larger; a VM that runs with it sees the new size at once.
#[utoipa::path(
    post, path = "/v1/disks/{disk}/grow", tag = "storage", params(("disk" = String, Path, description = "Id or name"), ChangeQuery),
    request_body = GrowDisk,
    responses((status = 200, description = "Nothing to do, or what would happen (`dry_run`).", body = DryRun), (status = 202, body = DiskAccepted), Refused)
)]
async fn grow_disk(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<GrowDisk>,
) -> Result<Response, Refusal> {
    let disk: DiskId = disk_named(&api.controller.view(), &name)?.id;
    let bytes = unit::Bytes(body.bytes);
    carry_out(&api, &by, query, Intent::GrowDisk { disk, bytes }).await
}

/// Deletes a disk that no VM has, with all that is on it.
#[utoipa::path(
    delete, path = "/v1/disks/{disk}", tag = "storage", params(("disk" = String, Path, description = "Id or name"), ChangeQuery),
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation deletes it.", body = DiskAccepted),
        Refused
    )
)]
async fn delete_disk(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let disk: DiskId = disk_named(&api.controller.view(), &name)?.id;
    carry_out(&api, &by, query, Intent::DeleteDisk { disk }).await
}
