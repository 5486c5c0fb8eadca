//! Writing a snapshot.
//!
//! Memory is copied while the guest runs; then the guest stands still while what it wrote meanwhile is copied again
//! and everything else is saved. Checksums and flushing come after it runs again.

use super::manifest::{
    CHECKSUM_BYTES, FileIdentity, FileSeal, MANIFEST, MEMORY, Manifest, PIECE_BYTES, PIECES, STATE,
    SnapshotError, VERSION,
};
use crate::kvm::{DirtyBitmap, DirtyLog};
use crate::machine::SavedMachine;
use crate::memory::{GuestRam, Segment};
use godwit_wire::cpu::GuestCpu;
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Pages that are cleared in the dirty log and copied in one go; a multiple of 64.
const SLICE_PAGES: u64 = 256;
/// Added to the name of a directory that is not complete yet.
const PARTIAL: &str = ".partial";
/// Modes of a snapshot's directory and files: what a guest keeps in memory is nobody else's.
const PRIVATE_DIRECTORY: u32 = 0o700;
const PRIVATE: u32 = 0o600;
const ZERO_PAGE: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];

/// A snapshot being written. What is not finished is removed.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    partial: PathBuf,
    memory: File,
    ram: GuestRam,
    buffer: Vec<u8>,
    finished: bool,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { what, path, source }
}

impl Writer {
    /// Begins a snapshot that will be called `directory`.
    pub fn begin(directory: &Path, ram: GuestRam) -> Result<Self, SnapshotError> {
        match fs::read_dir(directory) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(SnapshotError::NotEmpty(directory.to_owned()));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return Err(SnapshotError::NotEmpty(directory.to_owned())),
        }
        let mut name = directory.file_name().unwrap_or_default().to_owned();
        name.push(PARTIAL);
        let partial = directory.with_file_name(name);
        // Left behind by a process that died while it wrote.
        match fs::remove_dir_all(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("a left-over cannot be removed:", &partial)(error));
            }
            _ => {}
        }
        fs::DirBuilder::new()
            .mode(PRIVATE_DIRECTORY)
            .create(&partial)
            .map_err(failed("the directory cannot be made:", &partial))?;
        let path = partial.join(MEMORY);
        let memory = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(PRIVATE)
            .open(&path)
            .and_then(|memory| memory.set_len(ram.size().0).map(|()| memory))
            .map_err(failed("the file cannot be made:", &path))?;
        Ok(Self {
            directory: directory.to_owned(),
            partial,
            memory,
            ram,
            buffer: vec![0; (SLICE_PAGES * PAGE_BYTES) as usize],
            finished: false,
        })
    }

    /// Copies all of memory while the guest may write it: what it writes behind the copy is dirty in `log`.
    pub fn copy_running(&mut self, log: &DirtyLog) -> Result<(), SnapshotError> {
        // What devices have written up to now is copied below.
        self.ram.take_written();
        let all = log.first_round();
        for (index, (segment, bitmap)) in self.segments().iter().zip(&all).enumerate() {
            for start in (0..bitmap.pages()).step_by(SLICE_PAGES as usize) {
                let slice = start..(start + SLICE_PAGES).min(bitmap.pages());
                log.clear(index, bitmap, slice.clone())?;
                self.copy_touched(segment, slice.start * PAGE_BYTES, slice.end * PAGE_BYTES)?;
            }
        }
        Ok(())
    }

    /// Copies once more what the guest and its devices have written since. The guest stands still.
    pub fn copy_rest(&mut self, log: &DirtyLog) -> Result<(), SnapshotError> {
        let mut dirty: Vec<DirtyBitmap> = log.read()?;
        for (bitmap, devices) in dirty.iter_mut().zip(self.ram.take_written()) {
            bitmap.merge(&devices);
        }
        for (segment, bitmap) in self.segments().iter().zip(&dirty) {
            for (first, pages) in bitmap.runs(0..bitmap.pages()) {
                for page in (first..first + pages).step_by(SLICE_PAGES as usize) {
                    let bytes = (first + pages - page).min(SLICE_PAGES) * PAGE_BYTES;
                    let offset = page * PAGE_BYTES;
                    let buffer = &mut self.buffer[..bytes as usize];
                    self.ram.read(segment.start + offset, buffer)?;
                    self.memory
                        .write_all_at(buffer, segment.file_offset + offset)
                        .map_err(failed(
                            "guest memory cannot be written below",
                            &self.partial,
                        ))?;
                }
            }
        }
        Ok(())
    }

    fn segments(&self) -> Vec<Segment> {
        self.ram.segments().to_vec()
    }

    /// Copies the touched part of a slice of `segment`, zero pages apart.
    fn copy_touched(&mut self, segment: &Segment, from: u64, to: u64) -> Result<(), SnapshotError> {
        let (mut next, end) = (segment.start + from, segment.start + to);
        while next < end {
            let Some(touched) = self.ram.next_touched(next)? else {
                break;
            };
            let (start, stop) = (touched.start, touched.end.min(end));
            if start >= end {
                break;
            }
            let buffer = &mut self.buffer[..(stop - start) as usize];
            self.ram.read(start, buffer)?;
            let offset = segment.file_offset + (start - segment.start);
            for (page, content) in buffer.chunks(PAGE_BYTES as usize).enumerate() {
                if content != ZERO_PAGE {
                    self.memory
                        .write_all_at(content, offset + page as u64 * PAGE_BYTES)
                        .map_err(failed(
                            "guest memory cannot be written below",
                            &self.partial,
                        ))?;
                }
            }
            next = stop;
        }
        Ok(())
    }

    /// Completes the snapshot; the guest may run again meanwhile. Gives the room it takes.
    pub fn finish(
        mut self,
        saved: &SavedMachine,
        saved_at_unix_ns: u64,
        (spec, cpu, guest_cpu): (MachineSpec, CpuFacts, GuestCpu),
    ) -> Result<Bytes, SnapshotError> {
        let mut state = Vec::new();
        ciborium::into_writer(saved, &mut state)
            .map_err(|error| SnapshotError::Encode(error.to_string()))?;
        let pieces = self.checksums()?;
        let flushed = self.memory.sync_all().and_then(|()| self.memory.metadata());
        let memory = flushed.map_err(failed(
            "guest memory cannot be flushed below",
            &self.partial,
        ))?;
        let manifest = Manifest {
            version: VERSION,
            spec,
            cpu,
            guest_cpu,
            saved_at_unix_ns,
            state: FileSeal::of(&state),
            memory_bytes: self.ram.size().0,
            pieces: FileSeal::of(&pieces),
            memory_file: Some(FileIdentity::of(&memory)),
        }
        .encode()?;
        for (name, content) in [(STATE, &state), (PIECES, &pieces), (MANIFEST, &manifest)] {
            let path = self.partial.join(name);
            File::options()
                .write(true)
                .create_new(true)
                .mode(PRIVATE)
                .open(&path)
                .and_then(|file| {
                    file.write_all_at(content, 0)?;
                    file.sync_all()
                })
                .map_err(failed("the file cannot be written:", &path))?;
        }
        let room = memory.blocks() * 512 + (state.len() + pieces.len() + manifest.len()) as u64;
        flush_directory(&self.partial)?;
        fs::rename(&self.partial, &self.directory).map_err(failed(
            "the snapshot cannot be given its name",
            &self.directory,
        ))?;
        self.finished = true;
        if let Some(parent) = self.directory.parent() {
            flush_directory(parent)?;
        }
        Ok(Bytes(room))
    }

    /// Checksum of every piece of memory as it is in the file.
    fn checksums(&self) -> Result<Vec<u8>, SnapshotError> {
        let bytes = self.ram.size().0;
        let mut table = Vec::with_capacity(bytes.div_ceil(PIECE_BYTES) as usize * CHECKSUM_BYTES);
        let mut piece = vec![0; PIECE_BYTES as usize];
        for offset in (0..bytes).step_by(PIECE_BYTES as usize) {
            let piece = &mut piece[..(bytes - offset).min(PIECE_BYTES) as usize];
            self.memory.read_exact_at(piece, offset).map_err(failed(
                "guest memory cannot be read back below",
                &self.partial,
            ))?;
            table.extend_from_slice(&piece_checksum(piece));
        }
        Ok(table)
    }
}

/// The table's entry for a piece.
pub(super) fn piece_checksum(piece: &[u8]) -> [u8; CHECKSUM_BYTES] {
    if piece.iter().all(|byte| *byte == 0) {
        [0; CHECKSUM_BYTES]
    } else {
        xxhash_rust::xxh3::xxh3_128(piece).to_le_bytes()
    }
}

fn flush_directory(path: &Path) -> Result<(), SnapshotError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("the directory cannot be flushed:", path))
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}
