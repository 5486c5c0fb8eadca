//! `/healthz` and `/metrics`.

use super::extract::Refused;
use super::{Api, metrics};
use axum::Json;
use axum::extract::State;
use axum::response::Response;
use godwit_channel::problem::Refusal;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(show_metrics))
}

/// The server works.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct Health {
    /// Always `ok`.
    status: &'static str,
    /// Version of the program.
    version: &'static str,
    /// Revision of the event log.
    revision: u64,
}

/// Says whether the server works and its store can be read.
#[utoipa::path(get, path = "/healthz", tag = "server", responses((status = 200, body = Health), Refused))]
async fn health(State(api): State<Api>) -> Result<Json<Health>, Refusal> {
    let revision = api.controller.view().event_revision;
    Ok(Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        revision,
    }))
}

/// Figures in the text format of OpenMetrics.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, content_type = "application/openmetrics-text", body = String), Refused)
)]
async fn show_metrics(State(api): State<Api>) -> Response {
    metrics::answer(&api)
}
