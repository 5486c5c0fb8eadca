//! Disks whose content comes with the guest, at the target: who they are, what of them arrives, and that it stays.

use super::TargetError;
use super::doorway::Refusal;
use super::lanes::Content;
use godwit_devices::block::ArrivingDisk;
use godwit_wire::migration::{FrameHeader, TravellingDisk};
use godwit_wire::unit::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A lane makes durable what it has written whenever that is so much: what is left to the end of a round is bounded,
/// however much faster the link is than the disk.
const FLUSH_EVERY_BYTES: u64 = 8 << 20;

/// Arriving disks, in the order in which frames number them.
#[derive(Clone, Debug, Default)]
pub(super) struct Arriving(Arc<[ArrivingDisk]>);

/// What a lane has written to each disk since that was last made durable, by it or at the end of a round.
pub(super) type Unflushed = Vec<u64>;

impl Arriving {
    /// Those that this end was prepared for.
    pub(super) fn new(disks: Vec<ArrivingDisk>) -> Self {
        Self(disks.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Size of all of them.
    pub(super) fn size(&self) -> Bytes {
        Bytes(self.0.iter().map(|disk| disk.bytes().0).sum())
    }

    pub(super) fn unflushed(&self) -> Unflushed {
        vec![0; self.0.len()]
    }

    /// The order in which a source that names `theirs` numbers them, if those are the ones that are waited for.
    pub(super) fn order(&self, theirs: &[TravellingDisk]) -> Result<Vec<usize>, Refusal> {
        let names = |names: &mut dyn Iterator<Item = &str>| {
            let mut names: Vec<_> = names.map(str::to_owned).collect();
            names.sort();
            names
        };
        let sent = names(&mut theirs.iter().map(|disk| disk.name.as_str()));
        let expected = names(&mut self.0.iter().map(ArrivingDisk::name));
        if sent != expected {
            let told = |names: Vec<String>| match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            };
            return Err(Refusal::OtherDisks {
                sent: told(sent),
                expected: told(expected),
            });
        }
        theirs
            .iter()
            .map(|disk| {
                let mut ours = self.0.iter().enumerate();
                match ours.find(|(_, ours)| ours.name() == disk.name) {
                    Some((index, ours)) if ours.bytes() == disk.bytes => Ok(index),
                    Some((_, ours)) => Err(Refusal::DiskSize {
                        name: disk.name.clone(),
                        theirs: disk.bytes,
                        ours: ours.bytes(),
                    }),
                    None => Err(Refusal::OtherMachine(format!("its disk {}", disk.name))),
                }
            })
            .collect()
    }

    /// The disk of a frame, which must lie within it.
    pub(super) fn place(
        &self,
        order: &[usize],
        header: &FrameHeader,
    ) -> Result<(usize, &ArrivingDisk), TargetError> {
        let found = order.get(usize::from(header.disk));
        let index = *found.ok_or(TargetError::NoSuchDisk(header.disk))?;
        let disk = &self.0[index];
        let end = header.address.checked_add(header.content_bytes());
        match end {
            Some(end) if end <= disk.bytes().0 => Ok((index, disk)),
            _ => Err(TargetError::PastDiskEnd {
                disk: disk.name().to_owned(),
                offset: header.address,
                bytes: header.content_bytes(),
            }),
        }
    }

    /// Makes durable what came in a round that is whole; how long that took.
    pub(super) fn flush(&self) -> Result<Duration, TargetError> {
        let began = Instant::now();
        for disk in self.0.iter() {
            disk.flush()?;
        }
        Ok(began.elapsed())
    }

    /// The last round is whole: makes everything durable, after which nothing is written any more.
    pub(super) fn seal(&self) -> Result<(), TargetError> {
        for disk in self.0.iter() {
            disk.seal()?;
        }
        Ok(())
    }
}

/// Writes what a frame brings.
pub(super) fn store(
    (index, disk): (usize, &ArrivingDisk),
    header: &FrameHeader,
    content: Content<'_>,
    unflushed: &mut Unflushed,
) -> Result<(), TargetError> {
    match content {
        Content::Zeros => disk.zero(header.address, header.content_bytes())?,
        Content::Bytes(bytes) => {
            disk.write(header.address, bytes)?;
            unflushed[index] += bytes.len() as u64;
            if unflushed[index] >= FLUSH_EVERY_BYTES {
                unflushed[index] = 0;
                disk.flush()?;
            }
        }
    }
    Ok(())
}
