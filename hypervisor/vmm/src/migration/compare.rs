//! Which pages need not be sent, because the target has kept them from an earlier stay of the VM.
//!
//! The target hashes what it holds of a slice, the source compares. A page that both hash alike is not sent, so a false
//! match would leave the guest with a wrong page. The hash is all 128 bits of XXH3: by chance one comparison in 2^128
//! goes wrong, which for a guest of 1 TiB (2^28 pages) is one migration in 2^100. XXH3 is no cryptographic hash, so
//! pages that were made to collide must be thought of too: only code in the guest could make them, only that guest's own
//! memory would suffer, and it would have to place them before the guest left the host it returns to. The seed is drawn
//! after that, for one migration, and only the two VMMs know it.
//!
//! Nothing of this is believed for the end: with [`Verify::WholeMemory`](godwit_wire::migration::Verify) all memory is
//! hashed once more, as in every migration.

use crate::memory::{GuestRam, Presence, RamError};
use godwit_wire::migration::{FrameHeader, HeldPages, MAX_COMPARED_PAGES, PAGE_HASH_BYTES};
use godwit_wire::unit::PAGE_BYTES;
use xxhash_rust::xxh3::xxh3_128_with_seed;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages copied out of guest memory at a time (256 KiB), as when they are sent.
const CHUNK_PAGES: u64 = 64;

/// Where the hashes of one migration begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seed(pub(super) u64);

impl Seed {
    /// The hash of one page.
    pub(super) fn hash(self, page: &[u8]) -> [u8; PAGE_HASH_BYTES] {
        xxh3_128_with_seed(page, self.0).to_le_bytes()
    }
}

/// The target's side: says what is held.
#[derive(Debug)]
pub(super) struct Holder {
    seed: Seed,
    presence: Presence,
    buffer: Vec<u8>,
}

impl Holder {
    pub(super) fn new(seed: Seed) -> Self {
        Self {
            seed,
            presence: Presence::default(),
            buffer: Vec::new(),
        }
    }

    /// What `ram` holds of the pages of a `Compare` frame, which lie in it. Pages that are not there are not brought
    /// into being.
    pub(super) fn answer(
        &mut self,
        ram: &GuestRam,
        asked: &FrameHeader,
    ) -> Result<HeldPages, RamError> {
        assert!(
            asked.pages <= MAX_COMPARED_PAGES,
            "the header bounds what is asked for"
        );
        let end = asked.address + u64::from(asked.pages) * PAGE_BYTES;
        let mut held = HeldPages::none_of(asked.pages);
        let mut next = asked.address;
        while next < end {
            let there = self.presence.first(ram, next..end)?;
            self.hash_all(ram, asked.address, there.clone(), &mut held)?;
            next = there.end;
        }
        Ok(held)
    }

    fn hash_all(
        &mut self,
        ram: &GuestRam,
        origin: u64,
        there: std::ops::Range<u64>,
        held: &mut HeldPages,
    ) -> Result<(), RamError> {
        let mut next = there.start;
        while next < there.end {
            let bytes = (there.end - next).min(CHUNK_PAGES * PAGE_BYTES);
            self.buffer.resize(bytes as usize, 0);
            ram.read(next, &mut self.buffer)?;
            let first = (next - origin) / PAGE_BYTES;
            for (page, content) in (first as u32..).zip(self.buffer.chunks_exact(PAGE)) {
                held.note(page, self.seed.hash(content));
            }
            next += bytes;
        }
        Ok(())
    }
}

/// What is to be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes with its content.
    Content,
    /// It goes as "all zero".
    Zero,
    /// It does not go: the target has it.
    Kept,
}

/// The source's side: what the target holds of one slice.
#[derive(Clone, Debug)]
pub(super) struct Theirs {
    seed: Seed,
    /// Guest physical address of the slice.
    address: u64,
    held: HeldPages,
}

impl Theirs {
    pub(super) const fn new(seed: Seed, address: u64, held: HeldPages) -> Self {
        Self {
            seed,
            address,
            held,
        }
    }

    /// Judges a page of the slice that is `content` here.
    pub(super) fn fate(&self, address: u64, content: &[u8], zero: bool) -> Fate {
        match (self.their_hash(address), zero) {
            (Some(theirs), _) if theirs == self.seed.hash(content) => Fate::Kept,
            // What is not there is zero.
            (None, true) => Fate::Kept,
            (_, true) => Fate::Zero,
            (_, false) => Fate::Content,
        }
    }

    /// Judges a page of the slice that was never touched here: it is zero. What the target holds there, zeros or not,
    /// is given up.
    pub(super) fn fate_of_untouched(&self, address: u64) -> Fate {
        match self.their_hash(address) {
            Some(_) => Fate::Zero,
            None => Fate::Kept,
        }
    }

    fn their_hash(&self, address: u64) -> Option<[u8; PAGE_HASH_BYTES]> {
        let page = address.checked_sub(self.address)? / PAGE_BYTES;
        self.held.hash(u32::try_from(page).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::unit::Mib;

    const SEED: Seed = Seed(77);
    const ORIGIN: u64 = 8 * PAGE_BYTES;

    /// What the target says of 100 pages from page 8 on; page 9 holds zeros, page 10 and 80 hold sevens.
    fn theirs() -> Theirs {
        let ram = GuestRam::new(Mib(16)).unwrap();
        ram.write(9 * PAGE_BYTES, &[0; PAGE]).unwrap();
        ram.write(10 * PAGE_BYTES, &[7; PAGE]).unwrap();
        ram.write(80 * PAGE_BYTES, &[7; PAGE]).unwrap();
        // Beyond what is asked for.
        ram.write(108 * PAGE_BYTES, &[7; PAGE]).unwrap();
        let resident = ram.resident();
        let asked = FrameHeader::compare(ORIGIN, 100);
        let payload = Holder::new(SEED).answer(&ram, &asked).unwrap().encode();
        assert_eq!(ram.resident(), resident, "asking brings nothing into being");
        assert_eq!(payload.len(), 2 * 8 + 3 * PAGE_HASH_BYTES);
        let header = FrameHeader::held(ORIGIN, 100, payload.len() as u32);
        let held = HeldPages::decode(&asked, &header, &payload).unwrap();
        Theirs::new(SEED, ORIGIN, held)
    }

    #[test]
    fn only_what_differs_is_sent() {
        let theirs = theirs();
        let fate = |page: u64, byte: u8| {
            let content = [byte; PAGE];
            theirs.fate(page * PAGE_BYTES, &content, byte == 0)
        };
        assert_eq!(fate(10, 7), Fate::Kept);
        assert_eq!(fate(80, 7), Fate::Kept);
        assert_eq!(fate(10, 8), Fate::Content);
        assert_eq!(fate(10, 0), Fate::Zero);
        assert_eq!(fate(9, 0), Fate::Kept);
        assert_eq!(fate(11, 0), Fate::Kept);
        assert_eq!(fate(11, 7), Fate::Content);
    }

    #[test]
    fn what_was_never_touched_here_does_not_stay_there() {
        let theirs = theirs();
        assert_eq!(theirs.fate_of_untouched(10 * PAGE_BYTES), Fate::Zero);
        assert_eq!(theirs.fate_of_untouched(9 * PAGE_BYTES), Fate::Zero);
        assert_eq!(theirs.fate_of_untouched(11 * PAGE_BYTES), Fate::Kept);
    }

    #[test]
    fn hashes_depend_on_the_seed_and_on_every_byte() {
        let mut page = [7; PAGE];
        let hash = SEED.hash(&page);
        assert_ne!(hash, Seed(78).hash(&page));
        page[PAGE - 1] = 8;
        assert_ne!(hash, SEED.hash(&page));
    }
}
