//! Copying bytes into a pool, without writing zeros.

use super::error::StorageError;
use super::pool::Pool;
use super::work::Progress;
use ring::digest;
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes moved at once; progress and cancellation are looked at in between.
const PIECE_BYTES: usize = 1 << 20;
/// Zeros are left out in blocks of this size: what file systems can leave unallocated.
const HOLE_BYTES: usize = 4096;

/// A file of a pool while it is written; removed again unless it is published.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
}

impl<'a> Part<'a> {
    pub(crate) fn create(pool: &'a Pool, path: PathBuf) -> Result<Self, StorageError> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = pool.open_file(&path, &mut options)?;
        Ok(Self { pool, path, file })
    }

    pub(crate) fn failed(&self, source: io::Error) -> StorageError {
        self.pool.io("write", &self.path, source)
    }

    /// A second handle on the same file.
    pub(crate) fn handle(&self) -> Result<File, StorageError> {
        self.file.try_clone().map_err(|error| self.failed(error))
    }

    pub(crate) fn set_length(&self, bytes: u64) -> Result<(), StorageError> {
        self.file.set_len(bytes).map_err(|error| self.failed(error))
    }

    pub(crate) fn sync(&self) -> Result<(), StorageError> {
        self.file.sync_all().map_err(|error| self.failed(error))
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        // Published ones are gone already; what cannot be removed now is removed by the next agent.
        if let Err(error) = self.pool.remove_file(&self.path) {
            tracing::warn!(%error, "unfinished work is left");
        }
    }
}

/// What was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// Writes everything `source` gives, at most `limit` bytes, and takes its SHA-256.
pub(crate) fn receive(
    source: &mut impl Read,
    part: &Part<'_>,
    limit: u64,
    progress: &Progress,
) -> Result<Received, StorageError> {
    let mut digest = digest::Context::new(&digest::SHA256);
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        let length = fill(source, &mut piece).map_err(|source| StorageError::BadImage {
            problem: format!("its content could not be read: {source}"),
            remedy: "check the source and import it again",
        })?;
        if length == 0 {
            break;
        }
        let piece = &piece[..length];
        if at + length as u64 > limit {
            return Err(StorageError::BadImage {
                problem: format!("it has more than {limit} bytes"),
                remedy: "announce its true size",
            });
        }
        digest.update(piece);
        write_sparse(&part.file, piece, at).map_err(|error| part.failed(error))?;
        at += length as u64;
        progress.advance(length as u64)?;
    }
    part.set_length(at)?;
    let sha256 = digest
        .finish()
        .as_ref()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
    Ok(Received { bytes: at, sha256 })
}

/// Reads until the piece is full or the source ends.
fn fill(source: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match source.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn write_sparse(file: &File, piece: &[u8], at: u64) -> io::Result<()> {
    let mut offset = at;
    for block in piece.chunks(HOLE_BYTES) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, offset)?;
        }
        offset += block.len() as u64;
    }
    Ok(())
}

/// Copies a whole file: shared blocks where the file system can, else its data without its holes.
pub(crate) fn copy(
    from: &File,
    from_path: &Path,
    part: &Part<'_>,
    progress: &Progress,
) -> Result<(), StorageError> {
    let length = from
        .metadata()
        .map_err(|error| part.pool.io("read", from_path, error))?
        .len();
    progress.expect(godwit_wire::unit::Bytes(length));
    if ioctl_ficlone(&part.file, from).is_ok() {
        return progress.advance(length);
    }
    part.set_length(length)?;
    let mut at = 0;
    while at < length {
        let (start, end) = match data_from(from, at, length) {
            Ok(Some(range)) => range,
            Ok(None) => break,
            Err(error) => return Err(part.pool.io("read", from_path, error)),
        };
        progress.advance(start - at)?;
        at = start;
        while at < end {
            let wanted =
                usize::try_from(end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let copied = copy_piece(from, &part.file, at, wanted).map_err(|e| part.failed(e))?;
            at += copied;
            progress.advance(copied)?;
        }
    }
    progress.advance(length - at.min(length))
}

/// The next range with data at or after `at`.
fn data_from(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        // A file system without holes: all of it is data.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
            return Ok(Some((at, length)));
        }
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?.min(length);
    Ok((start < length).then_some((start, end)))
}

fn copy_piece(from: &File, to: &File, at: u64, wanted: usize) -> io::Result<u64> {
    use rustix::io::Errno;
    let (mut read_at, mut write_at) = (at, at);
    match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted) {
        Ok(copied) if copied > 0 => return Ok(copied as u64),
        Ok(_) | Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    let mut piece = vec![0; wanted];
    from.read_exact_at(&mut piece, at)?;
    write_sparse(to, &piece, at)?;
    Ok(wanted as u64)
}
