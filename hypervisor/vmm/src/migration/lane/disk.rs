//! A disk's content on a lane: read as the guest would read it, what is zero as a count.

use super::{CHUNK_PAGES, Lane, PAGE, PagesError, ZERO_PAGE};
use crate::migration::places::Turn;
use crate::migration::round::Round;
use godwit_devices::block::CLUSTER_BYTES;
use godwit_wire::migration::{FRAME_HEADER_BYTES, FrameHeader, SECTOR_BYTES};
use godwit_wire::unit::PAGE_BYTES;
use std::ops::Range;

/// Longest run of zeros in one frame.
const MAX_RUN_BYTES: u64 = u32::MAX as u64 * SECTOR_BYTES;

/// Where a lane stands with disks.
#[derive(Debug, Default)]
pub(super) struct DiskState {
    /// A stretch of a disk known to hold data. It may be zeros by now, which is seen when it is read.
    data: (usize, Range<u64>),
    /// Zeros that may still grow: (disk, offset, bytes).
    zeros: Option<(usize, u64, u64)>,
    /// Sent on this lane, zeros included.
    pub(super) bytes: u64,
}

impl Lane<'_> {
    /// Sends slices of the round's disks when it is this lane's turn, until none is left.
    pub(super) fn send_disks(&mut self, round: &Round, turn: Turn<'_>) -> Result<(), PagesError> {
        while let Some(slice) = turn.take_disk(round) {
            for (first, number) in round.disks[slice.disk].runs(slice.clusters.clone()) {
                self.send_clusters(round, slice.disk, first..first + number)?;
            }
        }
        self.flush_disk_zeros(round.number)
    }

    /// Sends these clusters. They count as unchanged *before* they are looked at in any way: whatever the guest changes
    /// from here on is noted for the next round.
    fn send_clusters(
        &mut self,
        round: &Round,
        index: usize,
        clusters: Range<u64>,
    ) -> Result<(), PagesError> {
        let disk = &self.disks[index];
        disk.clear(clusters.clone());
        let end = (clusters.end * CLUSTER_BYTES).min(disk.bytes());
        let mut next = clusters.start * CLUSTER_BYTES;
        while next < end {
            if round.is_stopped() {
                return Err(PagesError::Stopped);
            }
            if self.disk.data.0 != index || !self.disk.data.1.contains(&next) {
                let data = disk.next_data(next)?.unwrap_or(end..end);
                let hole = data.start.min(end) - next;
                self.disk.data = (index, data);
                if hole > 0 {
                    self.note_disk_zeros(round.number, index, next, hole)?;
                    next += hole;
                    continue;
                }
            }
            let stop = end
                .min(self.disk.data.1.end)
                .min(next + CHUNK_PAGES * PAGE_BYTES);
            self.send_disk_chunk(round, index, next..stop)?;
            next = stop;
        }
        Ok(())
    }

    /// Sends up to a chunk of a disk, zeros apart.
    fn send_disk_chunk(
        &mut self,
        round: &Round,
        index: usize,
        place: Range<u64>,
    ) -> Result<(), PagesError> {
        let start = FRAME_HEADER_BYTES;
        let chunk = start..start + (place.end - place.start) as usize;
        self.disks[index].read(place.start, &mut self.buffer[chunk.clone()])?;
        let offset = |at: usize| place.start + (at - start) as u64;
        let (mut content, mut at) = (start..start, start);
        while at < chunk.end {
            let end = (at + PAGE).min(chunk.end);
            if self.buffer[at..end] == ZERO_PAGE[..end - at] {
                self.send_disk_content(round, index, offset(content.start), content)?;
                content = end..end;
                self.note_disk_zeros(round.number, index, offset(at), (end - at) as u64)?;
            } else {
                content.end = end;
            }
            at = end;
        }
        self.send_disk_content(round, index, offset(content.start), content)
    }

    /// Sends what is in `range` of the buffer; what stood before it there gives room for the header.
    fn send_disk_content(
        &mut self,
        round: &Round,
        index: usize,
        offset: u64,
        range: Range<usize>,
    ) -> Result<(), PagesError> {
        if range.is_empty() {
            return Ok(());
        }
        let bytes = range.len();
        let sectors = (bytes as u64 / SECTOR_BYTES) as u32;
        let header = FrameHeader::disk_content(round.number, index as u8, offset, sectors);
        let sent = self.send_framed(round, header, range)?;
        self.disk.bytes += bytes as u64;
        self.tally
            .disk_content(bytes as u64, sent, FRAME_HEADER_BYTES + bytes);
        Ok(())
    }

    fn note_disk_zeros(
        &mut self,
        round: u32,
        index: usize,
        offset: u64,
        bytes: u64,
    ) -> Result<(), PagesError> {
        match &mut self.disk.zeros {
            Some((disk, start, run))
                if *disk == index && *start + *run == offset && *run + bytes <= MAX_RUN_BYTES =>
            {
                *run += bytes;
            }
            _ => {
                self.flush_disk_zeros(round)?;
                self.disk.zeros = Some((index, offset, bytes));
            }
        }
        Ok(())
    }

    fn flush_disk_zeros(&mut self, round: u32) -> Result<(), PagesError> {
        if let Some((index, offset, bytes)) = self.disk.zeros.take() {
            let sectors = (bytes / SECTOR_BYTES) as u32;
            let header = FrameHeader::disk_zero(round, index as u8, offset, sectors);
            self.out.send_frame(header, &[])?;
            self.disk.bytes += bytes;
            self.tally.disk_zeros(bytes);
        }
        Ok(())
    }
}
