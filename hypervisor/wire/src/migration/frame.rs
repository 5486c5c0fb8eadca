//! The fixed header of every frame, and its checksum.

use super::{
    FRAME_HEADER_BYTES, FRAME_MAGIC, MAX_COMPARED_PAGES, MAX_CONTROL_BYTES, MAX_FRAME_PAGES,
    MAX_FRAME_SECTORS, MAX_MAPPED_PAGES, MAX_STATE_BYTES, PAGE_HASH_BYTES, SECTOR_BYTES,
};
use crate::unit::PAGE_BYTES;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// One JSON control message.
    Control = 1,
    /// `pages` consecutive pages of content from `address` on.
    Pages = 2,
    /// `pages` consecutive pages of zeros from `address` on; no payload.
    Zero = 3,
    /// The device and vCPU state (CBOR).
    State = 4,
    /// Which of the `pages` pages from `address` on the target does not have: one bit per page, in words of 64.
    Missing = 5,
    /// The guest at the target waits for the page at `address`; no payload.
    Want = 6,
    /// What was wanted has been sent, here or on another lane; no payload.
    Served = 7,
    /// Asks what the target holds of the `pages` pages from `address` on; no payload.
    Compare = 8,
    /// Answers that: one bit per page that is there, in words of 64, and a hash of each of these in order.
    Held = 9,
    /// `pages` sectors of a disk's content from byte `address` of it on.
    DiskContent = 10,
    /// `pages` sectors of a disk from byte `address` of it on that read as zeros; no payload.
    DiskZero = 11,
}

impl FrameKind {
    /// Whether it carries a disk's content.
    pub const fn is_of_disk(self) -> bool {
        matches!(self, Self::DiskContent | Self::DiskZero)
    }
}

/// How a page frame's payload is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is in memory.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
}

/// Fixed header of every frame, little-endian: magic u32, kind u16, codec u8, disk u8, pages u32, length u32, address
/// u64, round u32, checksum u32 (CRC32C of the header before it and of the payload).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What follows.
    pub kind: FrameKind,
    /// How the payload is written; anything but raw only for pages and for disks' content.
    pub codec: Codec,
    /// Which of the travelling disks, in the order the source greeted with; 0 for what is no disk frame.
    pub disk: u8,
    /// Number of pages, for page frames; of sectors, for disk frames.
    pub pages: u32,
    /// Bytes of payload behind the header.
    pub length: u32,
    /// Guest physical address of the first page, for page frames; the first byte of the disk, for disk frames.
    pub address: u64,
    /// Round that the pages or sectors belong to, from 1; 0 for what is neither.
    pub round: u32,
}

/// A header that no correct peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a Godwit migration stream, or out of step.
    #[error("frame starts with {0:#010x} instead of the magic")]
    BadMagic(u32),
    /// A kind or codec of some other version.
    #[error("unknown frame kind {kind} with codec {codec}")]
    Unknown {
        /// Kind on the wire.
        kind: u16,
        /// Codec on the wire.
        codec: u16,
    },
    /// The length does not fit the kind.
    #[error("a frame of kind {kind:?} with {pages} pages cannot have {length} bytes")]
    BadLength {
        /// Kind on the wire.
        kind: FrameKind,
        /// Pages on the wire.
        pages: u32,
        /// Length on the wire.
        length: u32,
    },
    /// The address is not the start of a page.
    #[error("page frame at {0:#x}, which is not a page boundary")]
    Unaligned(u64),
    /// The place on the disk is not the start of a sector.
    #[error("disk frame at byte {0}, where no sector begins")]
    UnalignedSector(u64),
    /// Only page and disk frames belong to a round.
    #[error("a frame of kind {kind:?} cannot belong to round {round}")]
    BadRound {
        /// Kind on the wire.
        kind: FrameKind,
        /// Round on the wire.
        round: u32,
    },
    /// What arrived is not what was sent.
    #[error("a frame arrived damaged: its checksum is {found:#010x} and should be {sent:#010x}")]
    Damaged {
        /// In the header.
        sent: u32,
        /// Of what arrived.
        found: u32,
    },
}

/// CRC32C of a frame: of its header up to the checksum, and of its payload.
pub fn checksum(header: &[u8; FRAME_HEADER_BYTES], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..CHECKSUM_AT]), payload)
}

const CHECKSUM_AT: usize = FRAME_HEADER_BYTES - 4;

/// Judges a payload that is looked at piece by piece.
#[derive(Debug)]
pub struct PayloadCheck {
    sent: u32,
    found: u32,
}

impl PayloadCheck {
    /// Of what comes behind the header of these bytes.
    pub fn behind(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        let [.., a, b, c, d] = *bytes;
        Self {
            sent: u32::from_le_bytes([a, b, c, d]),
            found: checksum(bytes, &[]),
        }
    }

    /// Takes the next piece into account.
    pub fn add(&mut self, piece: &[u8]) {
        self.found = crc32c::crc32c_append(self.found, piece);
    }

    /// Whether that was the payload.
    pub const fn end(self) -> Result<(), FrameError> {
        let Self { sent, found } = self;
        if sent == found {
            Ok(())
        } else {
            Err(FrameError::Damaged { sent, found })
        }
    }
}

/// Bytes of a map of `pages` pages.
pub(super) const fn map_bytes(pages: u32) -> u32 {
    pages.div_ceil(64) * 8
}

impl FrameHeader {
    const fn plain(kind: FrameKind, length: u32) -> Self {
        Self {
            kind,
            codec: Codec::Raw,
            disk: 0,
            pages: 0,
            length,
            address: 0,
            round: 0,
        }
    }

    /// Header of a control message of `length` bytes.
    pub const fn control(length: u32) -> Self {
        Self::plain(FrameKind::Control, length)
    }

    /// Header of a machine state of `length` bytes.
    pub const fn state(length: u32) -> Self {
        Self::plain(FrameKind::State, length)
    }

    /// Header of `pages` pages of content from `address` on.
    pub const fn pages(round: u32, address: u64, pages: u32) -> Self {
        Self {
            pages,
            address,
            round,
            ..Self::plain(FrameKind::Pages, pages * PAGE_BYTES as u32)
        }
    }

    /// The same pages or sectors in `length` bytes of LZ4.
    pub const fn compressed(self, length: u32) -> Self {
        Self {
            codec: Codec::Lz4,
            length,
            ..self
        }
    }

    /// Header of `pages` pages of zeros from `address` on.
    pub const fn zero(round: u32, address: u64, pages: u32) -> Self {
        Self {
            pages,
            address,
            round,
            ..Self::plain(FrameKind::Zero, 0)
        }
    }

    /// Header of `sectors` sectors of content of a disk from its byte `offset` on.
    pub const fn disk_content(round: u32, disk: u8, offset: u64, sectors: u32) -> Self {
        Self {
            disk,
            pages: sectors,
            address: offset,
            round,
            ..Self::plain(FrameKind::DiskContent, sectors * SECTOR_BYTES as u32)
        }
    }

    /// Header of `sectors` sectors of zeros of a disk from its byte `offset` on.
    pub const fn disk_zero(round: u32, disk: u8, offset: u64, sectors: u32) -> Self {
        Self {
            disk,
            pages: sectors,
            address: offset,
            round,
            ..Self::plain(FrameKind::DiskZero, 0)
        }
    }

    /// Bytes of memory or of a disk that a frame stands for.
    pub const fn content_bytes(&self) -> u64 {
        let unit = match self.kind.is_of_disk() {
            true => SECTOR_BYTES,
            false => PAGE_BYTES,
        };
        self.pages as u64 * unit
    }

    /// Header of a map of the `pages` pages from `address` on.
    pub const fn missing(address: u64, pages: u32) -> Self {
        Self {
            pages,
            address,
            ..Self::plain(FrameKind::Missing, map_bytes(pages))
        }
    }

    /// Header that asks for the page at `address`.
    pub const fn want(address: u64) -> Self {
        Self {
            pages: 1,
            address,
            ..Self::plain(FrameKind::Want, 0)
        }
    }

    /// Header that answers a [`Self::want`].
    pub const fn served() -> Self {
        Self::plain(FrameKind::Served, 0)
    }

    /// Header that asks what the target holds of the `pages` pages from `address` on.
    pub const fn compare(address: u64, pages: u32) -> Self {
        Self {
            pages,
            address,
            ..Self::plain(FrameKind::Compare, 0)
        }
    }

    /// Header of the answer to a [`Self::compare`] about the same pages, `length` bytes long.
    pub const fn held(address: u64, pages: u32, length: u32) -> Self {
        Self {
            pages,
            address,
            ..Self::plain(FrameKind::Held, length)
        }
    }

    /// The bytes on the wire in front of `payload`.
    pub fn encode(&self, payload: &[u8]) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[6..8].copy_from_slice(&[self.codec as u8, self.disk]);
        out[8..12].copy_from_slice(&self.pages.to_le_bytes());
        out[12..16].copy_from_slice(&self.length.to_le_bytes());
        out[16..24].copy_from_slice(&self.address.to_le_bytes());
        out[24..28].copy_from_slice(&self.round.to_le_bytes());
        let sum = checksum(&out, payload);
        out[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Judges the payload that came behind the header of these bytes.
    pub fn verify(bytes: &[u8; FRAME_HEADER_BYTES], payload: &[u8]) -> Result<(), FrameError> {
        let mut check = PayloadCheck::behind(bytes);
        check.add(payload);
        check.end()
    }

    /// Reads and judges a header; whatever it returns is bounded by the limits of this module. The checksum covers
    /// the payload too and is judged by [`Self::verify`].
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let magic = u32_at(0);
        if magic != FRAME_MAGIC {
            return Err(FrameError::BadMagic(magic));
        }
        let disk = bytes[7];
        // Only disk frames name a disk: with any other number the codec is one that nobody knows.
        let coding = match u16_at(4) {
            10 | 11 => u16::from(bytes[6]),
            _ => u16_at(6),
        };
        let (kind, codec) = match (u16_at(4), coding) {
            (1, 0) => (FrameKind::Control, Codec::Raw),
            (2, 0) => (FrameKind::Pages, Codec::Raw),
            (2, 1) => (FrameKind::Pages, Codec::Lz4),
            (3, 0) => (FrameKind::Zero, Codec::Raw),
            (4, 0) => (FrameKind::State, Codec::Raw),
            (5, 0) => (FrameKind::Missing, Codec::Raw),
            (6, 0) => (FrameKind::Want, Codec::Raw),
            (7, 0) => (FrameKind::Served, Codec::Raw),
            (8, 0) => (FrameKind::Compare, Codec::Raw),
            (9, 0) => (FrameKind::Held, Codec::Raw),
            (10, 0) => (FrameKind::DiskContent, Codec::Raw),
            (10, 1) => (FrameKind::DiskContent, Codec::Lz4),
            (11, 0) => (FrameKind::DiskZero, Codec::Raw),
            (kind, codec) => return Err(FrameError::Unknown { kind, codec }),
        };
        let (pages, length, round) = (u32_at(8), u32_at(12), u32_at(24));
        let address = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
        let header = Self {
            kind,
            codec,
            disk,
            pages,
            length,
            address,
            round,
        };
        if !header.length_fits() {
            return Err(FrameError::BadLength {
                kind,
                pages,
                length,
            });
        }
        if kind.is_of_disk() && !address.is_multiple_of(SECTOR_BYTES) {
            return Err(FrameError::UnalignedSector(address));
        }
        if !kind.is_of_disk() && !address.is_multiple_of(PAGE_BYTES) {
            return Err(FrameError::Unaligned(address));
        }
        let in_a_round = kind.is_of_disk() || matches!(kind, FrameKind::Pages | FrameKind::Zero);
        if in_a_round == (round == 0) {
            return Err(FrameError::BadRound { kind, round });
        }
        Ok(header)
    }

    /// Whether the length is one that a frame of this kind with so many pages or sectors can have.
    fn length_fits(&self) -> bool {
        let (pages, length) = (self.pages, self.length);
        let content = |most: u32, unit: u64| {
            let whole = || pages * unit as u32;
            (1..=most).contains(&pages)
                && match self.codec {
                    Codec::Raw => length == whole(),
                    Codec::Lz4 => (1..whole()).contains(&length),
                }
        };
        match self.kind {
            FrameKind::Control => pages == 0 && length <= MAX_CONTROL_BYTES,
            FrameKind::State => pages == 0 && length <= MAX_STATE_BYTES,
            FrameKind::Pages => content(MAX_FRAME_PAGES, PAGE_BYTES),
            FrameKind::DiskContent => content(MAX_FRAME_SECTORS, SECTOR_BYTES),
            FrameKind::Zero | FrameKind::DiskZero => pages >= 1 && length == 0,
            FrameKind::Missing => {
                (1..=MAX_MAPPED_PAGES).contains(&pages) && length == map_bytes(pages)
            }
            FrameKind::Want => pages == 1 && length == 0,
            FrameKind::Served => pages == 0 && length == 0,
            FrameKind::Compare => (1..=MAX_COMPARED_PAGES).contains(&pages) && length == 0,
            // How many hashes follow the map, only the map tells.
            FrameKind::Held => {
                (1..=MAX_COMPARED_PAGES).contains(&pages)
                    && length >= map_bytes(pages)
                    && length - map_bytes(pages) <= pages * PAGE_HASH_BYTES as u32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_survive_the_wire() {
        for header in [
            FrameHeader::control(17),
            FrameHeader::pages(1, 0x1000, 256),
            FrameHeader::pages(2, 0x1000, 2).compressed(77),
            FrameHeader::zero(1, 0x1_0000_0000, 70_000),
            FrameHeader::state(5),
            FrameHeader::missing(0x4000, 65),
            FrameHeader::want(0x5000),
            FrameHeader::served(),
            FrameHeader::compare(0x6000, 1024),
            FrameHeader::held(0x6000, 65, 16 + 3 * 16),
            FrameHeader::disk_content(1, 15, 0x200, 2048),
            FrameHeader::disk_content(3, 0, 0x1400, 3).compressed(9),
            FrameHeader::disk_zero(1, 2, 64 << 40, u32::MAX),
        ] {
            assert_eq!(FrameHeader::decode(&header.encode(&[])), Ok(header));
        }
    }

    #[test]
    fn one_flipped_bit_is_noticed_in_header_and_payload() {
        let (header, mut payload) = (FrameHeader::control(3), *b"abc");
        let mut bytes = header.encode(&payload);
        assert_eq!(FrameHeader::verify(&bytes, &payload), Ok(()));
        payload[1] ^= 4;
        assert!(FrameHeader::verify(&bytes, &payload).is_err());
        payload[1] ^= 4;
        bytes[9] ^= 1;
        assert!(FrameHeader::verify(&bytes, &payload).is_err());
    }

    #[test]
    fn the_wire_form_of_a_page_frame_is_fixed() {
        expect_test::expect!["47574d32020000000300000000300000002000000000000007000000a5e81adc"]
            .assert_eq(
                &FrameHeader::pages(7, 0x2000, 3)
                    .encode(b"payload")
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<String>(),
            );
    }

    #[test]
    fn disk_frames_that_cannot_be_are_refused_by_name() {
        let refused = |header: FrameHeader| FrameHeader::decode(&header.encode(&[])).unwrap_err();
        assert_eq!(
            refused(FrameHeader::disk_content(1, 0, 0x201, 1)),
            FrameError::UnalignedSector(0x201)
        );
        assert_eq!(
            refused(FrameHeader::disk_zero(0, 0, 0, 1)),
            FrameError::BadRound {
                kind: FrameKind::DiskZero,
                round: 0
            }
        );
        for (sectors, length) in [(0, 0), (1, 511), (MAX_FRAME_SECTORS + 1, 512)] {
            let header = FrameHeader {
                length,
                ..FrameHeader::disk_content(1, 0, 0, sectors)
            };
            assert!(matches!(refused(header), FrameError::BadLength { .. }));
        }
        // A page frame of a disk is nothing.
        let header = FrameHeader {
            disk: 1,
            ..FrameHeader::pages(1, 0, 1)
        };
        assert_eq!(
            refused(header),
            FrameError::Unknown {
                kind: 2,
                codec: 0x100
            }
        );
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_header_or_an_error(bytes in prop::array::uniform32(any::<u8>())) {
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.length <= MAX_STATE_BYTES);
                prop_assert_eq!(&header.encode(&[])[..CHECKSUM_AT], &bytes[..CHECKSUM_AT]);
            }
        }

        #[test]
        fn no_header_with_the_magic_allows_an_unbounded_payload(
            kind in 0u16..13, pages in any::<u32>(), length in any::<u32>(), address in any::<u64>()
        ) {
            let mut bytes = [0; FRAME_HEADER_BYTES];
            bytes[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&kind.to_le_bytes());
            bytes[8..12].copy_from_slice(&pages.to_le_bytes());
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            bytes[16..24].copy_from_slice(&address.to_le_bytes());
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.length <= MAX_STATE_BYTES);
            }
        }
    }
}
