//! The migration port is open to whoever reaches it: nonsense is turned away and the rightful source still lands.

use super::{boot_dirtying_pilot, verify_guest, verifying};
use godwit_tests::migration::Flight;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, Vmm, new_vm};
use godwit_wire::cpu::{CpuidLeaf, GuestCpu};
use godwit_wire::id::{Epoch, MigrationId, VmId};
use godwit_wire::machine::{CpuBaseline, CpuFacts};
use godwit_wire::migration::{
    FRAME_HEADER_BYTES, FrameHeader, MigrationPhase, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{IncomingReady, IncomingRequest, VmmState};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(10);

/// A target that waits for a migration, with the greeting of the rightful source.
async fn waiting_target(dir: &TestDir, name: &str) -> (Vmm, SocketAddr, ToTarget) {
    let target = Vmm::start(dir, name).await.expect("a target");
    let (vm, epoch, migration) = (VmId::fresh(), Epoch(1), MigrationId::fresh());
    let spec = vmm::pilot(1, Mib(64));
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let request = IncomingRequest {
        attachments: Default::default(),
        vm,
        epoch,
        spec: spec.clone(),
        lease: None,
        migration,
        listen,
        last_port: None,
        kept: None,
        arriving_disks: BTreeSet::new(),
        identity: None,
    };
    let ready: IncomingReady = target
        .api
        .put("/v1/incoming", &request)
        .await
        .expect("a waiting target");
    let cpu = target.info().await.expect("info").cpu;
    let hello = ToTarget::Hello {
        version: godwit_wire::migration::PROTOCOL_VERSION,
        oldest_version: godwit_wire::migration::OLDEST_PROTOCOL_VERSION,
        required: [].into(),
        migration,
        token: ready.token,
        urgent_lanes: 0,
        lanes: 1,
        vm,
        epoch,
        spec,
        cpu,
        guest_cpu: None,
        verify: Verify::Frames,
        touched: Vec::new(),
        compare_seed: None,
        disks: Vec::new(),
    };
    (target, ready.address, hello)
}

/// Sends one greeting; the target's answer, or `None` if it hangs up without a word.
async fn greet(address: SocketAddr, hello: &ToTarget) -> Option<ToSource> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let body = serde_json::to_vec(hello).expect("a greeting is JSON");
    stream
        .write_all(&FrameHeader::control(body.len() as u32).encode(&body))
        .await
        .ok()?;
    stream.write_all(&body).await.ok()?;
    let mut header = [0; FRAME_HEADER_BYTES];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut header))
        .await
        .expect("an answer in time")
        .ok()?;
    let header = FrameHeader::decode(&header).expect("a frame");
    let mut body = vec![0; header.length as usize];
    stream.read_exact(&mut body).await.ok()?;
    Some(serde_json::from_slice(&body).expect("a control message"))
}

async fn is_refused(name: &str, mutate: impl FnOnce(&mut ToTarget)) {
    let dir = TestDir::new();
    let (target, address, mut hello) = waiting_target(&dir, "target").await;
    mutate(&mut hello);
    match greet(address, &hello).await {
        Some(ToSource::Refuse { reason }) => assert!(!reason.is_empty(), "{name}"),
        answer => panic!("{name}: {answer:?}"),
    }
    let info = target.info().await.expect("the target lives");
    assert_ne!(info.state, VmmState::Running);
}

/// What a target answers to a guest that sees `guest_cpu`.
async fn refusal_of_cpu(guest_cpu: GuestCpu) -> String {
    let dir = TestDir::new();
    let (_target, address, mut hello) = waiting_target(&dir, "target").await;
    if let ToTarget::Hello {
        guest_cpu: told, ..
    } = &mut hello
    {
        *told = Some(guest_cpu);
    }
    match greet(address, &hello).await {
        Some(ToSource::Refuse { reason }) => reason,
        answer => panic!("{answer:?}"),
    }
}

/// The source has sent nothing but its greeting by then, so its guest has not stood still.
#[tokio::test]
async fn a_guest_whose_cpu_the_host_cannot_give_is_refused_by_name() {
    require!(skip::kvm());
    let other_vendor = GuestCpu {
        cpuid: vec![CpuidLeaf {
            ebx: u32::from_le_bytes(*b"Cent"),
            edx: u32::from_le_bytes(*b"aurH"),
            ecx: u32::from_le_bytes(*b"auls"),
            ..CpuidLeaf::default()
        }],
        ..GuestCpu::default()
    };
    let reason = refusal_of_cpu(other_vendor).await;
    assert!(reason.contains("CentaurHauls"), "{reason}");
}

#[tokio::test]
async fn greetings_that_do_not_fit_are_refused_with_a_reason() {
    require!(skip::kvm());
    is_refused("a version of the future", |hello| {
        let ToTarget::Hello {
            version,
            oldest_version,
            ..
        } = hello
        else {
            unreachable!()
        };
        (*version, *oldest_version) = (99, 98);
    })
    .await;
    is_refused("a capability nobody knows", |hello| {
        let ToTarget::Hello { required, .. } = hello else {
            unreachable!()
        };
        required.insert("teleportation".into());
    })
    .await;
    is_refused("a token that was not given out", |hello| {
        let ToTarget::Hello { token, .. } = hello else {
            unreachable!()
        };
        token.0.push('0');
    })
    .await;
    is_refused("another migration", |hello| {
        let ToTarget::Hello { migration, .. } = hello else {
            unreachable!()
        };
        *migration = MigrationId::fresh();
    })
    .await;
    is_refused("another VM", |hello| {
        let ToTarget::Hello { vm, .. } = hello else {
            unreachable!()
        };
        *vm = VmId::fresh();
    })
    .await;
    is_refused("another machine", |hello| {
        let ToTarget::Hello { spec, .. } = hello else {
            unreachable!()
        };
        spec.vcpus = 2;
    })
    .await;
    is_refused("another CPU", |hello| {
        let ToTarget::Hello { spec, cpu, .. } = hello else {
            unreachable!()
        };
        spec.cpu = CpuBaseline::Host;
        *cpu = CpuFacts {
            signature: "a CPU that was never built".into(),
            ..cpu.clone()
        };
    })
    .await;
}

#[tokio::test]
async fn garbage_on_the_migration_port_does_not_keep_the_guest_from_landing() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::prepare(&source, &target, &request)
        .await
        .expect("a waiting target");
    let oversized = FrameHeader {
        length: u32::MAX,
        ..FrameHeader::control(0)
    };
    let garbage: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 4096],
        &oversized.encode(&[]),
        b"",
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(flight.address)
            .await
            .expect("the port is open");
        // The target may hang up while this is still being written.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .expect("the target hangs up");
    }
    flight.send(verifying()).await.expect("take-off");
    flight.land().await.expect("the guest lands");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_source_that_reaches_nobody_keeps_its_guest() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let mut flight = Flight::prepare(&source, &target, &request)
        .await
        .expect("a waiting target");
    flight.address = godwit_tests::cluster::free_address().expect("a free port");
    // The refusal may come as the answer or as the migration's end.
    if flight.send(verifying()).await.is_ok() {
        flight
            .source_reaches(MigrationPhase::Failed)
            .await
            .expect("the migration fails");
    }
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    verify_guest(&source).await;
    // A second machine in the same VMM would be a second guest.
    source
        .create(&new_vm(vmm::pilot(1, Mib(64))))
        .await
        .expect_err("one VMM holds one machine");
}
