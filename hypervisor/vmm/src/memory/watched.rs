//! Guest memory whose missing pages this process brings in, named by their place in the file behind it. Whoever touches
//! one that is not there waits for it, be it a vCPU, a device or a system call.

use super::ram::GuestRam;
use super::userfault::{Filled, UserFault};
use godwit_wire::devices::MemoryBacking;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// A segment of guest memory in this process.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    host: u64,
    bytes: u64,
    file_offset: u64,
}

/// All of a machine's memory, watched.
#[derive(Debug)]
pub struct Watched {
    fault: UserFault,
    segments: Vec<Mapped>,
    // Keeps the mappings that the addresses above are of.
    ram: GuestRam,
}

impl Watched {
    /// Watches all of `ram` for touches of what is not there. Fails where the kernel does not offer it, or not to
    /// this user (`vm.unprivileged_userfaultfd`).
    pub fn new(ram: &GuestRam) -> io::Result<Self> {
        let fault = UserFault::new(ram.backing())?;
        let segments: Vec<Mapped> = ram
            .slots()
            .into_iter()
            .zip(ram.segments())
            .map(|(slot, segment)| Mapped {
                host: slot.host_address,
                bytes: segment.bytes,
                file_offset: segment.file_offset,
            })
            .collect();
        for segment in &segments {
            fault.register(segment.host, segment.bytes)?;
        }
        Ok(Self {
            fault,
            segments,
            ram: ram.clone(),
        })
    }

    /// Where in the file somebody waits; `None` when nobody does at the moment.
    pub fn next_touch(&self) -> io::Result<Option<u64>> {
        while let Some(host) = self.fault.take_fault()? {
            let segment = self
                .segments
                .iter()
                .find(|segment| (segment.host..segment.host + segment.bytes).contains(&host));
            if let Some(segment) = segment {
                return Ok(Some(segment.file_offset + (host - segment.host)));
            }
        }
        Ok(None)
    }

    /// Puts `bytes` where they belong; whoever waits there goes on waiting. Pages that are there already stay as they
    /// are. Whole pages within one segment.
    pub fn fill(&self, file_offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = self.host(file_offset, bytes.len() as u64)?;
        let mut at = 0;
        while at < bytes.len() {
            at += match self.fault.copy_quietly(start + at as u64, &bytes[at..])? {
                Filled::Bytes(filled) => filled as usize,
                Filled::Present => self.ram.page_bytes() as usize,
            };
        }
        Ok(())
    }

    /// Makes the page at `file_offset` one of zeros, unless it is there already, and lets go on who waits for it.
    pub fn fill_zeros(&self, file_offset: u64) -> io::Result<()> {
        let bytes = self.ram.page_bytes();
        let file_offset = file_offset / bytes * bytes;
        let host = self.host(file_offset, bytes)?;
        let filled = match self.ram.backing() {
            MemoryBacking::Standard => self.fault.zero(host, bytes).map(drop),
            // The kernel has no zeros of that size to give.
            MemoryBacking::Huge2M => self.fill(file_offset, &vec![0; bytes as usize]),
        };
        match filled {
            // The watch has ended since somebody was seen to wait: the kernel has let go of them, and gives zeros.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            filled => filled.and_then(|()| self.let_go(file_offset, bytes)),
        }
    }

    /// Lets go on who waits for the range: it looks again.
    pub fn let_go(&self, file_offset: u64, bytes: u64) -> io::Result<()> {
        self.fault.wake(self.host(file_offset, bytes)?, bytes)
    }

    /// Everything is there: the kernel fills what is touched from now on, with zeros. Lets go on whoever waits.
    pub fn end(&self) -> io::Result<()> {
        self.segments
            .iter()
            .try_for_each(|segment| self.fault.unregister(segment.host, segment.bytes))
    }

    fn host(&self, file_offset: u64, bytes: u64) -> io::Result<u64> {
        self.segments
            .iter()
            .find(|segment| {
                file_offset >= segment.file_offset
                    && file_offset.saturating_add(bytes) <= segment.file_offset + segment.bytes
            })
            .map(|segment| segment.host + (file_offset - segment.file_offset))
            .ok_or_else(|| io::Error::other(format!("no guest memory is at {file_offset:#x}")))
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}
