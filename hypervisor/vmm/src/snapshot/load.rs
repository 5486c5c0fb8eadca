//! Reading a snapshot. Nothing in it is believed before its checksum was right, and no length is taken from it that
//! has no bound.

use super::manifest::{
    CHECKSUM_BYTES, FileSeal, MANIFEST, MAX_MANIFEST_BYTES, MEMORY, Manifest, PIECE_BYTES, PIECES,
    STATE, SnapshotError, checksum,
};
use super::save::piece_checksum;
use crate::machine::SavedMachine;
use crate::memory::GuestRam;
use godwit_wire::migration::MAX_STATE_BYTES;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// More threads than this only fight over the page cache.
const MAX_LOADERS: usize = 8;

/// A snapshot whose files are all there, of the right size, and sound but for guest memory, which is checked as it is
/// loaded.
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

    /// Fills `ram`, which is all zeros, on several CPUs at once. Every piece is checked before it is used.
    pub fn load_memory(&self, ram: &GuestRam) -> Result<(), SnapshotError> {
        let pieces = (self.pieces.len() / CHECKSUM_BYTES) as u64;
        let next = AtomicU64::new(0);
        let work = || {
            let mut buffer = vec![0; PIECE_BYTES as usize];
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= pieces {
                    return Ok(());
                }
                if let Err(error) = self.load_piece(ram, piece, &mut buffer) {
                    // The others need not go on.
                    next.store(pieces, Ordering::Relaxed);
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

    fn load_piece(
        &self,
        ram: &GuestRam,
        piece: u64,
        buffer: &mut [u8],
    ) -> Result<(), SnapshotError> {
        let offset = piece * PIECE_BYTES;
        let length = (self.manifest.memory_bytes - offset).min(PIECE_BYTES);
        let buffer = &mut buffer[..length as usize];
        let at = piece as usize * CHECKSUM_BYTES;
        let expected = &self.pieces[at..at + CHECKSUM_BYTES];
        self.memory
            .read_exact_at(buffer, offset)
            .map_err(unreadable(&self.memory_path))?;
        if piece_checksum(buffer) != *expected {
            return Err(SnapshotError::DamagedMemory { offset });
        }
        // What is all zeros is so already, and stays untouched.
        if expected.iter().any(|byte| *byte != 0) {
            ram.write_at(offset, buffer)?;
        }
        Ok(())
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
