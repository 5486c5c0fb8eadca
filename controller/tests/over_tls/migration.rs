//! What the ends of a migration prove themselves with: made for the hosts, kept by nobody else.

use super::{facts, operator, start, stopped};
use axum::extract::{Path, State};
use axum::routing::{post, put};
use axum::{Json, Router};
use godwit_channel::pki::{HostRequest, JoinToken};
use godwit_channel::tls::{self, Listener, MigrationTls, TlsClient};
use godwit_controller::model::{DisksOnMove, PowerIntent};
use godwit_controller::{Controller, Intent, NewVm};
use godwit_wire::host_api::{
    Heartbeat, HeartbeatReply, HostFacts, HostReport, JoinReply, JoinRequest, PrepareIncoming,
    StartOutgoing, StartVm, VmReport,
};
use godwit_wire::id::{Epoch, Generation, HostId, MigrationId, VmId};
use godwit_wire::migration::{MigrationIdentity, MigrationPolicy, MigrationToken};
use godwit_wire::usage::{HostUsage, VmUsage};
use godwit_wire::vmm_api::{IncomingReady, VmmState};
use rustls::Connection;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

const TOKEN: &str = "a-token-that-nobody-writes-down";
/// Longest a test waits for something that should happen at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an agent was told.
#[derive(Default)]
struct Told {
    vms: BTreeMap<VmId, VmReport>,
    prepare: Option<PrepareIncoming>,
    outgoing: Option<StartOutgoing>,
}

type Shared = Arc<Mutex<Told>>;

/// An agent that obeys and has no machines.
struct Agent {
    host: HostId,
    told: Shared,
    _tasks: [AbortOnDropHandle<()>; 2],
}

fn report(vm: VmId, epoch: Epoch, generation: Generation, state: VmmState) -> VmReport {
    VmReport {
        vm,
        epoch,
        generation,
        state: Some(state),
        usage: VmUsage::default(),
        migration: None,
        devices: None,
    }
}

async fn run(
    State(told): State<Shared>,
    Path(vm): Path<VmId>,
    Json(ask): Json<StartVm>,
) -> Json<VmReport> {
    let report = report(vm, ask.epoch, ask.generation, VmmState::Running);
    told.lock().unwrap().vms.insert(vm, report.clone());
    Json(report)
}

async fn incoming(
    State(told): State<Shared>,
    Path(vm): Path<VmId>,
    Json(ask): Json<PrepareIncoming>,
) -> Json<IncomingReady> {
    let mut told = told.lock().unwrap();
    let report = report(vm, ask.epoch, ask.generation, VmmState::Incoming);
    told.vms.insert(vm, report);
    told.prepare = Some(ask);
    Json(IncomingReady {
        address: ([127, 0, 0, 1], 9).into(),
        token: MigrationToken(TOKEN.into()),
    })
}

async fn outgoing(
    State(told): State<Shared>,
    Path(vm): Path<VmId>,
    Json(ask): Json<StartOutgoing>,
) -> Json<VmReport> {
    let mut told = told.lock().unwrap();
    let report = report(vm, ask.epoch, ask.generation, VmmState::Running);
    told.outgoing = Some(ask);
    Json(report)
}

impl Agent {
    async fn join(controller: &Controller, name: &str) -> Self {
        let token = controller
            .create_join_token(Duration::from_secs(60), &operator())
            .await
            .unwrap()
            .token;
        let token: JoinToken = token.parse().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let facts = HostFacts {
            address: listener.local_addr().unwrap(),
            ..facts(name)
        };
        let server = controller.agents_address().to_string();
        let request = HostRequest::fresh().unwrap();
        let pinned = TlsClient::to_server(&server, tls::client_pinned(token.authority).unwrap());
        let body = JoinRequest {
            token: token.secret,
            csr_pem: request.request_pem.clone(),
            facts: facts.clone(),
        };
        let reply: JoinReply = pinned.post("/v1/join", &body).await.unwrap();
        let identity = request.signed(reply.certificate_pem, reply.ca_pem);
        let told = Shared::default();
        let router = Router::new()
            .route("/v1/vms/{vm}", put(run))
            .route("/v1/vms/{vm}/incoming", put(incoming))
            .route("/v1/vms/{vm}/outgoing", post(outgoing))
            .with_state(told.clone());
        let config = tls::server_for_server_only(&identity).unwrap();
        let serving = tls::serve(
            Listener::new(listener, config),
            router,
            std::future::pending(),
        );
        let client = TlsClient::to_server(&server, tls::client(&identity).unwrap());
        let beating = beat(client, reply.host, facts, told.clone());
        Self {
            host: reply.host,
            told,
            _tasks: [serving.spawned(), beating.spawned()],
        }
    }

    /// What it was told, as soon as it was.
    async fn told<T>(&self, what: impl Fn(&Told) -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = what(&self.told.lock().unwrap()) {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .expect("the agent is told in time")
    }
}

trait Spawned: Future<Output = ()> + Send + Sized + 'static {
    fn spawned(self) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(self))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Spawned for F {}

async fn beat(client: TlsClient, host: HostId, facts: HostFacts, told: Shared) {
    for sequence in 1.. {
        let beat = Heartbeat {
            obeyed: 0,
            host,
            incarnation: Uuid::from_u128(1),
            sequence,
            report: HostReport {
                pools: Vec::new(),
                facts: facts.clone(),
                usage: HostUsage::default(),
                vms: told.lock().unwrap().vms.values().cloned().collect(),
            },
        };
        let _ = client.post::<HeartbeatReply>("/v1/heartbeat", &beat).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Both ends of one connection, shaken hands as far as they get.
fn shake_hands(source: &MigrationTls, target: &MigrationTls) -> Result<(), String> {
    let mut source_end = Connection::from(source.source().unwrap());
    let mut target_end = Connection::from(target.target().unwrap());
    let hand = |from: &mut Connection, to: &mut Connection| {
        let mut wire = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            to.read_tls(&mut wire).unwrap();
            to.process_new_packets()
                .map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(())
    };
    for _ in 0..4 {
        hand(&mut source_end, &mut target_end)?;
        hand(&mut target_end, &mut source_end)?;
    }
    assert!(!source_end.is_handshaking() && !target_end.is_handshaking());
    target
        .check_source(target_end.peer_certificates())
        .map_err(|error| error.to_string())
}

/// The lines of key and certificate that say something about this very end; those that name the CA also stand in the
/// CA's own certificate.
fn telling(identity: &MigrationIdentity) -> Vec<String> {
    let pem = [&identity.key_pem, &identity.certificate_pem].map(String::as_str);
    let lines = pem.into_iter().flat_map(|pem| {
        let lines: Vec<_> = pem
            .lines()
            .filter(|line| line.len() == 64 && !identity.authority_pem.contains(line))
            .map(str::to_owned)
            .collect();
        assert!(!lines.is_empty(), "{pem}");
        lines
    });
    lines.collect()
}

/// How many files were searched.
fn assert_untold(directory: &FilePath, secrets: &[String]) -> usize {
    let files = std::fs::read_dir(directory).unwrap();
    let mut searched = 0;
    for path in files.map(|entry| entry.unwrap().path()) {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        for secret in secrets {
            assert!(!text.contains(secret.as_str()), "{path:?} tells {secret}");
        }
        searched += 1;
    }
    searched
}

async fn until_running(controller: &Controller, name: &str) -> VmId {
    let running = async {
        loop {
            let view = controller.view();
            let vm = view.find_vm(name).unwrap();
            if view
                .report(vm)
                .is_some_and(|report| report.state == Some(VmmState::Running))
                && vm.operation.is_none()
            {
                return vm.id;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, running)
        .await
        .expect("the VM runs in time")
}

#[tokio::test]
async fn each_end_of_a_migration_gets_an_identity_for_its_part_and_the_store_gets_none() {
    let directory = tempfile::tempdir().unwrap();
    let controller = start(directory.path()).await;
    let (one, two) = (
        Agent::join(&controller, "host-1").await,
        Agent::join(&controller, "host-2").await,
    );
    let hosts_up = async {
        while controller.view().observed.len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, hosts_up).await.unwrap();
    let new = NewVm {
        intent: PowerIntent::Running,
        host: Some(one.host),
        ..stopped("a")
    };
    controller
        .submit(Intent::CreateVm(new), &operator())
        .await
        .unwrap();
    let vm = until_running(&controller, "a").await;
    let migrate = Intent::MigrateVm {
        vm,
        target: Some(two.host),
        policy: MigrationPolicy::default(),
        disks: DisksOnMove::SharedOnly,
    };
    controller.submit(migrate, &operator()).await.unwrap();

    let prepare = two.told(|told| told.prepare.clone()).await;
    let outgoing = one.told(|told| told.outgoing.clone()).await;
    let migration = prepare.migration;
    assert_eq!(outgoing.migration, migration);
    assert_eq!(outgoing.token, MigrationToken(TOKEN.into()));
    let (at_target, at_source) = (prepare.identity.unwrap(), outgoing.identity.unwrap());
    let as_end = |identity: &MigrationIdentity| MigrationTls::new(migration, identity);
    assert_eq!(
        shake_hands(&as_end(&at_source), &as_end(&at_target)),
        Ok(())
    );
    // The other way round, neither is what it claims to be.
    assert!(shake_hands(&as_end(&at_target), &as_end(&at_source)).is_err());
    let other = MigrationTls::new(MigrationId::fresh(), &at_target);
    let shown = CertificateDer::from_pem_slice(at_source.certificate_pem.as_bytes()).unwrap();
    assert!(other.check_source(Some(&[shown])).is_err());

    let mut secrets = vec![TOKEN.to_owned()];
    for identity in [&at_target, &at_source] {
        secrets.extend(telling(identity));
    }
    assert!(assert_untold(directory.path(), &secrets) > 1);
    controller.shutdown().await;
    assert!(assert_untold(directory.path(), &secrets) > 1);
}
