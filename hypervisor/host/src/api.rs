//! What the agent serves to the control plane (`godwit_wire::host_api` has the table).

mod storage;

use crate::facts::HostSampler;
use crate::record::{Seat, VmDirectory};
use crate::vm::{Command, Registry, Reply};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, get, on, post};
use axum::{Json, Router, middleware};
use godwit_channel::problem::{self, Answer, JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_channel::uds::UdsClient;
use godwit_channel::{tls, upgrade};
use godwit_wire::host_api::{HostFacts, HostReport, SERIAL_UPGRADE};
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::unit::Bytes;
use godwit_wire::usage::HostUsage;
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;

/// Longest command; a spec is the longest thing in it.
const MAX_COMMAND_BYTES: usize = 256 * 1024;

/// How long a VMM may take to tell a dirty rate, beside the watching itself: another watcher may be first.
const DIRTY_RATE_SLACK: Duration = Duration::from_secs(8);

/// What the handlers and the heartbeats share.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) facts: HostFacts,
    pub(crate) sampler: HostSampler,
    pub(crate) registry: Arc<Registry>,
}

impl Agent {
    /// What is kept for VMs that may come home is given up when it is needed: it is not in use.
    fn usage(&self) -> HostUsage {
        let usage = self.sampler.usage();
        let kept = self.registry.context().kept.bytes();
        HostUsage {
            memory_used_bytes: Bytes(usage.memory_used_bytes.0.saturating_sub(kept.0)),
            kept_memory_bytes: kept,
            ..usage
        }
    }

    pub(crate) fn report(&self) -> HostReport {
        HostReport {
            pools: self.registry.context().storage.reports(),
            facts: self.facts.clone(),
            usage: self.usage(),
            vms: self.registry.context().board.reports(),
        }
    }
}

type Shared = State<Arc<Agent>>;

/// The agent's API; everything in it is for the control plane only.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    const PUT: MethodFilter = MethodFilter::PUT;
    const POST: MethodFilter = MethodFilter::POST;
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/vms/{vm}", hand_on(PUT, Command::Start).delete(destroy))
        .route("/v1/vms/{vm}/stop", hand_on(POST, Command::Stop))
        .route("/v1/vms/{vm}/pause", hand_on(POST, Command::Pause))
        .route("/v1/vms/{vm}/resume", hand_on(POST, Command::Resume))
        .route("/v1/vms/{vm}/balloon", hand_on(POST, Command::Balloon))
        .route("/v1/vms/{vm}/incoming", hand_on(PUT, Command::Prepare))
        .route("/v1/vms/{vm}/outgoing", hand_on(POST, Command::Send))
        .route(
            "/v1/vms/{vm}/migration/cancel",
            hand_on(POST, Command::Cancel),
        )
        .route(
            "/v1/vms/{vm}/migration/bandwidth",
            hand_on(POST, Command::Bandwidth),
        )
        .route("/v1/vms/{vm}/upgrade", hand_on(POST, Command::Upgrade))
        .route("/v1/vms/{vm}/dirty-rate", post(dirty_rate))
        .route("/v1/vms/{vm}/serial", get(serial))
        .merge(storage::routes())
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_COMMAND_BYTES))
        .layer(middleware::from_fn(tls::require_server))
        .with_state(agent)
}

async fn host(State(agent): Shared) -> Json<HostReport> {
    Json(agent.report())
}

/// A method that hands its body, as a command, to the driver of the VM in the path.
fn hand_on<B, T>(
    method: MethodFilter,
    command: fn(B, Reply<T>) -> Command,
) -> MethodRouter<Arc<Agent>>
where
    B: DeserializeOwned + Send + 'static,
    T: Serialize + Send + 'static,
{
    let handler = move |State(agent): Shared,
                        PathArgs(vm): PathArgs<VmId>,
                        JsonBody(ask): JsonBody<B>| async move {
        let done = agent.registry.ask(vm, |reply| command(ask, reply)).await;
        let answer: Answer<T> = done.map(Json).map_err(Refusal);
        answer
    };
    on(method, handler)
}

#[derive(Debug, Deserialize)]
struct DestroyArgs {
    epoch: Epoch,
}

async fn destroy(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    QueryArgs(DestroyArgs { epoch }): QueryArgs<DestroyArgs>,
) -> Result<StatusCode, Refusal> {
    agent
        .registry
        .ask(vm, |reply| Command::Destroy(epoch, reply))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Hands the question to the VMM. It changes nothing, so the VM's driver need not take turns for it; the VMM refuses
/// while a migration or a snapshot uses the dirty log, and ends it for one that begins.
async fn dirty_rate(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<DirtyRateRequest>,
) -> Answer<DirtyRate> {
    let problems = ask.problems();
    if !problems.is_empty() {
        return Err(Refusal(Problem::invalid(problems)));
    }
    let context = agent.registry.context();
    let reports = context.board.reports();
    if !reports
        .iter()
        .any(|report| report.vm == vm && report.state.is_some())
    {
        let detail = format!("VM {vm} does not run here");
        return Err(Refusal(
            Problem::conflict("not-running", detail)
                .with_remedy("start the VM, or ask the host it runs on"),
        ));
    }
    let limit = Duration::from_millis(ask.window_ms) + DIRTY_RATE_SLACK;
    let (directory, seat) = seat_of(context.state.vm(vm)).await?;
    UdsClient::new(directory.api_socket(seat))
        .request_within(limit, Method::POST, "/v1/dirty-rate", Some(&ask))
        .await
        .map(Json)
        .map_err(|error| Refusal(error.into_problem()))
}

/// Which of two VMMs the machine is in, as its record says, should one be taking it over from the other.
async fn seat_of(directory: VmDirectory) -> Result<(VmDirectory, Seat), Refusal> {
    tokio::task::spawn_blocking(move || {
        let record = directory.read_record().ok().flatten();
        let seat = record.map(|record| record.seat).unwrap_or_default();
        (directory, seat)
    })
    .await
    .map_err(|error| Refusal(Problem::internal(error.to_string())))
}

/// Joins the caller to the VM's serial socket; the VMM sends its ring first.
async fn serial(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    request: Request,
) -> Result<Response, Refusal> {
    let (directory, seat) = seat_of(agent.registry.context().state.vm(vm)).await?;
    let path = directory.serial_socket(seat);
    let mut console = UnixStream::connect(&path).await.map_err(|error| {
        let detail = format!("VM {vm} has no serial console here: {error}");
        Refusal(
            Problem::conflict("not-running", detail)
                .with_remedy("start the VM, or ask the host it runs on"),
        )
    })?;
    upgrade::accept(request, SERIAL_UPGRADE, move |mut caller| async move {
        if let Err(error) = tokio::io::copy_bidirectional(&mut caller, &mut console).await {
            tracing::debug!(%vm, %error, "a serial console broke off");
        }
    })
}
