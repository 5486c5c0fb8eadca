//! `/v1/hosts` and `/v1/join-tokens`.

use super::extract::{
    By, ChangeQuery, OptionalBody, Refused, carry_out, host_in_field, host_named,
};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{
    ChangeHost, CreateJoinToken, DryRun, Host, HostAccepted, HostReason, JoinToken, List,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use godwit_channel::problem::{JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::{HostChange, Intent};
use godwit_wire::id::HostId;
use godwit_wire::problem::{FieldProblem, Problem};
use std::collections::BTreeMap;
use std::time::Duration;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// How long a join token can be used unless asked otherwise.
const TOKEN_TTL_S: u64 = 3_600;
/// Longest life of a join token.
const MAX_TOKEN_TTL_S: u64 = 30 * 24 * 3_600;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show, change, remove))
        .routes(routes!(cordon))
        .routes(routes!(uncordon))
        .routes(routes!(evacuate))
        .routes(routes!(upgrade))
        .routes(routes!(confirm_off))
        .routes(routes!(create_join_token))
}

/// Lists hosts.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", params(PageQuery), responses((status = 200, body = List<Host>), Refused))]
async fn list(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Host>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.hosts, |host| {
        convert::host(&view, host)
    })
    .map(Json)
}

/// Shows a host.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Id or name")), responses((status = 200, body = Host), Refused))]
async fn show(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
) -> Result<Json<Host>, Refusal> {
    let view = api.controller.view();
    Ok(Json(convert::host(&view, host_named(&view, &name)?)))
}

/// Changes what migrations may use of a host and its links.
#[utoipa::path(
    patch, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    request_body = ChangeHost, responses((status = 200, body = HostAccepted), Refused)
)]
async fn change(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    JsonBody(body): JsonBody<ChangeHost>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    let view = api.controller.view();
    let mut link_bandwidth = BTreeMap::new();
    for (number, link) in body.link_bandwidth.iter().enumerate() {
        let field = format!("link_bandwidth[{number}].host");
        if let Some(other) = host_in_field(&view, &field, Some(&link.host))? {
            link_bandwidth.insert(other, convert::bandwidth(link.bytes_per_s));
        }
    }
    let change = HostChange {
        migration_bandwidth: body.migration_bandwidth_bytes_per_s.map(convert::bandwidth),
        link_bandwidth,
    };
    carry_out(&api, &by, query, Intent::ChangeHost { host, change }).await
}

/// Takes an empty host out of the pool.
#[utoipa::path(
    delete, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 204, description = "It is gone."), Refused)
)]
async fn remove(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::RemoveHost { host }).await
}

/// Lets no new VM be placed on a host.
#[utoipa::path(
    post, path = "/v1/hosts/{host}/cordon", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<HostReason>), responses((status = 200, body = HostAccepted), Refused)
)]
async fn cordon(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<HostReason>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(
        &api,
        &by,
        query,
        Intent::CordonHost {
            host,
            reason: body.reason,
        },
    )
    .await
}

/// Lets VMs be placed on a host again.
#[utoipa::path(
    post, path = "/v1/hosts/{host}/uncordon", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, body = HostAccepted), Refused)
)]
async fn uncordon(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::UncordonHost { host }).await
}

/// Moves everything off a host that answers but is failing; it stays cordoned.
#[utoipa::path(
    post, path = "/v1/hosts/{host}/evacuate", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    request_body(content = Option<HostReason>),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = HostAccepted), Refused)
)]
async fn evacuate(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
    OptionalBody(body): OptionalBody<HostReason>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(
        &api,
        &by,
        query,
        Intent::EvacuateHost {
            host,
            reason: body.reason,
        },
    )
    .await
}

/// Hands a host's running VMs to VMMs of the program that its agent runs; each guest stands still for a moment.
#[utoipa::path(
    post, path = "/v1/hosts/{host}/upgrade", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, description = "What would happen (`dry_run`).", body = DryRun), (status = 202, body = HostAccepted), Refused)
)]
async fn upgrade(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::UpgradeHost { host }).await
}

/// Confirms that a host that is given up is off: its VMs may be started elsewhere, also those that nothing watches.
/// Whoever says so while the host runs makes VMs run twice.
#[utoipa::path(
    post, path = "/v1/hosts/{host}/confirm-off", tag = "hosts", params(("host" = String, Path, description = "Id or name"), ChangeQuery),
    responses((status = 200, body = HostAccepted), Refused)
)]
async fn confirm_off(
    State(api): State<Api>,
    by: By,
    PathArgs(name): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let host = id(&api, &name)?;
    carry_out(&api, &by, query, Intent::ConfirmHostOff { host }).await
}

/// Makes a one-time token with which a host can join.
#[utoipa::path(
    post, path = "/v1/join-tokens", tag = "hosts", request_body(content = Option<CreateJoinToken>),
    responses((status = 201, body = JoinToken), Refused)
)]
async fn create_join_token(
    State(api): State<Api>,
    By(actor): By,
    OptionalBody(body): OptionalBody<CreateJoinToken>,
) -> Result<(StatusCode, Json<JoinToken>), Refusal> {
    let ttl_s = body.ttl_s.unwrap_or(TOKEN_TTL_S);
    if ttl_s == 0 || ttl_s > MAX_TOKEN_TTL_S {
        return Err(Refusal(Problem::invalid(vec![FieldProblem::new(
            "ttl_s",
            format!("{ttl_s} is outside 1..={MAX_TOKEN_TTL_S}"),
            "choose a life of at most 30 days",
        )])));
    }
    let made = api
        .controller
        .create_join_token(Duration::from_secs(ttl_s), &actor)
        .await?;
    let server = format!("https://{}", api.agents_address);
    let command = format!("godwit host run --server {server} --join {}", made.token);
    Ok((
        StatusCode::CREATED,
        Json(JoinToken {
            token: made.token,
            server,
            command,
            expires_at: made.expires_at,
        }),
    ))
}

fn id(api: &Api, name: &str) -> Result<HostId, Refusal> {
    Ok(host_named(&api.controller.view(), name)?.id)
}
