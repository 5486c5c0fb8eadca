//! Finding the target, shaking hands, opening lanes, and doing so again when connections broke.

use super::error::{SourceError, out_of_turn};
use super::{Session, Shared};
use crate::kvm::{DirtyBitmap, LoggedSlot};
use crate::machine::MachineError;
use crate::migration::compare::Seed;
use crate::migration::connection::Connection;
use crate::migration::disks;
use crate::migration::lane::{Lane, PagesError};
use crate::migration::maps::{MAX_MAPS, read_map};
use crate::migration::squeeze::Squeeze;
use crate::migration::stream::{FrameStream, StreamError};
use godwit_wire::cpu::GuestCpu;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::migration::{
    Compression, DISKS_CAPABILITY, FrameHeader, FrameKind, LaneKind, MAX_TOUCHED_STRETCHES,
    OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, PostCopy, TargetMemory, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::PAGE_BYTES;
use std::net::TcpStream;
use std::time::Instant;

/// What a target has agreed to.
pub(super) struct Agreed {
    /// Urgent lanes that it takes.
    pub(super) urgent_lanes: u8,
    /// Where it has kept memory that is to be compared.
    pub(super) seed: Option<Seed>,
}

/// All lanes of one set of connections.
pub(super) struct Lanes<'a> {
    pub(super) bulk: Vec<(Lane<'a>, TcpStream)>,
    pub(super) urgent: Vec<Lane<'a>>,
}

/// Connections that were made again.
pub(super) struct Resumed<'a> {
    pub(super) control: FrameStream,
    pub(super) lanes: Lanes<'a>,
    /// The round that pages belong to from here on, and what the target lacks.
    pub(super) owed: (u32, Vec<DirtyBitmap>),
    /// Epoch under which the guest runs there, if it does.
    pub(super) running: Option<Epoch>,
}

impl Session<'_> {
    fn dial(&self) -> Result<FrameStream, SourceError> {
        let target = self.request.target;
        let connection = Connection::to_target(target, self.tls.as_ref())
            .map_err(|source| SourceError::Connect { target, source })?;
        let stream = FrameStream::new(connection);
        self.outgoing.publish(&stream)?;
        Ok(stream)
    }

    /// Finds the target and shakes hands; the control connection, and what the target agrees to.
    pub(super) fn connect(
        &self,
        (vm, spec, cpu, guest_cpu): (VmId, &MachineSpec, &CpuFacts, &GuestCpu),
    ) -> Result<(FrameStream, Agreed), SourceError> {
        let mut stream = self.dial()?;
        let seed = fresh_seed()?;
        let lanes = self.lanes.opened();
        let urgent_lanes = self.urgent_lane_count();
        stream.send(&ToTarget::Hello {
            version: PROTOCOL_VERSION,
            oldest_version: OLDEST_PROTOCOL_VERSION,
            required: match self.disks.is_empty() {
                true => Default::default(),
                false => [DISKS_CAPABILITY.to_owned()].into(),
            },
            migration: self.request.migration,
            token: self.request.token.clone(),
            lanes,
            urgent_lanes,
            vm,
            epoch: self.request.epoch,
            spec: spec.clone(),
            cpu: cpu.clone(),
            guest_cpu: Some(guest_cpu.clone()),
            verify: self.request.policy.verify,
            touched: self
                .ram
                .touched(MAX_TOUCHED_STRETCHES)
                .map_err(MachineError::from)?,
            compare_seed: Some(seed.0),
            disks: disks::told(&self.disks),
        })?;
        // The target populates that memory first, which takes as long as there is memory.
        let asked = Instant::now();
        stream.wait_without_limit().map_err(StreamError::from)?;
        let answer = stream.receive()?;
        stream.limit_silence().map_err(StreamError::from)?;
        self.ledger.progress(|progress| {
            progress.prefault_ms = asked.elapsed().as_millis() as u64;
            progress.lanes = self.lanes.at_work();
            progress.opened_lanes = lanes;
        });
        match answer {
            ToSource::Accept {
                version: PROTOCOL_VERSION,
                urgent_lanes: taken,
                memory,
            } => {
                if taken < urgent_lanes {
                    tracing::warn!(migration = %self.request.migration, "the target cannot do post-copy; going on without");
                }
                let seed = match memory {
                    TargetMemory::Fresh => None,
                    TargetMemory::Kept => Some(seed),
                };
                if seed.is_some() {
                    tracing::info!(migration = %self.request.migration, "the target has kept memory of this VM: only what differs is sent");
                }
                let agreed = Agreed {
                    urgent_lanes: taken.min(urgent_lanes),
                    seed,
                };
                Ok((stream, agreed))
            }
            ToSource::Accept { version, .. } => Err(SourceError::Refused(format!(
                "it wants protocol version {version}, which this end does not speak"
            ))),
            ToSource::Refuse { reason } => Err(SourceError::Refused(reason)),
            other => Err(out_of_turn(other, "Accept")),
        }
    }

    /// Urgent lanes are of use only where post-copy is, which a hash over all memory before the hand-over excludes. They
    /// carry single pages that are waited for, so it is CPUs that they need and not more of the link.
    fn urgent_lane_count(&self) -> u8 {
        let policy = &self.request.policy;
        match (policy.post_copy, policy.verify) {
            (PostCopy::Allowed, Verify::Frames) => self.lanes.at_work(),
            _ => 0,
        }
    }

    fn open_lane(&self, kind: LaneKind, lane: u8) -> Result<FrameStream, SourceError> {
        let mut stream = self.dial()?;
        stream.send(&ToTarget::Join {
            migration: self.request.migration,
            token: self.request.token.clone(),
            kind,
            lane,
        })?;
        match stream.receive()? {
            ToSource::Joined => Ok(stream),
            other => Err(out_of_turn(other, "Joined")),
        }
    }

    pub(super) fn open_lanes<'s>(
        &'s self,
        lanes: u8,
        urgent_lanes: u8,
        shared: &'s Shared<'s>,
    ) -> Result<Lanes<'s>, SourceError> {
        let content = (self.ram, shared.log, &*self.disks);
        let bulk = (0..lanes).map(|lane| {
            let out = self.open_lane(LaneKind::Bulk, lane)?;
            let socket = out.socket().map_err(StreamError::from)?;
            let squeeze = Squeeze::new(self.request.policy.compression);
            let lane = Lane::new(out, content, shared.pace, &shared.tally, squeeze);
            Ok((lane, socket))
        });
        let bulk = bulk.collect::<Result<_, SourceError>>()?;
        let urgent = (0..urgent_lanes).map(|lane| {
            let out = self.open_lane(LaneKind::Urgent, lane)?;
            // The guest may touch nothing that is missing for long.
            out.wait_without_limit().map_err(StreamError::from)?;
            let squeeze = Squeeze::new(Compression::Off);
            Ok(Lane::new(
                out,
                content,
                &shared.at_once,
                &shared.tally,
                squeeze,
            ))
        });
        let urgent = urgent.collect::<Result<_, SourceError>>()?;
        Ok(Lanes { bulk, urgent })
    }

    /// Connects again after `Done`, and hears what the target still lacks.
    pub(super) fn resume<'s>(
        &'s self,
        lanes: u8,
        urgent_lanes: u8,
        shared: &'s Shared<'s>,
    ) -> Result<Resumed<'s>, SourceError> {
        let mut control = self.dial()?;
        control.send(&ToTarget::Resume {
            migration: self.request.migration,
            token: self.request.token.clone(),
            lanes,
            urgent_lanes,
        })?;
        let mut owed: Vec<_> = shared
            .log
            .slots()
            .iter()
            .map(|slot| DirtyBitmap::new(Vec::new(), slot.bytes / PAGE_BYTES))
            .collect();
        let mut maps = 0;
        loop {
            let announced = control.announced()?;
            let header = announced.header;
            if header.kind == FrameKind::Missing && maps < MAX_MAPS {
                maps += 1;
                let payload = control.payload(&announced)?;
                self.note_missing(shared.log.slots(), &mut owed, &header, &payload)?;
                continue;
            }
            return match control.message(&announced)? {
                ToSource::Resumed {
                    round,
                    missing_pages,
                    running,
                } => {
                    let named = owed.iter().map(DirtyBitmap::count).sum();
                    if named != missing_pages {
                        let told = missing_pages;
                        return Err(SourceError::OtherPages { named, told });
                    }
                    let lanes = self.open_lanes(lanes, urgent_lanes, shared)?;
                    Ok(Resumed {
                        control,
                        lanes,
                        owed: (round, owed),
                        running,
                    })
                }
                ToSource::Refuse { reason } => Err(SourceError::Refused(reason)),
                other => Err(out_of_turn(other, "Resumed")),
            };
        }
    }

    fn note_missing(
        &self,
        slots: &[LoggedSlot],
        owed: &mut [DirtyBitmap],
        header: &FrameHeader,
        payload: &[u8],
    ) -> Result<(), SourceError> {
        let map = read_map(header, payload);
        let end = header.address.checked_add(map.pages() * PAGE_BYTES);
        let place = slots.iter().zip(owed).find(|(slot, _)| {
            header.address >= slot.guest_address
                && end.is_some_and(|end| end <= slot.guest_address + slot.bytes)
        });
        let place = place.map(|(slot, owed)| {
            let first = (header.address - slot.guest_address) / PAGE_BYTES;
            (first, owed)
        });
        match place {
            Some((first, owed)) if first.is_multiple_of(64) => {
                owed.merge_at(first, &map);
                Ok(())
            }
            _ => Err(PagesError::NoSuchPage(header.address).into()),
        }
    }
}

/// A number nobody can have known before this migration.
fn fresh_seed() -> Result<Seed, SourceError> {
    let secret = godwit_channel::pki::fresh_secret().map_err(|_| SourceError::NoRandomness)?;
    Ok(Seed(xxhash_rust::xxh3::xxh3_64(secret.as_bytes())))
}
