//! Pools, images and disks in the agent's API.

use super::{Agent, Shared};
use crate::storage::{MAX_UPLOAD_PIECES_WAITING, Storage, StorageError};
use crate::vm::{Command, Resize};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures_util::StreamExt;
use godwit_channel::problem::{Answer, JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_wire::devices::DiskSource;
use godwit_wire::id::{DiskId, ImageId, MigrationId, PoolId, SnapshotId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{
    CreateDisk, DiskReport, GrowDisk, ImageReport, ImportImage, MADE_FOR_NONE, SnapshotReport,
    TakeSnapshot, WorkState,
};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the next bytes of an upload may take.
const UPLOAD_IDLE: Duration = Duration::from_secs(60);

type ImagePath = PathArgs<(PoolId, ImageId)>;
type DiskPath = PathArgs<(PoolId, DiskId)>;
type SnapshotPath = PathArgs<(PoolId, SnapshotId)>;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route(
            "/v1/pools/{pool}/images/{image}",
            post(import).get(image).delete(delete_image),
        )
        .route("/v1/pools/{pool}/images/{image}/content", put(upload))
        .route(
            "/v1/pools/{pool}/disks/{disk}",
            post(create).get(disk).delete(delete_disk),
        )
        .route("/v1/pools/{pool}/disks/{disk}/grow", post(grow))
        .route(
            "/v1/pools/{pool}/snapshots/{snapshot}",
            get(snapshot).delete(delete_snapshot),
        )
        .route("/v1/vms/{vm}/snapshots/{snapshot}", post(take_snapshot))
}

/// Does something that may block as long as a pool's file system does.
async fn blocking<T: Send + 'static>(
    agent: &Agent,
    work: impl FnOnce(&Arc<Storage>) -> Result<T, StorageError> + Send + 'static,
) -> Result<Result<T, StorageError>, Refusal> {
    let storage = agent.registry.context().storage.clone();
    tokio::task::spawn_blocking(move || work(&storage))
        .await
        .map_err(|error| Refusal(Problem::internal(error.to_string())))
}

fn answer<T>(done: Result<T, StorageError>) -> Answer<T> {
    done.map(Json).map_err(|error| Refusal(error.problem()))
}

async fn import(
    State(agent): Shared,
    PathArgs((pool, image)): ImagePath,
    JsonBody(ask): JsonBody<ImportImage>,
) -> Answer<ImageReport> {
    answer(
        blocking(&agent, move |storage| {
            storage.import_image(pool, image, ask)
        })
        .await?,
    )
}

async fn image(State(agent): Shared, PathArgs((pool, image)): ImagePath) -> Answer<ImageReport> {
    answer(blocking(&agent, move |storage| storage.image(pool, image)).await?)
}

async fn delete_image(
    State(agent): Shared,
    PathArgs((pool, image)): ImagePath,
) -> Result<StatusCode, Refusal> {
    let Json(()) =
        answer(blocking(&agent, move |storage| storage.delete_image(pool, image)).await?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Streams the content of an announced image to the importer; a slow disk slows the sender.
async fn upload(
    State(agent): Shared,
    PathArgs((pool, image)): ImagePath,
    request: Request,
) -> Answer<ImageReport> {
    let look = move |storage: &Arc<Storage>| storage.image(pool, image);
    let present = answer(blocking(&agent, look).await?)?;
    if present.0.state == WorkState::Ready {
        return Ok(present);
    }
    let (sender, pieces) = mpsc::channel(MAX_UPLOAD_PIECES_WAITING);
    let Json(()) = answer(
        blocking(&agent, move |storage| {
            storage.begin_upload(pool, image, pieces)
        })
        .await?,
    )?;
    let mut content = request.into_body().into_data_stream();
    // What ends early is too short, and the importer says so.
    while let Ok(Some(Ok(piece))) = tokio::time::timeout(UPLOAD_IDLE, content.next()).await {
        if sender.send(piece).await.is_err() {
            break;
        }
    }
    drop(sender);
    answer(blocking(&agent, look).await?)
}

async fn create(
    State(agent): Shared,
    PathArgs((pool, disk)): DiskPath,
    JsonBody(ask): JsonBody<CreateDisk>,
) -> Answer<DiskReport> {
    answer(blocking(&agent, move |storage| storage.create_disk(pool, disk, &ask)).await?)
}

async fn disk(State(agent): Shared, PathArgs((pool, disk)): DiskPath) -> Answer<DiskReport> {
    answer(blocking(&agent, move |storage| storage.disk(pool, disk)).await?)
}

#[derive(Debug, Deserialize)]
struct DeleteArgs {
    /// Only the disk that was made for this migration, or for [none](MADE_FOR_NONE).
    #[serde(default)]
    made_for: Option<String>,
}

async fn delete_disk(
    State(agent): Shared,
    PathArgs((pool, disk)): DiskPath,
    QueryArgs(DeleteArgs { made_for }): QueryArgs<DeleteArgs>,
) -> Result<StatusCode, Refusal> {
    let deleted = blocking(&agent, move |storage| match made_for.as_deref() {
        None => storage.delete_disk(pool, disk),
        Some(MADE_FOR_NONE) => storage.erase_copy(pool, disk, None),
        Some(id) => {
            let made_for = id
                .parse::<MigrationId>()
                .map_err(|error| StorageError::Invalid {
                    field: "made_for",
                    problem: format!("{id} is no migration: {error}"),
                    remedy: "give the id of a migration, or none",
                })?;
            storage.erase_copy(pool, disk, Some(made_for))
        }
    });
    let Json(()) = answer(deleted.await?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Grows a disk; one that a machine uses here is grown by the machine's VMM.
async fn grow(
    State(agent): Shared,
    PathArgs((pool, disk)): DiskPath,
    JsonBody(ask): JsonBody<GrowDisk>,
) -> Answer<DiskReport> {
    let grown = blocking(&agent, move |storage| storage.grow_disk(pool, disk, ask)).await?;
    let Err(StorageError::DiskInUse(_)) = grown else {
        return answer(grown);
    };
    let Some((vm, name)) = user_of(&agent, pool, disk).await? else {
        return answer(grown);
    };
    let resize = Resize {
        disk: name,
        bytes: ask.bytes,
    };
    agent
        .registry
        .ask(vm, |reply| Command::Resize(resize, reply))
        .await?;
    answer(blocking(&agent, move |storage| storage.disk_has_grown(pool, disk)).await?)
}

/// Begins to save a VM; its driver says whether that may be.
async fn take_snapshot(
    State(agent): Shared,
    PathArgs((vm, snapshot)): PathArgs<(VmId, SnapshotId)>,
    JsonBody(ask): JsonBody<TakeSnapshot>,
) -> Answer<SnapshotReport> {
    let taken = agent
        .registry
        .ask(vm, |reply| Command::Snapshot((snapshot, ask), reply))
        .await?;
    Ok(Json(taken))
}

async fn snapshot(
    State(agent): Shared,
    PathArgs((pool, snapshot)): SnapshotPath,
) -> Answer<SnapshotReport> {
    answer(blocking(&agent, move |storage| storage.snapshot(pool, snapshot)).await?)
}

async fn delete_snapshot(
    State(agent): Shared,
    PathArgs((pool, snapshot)): SnapshotPath,
) -> Result<StatusCode, Refusal> {
    let Json(()) = answer(
        blocking(&agent, move |storage| {
            storage.delete_snapshot(pool, snapshot)
        })
        .await?,
    )?;
    Ok(StatusCode::NO_CONTENT)
}

/// The VM of this host that has the disk, and what it calls it.
async fn user_of(
    agent: &Agent,
    pool: PoolId,
    disk: DiskId,
) -> Result<Option<(VmId, String)>, Refusal> {
    let state = agent.registry.context().state.clone();
    let search = move || {
        let wanted = DiskSource::Volume { pool, disk };
        state
            .known_vms()
            .unwrap_or_default()
            .into_iter()
            .find_map(|vm| {
                let record = state.vm(vm).read_record().ok()??;
                let mut disks = record.spec.devices.disks.into_iter();
                let found = disks.find(|disk| disk.source == wanted)?;
                Some((vm, found.name))
            })
    };
    tokio::task::spawn_blocking(search)
        .await
        .map_err(|error| Refusal(Problem::internal(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{self, HostSampler};
    use crate::vm::tests::fake::Host;
    use godwit_channel::uds;
    use godwit_wire::machine::{CpuBaseline, CpuFacts};
    use serde_json::{Value, json};
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use uuid::Uuid;

    /// The routes on a socket, and the pool they are asked about.
    async fn serve(host: &Host) -> (std::path::PathBuf, PoolId) {
        let cpu = CpuFacts {
            level: CpuBaseline::V2,
            signature: "s".into(),
            model: "m".into(),
        };
        let address = ([127, 0, 0, 1], 1).into();
        let agent = Arc::new(Agent {
            facts: facts::facts("host".into(), address, cpu, None, Uuid::nil()),
            sampler: HostSampler::new(),
            registry: host.registry.clone(),
        });
        let storage = &host.registry.context().storage;
        storage.sample().await;
        let pool = storage.reports()[0].pool;
        assert_eq!(agent.report().pools, storage.reports());
        let socket = host.root.path().join("api.sock");
        let listener = uds::Listener::bind(socket.clone()).unwrap();
        let router = routes()
            .layer(axum::extract::DefaultBodyLimit::max(
                super::super::MAX_COMMAND_BYTES,
            ))
            .with_state(agent);
        tokio::spawn(uds::serve(listener, router, std::future::pending()));
        (socket, pool)
    }

    async fn ask(socket: &Path, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    async fn ask_json(socket: &Path, method: &str, path: &str, body: Value) -> (u16, Value) {
        ask(socket, method, path, body.to_string().as_bytes()).await
    }

    #[tokio::test]
    async fn an_image_is_uploaded_and_a_disk_made_from_it_grows_and_goes() {
        let host = Host::new().await;
        let (socket, pool) = serve(&host).await;
        let image = format!("/v1/pools/{pool}/images/{}", ImageId::fresh());
        let disk = format!("/v1/pools/{pool}/disks/{}", DiskId::fresh());
        // Much more than a command may have.
        let content = vec![5; 3 << 20];
        let (status, _) = ask(&socket, "PUT", &format!("{image}/content"), b"").await;
        assert_eq!(status, 404);
        let announced = json!({ "source": { "kind": "upload", "bytes": content.len() } });
        let (status, report) = ask_json(&socket, "POST", &image, announced).await;
        assert_eq!((status, &report["state"]), (200, &json!("working")));
        let (status, mut report) = ask(&socket, "PUT", &format!("{image}/content"), &content).await;
        assert_eq!(status, 200);
        while report["state"] == "working" {
            report = ask(&socket, "GET", &image, b"").await.1;
        }
        assert_eq!(
            (&report["state"], &report["file_bytes"]),
            (&json!("ready"), &json!(3 << 20))
        );

        let thin =
            json!({ "format": "qcow2", "from": { "kind": "image", "image": report["image"] } });
        let (status, report) = ask_json(&socket, "POST", &disk, thin).await;
        assert_eq!((status, &report["virtual_bytes"]), (200, &json!(3 << 20)));
        let larger = json!({ "bytes": 8 << 20 });
        let (status, report) = ask_json(&socket, "POST", &format!("{disk}/grow"), larger).await;
        assert_eq!((status, &report["virtual_bytes"]), (200, &json!(8 << 20)));
        let smaller = json!({ "bytes": 4 << 20 });
        let (status, problem) = ask_json(&socket, "POST", &format!("{disk}/grow"), smaller).await;
        assert_eq!(
            (status, &problem["fields"][0]["field"]),
            (422, &json!("bytes"))
        );
        let (status, problem) = ask(&socket, "DELETE", &image, b"").await;
        assert_eq!((status, &problem["type"]), (409, &json!("image-in-use")));
        for path in [&disk, &disk, &image] {
            assert_eq!(ask(&socket, "DELETE", path, b"").await.0, 204);
        }
        assert_eq!(ask(&socket, "GET", &disk, b"").await.0, 404);
        let elsewhere = format!("/v1/pools/{}/disks/{}", PoolId::fresh(), DiskId::fresh());
        assert_eq!(ask(&socket, "GET", &elsewhere, b"").await.0, 404);
    }
}
