//! Bounded walks over descriptor chains a hostile guest may have written (virtio 1.2, 2.7).
//!
//! [`Chain::pop`] takes the next chain the driver made available, reads every descriptor exactly once, and checks
//! all of it before a device sees any of it: a [`Chain`] has at most [`MAX_SEGMENTS`] segments, none empty, all of
//! them inside guest memory, readable ones before writable ones. What breaks the rules has a name in
//! [`ChainError`]; the device then stops and asks for a reset, since nothing in such a ring can be trusted.

use crate::memory::GuestMemory;
use std::sync::atomic::Ordering;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

/// Most segments of one chain, whatever the size of its queue or indirect table.
pub const MAX_SEGMENTS: usize = 1024;

/// Bytes of one descriptor.
const DESCRIPTOR_BYTES: u32 = 16;
/// Flag of a descriptor that has a successor.
const NEXT: u16 = 1;
/// Flag of a descriptor whose bytes the device writes.
const WRITE: u16 = 2;
/// Flag of a descriptor that points to a table of descriptors.
const INDIRECT: u16 = 4;
/// Where the ring of available heads begins in its area: after `flags` and `idx`.
const AVAIL_RING_OFFSET: u64 = 4;

/// What is wrong with a chain, or with the ring it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The driver claims more new chains than the queue has room for.
    #[error("the available index went from {next} to {index} in a queue of {size}")]
    AvailableIndex {
        /// What the ring says.
        index: u16,
        /// What the device would take next.
        next: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A ring or table lies outside guest memory.
    #[error("the descriptor or ring entry at {address:#x} is outside guest memory")]
    RingOutsideMemory {
        /// Where it would be.
        address: u64,
    },
    /// A descriptor that its table does not have.
    #[error("descriptor {index} is outside its table of {size}")]
    DescriptorOutsideTable {
        /// The descriptor.
        index: u16,
        /// Size of the table.
        size: u32,
    },
    /// More descriptors than the table has: the chain runs in a circle.
    #[error("the chain at {head} loops")]
    Loop {
        /// Where the chain begins.
        head: u16,
    },
    /// More segments than [`MAX_SEGMENTS`].
    #[error("the chain at {head} has more than {MAX_SEGMENTS} segments")]
    TooManySegments {
        /// Where the chain begins.
        head: u16,
    },
    /// An indirect table inside an indirect table.
    #[error("the chain at {head} nests indirect tables")]
    NestedIndirect {
        /// Where the chain begins.
        head: u16,
    },
    /// A descriptor that is indirect and has a successor, which the specification forbids.
    #[error("the chain at {head} goes on behind an indirect table")]
    IndirectWithNext {
        /// Where the chain begins.
        head: u16,
    },
    /// The indirect table is no whole number of descriptors, or has none.
    #[error("an indirect table of {bytes} bytes holds no whole number of descriptors")]
    IndirectLength {
        /// Its length.
        bytes: u32,
    },
    /// A segment without bytes.
    #[error("the chain at {head} has an empty segment")]
    EmptySegment {
        /// Where the chain begins.
        head: u16,
    },
    /// Bytes outside guest memory.
    #[error("{len} bytes at {address:#x} are not guest memory")]
    OutsideMemory {
        /// Where they would be.
        address: u64,
        /// How many.
        len: u32,
    },
    /// A readable segment behind a writable one.
    #[error("the chain at {head} has readable segments behind writable ones")]
    ReadableAfterWritable {
        /// Where the chain begins.
        head: u16,
    },
    /// More than 4 GiB, which the specification forbids.
    #[error("the chain at {head} is longer than 4 GiB")]
    TooLong {
        /// Where the chain begins.
        head: u16,
    },
}

/// Some contiguous bytes of guest memory; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where they begin.
    pub address: GuestAddress,
    /// How many.
    pub len: u32,
}

/// One request of the driver, all of it inside guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

impl Chain {
    /// Takes the next chain the driver made available, if there is one.
    ///
    /// After an error the queue's position is unspecified: nothing more may be taken until the device was reset.
    pub fn pop(queue: &mut Queue, memory: &GuestMemory) -> Result<Option<Self>, ChainError> {
        let Some(head) = pop_head(queue, memory)? else {
            return Ok(None);
        };
        Self::at(queue, memory, head).map(Some)
    }

    /// Reads the chain that begins at `head`: one that was taken earlier and is not finished yet.
    pub fn at(queue: &Queue, memory: &GuestMemory, head: u16) -> Result<Self, ChainError> {
        let mut chain = Self {
            head,
            segments: Vec::with_capacity(4),
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        };
        chain.walk(
            memory,
            Table {
                address: queue.desc_table(),
                size: queue.size().into(),
            },
        )?;
        Ok(chain)
    }

    /// The number by which the used ring names the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// What the device may write, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Length of [`Self::readable`].
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Length of [`Self::writable`].
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Copies from the readable part, from its byte `offset` on, and says how many bytes there were.
    pub fn read(&self, memory: &GuestMemory, offset: u32, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in pieces(self.readable(), offset, bytes.len()) {
            let end = done + piece.len as usize;
            if memory
                .read_slice(&mut bytes[done..end], piece.address)
                .is_err()
            {
                break;
            }
            done = end;
        }
        done
    }

    /// Copies to the writable part, from its byte `offset` on, and says how many bytes fitted.
    pub fn write(&self, memory: &GuestMemory, offset: u32, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in pieces(self.writable(), offset, bytes.len()) {
            let end = done + piece.len as usize;
            if memory
                .write_slice(&bytes[done..end], piece.address)
                .is_err()
            {
                break;
            }
            done = end;
        }
        done
    }

    fn walk(&mut self, memory: &GuestMemory, mut table: Table) -> Result<(), ChainError> {
        let head = self.head;
        let mut index = head;
        let mut indirect = false;
        let mut left = table.size;
        loop {
            if left == 0 {
                return Err(ChainError::Loop { head });
            }
            left -= 1;
            let descriptor = table.read(memory, index)?;
            if descriptor.flags() & INDIRECT != 0 {
                if indirect {
                    return Err(ChainError::NestedIndirect { head });
                }
                if descriptor.flags() & NEXT != 0 {
                    return Err(ChainError::IndirectWithNext { head });
                }
                table = Table::indirect(memory, &descriptor)?;
                (indirect, index, left) = (true, 0, table.size);
                continue;
            }
            self.push(memory, &descriptor)?;
            if descriptor.flags() & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let head = self.head;
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(ChainError::EmptySegment { head });
        }
        if self.segments.len() == MAX_SEGMENTS {
            return Err(ChainError::TooManySegments { head });
        }
        let writable = descriptor.flags() & WRITE != 0;
        let access = if writable {
            Permissions::Write
        } else {
            Permissions::Read
        };
        if !memory.check_range(address, len as usize, access) {
            return Err(ChainError::OutsideMemory {
                address: address.0,
                len,
            });
        }
        if self
            .readable_bytes
            .checked_add(self.writable_bytes)
            .and_then(|sum| sum.checked_add(len))
            .is_none()
        {
            return Err(ChainError::TooLong { head });
        }
        if writable {
            self.writable_bytes += len;
        } else {
            if self.writable_bytes > 0 {
                return Err(ChainError::ReadableAfterWritable { head });
            }
            self.readable += 1;
            self.readable_bytes += len;
        }
        self.segments.push(Segment { address, len });
        Ok(())
    }
}

/// The parts of `segments` that hold `len` bytes from byte `offset` on, as far as they reach.
pub fn pieces(segments: &[Segment], offset: u32, len: usize) -> impl Iterator<Item = Segment> + '_ {
    let mut skip = offset;
    let mut left = u32::try_from(len).unwrap_or(u32::MAX);
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len);
        skip -= skipped;
        let taken = (segment.len - skipped).min(left);
        left -= taken;
        (taken > 0).then(|| Segment {
            // In range: the whole segment is inside guest memory.
            address: GuestAddress(segment.address.0 + u64::from(skipped)),
            len: taken,
        })
    })
}

fn pop_head(queue: &mut Queue, memory: &GuestMemory) -> Result<Option<u16>, ChainError> {
    let (next, size) = (queue.next_avail(), queue.size());
    let index = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|_| ChainError::RingOutsideMemory {
            address: queue.avail_ring(),
        })?
        .0;
    match index.wrapping_sub(next) {
        0 => return Ok(None),
        new if new > size => return Err(ChainError::AvailableIndex { index, next, size }),
        _ => {}
    }
    let offset = AVAIL_RING_OFFSET + 2 * u64::from(next % size);
    let address = queue.avail_ring().saturating_add(offset);
    let head: u16 = memory
        .read_obj(GuestAddress(address))
        .map_err(|_| ChainError::RingOutsideMemory { address })?;
    queue.set_next_avail(next.wrapping_add(1));
    Ok(Some(u16::from_le(head)))
}

/// Descriptors, side by side in guest memory.
#[derive(Clone, Copy)]
struct Table {
    address: u64,
    size: u32,
}

impl Table {
    fn indirect(memory: &GuestMemory, descriptor: &Descriptor) -> Result<Self, ChainError> {
        let (address, bytes) = (descriptor.addr(), descriptor.len());
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::IndirectLength { bytes });
        }
        if !memory.check_range(address, bytes as usize, Permissions::Read) {
            return Err(ChainError::OutsideMemory {
                address: address.0,
                len: bytes,
            });
        }
        Ok(Self {
            address: address.0,
            size: bytes / DESCRIPTOR_BYTES,
        })
    }

    /// A copy: the guest may change its table while the device looks at it.
    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.size {
            return Err(ChainError::DescriptorOutsideTable {
                index,
                size: self.size,
            });
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let address = self.address.saturating_add(offset);
        memory
            .read_obj(GuestAddress(address))
            .map_err(|_| ChainError::RingOutsideMemory { address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const MEMORY: u64 = 0x10_0000;
    const TABLE: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const SIZE: u16 = 16;

    fn ring() -> (GuestMemory, Queue) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        (memory, queue)
    }

    fn put(memory: &GuestMemory, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        let at = GuestAddress(table + 16 * u64::from(index));
        memory
            .write_obj(Descriptor::new(address, len, flags, next), at)
            .unwrap();
    }

    /// What the device makes of a chain at descriptor 0 with these descriptors.
    fn offered(descriptors: &[(u64, u32, u16, u16)]) -> Result<Option<Chain>, ChainError> {
        let (memory, mut queue) = ring();
        for (index, descriptor) in descriptors.iter().enumerate() {
            put(&memory, TABLE, index as u16, *descriptor);
        }
        memory.write_obj(0u16, GuestAddress(AVAIL + 4)).unwrap();
        memory.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
        Chain::pop(&mut queue, &memory)
    }

    #[test]
    fn an_empty_ring_has_no_chain() {
        let (memory, mut queue) = ring();
        assert_eq!(Chain::pop(&mut queue, &memory), Ok(None));
    }

    #[test]
    fn a_chain_is_read_in_order_and_copied_across_segments() {
        let (memory, mut queue) = ring();
        for (index, descriptor) in [
            (0x8000, 3, NEXT, 1),
            (0x9000, 4, NEXT, 2),
            (0xa000, 2, NEXT | WRITE, 3),
            (0xb000, 8, WRITE, 0),
        ]
        .into_iter()
        .enumerate()
        {
            put(&memory, TABLE, index as u16, descriptor);
        }
        memory.write_slice(b"abc", GuestAddress(0x8000)).unwrap();
        memory.write_slice(b"defg", GuestAddress(0x9000)).unwrap();
        memory.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();

        let chain = Chain::pop(&mut queue, &memory).unwrap().unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (7, 10));
        let mut bytes = [0; 9];
        assert_eq!(chain.read(&memory, 2, &mut bytes), 5);
        assert_eq!(&bytes[..5], b"cdefg");
        assert_eq!(chain.write(&memory, 1, b"0123456789"), 9);
        let mut written = [0; 8];
        memory
            .read_slice(&mut written, GuestAddress(0xb000))
            .unwrap();
        assert_eq!(&written, b"12345678");
        assert_eq!(Chain::pop(&mut queue, &memory), Ok(None));
        assert_eq!(Chain::at(&queue, &memory, 0), Ok(chain));
    }

    #[test]
    fn what_no_driver_does_is_refused_by_name() {
        let head = 0;
        assert_eq!(
            offered(&[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)]),
            Err(ChainError::Loop { head })
        );
        assert_eq!(
            offered(&[(0x8000, 1, NEXT, SIZE)]),
            Err(ChainError::DescriptorOutsideTable {
                index: SIZE,
                size: SIZE.into()
            })
        );
        assert_eq!(
            offered(&[(0x8000, 0, 0, 0)]),
            Err(ChainError::EmptySegment { head })
        );
        assert_eq!(
            offered(&[(MEMORY - 4, 5, WRITE, 0)]),
            Err(ChainError::OutsideMemory {
                address: MEMORY - 4,
                len: 5
            })
        );
        assert_eq!(
            offered(&[(u64::MAX, u32::MAX, 0, 0)]),
            Err(ChainError::OutsideMemory {
                address: u64::MAX,
                len: u32::MAX
            })
        );
        assert_eq!(
            offered(&[(0x8000, 1, NEXT | WRITE, 1), (0x8000, 1, 0, 0)]),
            Err(ChainError::ReadableAfterWritable { head })
        );
        assert_eq!(
            offered(&[(0x8000, 17, INDIRECT, 0)]),
            Err(ChainError::IndirectLength { bytes: 17 })
        );
        assert_eq!(
            offered(&[(0x8000, 16, INDIRECT | NEXT, 1)]),
            Err(ChainError::IndirectWithNext { head })
        );
        // A table that contains itself.
        assert_eq!(
            offered(&[(TABLE, 16, INDIRECT, 0)]),
            Err(ChainError::NestedIndirect { head })
        );
    }

    #[test]
    fn an_indirect_table_is_walked_within_its_bounds() {
        let (memory, mut queue) = ring();
        put(&memory, TABLE, 0, (0x8000, 16 * 2000, INDIRECT, 0));
        for index in 0..1999 {
            put(&memory, 0x8000, index, (0x100, 1, NEXT, index + 1));
        }
        memory.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
        assert_eq!(
            Chain::pop(&mut queue, &memory),
            Err(ChainError::TooManySegments { head: 0 })
        );
        put(&memory, 0x8000, 10, (0x100, 1, WRITE, 0));
        let chain = Chain::at(&queue, &memory, 0).unwrap();
        assert_eq!((chain.readable().len(), chain.writable().len()), (10, 1));
        put(&memory, 0x8000, 10, (0x100, 1, NEXT, 2000));
        assert_eq!(
            Chain::at(&queue, &memory, 0),
            Err(ChainError::DescriptorOutsideTable {
                index: 2000,
                size: 2000
            })
        );
    }

    #[test]
    fn an_available_index_beyond_the_queue_is_refused() {
        let (memory, mut queue) = ring();
        memory.write_obj(SIZE + 1, GuestAddress(AVAIL + 2)).unwrap();
        assert_eq!(
            Chain::pop(&mut queue, &memory),
            Err(ChainError::AvailableIndex {
                index: SIZE + 1,
                next: 0,
                size: SIZE
            })
        );
    }

    proptest! {
        #[test]
        fn any_table_gives_a_chain_inside_memory_or_an_error(
            descriptors in prop::collection::vec(
                (0..2 * MEMORY, 0u32..0x4_0000, 0u16..8, 0u16..SIZE + 2),
                1..usize::from(SIZE),
            ),
        ) {
            if let Ok(Some(chain)) = offered(&descriptors) {
                prop_assert!(chain.readable().len() + chain.writable().len() <= MAX_SEGMENTS);
                for segment in chain.readable().iter().chain(chain.writable()) {
                    prop_assert!(segment.len > 0);
                    prop_assert!(segment.address.0 + u64::from(segment.len) <= MEMORY);
                }
            }
        }

        #[test]
        fn pieces_cover_what_was_asked_for(
            lens in prop::collection::vec(1u32..50, 0..8),
            offset in 0u32..500,
            len in 0usize..500,
        ) {
            let segments: Vec<_> = lens
                .iter()
                .map(|len| Segment { address: GuestAddress(0x1000), len: *len })
                .collect();
            let total: u32 = lens.iter().sum();
            let covered: u32 = pieces(&segments, offset, len).map(|piece| piece.len).sum();
            prop_assert_eq!(covered, total.saturating_sub(offset).min(len as u32));
        }
    }
}
