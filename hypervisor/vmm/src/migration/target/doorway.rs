//! Who is let in: connections are taken one after another and judged before anything they send is believed.

use super::{Greeting, Session, TargetError};
use crate::memory::{Absent, RamError};
use crate::migration::compare::Seed;
use crate::migration::connection::Connection;
use crate::migration::stream::{FrameStream, StreamError, brief};
use godwit_wire::id::{Epoch, MigrationId, VmId};
use godwit_wire::machine::{CpuMismatch, MachineSpec};
use godwit_wire::migration::{
    DISKS_CAPABILITY, LaneKind, MAX_LANES, MAX_TOUCHED_STRETCHES, MigrationToken,
    OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Stretch, TargetMemory, ToSource, ToTarget,
    TravellingDisk, Verify, difference,
};
use godwit_wire::unit::Bytes;
use std::time::{Duration, Instant};

/// How long whoever connects may take to say who it is; meanwhile the right one waits.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long all lanes may take to join.
pub(super) const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a source is turned away before it sends anything.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error(
        "it speaks protocol versions {oldest} to {newest}, this end {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    )]
    Version { oldest: u32, newest: u32 },
    #[error("it requires {0}, which this end does not know")]
    Capability(String),
    #[error("this end waits for another migration")]
    OtherMigration,
    #[error("it does not know the token that was given out for this migration")]
    WrongToken,
    #[error("it wants {0} lanes, and there are 1 to {MAX_LANES}")]
    Lanes(u8),
    #[error("the guest is here and waits for its own source")]
    NotResuming,
    #[error("it is no lane that is waited for")]
    NoSuchLane,
    #[error("{0} differs from what was announced")]
    OtherMachine(String),
    #[error("it sends the content of disks {sent}, and this end waits for {expected}")]
    OtherDisks { sent: String, expected: String },
    #[error("its disk {name} has {theirs} and the one here {ours}; make one of the same size")]
    DiskSize {
        name: String,
        theirs: Bytes,
        ours: Bytes,
    },
    #[error(transparent)]
    Cpu(CpuMismatch),
    #[error("it names more touched memory than the machine has")]
    Touched,
    #[error("memory for the guest cannot be had: {0}")]
    NoMemory(String),
}

/// The lanes of one set of connections.
pub(super) struct Joined {
    pub(super) bulk: Vec<FrameStream>,
    pub(super) urgent: Vec<FrameStream>,
}

/// Lanes that are waited for, those that have joined filled in.
struct Waiting {
    bulk: Vec<Option<FrameStream>>,
    urgent: Vec<Option<FrameStream>>,
}

impl Waiting {
    fn of(&mut self, kind: LaneKind) -> &mut Vec<Option<FrameStream>> {
        match kind {
            LaneKind::Bulk => &mut self.bulk,
            LaneKind::Urgent => &mut self.urgent,
        }
    }

    fn joined(&self) -> usize {
        self.bulk.iter().chain(&self.urgent).flatten().count()
    }
}

/// What a source may require of this end.
const KNOWN_CAPABILITIES: [&str; 1] = [DISKS_CAPABILITY];

/// What a source asked for, or offers.
struct Greeted {
    verify: Verify,
    lanes: u8,
    urgent_lanes: u8,
    /// If it can compare.
    seed: Option<Seed>,
    /// The arriving disks as it numbers them.
    disk_order: Vec<usize>,
}

/// What became of a connection: taken, turned away with a reason that it is still to hear, or broken.
pub(super) type Judged<T> = Result<Result<T, (FrameStream, Refusal)>, StreamError>;

impl Session<'_> {
    /// Takes connections until one is the expected source; the others are told why not and dropped.
    pub(super) fn accept(&self) -> Result<Greeting, TargetError> {
        while self.incoming.wanted() {
            if let Some(greeting) =
                self.take_one(|stream, deadline| self.greet(stream, deadline))?
            {
                return Ok(greeting);
            }
        }
        Err(TargetError::Aborted("nobody waits for it any more".into()))
    }

    /// Takes connections until every lane has joined.
    pub(super) fn join_lanes(
        &self,
        (lanes, urgent_lanes): (u8, u8),
        within: Duration,
    ) -> Result<Joined, TargetError> {
        let none = |lanes: u8| (0..lanes).map(|_| None).collect::<Vec<_>>();
        let mut waiting = Waiting {
            bulk: none(lanes),
            urgent: none(urgent_lanes),
        };
        let expected = usize::from(lanes) + usize::from(urgent_lanes);
        let deadline = Instant::now() + within;
        while waiting.joined() < expected {
            if !self.incoming.wanted() {
                return Err(TargetError::Aborted("nobody waits for it any more".into()));
            }
            let joined = waiting.joined();
            self.wait_for_connection(deadline)?
                .ok_or(TargetError::LanesMissing { joined, expected })?;
            self.take_one(|stream, deadline| self.join(stream, deadline, &mut waiting))?;
        }
        Ok(Joined {
            bulk: waiting.bulk.into_iter().flatten().collect(),
            urgent: waiting.urgent.into_iter().flatten().collect(),
        })
    }

    /// Waits for a connection that can be taken; `None` when none came before `deadline`.
    pub(super) fn wait_for_connection(&self, deadline: Instant) -> Result<Option<()>, TargetError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut waiting = [PollFd::new(&*self.incoming.listener.0, PollFlags::IN)];
            match poll(&mut waiting, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(Some(())),
                Err(error) => return Err(TargetError::Listen(error.into())),
            }
        }
    }

    /// Takes one connection and lets `judge` decide on it; whoever is turned away hears why.
    pub(super) fn take_one<T>(
        &self,
        judge: impl FnOnce(FrameStream, Instant) -> Judged<T>,
    ) -> Result<Option<T>, TargetError> {
        let accepted = self.incoming.listener.0.accept();
        let (socket, peer) = accepted.map_err(TargetError::Listen)?;
        let deadline = Instant::now() + HELLO_TIMEOUT;
        let known = self.incoming.sockets.count();
        let judged =
            Connection::from_source(socket, self.tls.as_ref(), deadline).and_then(|connection| {
                let stream = FrameStream::new(connection);
                self.incoming.publish(&stream)?;
                judge(stream, deadline)
            });
        match judged {
            Ok(Ok(taken)) => return Ok(Some(taken)),
            Ok(Err((mut stream, refusal))) => {
                tracing::warn!(%peer, %refusal, "a migration connection was refused");
                let reason = brief(&refusal.to_string());
                // Whoever hangs up without listening has gone as it should.
                let _ = stream.send(&ToSource::Refuse { reason });
            }
            Err(error) => {
                tracing::warn!(%peer, %error, "a connection to the migration port was dropped")
            }
        }
        self.incoming.sockets.keep(known);
        Ok(None)
    }

    fn greet(&self, mut control: FrameStream, deadline: Instant) -> Judged<Greeting> {
        let hello: ToTarget = control.receive_before(deadline)?;
        control.limit_silence()?;
        let judged = self.judge(&hello).and_then(|(greeted, touched)| {
            if greeted.urgent_lanes > 0 {
                // A part of a huge page cannot be given up for one that arrives later.
                self.ram.avoid_huge_pages();
            }
            self.make_ready(greeted.seed, touched)
                .map(|seed| Greeted { seed, ..greeted })
                .map_err(|error| Refusal::NoMemory(error.to_string()))
        });
        let greeted = match judged {
            Ok(greeted) => greeted,
            Err(refusal) => return Ok(Err((control, refusal))),
        };
        let absent = match greeted.urgent_lanes {
            0 => None,
            _ => Absent::new(self.ram)
                .inspect_err(|error| tracing::warn!(%error, "post-copy cannot be had here"))
                .ok(),
        };
        let urgent_lanes = match absent {
            Some(_) => greeted.urgent_lanes,
            None => 0,
        };
        control.send(&ToSource::Accept {
            version: PROTOCOL_VERSION,
            urgent_lanes,
            memory: match greeted.seed {
                Some(_) => TargetMemory::Kept,
                None => TargetMemory::Fresh,
            },
        })?;
        // A round takes as long as its pages take, and its end is the next thing said here.
        control.wait_without_limit()?;
        Ok(Ok(Greeting {
            control,
            verify: greeted.verify,
            lanes: greeted.lanes,
            urgent_lanes,
            absent,
            seed: greeted.seed,
            disk_order: greeted.disk_order,
        }))
    }

    /// Takes host memory for `touched`. Memory from before stays if the source can compare it, else it makes way: what
    /// such a source does not send must be zero. Says what is to be compared with.
    fn make_ready(
        &self,
        offered: Option<Seed>,
        touched: &[Stretch],
    ) -> Result<Option<Seed>, RamError> {
        let seed = match self.memory {
            TargetMemory::Fresh => None,
            TargetMemory::Kept => offered,
        };
        if seed.is_none() && self.memory == TargetMemory::Kept {
            self.ram.discard_all()?;
        }
        self.ram.populate_all(touched, &|| self.incoming.wanted())?;
        Ok(seed)
    }

    /// The source of a post-copy whose connections broke: its new control connection, lanes and urgent lanes.
    pub(super) fn greet_again(
        &self,
        mut control: FrameStream,
        deadline: Instant,
    ) -> Judged<(FrameStream, u8, u8)> {
        let ToTarget::Resume {
            migration,
            token,
            lanes,
            urgent_lanes,
        } = control.receive_before(deadline)?
        else {
            return Ok(Err((control, Refusal::NotResuming)));
        };
        control.limit_silence()?;
        let judged = self.know(migration, &token).and_then(|()| {
            [lanes, urgent_lanes]
                .into_iter()
                .find(|lanes| !(1..=MAX_LANES).contains(lanes))
                .map_or(Ok(()), |lanes| Err(Refusal::Lanes(lanes)))
        });
        Ok(match judged {
            Ok(()) => Ok((control, lanes, urgent_lanes)),
            Err(refusal) => Err((control, refusal)),
        })
    }

    fn join(
        &self,
        mut stream: FrameStream,
        deadline: Instant,
        waiting: &mut Waiting,
    ) -> Judged<()> {
        let ToTarget::Join {
            migration,
            token,
            kind,
            lane,
        } = stream.receive_before(deadline)?
        else {
            return Ok(Err((stream, Refusal::NoSuchLane)));
        };
        stream.limit_silence()?;
        if let Err(refusal) = self.know(migration, &token) {
            return Ok(Err((stream, refusal)));
        }
        match waiting.of(kind).get_mut(usize::from(lane)) {
            Some(place @ None) => {
                if kind == LaneKind::Bulk {
                    // Between rounds a lane may have nothing to say for long; the control connection tells.
                    stream.wait_without_limit()?;
                }
                stream.send(&ToSource::Joined)?;
                *place = Some(stream);
                Ok(Ok(()))
            }
            _ => Ok(Err((stream, Refusal::NoSuchLane))),
        }
    }

    fn know(&self, migration: MigrationId, token: &MigrationToken) -> Result<(), Refusal> {
        if migration != self.request.migration {
            return Err(Refusal::OtherMigration);
        }
        // The digests are compared, so that how long it takes tells nothing of the token.
        let digest = |token: &MigrationToken| godwit_channel::pki::secret_digest(&token.0);
        if digest(token) == digest(&self.incoming.token) {
            Ok(())
        } else {
            Err(Refusal::WrongToken)
        }
    }

    fn judge<'h>(&self, hello: &'h ToTarget) -> Result<(Greeted, &'h [Stretch]), Refusal> {
        let ToTarget::Hello {
            version,
            oldest_version,
            required,
            migration,
            token,
            lanes,
            urgent_lanes,
            vm,
            epoch,
            spec,
            cpu,
            guest_cpu,
            verify,
            touched,
            compare_seed,
            disks,
        } = hello
        else {
            return Err(Refusal::OtherMigration);
        };
        self.know(*migration, token)?;
        if *oldest_version > PROTOCOL_VERSION || *version < OLDEST_PROTOCOL_VERSION {
            return Err(Refusal::Version {
                oldest: *oldest_version,
                newest: *version,
            });
        }
        let known = |capability: &String| KNOWN_CAPABILITIES.contains(&capability.as_str());
        if let Some(unknown) = required.iter().find(|capability| !known(capability)) {
            return Err(Refusal::Capability(unknown.clone()));
        }
        let disk_order = self.judge_machine((*vm, *epoch), spec, disks)?;
        if !(1..=MAX_LANES).contains(lanes) {
            return Err(Refusal::Lanes(*lanes));
        }
        if *urgent_lanes > MAX_LANES {
            return Err(Refusal::Lanes(*urgent_lanes));
        }
        let ours = self.cpu;
        ours.facts
            .admits(spec.cpu, Some(&cpu.signature))
            .map_err(Refusal::Cpu)?;
        if let Some(guest_cpu) = guest_cpu {
            guest_cpu
                .can_go_on(&ours.guest, ours.scaling)
                .map_err(Refusal::Cpu)?;
        }
        let pages = touched
            .iter()
            .fold(0, |sum: u64, stretch| sum.saturating_add(stretch.pages));
        if touched.len() > MAX_TOUCHED_STRETCHES || pages > self.ram.size().pages() {
            return Err(Refusal::Touched);
        }
        let greeted = Greeted {
            verify: *verify,
            lanes: *lanes,
            urgent_lanes: *urgent_lanes,
            seed: compare_seed.map(Seed),
            disk_order,
        };
        Ok((greeted, touched))
    }

    /// It must be the machine that was built here, but for where the disks lie whose content comes along.
    fn judge_machine(
        &self,
        (vm, epoch): (VmId, Epoch),
        spec: &MachineSpec,
        disks: &[TravellingDisk],
    ) -> Result<Vec<usize>, Refusal> {
        let ours = self.request;
        let other = |what: &str| Err(Refusal::OtherMachine(what.to_owned()));
        if vm != ours.vm {
            return other("the VM");
        }
        if epoch != ours.epoch {
            return other("its epoch");
        }
        if let Some(what) = difference(spec, &ours.spec, &ours.arriving_disks) {
            return Err(Refusal::OtherMachine(what));
        }
        self.disks.order(disks)
    }
}
