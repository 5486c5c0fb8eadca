//! Predecessors against successors that leave, lie or are strangers; and who may run the guest, whatever happens.

use super::channel::Channel;
use super::*;
use crate::machine::MachineError;
use crate::memory::GuestRam;
use crate::migration::{Memory, SourceHandOver, TargetHandOver};
use godwit_wire::id::{Epoch, SuccessionId, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, CpuFacts, MachineSpec, MachineType};
use godwit_wire::migration::Arrival;
use godwit_wire::succession::{
    Offer, PrepareSuccession, SUCCESSION_VERSION, SuccessionPhase, ToPredecessor, ToSuccessor,
};
use godwit_wire::unit::{Mib, PAGE_BYTES};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

const EPOCH: Epoch = Epoch(3);

/// A machine that cannot be paused, and tells what it was asked.
struct Stubborn(mpsc::Sender<&'static str>);

impl PredecessorMachine for Stubborn {
    fn pause(&self) -> Result<Arrival, MachineError> {
        let _ = self.0.send("pause");
        Err(MachineError::BadState("it does not stop".into()))
    }

    fn save(&self) -> Result<Handed, MachineError> {
        unreachable!("it was never paused")
    }

    fn resume(&self) {
        let _ = self.0.send("resume");
    }
}

/// A predecessor on its own thread.
struct Fixture {
    _directory: tempfile::TempDir,
    yielding: Arc<Yielding>,
    request: PrepareSuccession,
    ram: GuestRam,
    asked: mpsc::Receiver<&'static str>,
    thread: JoinHandle<()>,
}

fn predecessor() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let request = PrepareSuccession {
        vm: VmId::fresh(),
        epoch: EPOCH,
        succession: SuccessionId::fresh(),
        socket: directory.path().join("take.sock"),
    };
    let ram = GuestRam::new(Mib(16)).unwrap();
    let offered = Offered {
        vm: request.vm,
        epoch: EPOCH,
        offer: Offer {
            version: SUCCESSION_VERSION,
            spec: MachineSpec {
                machine_type: MachineType::Godwit2,
                vcpus: 1,
                memory_mib: Mib(16),
                boot: Boot::Pilot,
                cpu: CpuBaseline::Host,
                devices: Default::default(),
            },
            lease: None,
            attachments: Default::default(),
            cpu: CpuFacts {
                level: CpuBaseline::V2,
                signature: "test".into(),
                model: "test".into(),
            },
            guest_cpu: Default::default(),
            keep_memory_mib: None,
        },
        memory: ram.lend().unwrap(),
        listener: UnixListener::bind(&request.socket).unwrap(),
        socket: request.socket.clone(),
    };
    let yielding = Arc::new(Yielding::new(request.succession));
    let (sender, asked) = mpsc::channel();
    let ours = yielding.clone();
    let thread = std::thread::spawn(move || yield_machine(&ours, offered, &Stubborn(sender)));
    Fixture {
        _directory: directory,
        yielding,
        request,
        ram,
        asked,
        thread,
    }
}

impl Fixture {
    /// Waits until the predecessor has given up: what its machine was asked, and why it failed.
    fn given_up(self) -> (Vec<&'static str>, String) {
        self.thread.join().unwrap();
        let status = self.yielding.status();
        assert_eq!(status.phase, SuccessionPhase::Failed);
        assert!(self.yielding.hand_over().may_run());
        (self.asked.try_iter().collect(), status.reason.unwrap())
    }
}

#[test]
fn a_message_takes_descriptors_along() {
    let (here, there) = UnixStream::pair().unwrap();
    let (here, there) = (Channel::new(here).unwrap(), Channel::new(there).unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "content").unwrap();
    let opened = [(); 3].map(|()| File::open(file.path()).unwrap());
    let lent: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
    here.send(&ToPredecessor::Take, &lent).unwrap();
    here.send(&ToPredecessor::Take, &[]).unwrap();
    let (message, got): (ToPredecessor, _) = there.receive().unwrap();
    assert_eq!((message, got.len()), (ToPredecessor::Take, 3));
    let mut text = String::new();
    File::from(got.into_iter().next().unwrap())
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "content");
    let (_, none): (ToPredecessor, _) = there.receive().unwrap();
    assert!(none.is_empty());
}

#[test]
fn a_message_that_claims_to_be_endless_is_not_read() {
    let (here, there) = UnixStream::pair().unwrap();
    let (here, there) = (Channel::new(here).unwrap(), Channel::new(there).unwrap());
    here.send_bytes(&u32::MAX.to_le_bytes()).unwrap();
    let refused = there.receive::<ToPredecessor>().unwrap_err();
    assert!(
        matches!(refused, SuccessionError::TooLong { .. }),
        "{refused}"
    );
}

#[test]
fn a_successor_gets_the_memory_itself_while_the_guest_runs() {
    let fixture = predecessor();
    let offering = Offering::ask(&fixture.request).unwrap();
    assert_eq!(offering.offer.spec.memory_mib, Mib(16));
    let heir = GuestRam::inherit(offering.memory, Mib(16), Default::default()).unwrap();
    fixture.ram.write(3 * PAGE_BYTES, b"written later").unwrap();
    let mut found = [0; 13];
    heir.read(3 * PAGE_BYTES, &mut found).unwrap();
    assert_eq!(&found, b"written later");
    assert!(fixture.asked.try_recv().is_err(), "nothing was paused");
}

#[test]
fn a_successor_that_leaves_before_the_state_is_out_leaves_the_guest_running() {
    let fixture = predecessor();
    drop(Offering::ask(&fixture.request).unwrap());
    let (asked, _) = fixture.given_up();
    assert_eq!(asked, ["resume"]);
}

#[test]
fn a_guest_that_cannot_be_paused_stays_where_it_is() {
    let fixture = predecessor();
    let offering = Offering::ask(&fixture.request).unwrap();
    let (taking, ..) = TakingOver::begin(fixture.request.succession, offering);
    taking.enter_blackout().unwrap();
    assert!(taking.enter_blackout().is_err(), "once only");
    taking.take().unwrap_err();
    taking.void("nothing came").unwrap();
    assert!(taking.commit(EPOCH).is_err());
    let (asked, reason) = fixture.given_up();
    assert_eq!(asked, ["pause", "resume"]);
    assert!(reason.contains("it does not stop"), "{reason}");
}

#[test]
fn a_succession_that_is_called_off_ends_the_successors_connection() {
    let fixture = predecessor();
    let offering = Offering::ask(&fixture.request).unwrap();
    let (taking, ..) = TakingOver::begin(fixture.request.succession, offering);
    fixture.yielding.cancel("the guest powered off").unwrap();
    taking.wait_for_end();
    assert!(taking.waits());
    let (_, reason) = fixture.given_up();
    assert_eq!(reason, "the guest powered off");
}

#[test]
fn another_version_and_another_machine_are_refused_by_name() {
    let older_epoch = Epoch(EPOCH.0 - 1);
    for (version, epoch, kind) in [
        (SUCCESSION_VERSION + 1, EPOCH, "succession-version"),
        (SUCCESSION_VERSION, older_epoch, "succession-failed"),
    ] {
        let fixture = predecessor();
        let stream = UnixStream::connect(&fixture.request.socket).unwrap();
        let channel = Channel::new(stream).unwrap();
        let hello = ToPredecessor::Hello {
            version,
            oldest_version: version,
            succession: fixture.request.succession,
            vm: fixture.request.vm,
            epoch,
        };
        channel.send(&hello, &[]).unwrap();
        let (ToSuccessor::Refuse { problem }, lent) = channel.receive().unwrap() else {
            panic!("it must be refused")
        };
        assert_eq!((problem.kind.as_str(), lent.len()), (kind, 0));
        let (asked, _) = fixture.given_up();
        assert_eq!(asked, ["resume"]);
    }
}

/// Both processes, the record on disk, and what is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct World {
    predecessor: SourceHandOver,
    successor: TargetHandOver,
    state_is_out: bool,
    record: Named,
    predecessor_dead: bool,
    successor_dead: bool,
}

/// Whom the agent's record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    Predecessor,
    Successor,
}

impl World {
    /// Every world one event away. Processes die, agents are killed and go on from the record at any time, so any
    /// step that the record and the processes allow may come next, and come again.
    fn next(self) -> Vec<Self> {
        let mut next = Vec::new();
        if !self.predecessor_dead {
            let by_itself = [
                self.predecessor.done_sent(Memory::Sent),
                self.predecessor.cancel(),
            ];
            for step in by_itself.into_iter().flatten() {
                next.push(Self {
                    predecessor: step,
                    state_is_out: self.state_is_out || matches!(step, SourceHandOver::InDoubt(_)),
                    ..self
                });
            }
            // The agent's rule: first the successor is dead, then the predecessor is told to go on.
            if self.record == Named::Predecessor
                && self.successor_dead
                && let Ok(predecessor) = self.predecessor.abort()
            {
                next.push(Self {
                    predecessor,
                    ..self
                });
            }
            next.push(Self {
                predecessor_dead: true,
                ..self
            });
        }
        if !self.successor_dead {
            if self.state_is_out
                && let Ok(successor) = self.successor.whole()
            {
                next.push(Self { successor, ..self });
            }
            // A successor that has heard of the commit is not told to void.
            if let Ok(successor) = self.successor.abort() {
                next.push(Self { successor, ..self });
            }
            match self.record {
                // Written only when the successor has said that it is whole.
                Named::Predecessor if self.successor == TargetHandOver::Whole => next.push(Self {
                    record: Named::Successor,
                    ..self
                }),
                Named::Predecessor => {}
                Named::Successor => {
                    next.extend(
                        self.successor
                            .succeed(EPOCH)
                            .map(|successor| Self { successor, ..self }),
                    );
                }
            }
            next.push(Self {
                successor_dead: true,
                ..self
            });
        }
        next
    }
}

#[test]
fn in_every_interleaving_at_most_one_process_may_run() {
    let start = World {
        predecessor: SourceHandOver::Copying,
        successor: TargetHandOver::Filling,
        state_is_out: false,
        record: Named::Predecessor,
        predecessor_dead: false,
        successor_dead: false,
    };
    let mut seen = BTreeSet::from([format!("{start:?}")]);
    let mut open = vec![start];
    let (mut stayed, mut went) = (0, 0);
    while let Some(world) = open.pop() {
        let here = !world.predecessor_dead && world.predecessor.may_run();
        let there = !world.successor_dead && world.successor.may_run();
        assert!(!(here && there), "both run in {world:?}");
        assert!(
            !(here && world.record == Named::Successor),
            "the predecessor runs a machine that is the successor's in {world:?}"
        );
        stayed += u32::from(here && world.state_is_out);
        went += u32::from(there);
        for next in world.next() {
            if seen.insert(format!("{next:?}")) {
                open.push(next);
            }
        }
    }
    assert!(stayed > 0 && went > 0, "the search must reach all outcomes");
    assert!(seen.len() > 20, "only {} worlds were reached", seen.len());
}
