//! A block device full of data that can prove that no block was lost, torn, stale or misplaced.
//!
//! Everything bypasses the page cache, so what is read comes from the device.

use crate::sys;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

const BLOCK_BYTES: usize = 4096;
const WORDS: usize = BLOCK_BYTES / 8;
/// Blocks written or read by one request of this program (64 KiB).
const BLOCKS_PER_REQUEST: usize = 16;
const BYTES_PER_MIB: u64 = 1 << 20;
const BLOCKS_PER_MIB: u64 = BYTES_PER_MIB / BLOCK_BYTES as u64;
/// `O_DIRECT` on x86-64.
const O_DIRECT: i32 = 0o40000;

#[repr(C, align(4096))]
struct Buffer([u8; BLOCK_BYTES * BLOCKS_PER_REQUEST]);

/// Fills the first `mib` MiB of `device` with what `seed` says, to the platter.
pub(crate) fn write(device: &str, seed: u64, mib: u64) -> io::Result<()> {
    let mut file = open(device)?;
    let mut buffer = Buffer([0; BLOCK_BYTES * BLOCKS_PER_REQUEST]);
    for first in (0..mib * BLOCKS_PER_MIB).step_by(BLOCKS_PER_REQUEST) {
        fill(&mut buffer, first, seed);
        file.write_all(&buffer.0)?;
    }
    file.sync_all()
}

/// Number of blocks among the first `mib` MiB of `device` that are not as `seed` says.
pub(crate) fn verify(device: &str, seed: u64, mib: u64) -> io::Result<u64> {
    let mut file = open(device)?;
    let mut found = Buffer([0; BLOCK_BYTES * BLOCKS_PER_REQUEST]);
    let mut wanted = Buffer([0; BLOCK_BYTES * BLOCKS_PER_REQUEST]);
    let mut wrong = 0;
    for first in (0..mib * BLOCKS_PER_MIB).step_by(BLOCKS_PER_REQUEST) {
        file.read_exact(&mut found.0)?;
        fill(&mut wanted, first, seed);
        let pairs = found
            .0
            .chunks(BLOCK_BYTES)
            .zip(wanted.0.chunks(BLOCK_BYTES));
        wrong += pairs.filter(|(found, wanted)| found != wanted).count() as u64;
    }
    Ok(wrong)
}

/// Size of `device` in bytes.
pub(crate) fn size(device: &str) -> io::Result<u64> {
    File::open(device)?.seek(SeekFrom::End(0))
}

fn open(device: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(device)
}

fn fill(buffer: &mut Buffer, first: u64, seed: u64) {
    for (number, block) in (first..).zip(buffer.0.chunks_mut(BLOCK_BYTES)) {
        let mut word = seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for (index, bytes) in block.chunks_mut(8).enumerate() {
            // The last word says again which write it is: a torn block contradicts itself.
            let value = match index {
                0 => number,
                1 => seed,
                _ if index == WORDS - 1 => seed,
                _ => {
                    word ^= word << 13;
                    word ^= word >> 7;
                    word ^= word << 17;
                    word
                }
            };
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Writes a device over and over and reads it back each time, until it is stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Load {
    /// Starts on the first `mib` MiB of `device`; round N writes what seed N says.
    pub(crate) fn start(device: String, mib: u64) -> Self {
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (ended, counted) = (stop.clone(), rounds.clone());
        let thread = std::thread::spawn(move || {
            let failed = |error: io::Error| format!("{device}: {error}");
            let mut seed = 0;
            while !ended.load(Ordering::Relaxed) {
                seed += 1;
                write(&device, seed, mib).map_err(failed)?;
                let wrong = verify(&device, seed, mib).map_err(failed)?;
                if wrong > 0 {
                    return Err(format!(
                        "{device}: {wrong} blocks are wrong in round {seed}"
                    ));
                }
                counted.store(seed, Ordering::Relaxed);
            }
            Ok(seed)
        });
        Self {
            stop,
            rounds,
            thread,
        }
    }

    /// Rounds done so far.
    pub(crate) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Ends it; gives the seed of what the device holds now.
    pub(crate) fn stop(self) -> Result<u64, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|_| Err("the load ended without a word".into()))
    }
}

/// The load under way, if there is one.
pub(crate) type Current = Mutex<Option<Load>>;

/// Answers `disk …`.
pub(crate) fn execute(current: &Current, words: &[&str]) -> Result<String, String> {
    let mut load = current.lock().unwrap_or_else(PoisonError::into_inner);
    let number = super::number;
    match words {
        ["write", device, seed, mib] => write(device, number("seed", seed)?, number("MiB", mib)?)
            .map(|()| "ok written".into())
            .map_err(|error| format!("{device}: {error}")),
        ["verify", device, seed, mib] => {
            let wrong = verify(device, number("seed", seed)?, number("MiB", mib)?)
                .map_err(|error| format!("{device}: {error}"))?;
            if wrong == 0 {
                Ok("ok wrong_blocks=0".into())
            } else {
                Err(format!("corrupt wrong_blocks={wrong}"))
            }
        }
        ["zero", device, first, mib] => on_range(device, (first, mib), sys::write_zeroes),
        ["discard", device, first, mib] => on_range(device, (first, mib), sys::discard),
        ["size", device] => size(device)
            .map(|bytes| format!("ok bytes={bytes}"))
            .map_err(|error| format!("{device}: {error}")),
        ["load", device, mib] => {
            let mib = number("MiB", mib)?;
            if load.is_some() {
                return Err("a load is running; send: disk stop".into());
            }
            *load = Some(Load::start((*device).to_owned(), mib));
            Ok("ok loading".into())
        }
        ["rounds"] => match &*load {
            Some(load) if load.thread.is_finished() => Err("the load has ended".into()),
            Some(load) => Ok(format!("ok rounds={}", load.rounds())),
            None => Err("no load is running".into()),
        },
        ["stop"] => match load.take() {
            Some(load) => load.stop().map(|seed| format!("ok seed={seed}")),
            None => Err("no load is running".into()),
        },
        _ => Err("usage: disk write|verify DEVICE SEED MIB, disk zero|discard DEVICE FIRST-MIB MIB, disk size DEVICE, disk load DEVICE MIB, disk rounds, disk stop".into()),
    }
}

/// Does something to `mib` MiB of `device` from the MiB `first` on.
fn on_range(
    device: &str,
    (first, mib): (&str, &str),
    act: fn(&File, u64, u64) -> io::Result<()>,
) -> Result<String, String> {
    let bytes = |argument: &str, text: &str| {
        super::number(argument, text)?
            .checked_mul(BYTES_PER_MIB)
            .ok_or_else(|| format!("argument <{argument}> is beyond any disk: '{text}'"))
    };
    let (offset, length) = (bytes("first MiB", first)?, bytes("MiB", mib)?);
    open(device)
        .and_then(|file| act(&file, offset, length))
        .map(|()| "ok done".into())
        .map_err(|error| format!("{device}: {error}"))
}
