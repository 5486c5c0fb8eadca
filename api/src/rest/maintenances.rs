//! `/v1/maintenances`.

use super::extract::{
    By, ChangeQuery, OptionalBody, Outcome, Refused, answer, carry_out, host_named,
    maintenance_named, submit, unknown_in_field, vm_named,
};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{
    CancelMaintenance, CreateMaintenance, DryRun, List, Maintenance, MaintenanceAccepted,
    ReturnPolicy,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{Intent, NewMaintenance};
use godwit_controller::model;
use godwit_wire::id::MaintenanceId;
use std::collections::BTreeMap;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show))
        .routes(routes!(start))
        .routes(routes!(cancel))
        .routes(routes!(finish))
}

/// Lists maintenances.
#[utoipa::path(get, path = "/v1/maintenances", tag = "maintenances", params(PageQuery), responses((status = 200, body = List<Maintenance>), Refused))]
async fn list(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Maintenance>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.maintenances, convert::maintenance).map(Json)
}

/// Plans a maintenance of a host; nothing moves before it is started.
#[utoipa::path(
    post, path = "/v1/maintenances", tag = "maintenances", params(ChangeQuery), request_body = CreateMaintenance,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 201, description = "Planned.", body = MaintenanceAccepted),
        Refused
    )
)]
async fn create(
    State(api): State<Api>,
    by: By,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateMaintenance>,
) -> Result<Response, Refusal> {
    let view = api.controller.view();
    let host = host_named(&view, &body.host)
        .map_err(|_| unknown_in_field("host", "host", &body.host))?
        .id;
    let mut overrides = BTreeMap::new();
    for (index, other) in body.overrides.iter().enumerate() {
        let field = format!("overrides[{index}].vm");
        let vm = vm_named(&view, &other.vm)
            .map_err(|_| unknown_in_field(&field, "vm", &other.vm))?
            .id;
        overrides.insert(vm, convert::maintenance_policy(other.policy));
    }
    let return_policy = match body.returning {
        ReturnPolicy::Exact => model::ReturnPolicy::Exact,
        ReturnPolicy::Rebalance => model::ReturnPolicy::Rebalance,
        ReturnPolicy::None => model::ReturnPolicy::None,
    };
    let intent = Intent::CreateMaintenance(NewMaintenance {
        host,
        reason: body.reason,
        return_policy,
        overrides,
    });
    match submit(&api, &by, query, intent).await? {
        Outcome::DryRun(response) => Ok(response),
        Outcome::Accepted(accepted) => Ok(answer(&api, accepted, StatusCode::CREATED)),
    }
}

/// Shows a maintenance with its plan.
#[utoipa::path(get, path = "/v1/maintenances/{maintenance}", tag = "maintenances", params(("maintenance" = String, Path)), responses((status = 200, body = Maintenance), Refused))]
async fn show(
    State(api): State<Api>,
    PathArgs(id): PathArgs<String>,
) -> Result<Json<Maintenance>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::maintenance(maintenance_named(&view, &id)?)))
}

/// Plans again and, if nothing stands in the way, moves every VM off the host.
#[utoipa::path(
    post, path = "/v1/maintenances/{maintenance}/start", tag = "maintenances", params(("maintenance" = String, Path), ChangeQuery),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = MaintenanceAccepted), Refused)
)]
async fn start(
    State(api): State<Api>,
    by: By,
    PathArgs(maintenance): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let maintenance = id(&api, &maintenance)?;
    carry_out(&api, &by, query, Intent::StartMaintenance { maintenance }).await
}

/// Calls a maintenance off: the move in flight is finished and the host takes VMs again.
#[utoipa::path(
    post, path = "/v1/maintenances/{maintenance}/cancel", tag = "maintenances", params(("maintenance" = String, Path), ChangeQuery),
    request_body(content = Option<CancelMaintenance>),
    responses((status = 200, description = "It is off, or what would happen (`dry_run`).", body = MaintenanceAccepted), (status = 202, body = MaintenanceAccepted), Refused)
)]
async fn cancel(
    State(api): State<Api>,
    by: By,
    PathArgs(maintenance): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<CancelMaintenance>,
) -> Result<Response, Refusal> {
    let maintenance = id(&api, &maintenance)?;
    let restore = if body.restore {
        model::RestoreOnCancel::Restore
    } else {
        model::RestoreOnCancel::Stay
    };
    carry_out(
        &api,
        &by,
        query,
        Intent::CancelMaintenance {
            maintenance,
            restore,
        },
    )
    .await
}

/// The work is over: checks the host and brings VMs home.
#[utoipa::path(
    post, path = "/v1/maintenances/{maintenance}/finish", tag = "maintenances", params(("maintenance" = String, Path), ChangeQuery),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = MaintenanceAccepted), Refused)
)]
async fn finish(
    State(api): State<Api>,
    by: By,
    PathArgs(maintenance): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let maintenance = id(&api, &maintenance)?;
    carry_out(&api, &by, query, Intent::FinishMaintenance { maintenance }).await
}

fn id(api: &Api, text: &str) -> Result<MaintenanceId, Refusal> {
    Ok(maintenance_named(&api.controller.view(), text)?.id)
}
