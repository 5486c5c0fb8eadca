//! A target against sources that lie, break off or speak another version.

use super::*;
use godwit_wire::id::{MigrationId, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, MachineSpec, MachineType};
use godwit_wire::migration::{MAX_STATE_BYTES, MigrationRole, MigrationStatus};
use godwit_wire::unit::Mib;
use std::io::{Read, Write};
use std::sync::mpsc;

struct NoMachine(mpsc::Sender<&'static str>);

impl TargetMachine for NoMachine {
    fn restore(&self, _: SavedMachine, _: Duration) -> Result<(), MachineError> {
        let _ = self.0.send("restored");
        Ok(())
    }

    fn void(&self) {
        let _ = self.0.send("void");
    }
}

/// A target on its own thread, its memory, and the hello it expects.
struct Fixture {
    incoming: Arc<Incoming>,
    address: SocketAddr,
    ram: GuestRam,
    hello: ToTarget,
    owner: mpsc::Receiver<&'static str>,
}

fn guest_cpu() -> GuestCpu {
    GuestCpu {
        tsc_khz: 2_000_000,
        ..GuestCpu::default()
    }
}

fn cpu(level: CpuBaseline) -> CpuFacts {
    CpuFacts {
        level,
        signature: "test".into(),
        model: "test".into(),
    }
}

fn target() -> Fixture {
    let spec = MachineSpec {
        machine_type: MachineType::Godwit2,
        vcpus: 1,
        memory_mib: Mib(16),
        boot: Boot::Pilot,
        cpu: CpuBaseline::Host,
        devices: Default::default(),
    };
    let (listener, address) = MigrationListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let request = IncomingRequest {
        attachments: Default::default(),
        vm: VmId::fresh(),
        epoch: Epoch(3),
        spec: spec.clone(),
        lease: None,
        migration: MigrationId::fresh(),
        listen: address,
    };
    let hello = ToTarget::Hello {
        version: PROTOCOL_VERSION,
        oldest_version: OLDEST_PROTOCOL_VERSION,
        required: Default::default(),
        migration: request.migration,
        vm: request.vm,
        epoch: request.epoch,
        spec,
        cpu: cpu(CpuBaseline::V2),
        guest_cpu: Some(guest_cpu()),
        verify: Verify::Frames,
        touched: vec![Stretch {
            address: 0x4000,
            pages: 4,
        }],
    };
    let ledger = Ledger::new(
        request.migration,
        MigrationRole::Target,
        TargetHandOver::Filling,
    );
    let incoming = Arc::new(Incoming::new(Arc::new(ledger), listener));
    let ram = GuestRam::new(Mib(16)).unwrap();
    let (sender, owner) = mpsc::channel();
    let (session, memory) = (incoming.clone(), ram.clone());
    std::thread::spawn(move || {
        receive_machine(
            &session,
            &request,
            &ThisCpu {
                facts: cpu(CpuBaseline::V2),
                guest: guest_cpu(),
                scaling: TscScaling::Missing,
            },
            &memory,
            &NoMachine(sender),
        );
    });
    Fixture {
        incoming,
        address,
        ram,
        hello,
        owner,
    }
}

impl Fixture {
    fn connect(&self) -> FrameStream {
        FrameStream::new(TcpStream::connect(self.address).unwrap()).unwrap()
    }

    fn greet(&self) -> FrameStream {
        let mut stream = self.connect();
        stream.send(&self.hello).unwrap();
        assert_eq!(
            stream.receive::<ToSource>().unwrap(),
            ToSource::Accept {
                version: PROTOCOL_VERSION
            }
        );
        stream
    }

    /// The migration must end void, with this in its reason, and nothing restored.
    fn expect_void(&self, why: &str) -> MigrationStatus {
        assert_eq!(self.owner.recv().unwrap(), "void");
        let status = self.incoming.ledger.status();
        assert_eq!(status.phase, MigrationPhase::Failed);
        assert!(
            status.reason.as_deref().unwrap_or_default().contains(why),
            "{:?}",
            status.reason
        );
        assert_eq!(self.incoming.ledger.hand_over(), TargetHandOver::Void);
        status
    }
}

#[test]
fn pages_arrive_where_they_belong_and_zeros_give_memory_back() {
    let target = target();
    target.ram.write(0x8000, &[7; 4096]).unwrap();
    let mut stream = target.greet();
    stream
        .send_frame(FrameHeader::pages(0x3000, 1), &[5; 4096])
        .unwrap();
    stream
        .send_frame(FrameHeader::zero(0x8000, 1), &[])
        .unwrap();
    stream
        .send(&ToTarget::EndOfRound { round: 1, pages: 2 })
        .unwrap();
    assert_eq!(
        stream.receive::<ToSource>().unwrap(),
        ToSource::RoundReceived { round: 1 }
    );
    let mut page = [0; 4096];
    target.ram.read(0x3000, &mut page).unwrap();
    assert_eq!(page, [5; 4096]);
    target.ram.read(0x8000, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
}

#[test]
fn garbage_on_the_port_costs_nothing_and_the_source_is_still_awaited() {
    let target = target();
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 64], b""] {
        let mut socket = TcpStream::connect(target.address).unwrap();
        socket.write_all(garbage).unwrap();
        // The target may have hung up already.
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.read_to_end(&mut Vec::new());
    }
    target.greet();
}

#[test]
fn another_version_an_unknown_capability_and_a_stranger_are_refused_with_the_reason() {
    let target = target();
    let refuse = |change: &dyn Fn(&mut ToTarget), why: &str| {
        let mut hello = target.hello.clone();
        change(&mut hello);
        let mut stream = target.connect();
        stream.send(&hello).unwrap();
        match stream.receive::<ToSource>().unwrap() {
            ToSource::Refuse { reason } => assert!(reason.contains(why), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    refuse(
        &|h| {
            if let ToTarget::Hello {
                version,
                oldest_version,
                ..
            } = h
            {
                (*version, *oldest_version) = (9, 8)
            }
        },
        "8 to 9",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { required, .. } = h {
                required.insert("nested".into());
            }
        },
        "nested",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { migration, .. } = h {
                *migration = MigrationId::fresh()
            }
        },
        "another migration",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { epoch, .. } = h {
                *epoch = Epoch(2)
            }
        },
        "differ",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { spec, .. } = h {
                spec.vcpus = 2
            }
        },
        "differ",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { cpu, .. } = h {
                cpu.signature = "other".into()
            }
        },
        "CPU",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { touched, .. } = h {
                touched[0].pages = u64::MAX;
            }
        },
        "more touched memory",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { touched, .. } = h {
                touched[0].address = 16 << 20;
            }
        },
        "no 16384 bytes at",
    );
    target.greet();
    assert!(target.ram.resident() >= godwit_wire::unit::Bytes(4 * PAGE_BYTES));
}

#[test]
fn pages_outside_guest_memory_end_the_migration() {
    for address in [16u64 << 20, !0xfff] {
        let target = target();
        target
            .greet()
            .send_frame(FrameHeader::pages(address, 1), &[1; 4096])
            .unwrap();
        target.expect_void("no 4096 bytes at");
        let target = super::tests::target();
        target
            .greet()
            .send_frame(FrameHeader::zero(address, u32::MAX), &[])
            .unwrap();
        target.expect_void("bytes at");
    }
}

#[test]
fn a_round_with_pages_missing_ends_the_migration() {
    let target = target();
    target
        .greet()
        .send(&ToTarget::EndOfRound { round: 1, pages: 3 })
        .unwrap();
    target.expect_void("0 pages arrived and the source sent 3");
}

#[test]
fn a_damaged_state_is_never_restored() {
    let target = target();
    let mut stream = target.greet();
    stream
        .send_frame(FrameHeader::state(3), &[1, 2, 3])
        .unwrap();
    let done = |state_hash: &str| ToTarget::Done {
        pages: 0,
        state_hash: state_hash.into(),
        clock_age_ns: 0,
        then: Arrival::Run,
        memory_hash: None,
    };
    stream.send(&done("00")).unwrap();
    target.expect_void("damaged");

    let target = super::tests::target();
    let mut stream = target.greet();
    stream
        .send_frame(FrameHeader::state(3), &[1, 2, 3])
        .unwrap();
    stream
        .send(&done(&format!(
            "{:032x}",
            xxhash_rust::xxh3::xxh3_128(&[1, 2, 3])
        )))
        .unwrap();
    target.expect_void("cannot be read");
}

#[test]
fn a_source_that_breaks_off_leaves_nothing() {
    let target = target();
    drop(target.greet());
    target.expect_void("connection");
}

#[test]
fn a_frame_longer_than_the_limit_is_refused_before_it_is_read() {
    let target = target();
    let mut stream = target.greet();
    let mut header = FrameHeader::state(MAX_STATE_BYTES).encode();
    header[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    stream.socket().write_all(&header).unwrap();
    target.expect_void("cannot have");
}
