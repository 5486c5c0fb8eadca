//! `/v1/vms/{vm}/snapshots`.

use super::devices;
use super::extract::{
    By, ChangeQuery, OptionalBody, Refused, carry_out, host_in_field, snapshot_named, vm_named,
};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{
    CreateSnapshot, DryRun, List, RestoreSnapshot, Snapshot, SnapshotAccepted, VmAccepted,
};
use axum::Json;
use axum::extract::State;
use axum::response::Response;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{Intent, NewSnapshot};
use godwit_controller::model::AfterSnapshot;
use godwit_wire::id::SnapshotId;
use godwit_wire::problem::Problem;
use std::collections::BTreeMap;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, delete))
        .routes(routes!(restore))
}

/// Lists a VM's snapshots.
#[utoipa::path(get, path = "/v1/vms/{vm}/snapshots", tag = "snapshots", params(("vm" = String, Path, description = "Id or name"), PageQuery), responses((status = 200, body = List<Snapshot>), Refused))]
async fn list(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Snapshot>>, Refusal> {
    let view = api.controller.view();
    let vm = vm_named(&view, &name)?.id;
    let snapshots: BTreeMap<SnapshotId, _> = view
        .snapshots_of(vm)
        .map(|snapshot| (snapshot.id, snapshot.clone()))
        .collect();
    page(&query, &view, &snapshots, |snapshot| {
        convert::snapshot(&view, snapshot)
    })
    .map(Json)
}

/// Saves a running or paused VM to a storage pool: memory, vCPUs and devices, and no disks.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/snapshots", tag = "snapshots", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body = CreateSnapshot,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation takes it.", body = SnapshotAccepted),
        Refused
    )
)]
async fn create(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateSnapshot>,
) -> Result<Response, Refusal> {
    let view = api.controller.view();
    let pool = body.pool.as_deref();
    let pool = pool.map(|name| devices::pool(&view, "pool", name));
    let intent = Intent::CreateSnapshot(NewSnapshot {
        vm: vm_named(&view, &name)?.id,
        name: body.name,
        pool: pool
            .transpose()
            .map_err(|problem| Refusal(Problem::invalid(vec![problem])))?,
        then: match body.stop {
            true => AfterSnapshot::Stop,
            false => AfterSnapshot::GoOn,
        },
    });
    carry_out(&api, &by, query, intent).await
}

/// Shows a snapshot.
#[utoipa::path(
    get, path = "/v1/vms/{vm}/snapshots/{snapshot}", tag = "snapshots",
    params(("vm" = String, Path, description = "Id or name"), ("snapshot" = String, Path, description = "Id or name")),
    responses((status = 200, body = Snapshot), Refused)
)]
async fn show(
    State(api): State<Api>,
    PathArgs((vm, name)): PathArgs<(String, String)>,
) -> Result<Json<Snapshot>, Refusal> {
    let view = api.controller.view();
    let snapshot = snapshot_named(&view, &vm, &name)?;
    Ok(Json(convert::snapshot(&view, snapshot)))
}

/// Deletes a snapshot.
#[utoipa::path(
    delete, path = "/v1/vms/{vm}/snapshots/{snapshot}", tag = "snapshots",
    params(("vm" = String, Path, description = "Id or name"), ("snapshot" = String, Path, description = "Id or name"), ChangeQuery),
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation deletes it.", body = SnapshotAccepted),
        Refused
    )
)]
async fn delete(
    State(api): State<Api>,
    by: By,
    PathArgs((vm, name)): PathArgs<(String, String)>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let snapshot = snapshot_named(&api.controller.view(), &vm, &name)?.id;
    carry_out(&api, &by, query, Intent::DeleteSnapshot { snapshot }).await
}

/// Starts a VM that is off from where it was saved. Refused by its host (`disks-moved-on`) when one of its writable
/// disks was claimed since.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/snapshots/{snapshot}/restore", tag = "snapshots",
    params(("vm" = String, Path, description = "Id or name"), ("snapshot" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<RestoreSnapshot>),
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation starts the VM.", body = VmAccepted),
        Refused
    )
)]
async fn restore(
    State(api): State<Api>,
    by: By,
    PathArgs((vm, name)): PathArgs<(String, String)>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<RestoreSnapshot>,
) -> Result<Response, Refusal> {
    let view = api.controller.view();
    let snapshot = snapshot_named(&view, &vm, &name)?.id;
    let host = host_in_field(&view, "host", body.host.as_deref())?;
    carry_out(&api, &by, query, Intent::RestoreSnapshot { snapshot, host }).await
}
