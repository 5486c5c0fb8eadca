//! `/v1/vms`.

use super::devices::{Asked, devices};
use super::extract::{
    By, ChangeQuery, OptionalBody, Outcome, Refused, answer, carry_out, host_in_field, submit,
    vm_named,
};
use super::page::{PageQuery, page};
use super::policy::{disks_on_move, migration_policy};
use super::{Api, convert};
use crate::resource::{
    Boot, ChangeVm, CreateVm, DeleteDisks, DryRun, List, MachineSpec, MachineType, MigrateVm,
    StartVm, StopMode, StopVm, Vm, VmAccepted, VmTemplate,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{Intent, NewVm, VmChange};
use godwit_controller::model::{DisksOnDelete, PowerIntent};
use godwit_wire::host_api;
use godwit_wire::id::VmId;
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::unit::Mib;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// How long a guest is given to stop unless asked otherwise.
const STOP_TIMEOUT_MS: u64 = 30_000;
/// Longest time a guest can be given to stop.
const MAX_STOP_TIMEOUT_MS: u64 = 600_000;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, change, delete))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(reboot))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(migrate))
}

/// Lists VMs.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(PageQuery), responses((status = 200, body = List<Vm>), Refused))]
async fn list(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Vm>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.vms, |vm| convert::vm(&view, vm)).map(Json)
}

/// Creates a VM and, unless told otherwise, starts it.
#[utoipa::path(
    post, path = "/v1/vms", tag = "vms", params(ChangeQuery), request_body = CreateVm,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 201, description = "Created; it is not started.", body = VmAccepted),
        (status = 202, description = "Created; an operation starts it.", body = VmAccepted),
        Refused
    )
)]
async fn create(
    State(api): State<Api>,
    by: By,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateVm>,
) -> Result<Response, Refusal> {
    let spec = match (body.spec, body.template) {
        (Some(spec), None) => spec,
        (None, Some(VmTemplate::Pilot)) => pilot_template(),
        (spec, _) => {
            let (problem, remedy) = match spec {
                Some(_) => (
                    "both `spec` and `template` are given",
                    "leave one of them out",
                ),
                None => (
                    "neither `spec` nor `template` is given",
                    "describe the machine, or name a template",
                ),
            };
            return Err(Refusal(Problem::invalid(vec![FieldProblem::new(
                "spec", problem, remedy,
            )])));
        }
    };
    let view = api.controller.view();
    let asked = Asked {
        disks: Some(&body.disks),
        nics: Some(&body.nics),
        cloud_init: body.cloud_init,
        vsock: body.vsock,
        console: Some(body.console),
        memory_backing: Some(body.memory_backing),
    };
    let devices = devices(&view, asked).map_err(|found| Refusal(Problem::invalid(found)))?;
    let intent = Intent::CreateVm(NewVm {
        devices,
        name: body.name,
        spec: convert::machine(spec),
        intent: if body.start {
            PowerIntent::Running
        } else {
            PowerIntent::Stopped
        },
        host: host_in_field(&view, "host", body.host.as_deref())?,
        lease: convert::lease(body.lease),
        maintenance_policy: convert::maintenance_policy(body.maintenance_policy),
        post_copy: convert::post_copy_permission(body.post_copy),
    });
    match submit(&api, &by, query, intent).await? {
        Outcome::DryRun(response) => Ok(response),
        Outcome::Accepted(accepted) => Ok(answer(&api, accepted, StatusCode::CREATED)),
    }
}

fn pilot_template() -> MachineSpec {
    MachineSpec {
        machine_type: MachineType::Godwit2,
        vcpus: 1,
        memory_mib: 64,
        boot: Boot::Pilot,
        cpu: crate::resource::CpuBaseline::V2,
    }
}

/// Shows a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Id or name")), responses((status = 200, body = Vm), Refused))]
async fn show(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
) -> Result<Json<Vm>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::vm(&view, vm_named(&view, &name)?)))
}

/// Changes a VM.
#[utoipa::path(
    patch, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body = ChangeVm, responses((status = 200, body = VmAccepted), (status = 202, description = "An operation carries it out.", body = VmAccepted), Refused)
)]
async fn change(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<ChangeVm>,
) -> Result<Response, Refusal> {
    let asked = Asked {
        disks: body.disks.as_deref(),
        nics: body.nics.as_deref(),
        cloud_init: body.cloud_init,
        vsock: body.vsock,
        console: body.console,
        memory_backing: body.memory_backing,
    };
    let devices =
        devices(&api.controller.view(), asked).map_err(|found| Refusal(Problem::invalid(found)))?;
    let change = VmChange {
        devices,
        name: body.name,
        spec: body.spec.map(convert::machine),
        lease: body.lease.map(convert::lease),
        maintenance_policy: body.maintenance_policy.map(convert::maintenance_policy),
        post_copy: body.post_copy.map(convert::post_copy_permission),
        keep_memory: body.keep_memory_mib.map(Mib),
    };
    let vm = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::ChangeVm { vm, change }).await
}

/// Parameters of a deletion.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
struct DeleteQuery {
    /// Only say what would happen.
    dry_run: bool,
    /// What becomes of its disks.
    #[param(inline)]
    delete_disks: DeleteDisks,
}

/// Kills a VM if it runs, and forgets it; its disks are deleted after it is surely gone.
#[utoipa::path(
    delete, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Id or name"), DeleteQuery),
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 202, description = "An operation deletes it.", body = VmAccepted),
        (status = 204, description = "It was off and is gone."),
        Refused
    )
)]
async fn delete(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<DeleteQuery>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    let disks = match query.delete_disks {
        DeleteDisks::Keep => DisksOnDelete::Keep,
        DeleteDisks::Delete => DisksOnDelete::Delete,
    };
    let change = ChangeQuery {
        dry_run: query.dry_run,
    };
    carry_out(&api, &by, change, Intent::DeleteVm { vm, disks }).await
}

/// Places a VM on a host and starts it.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/start", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<StartVm>),
    responses((status = 200, description = "Nothing to do, or what would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn start(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<StartVm>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    let host = host_in_field(&api.controller.view(), "host", body.host.as_deref())?;
    carry_out(&api, &by, query, Intent::StartVm { vm, host }).await
}

/// Stops a VM: the guest is asked, then killed.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/stop", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<StopVm>),
    responses((status = 200, description = "Nothing to do, or what would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn stop(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<StopVm>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    carry_out(
        &api,
        &by,
        query,
        Intent::StopVm {
            vm,
            mode: stop_mode(body)?,
        },
    )
    .await
}

/// Stops a VM and starts it again on the same host.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/reboot", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<StopVm>),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn reboot(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<StopVm>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    carry_out(
        &api,
        &by,
        query,
        Intent::RebootVm {
            vm,
            mode: stop_mode(body)?,
        },
    )
    .await
}

fn stop_mode(body: StopVm) -> Result<host_api::StopMode, Refusal> {
    let timeout_ms = body.timeout_ms.unwrap_or(STOP_TIMEOUT_MS);
    if timeout_ms > MAX_STOP_TIMEOUT_MS {
        return Err(Refusal(Problem::invalid(vec![FieldProblem::new(
            "timeout_ms",
            format!("{timeout_ms} is more than {MAX_STOP_TIMEOUT_MS}"),
            "give the guest less time, or kill it",
        )])));
    }
    Ok(match body.mode {
        StopMode::Graceful => host_api::StopMode::Graceful { timeout_ms },
        StopMode::Kill => host_api::StopMode::Kill,
    })
}

/// Makes a running VM stand still.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/pause", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, description = "Nothing to do, or what would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn pause(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::PauseVm { vm }).await
}

/// Lets a paused VM run.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/resume", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, description = "Nothing to do, or what would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn resume(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::ResumeVm { vm }).await
}

/// Moves a running VM to another host without stopping it.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/migrate", tag = "vms", params(("vm" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<MigrateVm>),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = VmAccepted), Refused)
)]
async fn migrate(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<MigrateVm>,
) -> Result<Response, Refusal> {
    let vm = id(&api, &name)?;
    let target = host_in_field(&api.controller.view(), "target", body.target.as_deref())?;
    let policy = migration_policy(body.policy.unwrap_or_default())
        .map_err(|found| Refusal(Problem::invalid(found)))?;
    let disks = disks_on_move(body.disks, body.disk_pool)
        .map_err(|found| Refusal(Problem::invalid(vec![found])))?;
    let intent = Intent::MigrateVm {
        vm,
        target,
        policy,
        disks,
    };
    carry_out(&api, &by, query, intent).await
}

fn id(api: &Api, name: &str) -> Result<VmId, Refusal> {
    Ok(vm_named(&api.controller.view(), name)?.id)
}
