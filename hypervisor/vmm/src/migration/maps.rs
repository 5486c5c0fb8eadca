//! Maps of missing pages, as they go over a control connection.

use super::stream::{FrameStream, StreamError};
use crate::kvm::DirtyBitmap;
use godwit_wire::migration::{FrameHeader, MAX_MAPPED_PAGES};
use godwit_wire::unit::PAGE_BYTES;

/// Most maps that come one after another: twice what 16 TiB of memory take, once before the pause and once after.
pub(super) const MAX_MAPS: u32 = 1 << 15;

/// Sends the pages of `map`, the first of which is at `address`; parts without any are left out.
pub(super) fn send_map(
    out: &mut FrameStream,
    address: u64,
    map: &DirtyBitmap,
) -> Result<(), StreamError> {
    for first in (0..map.pages()).step_by(MAX_MAPPED_PAGES as usize) {
        let pages = (map.pages() - first).min(u64::from(MAX_MAPPED_PAGES));
        let words = map.words(first..first + pages);
        if words.iter().all(|word| *word == 0) {
            continue;
        }
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let header = FrameHeader::missing(address + first * PAGE_BYTES, pages as u32);
        out.send_frame(header, &payload)?;
    }
    Ok(())
}

/// The map in a frame with this header.
pub(super) fn read_map(header: &FrameHeader, payload: &[u8]) -> DirtyBitmap {
    let (words, _) = payload.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    DirtyBitmap::new(words, u64::from(header.pages))
}
