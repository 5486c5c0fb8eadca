//! What is behind a disk: a raw file or a qcow2 image, read and written straight from guest memory.
//!
//! All calls block. They may come from several threads at once, for ranges that the driver keeps apart.

use super::lock::DiskLock;
use super::qcow2::Qcow2Image;
use super::request::{Range, SECTOR};
use crate::chain::Segment;
use crate::memory::GuestMemory;
use crate::sys::guest_io::{self, Direction, Durability};
use godwit_wire::devices::{DiskAccess, DiskFormat};
use godwit_wire::storage::MAX_DISK;
use rustix::fs::FallocateFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Zeros written at a time where the file system cannot do it by itself.
const ZEROS: usize = 64 << 10;

/// Why an image cannot be used, with what would help.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened or read.
    #[error("cannot open {path}; check that the file exists and may be used", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("{path} is no file; give the path of an image", path = path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// A raw file that ends within a sector.
    #[error("{path} has {bytes} bytes, no whole number of 512-byte sectors; grow it to one with truncate --size=%512", path = path.display())]
    TornSector {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Nothing in it, or more than any disk has.
    #[error("{path} holds a disk of {bytes} bytes; a disk has 512 bytes to 64 TiB", path = path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Size of the disk.
        bytes: u64,
    },
    /// Not what the machine's spec says it is.
    #[error("{path} is no usable qcow2 image: {reason}", path = path.display())]
    NotQcow2 {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An image that refers to a file it must not refer to.
    #[error("{path} refers to {target}: {reason}", path = path.display())]
    Reference {
        /// The image.
        path: PathBuf,
        /// What it refers to.
        target: String,
        /// Why not, and what would help.
        reason: String,
    },
    /// The disk cannot be made as large as asked.
    #[error("{path} cannot grow to {bytes} bytes", path = path.display())]
    Grow {
        /// The file.
        path: PathBuf,
        /// The size asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open image.
#[derive(Debug)]
pub(crate) enum Image {
    /// The bytes as they are.
    Raw(RawFile),
    /// Copy on write.
    Qcow2(Qcow2Image),
}

/// Whether an image is only looked at, or may be changed too.
#[derive(Clone, Debug)]
pub(crate) enum Opening {
    /// Nothing is written.
    Reading,
    /// Written, each time only while the lock (if there is one) allows it.
    Writing(Option<Arc<DiskLock>>),
}

impl Opening {
    pub(crate) fn access(&self) -> DiskAccess {
        match self {
            Self::Reading => DiskAccess::ReadOnly,
            Self::Writing(_) => DiskAccess::ReadWrite,
        }
    }
}

impl Image {
    /// Opens the file at `path` as what `format` says; the format is never guessed.
    pub(crate) fn open(
        path: &Path,
        format: DiskFormat,
        opening: &Opening,
    ) -> Result<Self, ImageError> {
        let image = match format {
            DiskFormat::Raw => Self::Raw(RawFile::open(path, opening.access())?),
            DiskFormat::Qcow2 => Self::Qcow2(Qcow2Image::open(path, opening)?),
        };
        match image.capacity() {
            SECTOR..=MAX_CAPACITY => Ok(image),
            bytes => Err(ImageError::Size {
                path: path.to_owned(),
                bytes,
            }),
        }
    }

    /// Size of the disk, in whole sectors.
    pub(crate) fn capacity(&self) -> u64 {
        let bytes = match self {
            Self::Raw(file) => file.length().unwrap_or(0),
            Self::Qcow2(image) => image.capacity(),
        };
        bytes - bytes % SECTOR
    }

    pub(crate) fn read(
        &self,
        memory: &GuestMemory,
        segments: &[Segment],
        offset: u64,
    ) -> io::Result<()> {
        match self {
            Self::Raw(file) => {
                guest_io::transfer(&file.file, memory, segments, offset, Direction::Read)
            }
            Self::Qcow2(image) => image.read(memory, segments, offset),
        }
    }

    pub(crate) fn write(
        &self,
        memory: &GuestMemory,
        segments: &[Segment],
        offset: u64,
        durability: Durability,
    ) -> io::Result<()> {
        match self {
            Self::Raw(file) => {
                let direction = Direction::Write(durability);
                guest_io::transfer(&file.file, memory, segments, offset, direction)
            }
            Self::Qcow2(image) => {
                image.write(memory, segments, offset)?;
                match durability {
                    Durability::AtOnce => image.flush(),
                    Durability::AfterFlush => Ok(()),
                }
            }
        }
    }

    /// Fills `buffer` from byte `offset` on, as the guest would read it.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.file.read_exact_at(buffer, offset),
            Self::Qcow2(image) => image.read_at(buffer, offset),
        }
    }

    /// Writes `content` at byte `offset`.
    pub(crate) fn write_at(&self, content: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.file.write_all_at(content, offset),
            Self::Qcow2(image) => image.write_at(content, offset),
        }
    }

    /// The first stretch between `offset` and `end` that may hold anything but zeros.
    pub(crate) fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<ops::Range<u64>>> {
        match self {
            Self::Raw(file) => file.next_data(offset, end),
            Self::Qcow2(image) => image.next_data(offset, end),
        }
    }

    /// Makes `range` read as zeros and gives its space back where that is possible.
    pub(crate) fn make_zero(&self, range: Range) -> io::Result<()> {
        match self {
            Self::Raw(file) => match file.punch(range) {
                Err(error) if is_unsupported(&error) => file.write_zeroes(range),
                result => result,
            },
            Self::Qcow2(image) => image.write_zeroes(range),
        }
    }

    /// Makes everything written durable.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw(file) => Ok(rustix::fs::fdatasync(&*file.file)?),
            Self::Qcow2(image) => image.flush(),
        }
    }

    /// Makes the file as such complete: nothing of the disk is in this process only.
    pub(crate) fn write_back(&self) -> io::Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.write_back(),
        }
    }

    /// Gives the space of `range` back where that is possible; a hint.
    pub(crate) fn discard(&self, range: Range) -> io::Result<()> {
        match self {
            Self::Raw(file) => match file.punch(range) {
                Err(error) if is_unsupported(&error) => Ok(()),
                result => result,
            },
            Self::Qcow2(image) => image.discard(range),
        }
    }

    /// Makes `range` read as zeros.
    pub(crate) fn write_zeroes(&self, range: Range) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.write_zeroes(range),
            Self::Qcow2(image) => image.write_zeroes(range),
        }
    }

    /// Makes the disk larger; never smaller. A file that is larger already is taken as it is.
    pub(crate) fn grow(&self, path: &Path, bytes: u64) -> Result<(), ImageError> {
        let grown = match self {
            Self::Raw(file) => match file.length() {
                Ok(length) if length >= bytes => Ok(()),
                Ok(_) => file.file.set_len(bytes),
                Err(error) => Err(error),
            },
            Self::Qcow2(image) => image.grow(bytes),
        };
        grown.map_err(|source| ImageError::Grow {
            path: path.to_owned(),
            bytes,
            source,
        })
    }
}

/// [`MAX_DISK`], as a pattern.
const MAX_CAPACITY: u64 = MAX_DISK.0;

/// A raw image.
#[derive(Debug)]
pub(crate) struct RawFile {
    file: Arc<File>,
}

impl RawFile {
    fn open(path: &Path, access: DiskAccess) -> Result<Self, ImageError> {
        let file = open_file(path, access)?;
        let raw = Self {
            file: Arc::new(file),
        };
        let bytes = raw.length().map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(ImageError::TornSector {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(raw)
    }

    /// The file, for a ring.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    fn length(&self) -> io::Result<u64> {
        // A block device has no length in its metadata; its end has a position.
        Ok(rustix::fs::seek(&*self.file, rustix::fs::SeekFrom::End(0))?)
    }

    fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<ops::Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        let start = match seek(&*self.file, SeekFrom::Data(offset)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(None),
            // It cannot tell: then all of it may be data.
            Err(rustix::io::Errno::INVAL) => return Ok((offset < end).then_some(offset..end)),
            Err(error) => return Err(error.into()),
        };
        let stop = seek(&*self.file, SeekFrom::Hole(start))?;
        // Somebody may have made a hole there meanwhile; whatever it is, it is looked at.
        Ok(Some(start..stop.max(start + 1).min(end)))
    }

    fn punch(&self, range: Range) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(
            &*self.file,
            flags,
            range.offset,
            range.bytes,
        )?)
    }

    /// First the way that keeps the space reserved, then the one that gives it back, then plain zeros.
    fn write_zeroes(&self, range: Range) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = rustix::fs::fallocate(&*self.file, flags, range.offset, range.bytes)
            .map_err(io::Error::from);
        match zeroed {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        match self.punch(range) {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        let zeros = [0; ZEROS];
        let end = range.offset + range.bytes;
        let mut at = range.offset;
        while at < end {
            let length = (end - at).min(ZEROS as u64);
            self.file.write_all_at(&zeros[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }
}

/// Opens a file or a block device, and nothing else. Opening a FIFO must not block, so the open does not.
pub(crate) fn open_file(path: &Path, access: DiskAccess) -> Result<File, ImageError> {
    let file = OpenOptions::new()
        .read(true)
        .write(access == DiskAccess::ReadWrite)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(_) if path.is_dir() => {
            return Err(ImageError::NotAFile {
                path: path.to_owned(),
            });
        }
        Err(source) => {
            return Err(ImageError::Open {
                path: path.to_owned(),
                source,
            });
        }
    };
    let kind = file.metadata().map(|metadata| metadata.file_type());
    match kind {
        Ok(kind) if kind.is_file() || kind.is_block_device() => Ok(file),
        _ => Err(ImageError::NotAFile {
            path: path.to_owned(),
        }),
    }
}

/// Whether the file system cannot do what it was asked for, as opposed to having failed.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

/// Whether there is no room for what was written.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
