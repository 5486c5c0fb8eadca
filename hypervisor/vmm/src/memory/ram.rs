//! Guest RAM: one memfd, mapped shared, below and above the hole under 4 GiB.

use super::pending::Pending;
use crate::kvm::{self, DirtyBitmap, DirtyLogging, KvmError, VmFd};
use godwit_devices::memory::GuestMemory;
use godwit_wire::devices::MemoryBacking;
use godwit_wire::migration::Stretch;
use godwit_wire::unit::{Bytes, Mib, PAGE_BYTES};
use godwit_wire::vmm_api::GUEST_MEMORY_NAME;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    Address, Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion,
    MmapRegion, VolatileSlice,
};

/// RAM ends here and goes on at 4 GiB: LAPIC, IOAPIC and (later) PCI live between.
const HOLE_START: u64 = 0xc000_0000;
const HOLE_END: u64 = 0x1_0000_0000;
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;
const HUGE_PAGE_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Unit of hashing.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// Guest RAM cannot be had or accessed.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host does not have that much left.
    #[error("the guest needs {needed} and the host has {available} available")]
    NotEnough {
        /// What the spec asks for.
        needed: Mib,
        /// `MemAvailable`.
        available: Mib,
    },
    /// The kernel refused.
    #[error("guest memory of {0} cannot be set up")]
    Setup(Mib, #[source] io::Error),
    /// The pool of huge pages has too little left.
    #[error("the guest needs {needed} of 2 MiB pages and the host's pool has {available} free")]
    HugePages {
        /// What the spec asks for.
        needed: Mib,
        /// Free and not reserved.
        available: Mib,
    },
    /// What was kept of an earlier stay is not what it should be.
    #[error("the memory kept at {path} cannot be used")]
    Kept {
        /// Where it should be.
        path: std::path::PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// Mapping failed.
    #[error("guest memory cannot be mapped")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// Memory of another machine.
    #[error("the memory to be taken over has {found} and the guest {expected}")]
    OtherSize {
        /// What the spec says.
        expected: Bytes,
        /// What it is.
        found: Bytes,
    },
    /// An address outside guest memory.
    #[error("guest memory has no {bytes} bytes at {address:#x}")]
    OutOfRange {
        /// Guest physical address.
        address: u64,
        /// Length of the access.
        bytes: u64,
    },
    /// Reading or writing failed.
    #[error("guest memory at {address:#x} cannot be accessed")]
    Access {
        /// Guest physical address.
        address: u64,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First guest physical address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// Where it begins in the memfd.
    pub file_offset: u64,
}

/// Guest RAM; cheap to clone, freed with the last clone.
#[derive(Clone, Debug)]
pub struct GuestRam {
    map: GuestMemory,
    file: Arc<File>,
    segments: Arc<[Segment]>,
    backing: MemoryBacking,
    /// Whether pages of 4 KiB are wanted where huge ones could be had.
    pub(super) small_pages: Arc<AtomicBool>,
    /// What is brought in on demand and has not arrived; nothing ever for most machines.
    pending: Arc<OnceLock<Arc<Pending>>>,
}

/// Splits `bytes` of RAM around the hole.
fn layout(bytes: u64) -> Vec<Segment> {
    let low = bytes.min(HOLE_START);
    let mut segments = vec![Segment {
        start: 0,
        bytes: low,
        file_offset: 0,
    }];
    if bytes > low {
        segments.push(Segment {
            start: HOLE_END,
            bytes: bytes - low,
            file_offset: low,
        });
    }
    segments
}

impl GuestRam {
    /// Reserves `size` of guest memory; pages are taken from the host when first touched.
    pub fn new(size: Mib) -> Result<Self, RamError> {
        Self::with_backing(size, MemoryBacking::Standard)
    }

    /// [`Self::new`] with a choice of pages.
    pub fn with_backing(size: Mib, backing: MemoryBacking) -> Result<Self, RamError> {
        let pages = match backing {
            MemoryBacking::Standard => {
                if let Some(available) = available_memory()
                    && available < size
                {
                    return Err(RamError::NotEnough {
                        needed: size,
                        available,
                    });
                }
                MemfdFlags::empty()
            }
            MemoryBacking::Huge2M => {
                let available = free_huge_pages();
                if available < size {
                    return Err(RamError::HugePages {
                        needed: size,
                        available,
                    });
                }
                MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB
            }
        };
        let setup = |error: rustix::io::Errno| RamError::Setup(size, error.into());
        let file = File::from(
            rustix::fs::memfd_create(
                GUEST_MEMORY_NAME,
                MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL | pages,
            )
            .or_else(|_| rustix::fs::memfd_create(GUEST_MEMORY_NAME, MemfdFlags::CLOEXEC | pages))
            .map_err(setup)?,
        );
        rustix::fs::ftruncate(&file, size.bytes().0).map_err(setup)?;
        Self::map_file(file, size, backing)
    }

    /// Guest memory that another process of this host has, with what is in it.
    pub fn inherit(file: File, size: Mib, backing: MemoryBacking) -> Result<Self, RamError> {
        let length = file
            .metadata()
            .map_err(|error| RamError::Setup(size, error))?
            .len();
        if length != size.bytes().0 {
            return Err(RamError::OtherSize {
                expected: size.bytes(),
                found: Bytes(length),
            });
        }
        Self::map_file(file, size, backing)
    }

    /// The file behind the memory, for another process of this host.
    pub fn lend(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Guest memory of `size` in a memfd that is there already, with whatever it holds.
    pub(super) fn map_file(
        file: File,
        size: Mib,
        backing: MemoryBacking,
    ) -> Result<Self, RamError> {
        let file = Arc::new(file);
        let segments: Arc<[Segment]> = layout(size.bytes().0).into();
        let ranges = segments.iter().map(|segment| {
            (
                GuestAddress(segment.start),
                segment.bytes as usize,
                Some(FileOffset::from_arc(file.clone(), segment.file_offset)),
            )
        });
        let map = GuestMemory::from_ranges_with_files(ranges).map_err(RamError::Map)?;
        Ok(Self {
            map,
            file,
            segments,
            backing,
            small_pages: Arc::default(),
            pending: Arc::default(),
        })
    }

    /// The memory as rust-vmm's crates know it.
    pub const fn map(&self) -> &GuestMemory {
        &self.map
    }

    /// Contiguous pieces, by address.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Size in all.
    pub fn size(&self) -> Bytes {
        Bytes(self.segments.iter().map(|segment| segment.bytes).sum())
    }

    /// Which pages it is made of.
    pub const fn backing(&self) -> MemoryBacking {
        self.backing
    }

    /// Host memory that guest pages take now.
    pub fn resident(&self) -> Bytes {
        rustix::fs::fstat(&*self.file).map_or(Bytes(0), |stat| Bytes(stat.st_blocks as u64 * 512))
    }

    /// Bytes of the pages it is made of.
    pub const fn page_bytes(&self) -> u64 {
        match self.backing {
            MemoryBacking::Standard => PAGE_BYTES,
            MemoryBacking::Huge2M => HUGE_PAGE_BYTES,
        }
    }

    /// From now on what `pending` waits for counts as touched, because it is not zero. Once in a lifetime, before
    /// anything touches the memory.
    pub fn expect(&self, pending: Arc<Pending>) {
        let first = self.pending.set(pending).is_ok();
        assert!(first, "memory is filled once");
    }

    /// Guest memory that is still to be brought in.
    pub fn expected(&self) -> Bytes {
        let left = |pending: &Arc<Pending>| pending.left() * pending.unit_bytes();
        Bytes(self.pending.get().map_or(0, left))
    }

    /// Gives the memory to a VM, one slot per segment.
    pub fn give_to(&self, vm: &VmFd) -> Result<(), KvmError> {
        self.slots().iter().try_for_each(|slot| {
            kvm::map_memory(
                vm,
                slot.slot,
                slot.guest_address,
                slot.host_address,
                slot.bytes,
                DirtyLogging::Off,
            )
        })
    }

    /// The slots [`Self::give_to`] makes.
    pub fn slots(&self) -> Vec<kvm::LoggedSlot> {
        (0..)
            .zip(self.segments.iter())
            .map(|(slot, segment)| kvm::LoggedSlot {
                slot,
                guest_address: segment.start,
                host_address: self.host_start(segment) as u64,
                bytes: segment.bytes,
            })
            .collect()
    }

    /// Pages that this process wrote (devices, above all) since it was last asked, per segment; KVM's dirty log knows
    /// only what vCPUs write. A page is marked after it was written, so what is written meanwhile is told next time.
    pub fn take_written(&self) -> Vec<DirtyBitmap> {
        self.map
            .iter()
            .map(|region| {
                // The region as a mapping: as memory it shows its bitmap only in slices.
                let marks = MmapRegion::bitmap(region).get_and_reset();
                DirtyBitmap::new(marks, region.len() / PAGE_BYTES)
            })
            .collect()
    }

    /// Copies guest memory into `buffer`.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), RamError> {
        self.map
            .read_slice(buffer, GuestAddress(address))
            .map_err(|error| Self::access(address, error))
    }

    /// Copies `bytes` into guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), RamError> {
        self.map
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Self::access(address, error))
    }

    /// Copies `bytes` to where they belong by their place in the file behind the memory: its segments follow one
    /// another there.
    pub fn write_at(&self, file_offset: u64, bytes: &[u8]) -> Result<(), RamError> {
        let mut rest = bytes;
        for segment in self.segments.iter() {
            let at = file_offset + (bytes.len() - rest.len()) as u64;
            let end = segment.file_offset + segment.bytes;
            if rest.is_empty() || at < segment.file_offset || at >= end {
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min((end - at) as usize));
            self.write(segment.start + (at - segment.file_offset), now)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(RamError::OutOfRange {
                address: file_offset,
                bytes: bytes.len() as u64,
            })
        }
    }

    /// The memory itself, to be filled from or written to a file descriptor. The whole range must lie within one
    /// segment.
    pub fn slice(
        &self,
        address: u64,
        bytes: u64,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, RamError> {
        let out_of_range = || RamError::OutOfRange { address, bytes };
        let length = usize::try_from(bytes).map_err(|_| out_of_range())?;
        self.map
            .get_slice(GuestAddress(address), length)
            .map_err(|_| out_of_range())
    }

    /// Makes `pages` pages from `address` on read as zeros and gives them back to the host.
    pub fn discard(&self, address: u64, pages: u64) -> Result<(), RamError> {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        let segment = self
            .segment_of(address, bytes)
            .ok_or(RamError::OutOfRange { address, bytes })?;
        self.bring_in(segment.file_offset + (address - segment.start), bytes)?;
        let (mut address, mut bytes) = (address, bytes);
        if self.backing == MemoryBacking::Huge2M {
            // A part of a huge page cannot be given back, and older kernels leave it as it was.
            let start = address.next_multiple_of(HUGE_PAGE_BYTES);
            let end = (address + bytes) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
            if start >= end {
                return self.clear(address, bytes);
            }
            self.clear(address, start - address)?;
            self.clear(end, address + bytes - end)?;
            (address, bytes) = (start, end - start);
        }
        let offset = segment.file_offset + (address - segment.start);
        rustix::fs::fallocate(
            &*self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            bytes,
        )
        .map_err(|error| RamError::Access {
            address,
            source: error.into(),
        })
    }

    /// Waits until everything in the range is there: what is brought in later would undo a discard.
    fn bring_in(&self, file_offset: u64, bytes: u64) -> Result<(), RamError> {
        let Some(pending) = self.pending.get() else {
            return Ok(());
        };
        let end = file_offset + bytes;
        while let Some(waiting) = pending.next(file_offset..end) {
            // Its page may be there while others of its unit are still to come.
            self.read_at(waiting.start, &mut [0])?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Copies what is at a place in the file behind the memory into `buffer`. Within one segment.
    fn read_at(&self, file_offset: u64, buffer: &mut [u8]) -> Result<(), RamError> {
        let segment = self.segments.iter().find(|segment| {
            (segment.file_offset..segment.file_offset + segment.bytes).contains(&file_offset)
        });
        let segment = segment.ok_or(RamError::OutOfRange {
            address: file_offset,
            bytes: buffer.len() as u64,
        })?;
        self.read(segment.start + (file_offset - segment.file_offset), buffer)
    }

    /// Makes all memory read as zeros and gives it back to the host.
    pub fn discard_all(&self) -> Result<(), RamError> {
        self.segments
            .iter()
            .try_for_each(|segment| self.discard(segment.start, segment.bytes / PAGE_BYTES))
    }

    fn clear(&self, address: u64, bytes: u64) -> Result<(), RamError> {
        const ZEROS: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
        (0..bytes)
            .step_by(ZEROS.len())
            .try_for_each(|offset| self.write(address + offset, &ZEROS))
    }

    /// The first stretch of memory at or behind `address` that was ever touched or is still to be brought in, within
    /// `address`'s segment. What lies between was never touched, which means that it is zero *now*; touched memory
    /// stays touched until it is discarded. Asking costs time in proportion to the stretch.
    pub fn next_touched(&self, address: u64) -> Result<Option<Range<u64>>, RamError> {
        let segment = self
            .segment_of(address, 1)
            .ok_or(RamError::OutOfRange { address, bytes: 1 })?;
        let access = |error: rustix::io::Errno| RamError::Access {
            address,
            source: error.into(),
        };
        let file_start = segment.file_offset + (address - segment.start);
        let file_end = segment.file_offset + segment.bytes;
        let guest = |file: Range<u64>| {
            let at = |offset: u64| segment.start + (offset - segment.file_offset);
            at(file.start)..at(file.end)
        };
        // Asked first: what arrives meanwhile is found in the file.
        let pending = self.pending.get();
        let pending = pending.and_then(|pending| pending.next(file_start..file_end));
        let data = match rustix::fs::seek(&*self.file, SeekFrom::Data(file_start)) {
            Ok(data) if data < file_end => data,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(pending.map(guest)),
            Err(error) => return Err(access(error)),
        };
        if let Some(pending) = pending
            && pending.start <= data
        {
            return Ok(Some(guest(pending)));
        }
        let hole = rustix::fs::seek(&*self.file, SeekFrom::Hole(data))
            .map_err(access)?
            .min(file_end);
        Ok(Some(guest(data..hole)))
    }

    /// All memory that was ever touched, at most `limit` stretches of it.
    pub fn touched(&self, limit: usize) -> Result<Vec<Stretch>, RamError> {
        let mut stretches = Vec::new();
        for segment in self.segments.iter() {
            let mut next = segment.start;
            while next < segment.start + segment.bytes && stretches.len() < limit {
                let Some(stretch) = self.next_touched(next)? else {
                    break;
                };
                let pages = (stretch.end - stretch.start) / PAGE_BYTES;
                stretches.push(Stretch {
                    address: stretch.start,
                    pages,
                });
                next = stretch.end;
            }
        }
        Ok(stretches)
    }

    /// Whether none of the `pages` pages from `address` on is there.
    pub fn is_absent(&self, address: u64, pages: u64) -> Result<bool, RamError> {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        let segment = self
            .segment_of(address, bytes)
            .ok_or(RamError::OutOfRange { address, bytes })?;
        let start = segment.file_offset + (address - segment.start);
        match rustix::fs::seek(&*self.file, SeekFrom::Data(start)) {
            Ok(data) => Ok(data >= start + bytes),
            Err(rustix::io::Errno::NXIO) => Ok(true),
            Err(error) => Err(RamError::Access {
                address,
                source: error.into(),
            }),
        }
    }

    /// XXH3-128 over all of guest memory in order of address, as 32 hex digits. The guest must stand still.
    pub fn hash(&self) -> Result<String, RamError> {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        let mut buffer = vec![0; HASH_CHUNK_BYTES];
        for region in self.map.iter() {
            let start = region.start_addr();
            let mut touched = self.next_touched(start.0)?;
            for offset in (0..region.len()).step_by(HASH_CHUNK_BYTES) {
                let address = start.unchecked_add(offset).0;
                let length = (region.len() - offset).min(HASH_CHUNK_BYTES as u64);
                let chunk = &mut buffer[..length as usize];
                // Memory that was never touched is not brought into being only to be hashed.
                if touched
                    .as_ref()
                    .is_some_and(|stretch: &Range<u64>| stretch.end <= address)
                {
                    touched = self.next_touched(address)?;
                }
                match &touched {
                    Some(stretch) if stretch.start < address + length => {
                        self.read(address, chunk)?
                    }
                    _ => chunk.fill(0),
                }
                hasher.update(chunk);
            }
        }
        Ok(format!("{:032x}", hasher.digest128()))
    }

    /// Where a segment is mapped in this process.
    pub(super) fn host_start(&self, segment: &Segment) -> *mut u8 {
        self.map
            .get_host_address(GuestAddress(segment.start))
            .expect("a segment is mapped")
    }

    pub(super) fn segment_of(&self, address: u64, bytes: u64) -> Option<&Segment> {
        let end = address.checked_add(bytes)?;
        self.segments
            .iter()
            .find(|s| address >= s.start && end <= s.start + s.bytes)
    }

    fn access(address: u64, error: vm_memory::GuestMemoryError) -> RamError {
        RamError::Access {
            address,
            source: io::Error::other(error),
        }
    }
}

/// Huge pages of 2 MiB that nobody has taken or reserved.
fn free_huge_pages() -> Mib {
    let count = |name: &str| {
        std::fs::read_to_string(format!("{HUGE_PAGE_POOL}/{name}"))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    let free = count("free_hugepages").saturating_sub(count("resv_hugepages"));
    Mib((free * HUGE_PAGE_BYTES) >> 20)
}

/// `MemAvailable` of this host; `None` where /proc does not tell.
pub(super) fn available_memory() -> Option<Mib> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Mib(kib / 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole_below_4_gib() {
        assert_eq!(
            layout(1 << 30),
            [Segment {
                start: 0,
                bytes: 1 << 30,
                file_offset: 0
            }]
        );
        assert_eq!(
            layout(5 << 30),
            [
                Segment {
                    start: 0,
                    bytes: 3 << 30,
                    file_offset: 0
                },
                Segment {
                    start: 4 << 30,
                    bytes: 2 << 30,
                    file_offset: 3 << 30
                }
            ]
        );
    }

    #[test]
    fn huge_pages_need_a_pool_that_has_them() {
        let size = Mib(1 << 24);
        match GuestRam::with_backing(size, MemoryBacking::Huge2M) {
            Err(RamError::HugePages { needed, available }) => {
                assert!(needed == size && available < size);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parts_of_huge_pages_are_cleared_when_they_are_discarded() {
        if free_huge_pages() < Mib(16) {
            return godwit_devices::skip::skip(
                "no 16 MiB of huge pages are free (vm.nr_hugepages)",
            );
        }
        let ram = GuestRam::with_backing(Mib(16), MemoryBacking::Huge2M).unwrap();
        let pages = 3 * HUGE_PAGE_BYTES / PAGE_BYTES;
        for page in 0..pages {
            ram.write(page * PAGE_BYTES, &[7]).unwrap();
        }
        ram.discard(PAGE_BYTES, pages - 2).unwrap();
        let first_byte = |page: u64| {
            let mut byte = [0];
            ram.read(page * PAGE_BYTES, &mut byte).unwrap();
            byte[0]
        };
        assert_eq!((first_byte(0), first_byte(pages - 1)), (7, 7));
        assert!((1..pages - 1).all(|page| first_byte(page) == 0));
    }

    #[test]
    fn untouched_memory_is_found_without_touching_it() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        assert_eq!(ram.next_touched(0).unwrap(), None);
        ram.write(5 * PAGE_BYTES, &[1]).unwrap();
        ram.write(6 * PAGE_BYTES, &[1]).unwrap();
        let stretch = 5 * PAGE_BYTES..7 * PAGE_BYTES;
        assert_eq!(ram.next_touched(0).unwrap(), Some(stretch.clone()));
        assert_eq!(
            ram.next_touched(6 * PAGE_BYTES).unwrap(),
            Some(6 * PAGE_BYTES..stretch.end)
        );
        assert_eq!(ram.next_touched(stretch.end).unwrap(), None);
        assert_eq!(ram.resident(), Bytes(2 * PAGE_BYTES));
        ram.discard(5 * PAGE_BYTES, 2).unwrap();
        assert_eq!(ram.resident(), Bytes(0));
        let stretches = [
            Stretch {
                address: 8 * PAGE_BYTES,
                pages: 3,
            },
            Stretch {
                address: 0,
                pages: 1,
            },
        ];
        ram.populate_all(&stretches, &|| true).unwrap();
        assert_eq!(ram.resident(), Bytes(4 * PAGE_BYTES));
        assert_eq!(ram.touched(9).unwrap(), [stretches[1], stretches[0]]);
        assert_eq!(ram.touched(1).unwrap(), [stretches[1]]);
        assert!(
            ram.populate_all(
                &[Stretch {
                    address: 16 << 20,
                    pages: 1
                }],
                &|| true
            )
            .is_err()
        );
        assert!(
            ram.populate_all(
                &[Stretch {
                    address: u64::MAX,
                    pages: 1
                }],
                &|| true
            )
            .is_err()
        );
    }

    #[test]
    fn equal_memory_has_equal_hashes_however_it_came_about() {
        let (one, other) = (
            GuestRam::new(Mib(16)).unwrap(),
            GuestRam::new(Mib(16)).unwrap(),
        );
        one.write(PAGE_BYTES, &[0; 4096]).unwrap();
        assert_eq!(one.hash().unwrap(), other.hash().unwrap());
        one.write(PAGE_BYTES + 7, &[9]).unwrap();
        assert_ne!(one.hash().unwrap(), other.hash().unwrap());
    }

    #[test]
    fn what_this_process_writes_is_told_once() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        ram.write(3 * PAGE_BYTES - 1, &[1, 2]).unwrap();
        let written = ram.take_written();
        assert_eq!(written[0].pages(), ram.size().pages());
        assert_eq!(
            written[0].runs(0..written[0].pages()).collect::<Vec<_>>(),
            [(2, 2)]
        );
        assert_eq!(ram.take_written()[0].count(), 0);
    }

    #[test]
    fn inherited_memory_is_the_same_memory_and_of_the_same_size() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        ram.write(5 * PAGE_BYTES, b"before").unwrap();
        let lent = || File::from(ram.lend().unwrap());
        let heir = GuestRam::inherit(lent(), Mib(16), MemoryBacking::Standard).unwrap();
        let mut found = [0; 6];
        heir.read(5 * PAGE_BYTES, &mut found).unwrap();
        assert_eq!(&found, b"before");
        heir.write(5 * PAGE_BYTES, b"after!").unwrap();
        ram.read(5 * PAGE_BYTES, &mut found).unwrap();
        assert_eq!(&found, b"after!");
        assert_eq!(heir.resident(), Bytes(PAGE_BYTES));
        assert!(matches!(
            GuestRam::inherit(lent(), Mib(32), MemoryBacking::Standard),
            Err(RamError::OtherSize { .. })
        ));
    }

    #[test]
    fn accesses_past_the_end_are_errors() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        assert!(ram.slice((16 << 20) - 4096, 8192).is_err());
        assert!(ram.discard(u64::MAX - 4095, 1).is_err());
        assert!(ram.write(16 << 20, &[1]).is_err());
    }
}
