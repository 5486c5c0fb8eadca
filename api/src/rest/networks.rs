//! `/v1/networks`.

use super::devices;
use super::extract::{By, ChangeQuery, Outcome, Refused, answer, carry_out, network_named, submit};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{CreateNetwork, DryRun, List, Network, NetworkAccepted};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{Intent, NewNetwork};
use godwit_wire::problem::Problem;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, delete))
}

/// Lists networks.
#[utoipa::path(get, path = "/v1/networks", tag = "networks", params(PageQuery), responses((status = 200, body = List<Network>), Refused))]
async fn list(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Network>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.networks, |network| {
        convert::network(&view, network)
    })
    .map(Json)
}

/// Makes a network; hosts build it when the first VM on it starts there.
#[utoipa::path(
    post, path = "/v1/networks", tag = "networks", params(ChangeQuery), request_body = CreateNetwork,
    responses(
        (status = 200, description = "What would happen (`dry_run`).", body = DryRun),
        (status = 201, body = NetworkAccepted),
        Refused
    )
)]
async fn create(
    State(api): State<Api>,
    by: By,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<CreateNetwork>,
) -> Result<Response, Refusal> {
    let subnet = body.subnet.as_ref().map(devices::subnet).transpose();
    let intent = Intent::CreateNetwork(NewNetwork {
        name: body.name,
        transport: devices::transport(body.transport),
        mtu: body.mtu,
        subnet: subnet.map_err(|problem| Refusal(Problem::invalid(vec![problem])))?,
    });
    match submit(&api, &by, query, intent).await? {
        Outcome::DryRun(response) => Ok(response),
        Outcome::Accepted(accepted) => Ok(answer(&api, accepted, StatusCode::CREATED)),
    }
}

/// Shows a network.
#[utoipa::path(get, path = "/v1/networks/{network}", tag = "networks", params(("network" = String, Path, description = "Id or name")), responses((status = 200, body = Network), Refused))]
async fn show(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
) -> Result<Json<Network>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::network(&view, network_named(&view, &name)?)))
}

/// Deletes a network that no VM is plugged into.
#[utoipa::path(
    delete, path = "/v1/networks/{network}", tag = "networks", params(("network" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 204, description = "It is gone."), Refused)
)]
async fn delete(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let network = network_named(&api.controller.view(), &name)?.id();
    carry_out(&api, &by, query, Intent::DeleteNetwork { network }).await
}
