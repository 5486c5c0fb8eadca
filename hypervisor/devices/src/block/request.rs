//! Requests to a disk, as the driver writes them into a chain (virtio 1.2, 5.2.6).
//!
//! Parsing is pure but for reading guest memory: everything is checked here, so that what comes out can be carried
//! out without another look at it. A request the disk will not do gets a status, if there is a byte to put it in;
//! without one the driver is broken.

use crate::chain::{Chain, Segment, pieces};
use crate::memory::GuestMemory;
use vm_memory::GuestAddress;

/// Bytes of a sector, the unit of addresses.
pub const SECTOR: u64 = 512;
/// Most segments of a request's data.
pub const MAX_DATA_SEGMENTS: u32 = 254;
/// Most ranges of one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 32;
/// Most sectors of one such range.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Bytes of a serial number.
pub const ID_BYTES: usize = 20;

/// Bytes before the data: type, reserved, sector.
const HEADER_BYTES: u32 = 16;
/// Bytes of one range: sector, number of sectors, flags.
const RANGE_BYTES: u32 = 16;
/// Flag of a write-zeroes range: the space may be given back.
const UNMAP: u32 = 1;

/// Status byte: done.
pub const STATUS_OK: u8 = 0;
/// Status byte: an error.
pub const STATUS_IOERR: u8 = 1;
/// Status byte: the disk does not know the request.
pub const STATUS_UNSUPP: u8 = 2;

/// What the disk can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Its size in bytes, a multiple of [`SECTOR`].
    pub capacity: u64,
    /// Whether it may be written.
    pub writable: bool,
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where they begin.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// Something the disk will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into these segments.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where in memory.
        data: Vec<Segment>,
    },
    /// Write from these segments.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where in memory.
        data: Vec<Segment>,
    },
    /// Make everything written durable.
    Flush,
    /// These ranges are not needed any more.
    Discard(Vec<Range>),
    /// These ranges read as zeros from now on.
    WriteZeroes(Vec<Range>),
    /// Give the serial number.
    GetId,
}

impl Request {
    /// How many bytes of data go over to the guest or come from it.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => {
                data.iter().map(|segment| u64::from(segment.len)).sum()
            }
            Self::GetId => ID_BYTES as u64,
            Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) => 0,
        }
    }

    /// How many bytes of the disk are not what they were afterwards.
    pub fn changed_bytes(&self) -> u64 {
        match self {
            Self::Write { .. } => self.data_bytes(),
            Self::Discard(ranges) | Self::WriteZeroes(ranges) => ranges
                .iter()
                .fold(0, |sum, range| sum.saturating_add(range.bytes)),
            Self::Read { .. } | Self::Flush | Self::GetId => 0,
        }
    }
}

/// Why the disk does not do what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// A request type that this disk does not have.
    #[error("request type {kind} is not known")]
    UnknownType {
        /// The type.
        kind: u32,
    },
    /// The header is not whole.
    #[error("the request has {bytes} bytes, too few for its header")]
    ShortHeader {
        /// What there is.
        bytes: u32,
    },
    /// The data is empty or no whole number of sectors (or ranges).
    #[error("{bytes} bytes of data are no whole number of {unit}-byte units")]
    DataLength {
        /// What there is.
        bytes: u32,
        /// What it must be a multiple of.
        unit: u32,
    },
    /// Beyond the end of the disk.
    #[error("{bytes} bytes at sector {sector} reach past the end of the disk")]
    PastEnd {
        /// First sector.
        sector: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// More data segments than [`MAX_DATA_SEGMENTS`].
    #[error("{segments} data segments are too many")]
    TooManySegments {
        /// How many.
        segments: usize,
    },
    /// More ranges than [`MAX_RANGES`].
    #[error("{ranges} ranges are too many")]
    TooManyRanges {
        /// How many.
        ranges: u32,
    },
    /// A range of more than [`MAX_RANGE_SECTORS`].
    #[error("a range of {sectors} sectors is too long")]
    RangeTooLong {
        /// How many sectors.
        sectors: u32,
    },
    /// Flags of a range that are reserved, or that the request cannot have.
    #[error("a range has flags {flags:#x}")]
    RangeFlags {
        /// The flags.
        flags: u32,
    },
    /// A change to a disk that may only be read.
    #[error("the disk is read-only")]
    ReadOnly,
}

impl Rejection {
    /// What the driver is told.
    pub fn status(self) -> u8 {
        match self {
            Self::UnknownType { .. } | Self::RangeFlags { .. } => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// A chain that has no byte for the status: no request at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request at {head} has no room for a status")]
pub struct NoStatus {
    /// Where its chain begins.
    pub head: u16,
}

/// A request and where its answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What to do, or why not.
    pub request: Result<Request, Rejection>,
    /// Where the status byte goes: the last byte the device may write.
    pub status: GuestAddress,
}

/// Reads the request in `chain`.
pub fn parse(chain: &Chain, memory: &GuestMemory, limits: Limits) -> Result<Parsed, NoStatus> {
    let last = chain.writable().last();
    let Some(last) = last else {
        return Err(NoStatus { head: chain.head() });
    };
    Ok(Parsed {
        request: request(chain, memory, limits),
        status: GuestAddress(last.address.0 + u64::from(last.len) - 1),
    })
}

fn request(chain: &Chain, memory: &GuestMemory, limits: Limits) -> Result<Request, Rejection> {
    let bytes = chain.readable_bytes();
    let mut header = [0; HEADER_BYTES as usize];
    if chain.read(memory, 0, &mut header) < header.len() {
        return Err(Rejection::ShortHeader { bytes });
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes(sector);
    let read_bytes = chain.writable_bytes() - 1;
    let written_bytes = bytes - HEADER_BYTES;
    match kind {
        0 => {
            let offset = placed(sector, read_bytes, limits)?;
            let data = data(chain.writable(), 0, read_bytes)?;
            Ok(Request::Read { offset, data })
        }
        1 => {
            writable(limits)?;
            let offset = placed(sector, written_bytes, limits)?;
            let data = data(chain.readable(), HEADER_BYTES, written_bytes)?;
            Ok(Request::Write { offset, data })
        }
        4 => Ok(Request::Flush),
        8 if (read_bytes as usize) < ID_BYTES => Err(Rejection::DataLength {
            bytes: read_bytes,
            unit: ID_BYTES as u32,
        }),
        8 => Ok(Request::GetId),
        11 => {
            writable(limits)?;
            ranges(chain, memory, limits, 0).map(Request::Discard)
        }
        13 => {
            writable(limits)?;
            ranges(chain, memory, limits, UNMAP).map(Request::WriteZeroes)
        }
        kind => Err(Rejection::UnknownType { kind }),
    }
}

fn writable(limits: Limits) -> Result<(), Rejection> {
    match limits.writable {
        true => Ok(()),
        false => Err(Rejection::ReadOnly),
    }
}

/// The offset of `bytes` at `sector`, if the disk has them.
fn placed(sector: u64, bytes: u32, limits: Limits) -> Result<u64, Rejection> {
    if bytes == 0 || !u64::from(bytes).is_multiple_of(SECTOR) {
        return Err(Rejection::DataLength {
            bytes,
            unit: SECTOR as u32,
        });
    }
    within(sector, bytes.into(), limits)
}

fn within(sector: u64, bytes: u64, limits: Limits) -> Result<u64, Rejection> {
    sector
        .checked_mul(SECTOR)
        .filter(|offset| {
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= limits.capacity)
        })
        .ok_or(Rejection::PastEnd { sector, bytes })
}

fn data(segments: &[Segment], skip: u32, bytes: u32) -> Result<Vec<Segment>, Rejection> {
    let data: Vec<_> = pieces(segments, skip, bytes as usize).collect();
    match data.len() {
        segments if segments > MAX_DATA_SEGMENTS as usize => {
            Err(Rejection::TooManySegments { segments })
        }
        _ => Ok(data),
    }
}

fn ranges(
    chain: &Chain,
    memory: &GuestMemory,
    limits: Limits,
    allowed_flags: u32,
) -> Result<Vec<Range>, Rejection> {
    let bytes = chain.readable_bytes() - HEADER_BYTES;
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) {
        return Err(Rejection::DataLength {
            bytes,
            unit: RANGE_BYTES,
        });
    }
    let count = bytes / RANGE_BYTES;
    if count > MAX_RANGES {
        return Err(Rejection::TooManyRanges { ranges: count });
    }
    let mut ranges = Vec::with_capacity(count as usize);
    for nth in 0..count {
        let mut raw = [0; RANGE_BYTES as usize];
        if chain.read(memory, HEADER_BYTES + nth * RANGE_BYTES, &mut raw) < raw.len() {
            return Err(Rejection::DataLength {
                bytes,
                unit: RANGE_BYTES,
            });
        }
        let [s @ .., n0, n1, n2, n3, f0, f1, f2, f3] = raw;
        let sector = u64::from_le_bytes(s);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !allowed_flags != 0 {
            return Err(Rejection::RangeFlags { flags });
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Rejection::RangeTooLong { sectors });
        }
        let bytes = u64::from(sectors) * SECTOR;
        let offset = within(sector, bytes, limits)?;
        if bytes > 0 {
            ranges.push(Range { offset, bytes });
        }
    }
    Ok(ranges)
}
