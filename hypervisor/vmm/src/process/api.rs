//! HTTP + JSON on the UNIX socket: `godwit_wire::vmm_api` as routes.

use super::driver::{Driver, DriverHandle};
use axum::extract::{Path, State};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use godwit_channel::problem::{Answer, JsonBody, QueryArgs, Refusal, no_such_path};
use godwit_wire::migration::MigrationStatus;
use godwit_wire::problem::Problem;
use godwit_wire::succession::{
    OfferSuccession, PrepareSuccession, SuccessionCommand, SuccessionStatus,
};
use godwit_wire::vmm_api::{
    CreateRequest, DirtyRate, DirtyRateRequest, IncomingReady, IncomingRequest, OutgoingRequest,
    ResizeDisk, RestoreRequest, SnapshotInfo, SnapshotRequest, VmmInfo,
};
use serde::Deserialize;
use std::time::Duration;

/// Longest a caller may wait for news of a migration in one request.
const MAX_WAIT_MS: u64 = 60_000;

pub(super) fn router(driver: DriverHandle) -> Router {
    Router::new()
        .route("/v1/info", get(info))
        .route("/v1/machine", put(create))
        .route("/v1/incoming", put(incoming))
        .route("/v1/boot", command(Driver::boot))
        .route("/v1/pause", command(Driver::pause))
        .route("/v1/resume", command(Driver::resume))
        .route("/v1/stop", command(Driver::stop))
        .route("/v1/kill", command(Driver::kill))
        .route("/v1/balloon", command(Driver::balloon))
        .route("/v1/disks/{name}/resize", post(resize_disk))
        .route("/v1/snapshot", post(snapshot))
        .route("/v1/restore", put(restore))
        .route("/v1/dirty-rate", post(dirty_rate))
        .route("/v1/outgoing", post(outgoing))
        .route("/v1/migration", get(migration))
        .route("/v1/migration/cancel", command(Driver::cancel))
        .route(
            "/v1/migration/bandwidth",
            command(Driver::set_migration_bandwidth),
        )
        .route("/v1/migration/abort", command(Driver::abort))
        .route("/v1/migration/release", command(Driver::release))
        .route("/v1/migration/commit", command(Driver::commit))
        .route("/v1/succession/offer", put(offer_succession))
        .route("/v1/succession/prepare", put(prepare_succession))
        .route("/v1/succession/take", post(take_succession))
        .route("/v1/succession/commit", command(Driver::commit_succession))
        .route("/v1/succession/abort", command(Driver::abort_succession))
        .fallback(no_such_path)
        .with_state(driver)
}

/// A route whose body is handed to one of the driver's methods.
fn command<B, T>(
    act: fn(&mut Driver, B) -> Result<T, Problem>,
) -> axum::routing::MethodRouter<DriverHandle>
where
    B: serde::de::DeserializeOwned + Send + 'static,
    T: serde::Serialize + Send + 'static,
{
    post(
        move |State(driver): State<DriverHandle>, JsonBody(body): JsonBody<B>| async move {
            let answer: Answer<T> = driver
                .call(move |d| act(d, body))
                .await
                .map(Json)
                .map_err(Refusal);
            answer
        },
    )
}

async fn info(State(driver): State<DriverHandle>) -> Answer<VmmInfo> {
    Ok(Json(driver.call(Driver::info).await?))
}

async fn create(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<CreateRequest>,
) -> Answer<VmmInfo> {
    Ok(Json(driver.call(move |d| d.create(request)).await?))
}

async fn incoming(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<IncomingRequest>,
) -> Answer<IncomingReady> {
    Ok(Json(driver.call(move |d| d.incoming(request)).await?))
}

async fn outgoing(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<OutgoingRequest>,
) -> Answer<MigrationStatus> {
    Ok(Json(driver.call(move |d| d.outgoing(request)).await?))
}

async fn resize_disk(
    State(driver): State<DriverHandle>,
    Path(name): Path<String>,
    JsonBody(request): JsonBody<ResizeDisk>,
) -> Answer<VmmInfo> {
    Ok(Json(
        driver.call(move |d| d.resize_disk(&name, request)).await?,
    ))
}

async fn snapshot(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<SnapshotRequest>,
) -> Answer<SnapshotInfo> {
    blocking(move || driver.snapshot(&request)).await
}

async fn restore(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<RestoreRequest>,
) -> Answer<VmmInfo> {
    blocking(move || driver.restore(request)).await
}

async fn offer_succession(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<OfferSuccession>,
) -> Answer<SuccessionStatus> {
    Ok(Json(
        driver.call(move |d| d.offer_succession(request)).await?,
    ))
}

async fn prepare_succession(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<PrepareSuccession>,
) -> Answer<SuccessionStatus> {
    blocking(move || driver.prepare_succession(&request)).await
}

async fn take_succession(
    State(driver): State<DriverHandle>,
    JsonBody(command): JsonBody<SuccessionCommand>,
) -> Answer<SuccessionStatus> {
    blocking(move || driver.take_succession(command)).await
}

/// Runs what takes long on a thread that may block. It goes on if the caller hangs up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Answer<T> {
    let done = tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Problem::internal(error.to_string()))?;
    Ok(Json(done?))
}

async fn dirty_rate(
    State(driver): State<DriverHandle>,
    JsonBody(request): JsonBody<DirtyRateRequest>,
) -> Answer<DirtyRate> {
    blocking(move || driver.watch_dirtying(request)).await
}

#[derive(Debug, Deserialize)]
struct Wait {
    #[serde(default)]
    after: u64,
    #[serde(default)]
    wait_ms: u64,
}

/// Answers when the migration has changed since `after`, or when the wait is over.
async fn migration(
    State(driver): State<DriverHandle>,
    QueryArgs(wait): QueryArgs<Wait>,
) -> Answer<MigrationStatus> {
    let (mut sequence, status) = driver.call(|d| d.watch_migration()).await?;
    let limit = Duration::from_millis(wait.wait_ms.min(MAX_WAIT_MS));
    let changed = sequence.wait_for(|sequence| *sequence > wait.after);
    // Running out of time is an answer too: the figures have moved on.
    let _ = tokio::time::timeout(limit, changed).await;
    Ok(Json(status()))
}
