//! A target against sources that lie, break off or speak another version.

mod disks;

use super::*;
use crate::migration::connection::Connection;
use godwit_devices::block::Block;
use godwit_wire::id::{MigrationId, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, MachineSpec, MachineType};
use godwit_wire::migration::{
    FrameHeader, HeldPages, LaneKind, MAX_STATE_BYTES, MigrationRole, MigrationStatus,
    OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Stretch,
};
use godwit_wire::unit::{Mib, PAGE_BYTES};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;

struct NoMachine(mpsc::Sender<&'static str>);

impl TargetMachine for NoMachine {
    fn restore(&self, _: SavedMachine, _: Duration, _: Counted) -> Result<(), MachineError> {
        let _ = self.0.send("restored");
        Ok(())
    }

    fn void(&self) {
        let _ = self.0.send("void");
    }

    fn stall(&self, _: String) {
        let _ = self.0.send("stalled");
    }

    fn go_on(&self) {
        let _ = self.0.send("goes on");
    }

    fn all_is_here(&self) {
        let _ = self.0.send("whole");
    }
}

const LANES: u8 = 2;

/// A target on its own thread, its memory, and the hello it expects.
struct Fixture {
    incoming: Arc<Incoming>,
    address: SocketAddr,
    ram: GuestRam,
    hello: ToTarget,
    owner: mpsc::Receiver<&'static str>,
    /// Whose content arrives, if one does.
    _disk: Option<Block>,
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

/// The end of a round without disks.
fn end(round: u32, pages: u64) -> ToTarget {
    ToTarget::EndOfRound {
        round,
        pages,
        disk_bytes: 0,
    }
}

/// The answer to it.
fn received(round: u32) -> ToSource {
    ToSource::RoundReceived { round, flush_us: 0 }
}

const SEED: Seed = Seed(99);

fn target() -> Fixture {
    target_with(TargetMemory::Fresh, |_| ())
}

/// A target whose memory is made so before it listens.
fn target_with(held: TargetMemory, prepare: impl FnOnce(&GuestRam)) -> Fixture {
    target_of(held, prepare, None)
}

/// The same, waiting for the content of a disk that lies there.
fn target_of(
    held: TargetMemory,
    prepare: impl FnOnce(&GuestRam),
    disk: Option<&std::path::Path>,
) -> Fixture {
    let mut spec = MachineSpec {
        machine_type: MachineType::Godwit2,
        vcpus: 1,
        memory_mib: Mib(16),
        boot: Boot::Pilot,
        cpu: CpuBaseline::Host,
        devices: Default::default(),
    };
    let source_spec = disks::with_disk(&spec, disk.map(|_| "/elsewhere/root.img".as_ref()));
    spec = disks::with_disk(&spec, disk);
    let block = disk.map(disks::open);
    let arriving: Vec<_> = block
        .iter()
        .map(|block| block.content().arrive(Epoch(3)).unwrap())
        .collect();
    let (listener, address) =
        MigrationListener::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let request = IncomingRequest {
        attachments: Default::default(),
        vm: VmId::fresh(),
        epoch: Epoch(3),
        spec,
        lease: None,
        migration: MigrationId::fresh(),
        listen: address,
        last_port: None,
        kept: None,
        arriving_disks: arriving.iter().map(|disk| disk.name().to_owned()).collect(),
        identity: None,
    };
    let token = MigrationToken("the token of this migration".into());
    let hello = ToTarget::Hello {
        version: PROTOCOL_VERSION,
        oldest_version: OLDEST_PROTOCOL_VERSION,
        required: Default::default(),
        migration: request.migration,
        token: token.clone(),
        lanes: LANES,
        urgent_lanes: 0,
        vm: request.vm,
        epoch: request.epoch,
        spec: source_spec,
        cpu: cpu(CpuBaseline::V2),
        guest_cpu: Some(guest_cpu()),
        verify: Verify::Frames,
        touched: vec![Stretch {
            address: 0x4000,
            pages: 4,
        }],
        compare_seed: Some(SEED.0),
        disks: disks::told(&arriving),
    };
    let ledger = Ledger::new(
        request.migration,
        MigrationRole::Target,
        TargetHandOver::Filling,
    );
    let incoming = Arc::new(Incoming::new(Arc::new(ledger), listener, token, Vec::new()));
    let ram = GuestRam::new(Mib(16)).unwrap();
    prepare(&ram);
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
            (&memory, held),
            arriving,
            &NoMachine(sender),
        );
    });
    Fixture {
        incoming,
        address,
        ram,
        hello,
        owner,
        _disk: block,
    }
}

impl Fixture {
    fn connect(&self) -> FrameStream {
        FrameStream::new(Connection::to_target(self.address, None).unwrap())
    }

    fn join(&self, number: u8) -> FrameStream {
        let ToTarget::Hello {
            migration, token, ..
        } = self.hello.clone()
        else {
            unreachable!("it is a hello")
        };
        let mut stream = self.connect();
        stream
            .send(&ToTarget::Join {
                migration,
                token,
                kind: LaneKind::Bulk,
                lane: number,
            })
            .unwrap();
        assert_eq!(stream.receive::<ToSource>().unwrap(), ToSource::Joined);
        stream
    }

    /// The control connection of a source whose lanes have all joined.
    fn arrive(&self) -> (FrameStream, Vec<FrameStream>) {
        let control = self.greet();
        (control, (0..LANES).map(|lane| self.join(lane)).collect())
    }

    fn greet(&self) -> FrameStream {
        self.greet_and_hear(TargetMemory::Fresh)
    }

    fn greet_and_hear(&self, memory: TargetMemory) -> FrameStream {
        let mut stream = self.connect();
        stream.send(&self.hello).unwrap();
        assert_eq!(
            stream.receive::<ToSource>().unwrap(),
            ToSource::Accept {
                version: PROTOCOL_VERSION,
                urgent_lanes: 0,
                memory,
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
    let (mut control, mut lanes) = target.arrive();
    lanes[0]
        .send_frame(FrameHeader::pages(1, 0x3000, 1), &[5; 4096])
        .unwrap();
    lanes[1]
        .send_frame(FrameHeader::zero(1, 0x8000, 1), &[])
        .unwrap();
    let packed = lz4_flex::block::compress(&[9; 8192]);
    lanes[1]
        .send_frame(
            FrameHeader::pages(1, 0xa000, 2).compressed(packed.len() as u32),
            &packed,
        )
        .unwrap();
    for (lane, pages) in lanes.iter_mut().zip([1, 3]) {
        lane.send(&end(1, pages)).unwrap();
    }
    control.send(&end(1, 4)).unwrap();
    assert_eq!(control.receive::<ToSource>().unwrap(), received(1));
    let mut page = [0; 4096];
    for (address, content) in [(0x3000, 5), (0x8000, 0), (0xa000, 9), (0xb000, 9)] {
        target.ram.read(address, &mut page).unwrap();
        assert_eq!(page, [content; 4096], "{address:#x}");
    }
}

#[test]
fn a_page_of_another_round_a_damaged_one_and_a_bad_block_end_the_migration() {
    let after = |send: &dyn Fn(&mut FrameStream), why: &str| {
        let target = target();
        let (_control, mut lanes) = target.arrive();
        send(&mut lanes[1]);
        target.expect_void(why);
    };
    after(
        &|lane| {
            lane.send_frame(FrameHeader::pages(2, 0x3000, 1), &[5; 4096])
                .unwrap();
        },
        "pages of round 2 came in round 1",
    );
    after(
        &|lane| {
            let header = FrameHeader::pages(1, 0x3000, 1).encode(&[5; 4096]);
            lane.write(&header).unwrap();
            lane.write(&[4; 4096]).unwrap();
        },
        "damaged",
    );
    after(
        &|lane| {
            let header = FrameHeader::pages(1, 0x3000, 4).compressed(9);
            lane.send_frame(header, &[0xff; 9]).unwrap();
        },
        "cannot be unpacked",
    );
    after(
        &|lane| lane.send_frame(FrameHeader::state(1), &[0]).unwrap(),
        "State frame",
    );
}

/// The source closes its lanes when everything is on its way; what one of them still holds is read nevertheless.
#[test]
fn a_lane_that_has_ended_does_not_keep_another_from_ending_its_round() {
    let target = target();
    let (mut control, mut lanes) = target.arrive();
    let mut slow = lanes.pop().unwrap();
    let mut done = lanes.pop().unwrap();
    done.send(&end(1, 0)).unwrap();
    drop(done);
    control.send(&end(1, 1)).unwrap();
    slow.send_frame(FrameHeader::pages(1, 0x3000, 1), &[5; 4096])
        .unwrap();
    slow.send(&end(1, 1)).unwrap();
    assert_eq!(control.receive::<ToSource>().unwrap(), received(1));
}

#[test]
fn only_the_lanes_that_were_announced_join_and_only_with_the_token() {
    let target = target();
    let _control = target.greet();
    let ToTarget::Hello {
        migration, token, ..
    } = target.hello.clone()
    else {
        unreachable!("it is a hello")
    };
    let refused = |token: &MigrationToken, lane: u8, why: &str| {
        let mut stream = target.connect();
        let token = token.clone();
        stream
            .send(&ToTarget::Join {
                kind: LaneKind::Bulk,
                migration,
                token,
                lane,
            })
            .unwrap();
        match stream.receive::<ToSource>().unwrap() {
            ToSource::Refuse { reason } => assert!(reason.contains(why), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    refused(&MigrationToken("guess".into()), 0, "token");
    refused(&token, LANES, "no lane");
    let _first = target.join(0);
    refused(&token, 0, "no lane");
    target.join(1);
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
            if let ToTarget::Hello { token, .. } = h {
                token.0.push('x');
            }
        },
        "token",
    );
    refuse(
        &|h| {
            if let ToTarget::Hello { lanes, .. } = h {
                *lanes = 17;
            }
        },
        "17 lanes",
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
        for header in [
            FrameHeader::pages(1, address, 1),
            FrameHeader::zero(1, address, u32::MAX),
        ] {
            let target = target();
            let (_control, mut lanes) = target.arrive();
            let payload = vec![1; header.length as usize];
            lanes[0].send_frame(header, &payload).unwrap();
            target.expect_void("bytes at");
        }
    }
}

#[test]
fn a_round_with_pages_missing_ends_the_migration() {
    let target = target();
    let (mut control, mut lanes) = target.arrive();
    for lane in &mut lanes {
        lane.send(&end(1, 0)).unwrap();
    }
    control.send(&end(1, 3)).unwrap();
    target.expect_void("0 pages arrived and the source sent 3");
}

fn end_round(lanes: &mut [FrameStream]) {
    for lane in lanes {
        lane.send(&end(1, 0)).unwrap();
    }
}

#[test]
fn a_damaged_state_is_never_restored() {
    let target = target();
    let (mut stream, mut lanes) = target.arrive();
    end_round(&mut lanes);
    stream
        .send_frame(FrameHeader::state(3), &[1, 2, 3])
        .unwrap();
    let done = |state_hash: &str| {
        ToTarget::Done(Done {
            round: 1,
            pages: 0,
            disk_bytes: 0,
            state_hash: state_hash.into(),
            clock_age_ns: 0,
            packet_age_ns: None,
            missing_pages: 0,
            then: Arrival::Run,
            counted: Counted::default(),
            memory_hash: None,
        })
    };
    stream.send(&done("00")).unwrap();
    target.expect_void("damaged");

    let target = super::tests::target();
    let (mut stream, mut lanes) = target.arrive();
    end_round(&mut lanes);
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
    drop(target.arrive());
    target.expect_void("connection");
}

#[test]
fn a_frame_longer_than_the_limit_is_refused_before_it_is_read() {
    let target = target();
    let (_control, mut lanes) = target.arrive();
    let mut header = FrameHeader::state(MAX_STATE_BYTES).encode(&[]);
    header[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    lanes[0].write(&header).unwrap();
    target.expect_void("cannot have");
}

/// A source that may leave memory for later, with a lane for each kind of page; `None`, said aloud, where this machine
/// has no userfaultfd.
fn arrive_ahead(target: &mut Fixture) -> Option<(FrameStream, FrameStream, FrameStream)> {
    let ToTarget::Hello {
        lanes,
        urgent_lanes,
        migration,
        token,
        ..
    } = &mut target.hello
    else {
        unreachable!("it is a hello")
    };
    (*lanes, *urgent_lanes) = (1, 1);
    let (migration, token) = (*migration, token.clone());
    let mut control = target.connect();
    control.send(&target.hello).unwrap();
    match control.receive().unwrap() {
        ToSource::Accept {
            urgent_lanes: 1, ..
        } => {}
        other => {
            godwit_devices::skip::skip(format!("no userfaultfd here: {other:?}"));
            return None;
        }
    }
    let join = |kind| {
        let mut stream = target.connect();
        let (token, lane) = (token.clone(), 0);
        stream
            .send(&ToTarget::Join {
                migration,
                token,
                kind,
                lane,
            })
            .unwrap();
        assert_eq!(stream.receive::<ToSource>().unwrap(), ToSource::Joined);
        stream
    };
    let (bulk, urgent) = (join(LaneKind::Bulk), join(LaneKind::Urgent));
    Some((control, bulk, urgent))
}

/// Pages 2 and 3 of the first 64.
fn name_two_pages(control: &mut FrameStream, address: u64) {
    control
        .send_frame(FrameHeader::missing(address, 64), &0b1100u64.to_le_bytes())
        .unwrap();
}

#[test]
fn missing_pages_that_do_not_add_up_end_it() {
    let not_agreed = target();
    let (mut control, _lanes) = not_agreed.arrive();
    name_two_pages(&mut control, 0);
    not_agreed.expect_void("missing pages");

    let mut miscounted = target();
    let Some((mut control, _bulk, _urgent)) = arrive_ahead(&mut miscounted) else {
        return;
    };
    name_two_pages(&mut control, 0);
    control.send(&ToTarget::WillMiss { pages: 3 }).unwrap();
    miscounted.expect_void("2 missing pages were named and the source spoke of 3");

    let mut outside = target();
    let Some((mut control, _bulk, _urgent)) = arrive_ahead(&mut outside) else {
        return;
    };
    name_two_pages(&mut control, (16 << 20) - 4096);
    outside.expect_void("guest memory has no");

    let mut endless = target();
    let Some((mut control, _bulk, _urgent)) = arrive_ahead(&mut endless) else {
        return;
    };
    for _ in 0..=MAX_MAPS {
        let sent = control.send_frame(FrameHeader::missing(0, 64), &[0; 8]);
        if sent.is_err() {
            break;
        }
    }
    endless.expect_void("yet another map");
}

#[test]
fn what_was_named_is_given_up_and_nobody_can_resume_what_has_not_begun() {
    let mut target = target();
    target.ram.write(2 * PAGE_BYTES, &[7; 8192]).unwrap();
    let Some((mut control, _bulk, _urgent)) = arrive_ahead(&mut target) else {
        return;
    };
    name_two_pages(&mut control, 0);
    control.send(&ToTarget::WillMiss { pages: 2 }).unwrap();
    assert_eq!(control.receive::<ToSource>().unwrap(), ToSource::Discarded);
    assert!(target.ram.is_absent(2 * PAGE_BYTES, 2).unwrap());
    control
        .send(&ToTarget::Resume {
            migration: MigrationId::fresh(),
            token: MigrationToken("any".into()),
            lanes: 1,
            urgent_lanes: 1,
        })
        .unwrap();
    target.expect_void("Resume came");
}

/// A target that has kept sevens in page 32 and eights in page 40.
fn target_that_kept() -> Fixture {
    target_with(TargetMemory::Kept, |ram| {
        ram.write(32 * PAGE_BYTES, &[7; 4096]).unwrap();
        ram.write(40 * PAGE_BYTES, &[8; 4096]).unwrap();
    })
}

#[test]
fn a_target_tells_what_it_has_kept_and_stores_what_differs() {
    let target = target_that_kept();
    let mut control = target.greet_and_hear(TargetMemory::Kept);
    let mut lanes: Vec<_> = (0..LANES).map(|lane| target.join(lane)).collect();
    let asked = FrameHeader::compare(0, 64);
    lanes[0].send_frame(asked, &[]).unwrap();
    let announced = lanes[0].announced().unwrap();
    let payload = lanes[0].payload(&announced).unwrap();
    let held = HeldPages::decode(&asked, &announced.header, &payload).unwrap();
    assert_eq!(held.hash(32), Some(SEED.hash(&[7; 4096])));
    assert_eq!(held.hash(40), Some(SEED.hash(&[8; 4096])));
    // Taken from the host because the source has touched it.
    assert_eq!(held.hash(4), Some(SEED.hash(&[0; 4096])));
    assert_eq!(held.hash(33), None);
    lanes[0]
        .send_frame(FrameHeader::pages(1, 33 * PAGE_BYTES, 1), &[9; 4096])
        .unwrap();
    lanes[0]
        .send_frame(FrameHeader::zero(1, 40 * PAGE_BYTES, 1), &[])
        .unwrap();
    for (lane, pages) in lanes.iter_mut().zip([2, 0]) {
        lane.send(&end(1, pages)).unwrap();
    }
    control.send(&end(1, 2)).unwrap();
    assert_eq!(control.receive::<ToSource>().unwrap(), received(1));
    let mut page = [0; 4096];
    for (number, content) in [(32, 7), (33, 9), (40, 0)] {
        target.ram.read(number * PAGE_BYTES, &mut page).unwrap();
        assert_eq!(page, [content; 4096], "page {number}");
    }
    // Once the round is over there is nothing to ask for any more.
    lanes[0].send_frame(asked, &[]).unwrap();
    target.expect_void("a question about pages");
}

#[test]
fn memory_that_a_source_cannot_compare_makes_way_for_zeros() {
    let mut target = target_that_kept();
    if let ToTarget::Hello { compare_seed, .. } = &mut target.hello {
        *compare_seed = None;
    }
    let _control = target.greet_and_hear(TargetMemory::Fresh);
    let mut page = [1; 4096];
    target.ram.read(32 * PAGE_BYTES, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
}

#[test]
fn questions_that_were_not_agreed_or_have_no_end_end_the_migration() {
    let fresh = target();
    let (_control, mut lanes) = fresh.arrive();
    lanes[0]
        .send_frame(FrameHeader::compare(0, 64), &[])
        .unwrap();
    fresh.expect_void("a question about pages");

    let outside = target_that_kept();
    let _control = outside.greet_and_hear(TargetMemory::Kept);
    let mut lanes: Vec<_> = (0..LANES).map(|lane| outside.join(lane)).collect();
    lanes[0]
        .send_frame(FrameHeader::compare((16 << 20) - PAGE_BYTES, 2), &[])
        .unwrap();
    outside.expect_void("bytes at");

    let endless = target_that_kept();
    let _control = endless.greet_and_hear(TargetMemory::Kept);
    let mut lanes: Vec<_> = (0..LANES).map(|lane| endless.join(lane)).collect();
    // All of the guest's 4096 pages, and one more.
    for first in [0, 1024, 2048, 3072] {
        let asked = FrameHeader::compare(first * PAGE_BYTES, 1024);
        lanes[0].send_frame(asked, &[]).unwrap();
        let announced = lanes[0].announced().unwrap();
        lanes[0].payload(&announced).unwrap();
    }
    lanes[0]
        .send_frame(FrameHeader::compare(0, 1), &[])
        .unwrap();
    endless.expect_void("more pages than the guest has");
}

#[test]
fn a_target_listens_on_the_first_free_port_of_its_range() {
    // Loopback has 2^24 addresses: this process has one, and all of its ports, to itself.
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = |port| SocketAddr::from(([127, 77, high, low], port));
    let bind = |last_port| MigrationListener::bind(address(20_301), last_port);
    let (_first, at) = bind(None).unwrap();
    assert_eq!(at, address(20_301));
    let (second, at) = bind(Some(20_302)).unwrap();
    assert_eq!(at, address(20_302));
    for last_port in [None, Some(20_301), Some(20_302), Some(9)] {
        let error = bind(last_port).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{last_port:?}");
    }
    drop(second);
    assert_eq!(bind(Some(20_303)).unwrap().1, address(20_302));
    assert_ne!(
        MigrationListener::bind(address(0), None).unwrap().1.port(),
        0
    );
}
