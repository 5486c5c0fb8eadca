//! `/v1/operations` and `/v1/migrations`.

use super::extract::{By, ChangeQuery, Refused, carry_out};
use super::page::{PageQuery, page};
use super::{Api, convert};
use crate::resource::{List, Migration, Operation};
use axum::Json;
use axum::extract::State;
use axum::response::Response;
use godwit_channel::problem::{PathArgs, QueryArgs, Refusal};
use godwit_controller::intent::Intent;
use godwit_wire::id::{MigrationId, OperationId};
use godwit_wire::problem::Problem;
use serde::Deserialize;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Longest wait for an operation; a client that wants longer asks again.
const MAX_WAIT_S: u64 = 30;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(cancel))
        .routes(routes!(list_migrations))
        .routes(routes!(show_migration))
}

#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Wait this long, at most 30, for the operation to end.
    wait_s: u64,
}

/// Lists operations, oldest first.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", params(PageQuery), responses((status = 200, body = List<Operation>), Refused))]
async fn list(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Operation>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.operations, |operation| {
        convert::operation(&view, operation)
    })
    .map(Json)
}

/// Shows an operation, at once or when it has ended.
#[utoipa::path(get, path = "/v1/operations/{operation}", tag = "operations", params(("operation" = String, Path), WaitQuery), responses((status = 200, body = Operation), Refused))]
async fn show(
    State(api): State<Api>,
    PathArgs(text): PathArgs<String>,
    QueryArgs(query): QueryArgs<WaitQuery>,
) -> Result<Json<Operation>, Refusal> {
    let id = id(&text)?;
    let deadline = Instant::now() + Duration::from_secs(query.wait_s.min(MAX_WAIT_S));
    let mut changed = api.controller.changed();
    loop {
        changed.mark_unchanged();
        let view = api.controller.view();
        let record = view
            .operations
            .get(&id)
            .ok_or_else(|| no_such_operation(&text))?;
        if !record.state.is_final() {
            let waited = timeout_at(deadline, async {
                tokio::select! {
                    waited = changed.changed() => waited,
                    () = api.shutdown.cancelled() => Ok(()),
                }
            });
            if matches!(waited.await, Ok(Ok(()))) && !api.shutdown.is_cancelled() {
                continue;
            }
        }
        return Ok(Json(convert::operation(&view, record)));
    }
}

/// Calls an operation off; what cannot be called off any more is finished.
#[utoipa::path(
    post, path = "/v1/operations/{operation}/cancel", tag = "operations", params(("operation" = String, Path), ChangeQuery),
    responses((status = 200, description = "It had ended already.", body = Operation), (status = 202, body = Operation), Refused)
)]
async fn cancel(
    State(api): State<Api>,
    by: By,
    PathArgs(text): PathArgs<String>,
    QueryArgs(query): QueryArgs<ChangeQuery>,
) -> Result<Response, Refusal> {
    let operation = id(&text)?;
    carry_out(&api, &by, query, Intent::CancelOperation { operation }).await
}

/// Lists migrations, oldest first.
#[utoipa::path(get, path = "/v1/migrations", tag = "migrations", params(PageQuery), responses((status = 200, body = List<Migration>), Refused))]
async fn list_migrations(
    State(api): State<Api>,
    QueryArgs(query): QueryArgs<PageQuery>,
) -> Result<Json<List<Migration>>, Refusal> {
    let view = api.controller.view();
    page(&query, &view, &view.migrations, |migration| {
        convert::migration(&view, migration)
    })
    .map(Json)
}

/// Shows a migration.
#[utoipa::path(get, path = "/v1/migrations/{migration}", tag = "migrations", params(("migration" = String, Path)), responses((status = 200, body = Migration), Refused))]
async fn show_migration(
    State(api): State<Api>,
    PathArgs(text): PathArgs<String>,
) -> Result<Json<Migration>, Refusal> {
    let view = api.controller.view();
    let migration =
        text.parse()
            .ok()
            .and_then(|id: MigrationId| view.migrations.get(&id))
            .ok_or_else(|| {
                Refusal(Problem::not_found("migration", &text).with_remedy(
                    "`godwit migration list` shows the migrations that are remembered",
                ))
            })?;
    Ok(Json(convert::migration(&view, migration)))
}

fn id(text: &str) -> Result<OperationId, Refusal> {
    text.parse().map_err(|_| no_such_operation(text))
}

fn no_such_operation(text: &str) -> Refusal {
    Refusal(
        Problem::not_found("operation", text)
            .with_remedy("`godwit operation list` shows the operations that are remembered"),
    )
}
