//! Reading a snapshot. Nothing in it is believed before its checksum was right, and no length is taken from it that
//! has no bound.

use super::manifest::{
    CHECKSUM_BYTES, FileIdentity, FileSeal, MANIFEST, MAX_MANIFEST_BYTES, MEMORY, Manifest,
    PIECE_BYTES, PIECES, STATE, SnapshotError, checksum,
};
use super::save::piece_checksum;
use crate::machine::SavedMachine;
use crate::memory::GuestRam;
use godwit_wire::migration::MAX_STATE_BYTES;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

/// More threads than this only fight over the page cache.
const MAX_LOADERS: usize = 8;

/// A snapshot whose files are all there, of the right size, and sound but for guest memory, which is checked piece by
/// piece.
#[derive(Debug)]
pub struct Snapshot {
    manifest: Manifest,
    state: Vec<u8>,
    pieces: Vec<u8>,
    memory: File,
    memory_path: PathBuf,
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io {
        what: "the file cannot be read:",
        path,
        source,
    }
}

impl Snapshot {
    /// Opens the snapshot in `directory`.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let path = directory.join(MANIFEST);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => file
                .take(MAX_MANIFEST_BYTES)
                .read_to_end(&mut bytes)
                .map_err(unreadable(&path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::Unfinished(directory.to_owned()));
            }
            Err(error) => return Err(unreadable(&path)(error)),
        };
        let manifest = Manifest::decode(&bytes)?;
        let damaged = |file, detail: String| SnapshotError::Damaged { file, detail };
        if manifest.memory_bytes != manifest.spec.memory_mib.bytes().0 {
            return Err(damaged(
                MANIFEST,
                "memory and machine differ in size".into(),
            ));
        }
        let memory_path = directory.join(MEMORY);
        let memory = File::open(&memory_path).map_err(unreadable(&memory_path))?;
        let length = memory.metadata().map_err(unreadable(&memory_path))?.len();
        if length != manifest.memory_bytes {
            return Err(damaged(
                MEMORY,
                format!("it has {length} bytes and had {}", manifest.memory_bytes),
            ));
        }
        let most = manifest.memory_bytes.div_ceil(PIECE_BYTES) * CHECKSUM_BYTES as u64;
        let pieces = read_sealed(directory, PIECES, &manifest.pieces, most)?;
        if pieces.len() as u64 != most {
            return Err(damaged(PIECES, "it does not cover all of memory".into()));
        }
        let state = read_sealed(
            directory,
            STATE,
            &manifest.state,
            u64::from(MAX_STATE_BYTES),
        )?;
        Ok(Self {
            manifest,
            state,
            pieces,
            memory,
            memory_path,
        })
    }

    /// What it is.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// vCPUs and devices.
    pub fn state(&self) -> Result<SavedMachine, SnapshotError> {
        ciborium::from_reader(self.state.as_slice()).map_err(|error| SnapshotError::Damaged {
            file: STATE,
            detail: error.to_string(),
        })
    }

    /// Time since it was taken, by the hosts' clocks.
    pub fn age(&self) -> Duration {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(Duration::from_nanos(self.manifest.saved_at_unix_ns))
    }

    /// Whether the file with guest memory is the very one that was written, and was left alone since.
    pub(super) fn memory_is_untouched(&self) -> bool {
        let present = self.memory.metadata();
        let present = present.map(|metadata| FileIdentity::of(&metadata)).ok();
        present.is_some() && present == self.manifest.memory_file
    }

    /// Reads all of memory once, on several CPUs, and takes no guest memory for it.
    pub(super) fn verify_memory(&self) -> Result<(), SnapshotError> {
        self.each_piece(|_, _| Ok(()))
    }

    /// Fills `ram`, which is all zeros, on several CPUs at once. Every piece is checked before it is used.
    pub fn load_memory(&self, ram: &GuestRam) -> Result<(), SnapshotError> {
        // What is all zeros is so already, and stays untouched.
        self.each_piece(|offset, content| Ok(ram.write_at(offset, content)?))
    }

    /// Gives every sound piece that is not all zeros to `take`, with its offset; the first damaged one ends it.
    fn each_piece(
        &self,
        take: impl Fn(u64, &[u8]) -> Result<(), SnapshotError> + Sync,
    ) -> Result<(), SnapshotError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = Vec::new();
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= self.pieces() {
                    return Ok(());
                }
                let done = self
                    .read_pieces(piece..piece + 1, &mut buffer)
                    .and_then(|offset| match self.is_zero(piece) {
                        true => Ok(()),
                        false => take(offset, &buffer),
                    });
                if let Err(error) = done {
                    // The others need not go on.
                    next.store(self.pieces(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        };
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        std::thread::scope(|scope| {
            let loaders: Vec<_> = (1..cpus.min(MAX_LOADERS))
                .map(|_| scope.spawn(work))
                .collect();
            let own = work();
            loaders.into_iter().fold(own, |done, loader| {
                done.and(
                    loader
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                )
            })
        })
    }

    /// Number of pieces.
    pub(super) const fn pieces(&self) -> usize {
        self.pieces.len() / CHECKSUM_BYTES
    }

    fn expected(&self, piece: usize) -> &[u8] {
        &self.pieces[piece * CHECKSUM_BYTES..(piece + 1) * CHECKSUM_BYTES]
    }

    /// Whether a piece is said to be nothing but zeros.
    pub(super) fn is_zero(&self, piece: usize) -> bool {
        self.expected(piece).iter().all(|byte| *byte == 0)
    }

    /// Reads `range` of the pieces into `buffer` and checks each. Gives the offset of the first.
    pub(super) fn read_pieces(
        &self,
        range: Range<usize>,
        buffer: &mut Vec<u8>,
    ) -> Result<u64, SnapshotError> {
        let offset = range.start as u64 * PIECE_BYTES;
        let end = (range.end as u64 * PIECE_BYTES).min(self.manifest.memory_bytes);
        buffer.resize((end - offset) as usize, 0);
        self.memory
            .read_exact_at(buffer, offset)
            .map_err(unreadable(&self.memory_path))?;
        for (piece, content) in range.zip(buffer.chunks(PIECE_BYTES as usize)) {
            if piece_checksum(content) != *self.expected(piece) {
                return Err(SnapshotError::DamagedMemory {
                    offset: piece as u64 * PIECE_BYTES,
                });
            }
        }
        Ok(offset)
    }
}

#[cfg(test)]
impl Snapshot {
    /// Memory alone, in a file at `path`.
    pub(super) fn of_memory(path: &Path, content: &[u8]) -> Self {
        std::fs::write(path, content).unwrap();
        let memory = File::open(path).unwrap();
        let pieces: Vec<u8> = content
            .chunks(PIECE_BYTES as usize)
            .flat_map(piece_checksum)
            .collect();
        let spec = serde_json::json!({
            "vcpus": 1, "memory_mib": content.len() >> 20, "boot": { "kind": "pilot" }
        });
        let cpu = serde_json::json!({ "level": "x86-64-v2", "signature": "s", "model": "m" });
        let manifest = Manifest {
            version: super::manifest::VERSION,
            spec: serde_json::from_value(spec).unwrap(),
            cpu: serde_json::from_value(cpu).unwrap(),
            guest_cpu: Default::default(),
            saved_at_unix_ns: 0,
            state: FileSeal::of(&[]),
            memory_bytes: content.len() as u64,
            pieces: FileSeal::of(&pieces),
            memory_file: Some(FileIdentity::of(&memory.metadata().unwrap())),
        };
        Self {
            manifest,
            state: Vec::new(),
            pieces,
            memory,
            memory_path: path.to_owned(),
        }
    }

    /// As if nobody had noticed what happened to the file.
    pub(super) fn trust_memory_file(&mut self) {
        self.manifest.memory_file = Some(FileIdentity::of(&self.memory.metadata().unwrap()));
    }
}

fn read_sealed(
    directory: &Path,
    file: &'static str,
    seal: &FileSeal,
    most: u64,
) -> Result<Vec<u8>, SnapshotError> {
    let path = directory.join(file);
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|opened| opened.take(most.saturating_add(1)).read_to_end(&mut bytes))
        .map_err(unreadable(&path))?;
    if bytes.len() as u64 != seal.bytes {
        return Err(SnapshotError::Damaged {
            file,
            detail: format!("it has {} bytes and had {}", bytes.len(), seal.bytes),
        });
    }
    if checksum(&bytes) != seal.xxh3 {
        return Err(SnapshotError::Damaged {
            file,
            detail: "it is not what was written".into(),
        });
    }
    Ok(bytes)
}
