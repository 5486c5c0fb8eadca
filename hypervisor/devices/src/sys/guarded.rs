//! A file under a copy-on-write image, that is written only while its disk's lock allows it.
//!
//! The image's own metadata is written at times of the library's choosing; only here is every write seen.

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use std::fmt;
use std::io;

/// Says whether a write may pass now.
pub(crate) trait WriteGate: fmt::Debug + Send + Sync {
    /// An error when it may not.
    fn pass(&self) -> io::Result<()>;
}

/// A file and what guards it.
#[derive(Debug)]
pub(crate) struct GuardedFile<G> {
    file: File,
    gate: G,
}

impl<G: WriteGate> GuardedFile<G> {
    /// Guards `file` with `gate`.
    pub(crate) fn new(file: std::fs::File, gate: G) -> io::Result<Self> {
        Ok(Self {
            file: File::try_from(file)?,
            gate,
        })
    }
}

impl<G: WriteGate> fmt::Display for GuardedFile<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.file, f)
    }
}

impl<G: WriteGate> Storage for GuardedFile<G> {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    async unsafe fn pure_readv(&self, pieces: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller keeps what this function's contract asks for, which is the same one.
        unsafe { self.file.pure_readv(pieces, offset) }.await
    }

    async unsafe fn pure_writev(&self, pieces: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.gate.pass()?;
        // SAFETY: as above.
        unsafe { self.file.pure_writev(pieces, offset) }.await
    }

    async unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.gate.pass()?;
        // SAFETY: as above.
        unsafe { self.file.pure_write_zeroes(offset, length) }.await
    }

    async unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.gate.pass()?;
        // SAFETY: as above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }.await
    }

    async unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.gate.pass()?;
        // SAFETY: as above.
        unsafe { self.file.pure_discard(offset, length) }.await
    }

    async fn flush(&self) -> io::Result<()> {
        self.file.flush().await
    }

    async fn sync(&self) -> io::Result<()> {
        self.file.sync().await
    }

    async fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes().await
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.invalidate_cache() }.await
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    async fn resize(&self, size: u64, preallocation: PreallocateMode) -> io::Result<()> {
        self.gate.pass()?;
        self.file.resize(size, preallocation).await
    }
}
