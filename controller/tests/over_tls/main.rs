//! A controller with its real store and its real mutual TLS listener, and an agent that is only a client.

#![allow(clippy::unwrap_used)]

mod migration;

use godwit_channel::CallError;
use godwit_channel::pki::{HostRequest, Identity, JoinToken};
use godwit_channel::tls::{self, TlsClient};
use godwit_controller::model::{Actor, HostState, PowerIntent};
use godwit_controller::{Controller, ControllerConfig, Intent, NewVm};
use godwit_wire::host_api::{
    Heartbeat, HeartbeatReply, HostFacts, HostReport, JoinReply, JoinRequest, LeasePolicy,
    Resolution, ResolveRequest,
};
use godwit_wire::id::{Epoch, HostId, MigrationId, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, CpuFacts, MachineSpec, MachineType};
use godwit_wire::migration::MigrationRole;
use godwit_wire::unit::Mib;
use godwit_wire::usage::HostUsage;
use std::path::Path;
use std::time::{Duration, Instant};
use uuid::Uuid;

async fn start(state_dir: &Path) -> Controller {
    Controller::start(ControllerConfig {
        state_dir: state_dir.to_owned(),
        agents_listen: ([127, 0, 0, 1], 0).into(),
        agents_names: vec!["127.0.0.1".into()],
        migrations_per_host: 2,
    })
    .await
    .unwrap()
}

fn operator() -> Actor {
    Actor::new("operator")
}

fn facts(name: &str) -> HostFacts {
    HostFacts {
        name: name.into(),
        address: ([127, 0, 0, 1], 9).into(),
        cpu: CpuFacts {
            level: CpuBaseline::V3,
            signature: "s".into(),
            model: "m".into(),
        },
        cores: 4,
        memory_mib: Mib(8192),
        guest_memory_mib: Mib(4096),
        kernel: "k".into(),
        version: "0".into(),
        boot_id: Uuid::from_u128(7),
    }
}

fn kind(error: &CallError) -> &str {
    &error.problem().expect("a problem").kind
}

struct Joined {
    host: HostId,
    client: TlsClient,
}

async fn join(
    controller: &Controller,
    token: &str,
    name: &str,
    request: &HostRequest,
) -> Result<Joined, CallError> {
    let token: JoinToken = token.parse().unwrap();
    let address = controller.agents_address().to_string();
    let pinned = TlsClient::to_server(&address, tls::client_pinned(token.authority).unwrap());
    let body = JoinRequest {
        token: token.secret,
        csr_pem: request.request_pem.clone(),
        facts: facts(name),
    };
    let reply: JoinReply = pinned.post("/v1/join", &body).await?;
    let identity: Identity = request.clone().signed(reply.certificate_pem, reply.ca_pem);
    Ok(Joined {
        host: reply.host,
        client: TlsClient::to_server(&address, tls::client(&identity).unwrap()),
    })
}

fn beat(host: HostId, sequence: u64, name: &str) -> Heartbeat {
    let report = HostReport {
        pools: Vec::new(),
        facts: facts(name),
        usage: HostUsage::default(),
        vms: Vec::new(),
    };
    Heartbeat {
        obeyed: 0,
        host,
        incarnation: Uuid::from_u128(1),
        sequence,
        report,
    }
}

#[tokio::test]
async fn a_host_joins_once_per_token_and_gets_its_lease_by_heartbeat() {
    let directory = tempfile::tempdir().unwrap();
    let controller = start(directory.path()).await;
    let token = controller
        .create_join_token(Duration::from_secs(60), &operator())
        .await
        .unwrap()
        .token;
    let request = HostRequest::fresh().unwrap();
    let joined = join(&controller, &token, "host-1", &request).await.unwrap();

    // The answer may have been lost: the same key gets the same identity, another key gets nothing.
    assert_eq!(
        join(&controller, &token, "host-1", &request)
            .await
            .unwrap()
            .host,
        joined.host
    );
    let other = HostRequest::fresh().unwrap();
    let refused = join(&controller, &token, "host-2", &other)
        .await
        .err()
        .unwrap();
    assert_eq!(kind(&refused), "bad-token");
    let second = controller
        .create_join_token(Duration::from_secs(60), &operator())
        .await
        .unwrap()
        .token;
    let refused = join(&controller, &second, "host-1", &other)
        .await
        .err()
        .unwrap();
    assert_eq!(kind(&refused), "name-taken");

    let view = controller.view();
    assert_eq!(
        view.host_state(&view.hosts[&joined.host]),
        HostState::Joining
    );
    let reply: HeartbeatReply = joined
        .client
        .post("/v1/heartbeat", &beat(joined.host, 1, "host-1"))
        .await
        .unwrap();
    assert_eq!(
        reply,
        HeartbeatReply {
            peers: vec![[127, 0, 0, 1].into()],
            number: reply.number,
            lease_ms: 6_000,
            orders: Vec::new()
        }
    );
    let view = controller.view();
    assert_eq!(view.host_state(&view.hosts[&joined.host]), HostState::Up);

    let stale: Result<HeartbeatReply, _> = joined
        .client
        .post("/v1/heartbeat", &beat(joined.host, 1, "host-1"))
        .await;
    assert_eq!(kind(&stale.unwrap_err()), "stale-heartbeat");
    let posing: Result<HeartbeatReply, _> = joined
        .client
        .post("/v1/heartbeat", &beat(HostId::fresh(), 2, "host-1"))
        .await;
    assert_eq!(kind(&posing.unwrap_err()), "wrong-host");
    let token: JoinToken = token.parse().unwrap();
    let address = controller.agents_address().to_string();
    let anonymous = TlsClient::to_server(&address, tls::client_pinned(token.authority).unwrap());
    let refused: Result<HeartbeatReply, _> = anonymous
        .post("/v1/heartbeat", &beat(joined.host, 2, "host-1"))
        .await;
    assert_eq!(kind(&refused.unwrap_err()), "wrong-certificate");

    controller
        .submit(Intent::RemoveHost { host: joined.host }, &operator())
        .await
        .unwrap();
    let removed: Result<HeartbeatReply, _> = joined
        .client
        .post("/v1/heartbeat", &beat(joined.host, 3, "host-1"))
        .await;
    assert_eq!(kind(&removed.unwrap_err()), "host-removed");
    controller.shutdown().await;
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart_and_the_ca_is_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let controller = start(directory.path()).await;
    let fingerprint = controller.ca_fingerprint();
    controller
        .submit(Intent::CreateVm(stopped("a")), &operator())
        .await
        .unwrap();
    let revision = controller.view().revision;
    let events = controller.view().event_revision;
    controller.shutdown().await;
    drop(controller);
    let controller = start(directory.path()).await;
    let view = controller.view();
    assert_eq!((view.revision, view.event_revision), (revision, events));
    assert!(view.find_vm("a").is_some());
    assert_eq!(controller.ca_fingerprint(), fingerprint);
    assert_eq!(
        controller.events_after(0, 10).unwrap().len(),
        events as usize
    );
    controller.shutdown().await;
}

fn stopped(name: &str) -> NewVm {
    NewVm {
        name: name.into(),
        spec: MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: 1,
            memory_mib: Mib(64),
            boot: Boot::Pilot,
            cpu: CpuBaseline::V2,
            devices: Default::default(),
        },
        devices: Default::default(),
        intent: PowerIntent::Stopped,
        host: None,
        lease: LeasePolicy::Watched,
        maintenance_policy: Default::default(),
        post_copy: Default::default(),
    }
}

#[tokio::test]
#[ignore = "a measurement: cargo nextest run -p godwit-controller --run-ignored only --no-capture time_of"]
async fn time_of_a_decision_over_tls_and_of_a_listing_of_2000_vms() {
    let directory = tempfile::tempdir_in(".").unwrap();
    let controller = start(directory.path()).await;
    let begun = Instant::now();
    for n in 0..2_000 {
        controller
            .submit(Intent::CreateVm(stopped(&format!("vm-{n}"))), &operator())
            .await
            .unwrap();
    }
    println!(
        "create one VM of 2,000: {:?} on average",
        begun.elapsed() / 2_000
    );

    let begun = Instant::now();
    let view = controller.view();
    let states: Vec<_> = view
        .vms
        .values()
        .map(|vm| (vm.name.clone(), view.vm_status(vm), view.vm_usage(vm)))
        .collect();
    println!(
        "states and usage of {} VMs: {:?}",
        states.len(),
        begun.elapsed()
    );

    let token = controller
        .create_join_token(Duration::from_secs(60), &operator())
        .await
        .unwrap()
        .token;
    let joined = join(
        &controller,
        &token,
        "host-1",
        &HostRequest::fresh().unwrap(),
    )
    .await
    .unwrap();
    let mut times = Vec::new();
    for sequence in 1..=300 {
        let begun = Instant::now();
        let _: HeartbeatReply = joined
            .client
            .post("/v1/heartbeat", &beat(joined.host, sequence, "host-1"))
            .await
            .unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    println!(
        "heartbeat round trip: p50 {:?} p99 {:?}",
        times[150], times[297]
    );

    let ask = ResolveRequest {
        vm: VmId::fresh(),
        host: joined.host,
        role: MigrationRole::Source,
        epoch: Epoch(1),
    };
    let path = format!("/v1/migrations/{}/resolve", MigrationId::fresh());
    let mut times = Vec::new();
    for _ in 0..300 {
        let begun = Instant::now();
        let _: Resolution = joined.client.post(&path, &ask).await.unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    println!(
        "round trip without a write: p50 {:?} p99 {:?}",
        times[150], times[297]
    );
    controller.shutdown().await;
}
