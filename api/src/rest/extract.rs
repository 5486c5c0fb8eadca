//! What handlers take out of requests, beyond what the channel crate offers.

use super::access::Caller;
use super::{Api, convert};
use crate::resource::{
    DiskAccepted, HostAccepted, ImageAccepted, MaintenanceAccepted, NetworkAccepted,
    SnapshotAccepted, VmAccepted,
};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use godwit_channel::problem::{Refusal, parse_json};
use godwit_controller::intent::{Accepted, Intent, Resource};
use godwit_controller::model::{Actor, Disk, Host, Image, Maintenance, Network, Snapshot, Vm};
use godwit_controller::view::View;
use godwit_wire::id::{HostId, MaintenanceId};
use godwit_wire::problem::{FieldProblem, Problem};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use utoipa::{IntoParams, IntoResponses};

/// Fallback: there is nothing at this path.
pub(super) async fn no_such_path(uri: Uri) -> Refusal {
    let problem = Problem::not_found("resource", uri.path());
    Refusal(problem.with_remedy("look at /openapi.json for all paths, or at / for the console"))
}

/// Every refusal, for the API's description.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum Refused {
    /// The request cannot be carried out; the body says why and what to do.
    #[response(status = "default", content_type = "application/problem+json")]
    Problem(#[to_schema] crate::resource::Problem),
}

/// Parameters of every change.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct ChangeQuery {
    /// Only say what would happen.
    pub(super) dry_run: bool,
}

/// A JSON body that may be left out.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptionalBody<T>(pub(super) T);

impl<T, S> FromRequest<S> for OptionalBody<T>
where
    T: DeserializeOwned + Default,
    S: Send + Sync,
{
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Self::Rejection> {
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(IntoResponse::into_response)?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self(T::default()));
        }
        parse_json(&bytes)
            .map(Self)
            .map_err(|problem| Refusal(problem).into_response())
    }
}

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct By(pub(super) Actor);

impl<S: Send + Sync> FromRequestParts<S> for By {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        match parts.extensions.get::<Caller>() {
            Some(caller) => Ok(Self(Actor::new(caller.name()))),
            None => Err(Refusal(Problem::internal(
                "a route was reached without passing the access check",
            ))),
        }
    }
}

/// The VM a path names.
pub(super) fn vm_named<'v>(view: &'v View, name: &str) -> Result<&'v Arc<Vm>, Refusal> {
    view.find_vm(name).ok_or_else(|| {
        Refusal(
            Problem::not_found("VM", name).with_remedy("`godwit vm list` shows the VMs there are"),
        )
    })
}

/// The host a path names.
pub(super) fn host_named<'v>(view: &'v View, name: &str) -> Result<&'v Arc<Host>, Refusal> {
    view.find_host(name).ok_or_else(|| {
        Refusal(
            Problem::not_found("host", name)
                .with_remedy("`godwit host list` shows the hosts there are"),
        )
    })
}

/// The image a path names.
pub(super) fn image_named<'v>(view: &'v View, name: &str) -> Result<&'v Arc<Image>, Refusal> {
    view.find_image(name).ok_or_else(|| {
        let remedy = "`godwit image list` shows the images there are";
        Refusal(Problem::not_found("image", name).with_remedy(remedy))
    })
}

/// The disk a path names.
pub(super) fn disk_named<'v>(view: &'v View, name: &str) -> Result<&'v Arc<Disk>, Refusal> {
    view.find_disk(name).ok_or_else(|| {
        let remedy = "`godwit disk list` shows the disks there are";
        Refusal(Problem::not_found("disk", name).with_remedy(remedy))
    })
}

/// The network a path names.
pub(super) fn network_named<'v>(view: &'v View, name: &str) -> Result<&'v Arc<Network>, Refusal> {
    view.find_network(name).ok_or_else(|| {
        let remedy = "`godwit network list` shows the networks there are";
        Refusal(Problem::not_found("network", name).with_remedy(remedy))
    })
}

/// The maintenance a path names.
pub(super) fn maintenance_named<'v>(
    view: &'v View,
    id: &str,
) -> Result<&'v Arc<Maintenance>, Refusal> {
    id.parse()
        .ok()
        .and_then(|id: MaintenanceId| view.maintenances.get(&id))
        .ok_or_else(|| {
            Refusal(
                Problem::not_found("maintenance", id)
                    .with_remedy("`godwit maintenance list` shows the maintenances there are"),
            )
        })
}

/// Something a field of a body names and that does not exist: the body is at fault, not the path.
pub(super) fn unknown_in_field(field: &str, what: &str, name: &str) -> Refusal {
    let remedy = format!("`godwit {what} list` shows what there is");
    Refusal(Problem::invalid(vec![FieldProblem::new(
        field,
        format!("there is no {what} {name}"),
        remedy,
    )]))
}

/// The host a field of a body names, if it names one.
pub(super) fn host_in_field(
    view: &View,
    field: &str,
    name: Option<&str>,
) -> Result<Option<HostId>, Refusal> {
    match name {
        None => Ok(None),
        Some(name) => match host_named(view, name) {
            Ok(host) => Ok(Some(host.id)),
            Err(_) => Err(unknown_in_field(field, "host", name)),
        },
    }
}

/// The snapshot a path names.
pub(super) fn snapshot_named<'v>(
    view: &'v View,
    vm: &str,
    name: &str,
) -> Result<&'v Arc<Snapshot>, Refusal> {
    let vm = vm_named(view, vm)?;
    view.find_snapshot(vm.id, name).ok_or_else(|| {
        let remedy = format!("`godwit vm snapshot list {}` shows what there is", vm.name);
        Refusal(Problem::not_found("snapshot", name).with_remedy(remedy))
    })
}

/// What became of an intent.
pub(super) enum Outcome {
    /// Nothing was changed.
    DryRun(Response),
    /// It was accepted.
    Accepted(Accepted),
}

/// Hands an intent to the controller, or asks what it would do.
pub(super) async fn submit(
    api: &Api,
    By(actor): &By,
    query: ChangeQuery,
    intent: Intent,
) -> Result<Outcome, Refusal> {
    if query.dry_run {
        let preview = api.controller.foresee(&intent).await?;
        return Ok(Outcome::DryRun(
            Json(convert::dry_run(preview)).into_response(),
        ));
    }
    Ok(Outcome::Accepted(
        api.controller.submit(intent, actor).await?,
    ))
}

/// Hands an intent to the controller and answers with the resource it changed: 202 with an operation, else 200.
pub(super) async fn carry_out(
    api: &Api,
    by: &By,
    query: ChangeQuery,
    intent: Intent,
) -> Result<Response, Refusal> {
    match submit(api, by, query, intent).await? {
        Outcome::DryRun(response) => Ok(response),
        Outcome::Accepted(accepted) => Ok(answer(api, accepted, StatusCode::OK)),
    }
}

/// The answer to an accepted change; `at_once` is the status when no operation is needed.
pub(super) fn answer(api: &Api, accepted: Accepted, at_once: StatusCode) -> Response {
    let view = api.controller.view();
    let operation = convert::operation_of(&view, accepted.operation);
    let (path, body) = match accepted.resource {
        Resource::Vm(id) => {
            let vm = view.vms.get(&id).map(|vm| convert::vm(&view, vm));
            (
                format!("/v1/vms/{id}"),
                vm.map(|vm| {
                    Json(VmAccepted {
                        operation: operation.clone(),
                        vm,
                    })
                    .into_response()
                }),
            )
        }
        Resource::Host(id) => {
            let host = view.hosts.get(&id).map(|host| convert::host(&view, host));
            let body = host.map(|host| {
                Json(HostAccepted {
                    operation: operation.clone(),
                    host,
                })
                .into_response()
            });
            (format!("/v1/hosts/{id}"), body)
        }
        Resource::Maintenance(id) => {
            let maintenance = view
                .maintenances
                .get(&id)
                .map(|record| convert::maintenance(record));
            let body = maintenance.map(|maintenance| {
                Json(MaintenanceAccepted {
                    operation: operation.clone(),
                    maintenance,
                })
                .into_response()
            });
            (format!("/v1/maintenances/{id}"), body)
        }
        Resource::Image(id) => {
            let image = view
                .images
                .get(&id)
                .map(|image| convert::image(&view, image));
            let body = image.map(|image| {
                Json(ImageAccepted {
                    operation: operation.clone(),
                    image,
                })
                .into_response()
            });
            (format!("/v1/images/{id}"), body)
        }
        Resource::Disk(id) => {
            let disk = view.disks.get(&id).map(|disk| convert::disk(&view, disk));
            let body = disk.map(|disk| {
                Json(DiskAccepted {
                    operation: operation.clone(),
                    disk,
                })
                .into_response()
            });
            (format!("/v1/disks/{id}"), body)
        }
        Resource::Network(id) => {
            let network = view
                .networks
                .get(&id)
                .map(|network| convert::network(&view, network));
            let body = network.map(|network| {
                Json(NetworkAccepted {
                    operation: operation.clone(),
                    network,
                })
                .into_response()
            });
            (format!("/v1/networks/{id}"), body)
        }
        Resource::Snapshot(id) => {
            let snapshot = view.snapshots.get(&id);
            let path = snapshot.map(|snapshot| format!("/v1/vms/{}/snapshots/{id}", snapshot.vm));
            let body = snapshot.map(|snapshot| {
                Json(SnapshotAccepted {
                    operation: operation.clone(),
                    snapshot: convert::snapshot(&view, snapshot),
                })
                .into_response()
            });
            (path.unwrap_or_default(), body)
        }
        Resource::Operation(id) => {
            let body = convert::operation_of(&view, Some(id))
                .map(|operation| Json(operation).into_response());
            (format!("/v1/operations/{id}"), body)
        }
    };
    // The resource may be gone by now: a removed host, or a VM that was off when it was deleted.
    let Some(mut response) = body else {
        return StatusCode::NO_CONTENT.into_response();
    };
    let location = match accepted.operation {
        Some(id) => {
            *response.status_mut() = StatusCode::ACCEPTED;
            format!("/v1/operations/{id}")
        }
        None => {
            *response.status_mut() = at_once;
            path
        }
    };
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}
