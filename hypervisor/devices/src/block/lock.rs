//! The lock that keeps a disk from being written by two machines.
//!
//! ```text
//!                 claim(E): OFD lock taken, record ≤ E, E recorded
//!   unclaimed ──────────────────────────────────────────────────────▶ held(E) ◀─┐ claim(E'), E' ≥ E
//!       ▲                                                              │  │  └───┘
//!       └──────────────────────── release ─────────────────────────────┘  │ the record names another holder
//!                                                                         ▼
//!                                                                       fenced: no write passes until a new claim
//! ```
//!
//! The file beside the disk carries both halves: an exclusive lock that belongs to the open file description, which
//! the kernel gives up when the process dies, and a record of who held it last, under which epoch. The lock stops
//! two live processes; the record stops a writer that was frozen or cut off while the disk was given to another.
//! Every batch of writes reads the record first, so that a writer that was overtaken cannot write any more.

use crate::sys::guest_io;
use godwit_wire::id::{Epoch, VmId};
use rustix::fs::fdatasync;
use rustix::io::{pread, pwrite};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a lock that another holds is tried; the holder may be about to leave.
pub const CLAIM_ATTEMPTS: u32 = 40;
/// How long to wait between two attempts.
pub const CLAIM_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of the record, filled up with spaces, so that it is always written and read in one piece.
const RECORD_BYTES: usize = 512;

/// Who holds a disk, or held it last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The machine.
    pub vm: VmId,
    /// Its epoch.
    pub epoch: Epoch,
    /// The host it ran on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// Why a disk cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The lock file cannot be used.
    #[error("{what} {path}", path = path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The lock file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Another process holds the lock.
    #[error("{path} is held by {holder}", path = path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who wrote the record.
        holder: String,
    },
    /// The disk was given on under a newer epoch.
    #[error("{path} names {holder}, which is newer than epoch {epoch}", path = path.display())]
    Newer {
        /// The lock file.
        path: PathBuf,
        /// Who wrote the record.
        holder: String,
        /// Under which epoch it was claimed.
        epoch: Epoch,
    },
    /// The record cannot be read.
    #[error("{path} holds no lock record; find out which machine writes the disk, then remove the file", path = path.display())]
    Garbled {
        /// The lock file.
        path: PathBuf,
    },
    /// Nobody claimed the disk for this machine.
    #[error("{path} is not claimed", path = path.display())]
    Unclaimed {
        /// The lock file.
        path: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unclaimed,
    Held(Epoch),
    Fenced(Epoch),
}

/// The lock of one disk.
#[derive(Debug)]
pub struct DiskLock {
    path: PathBuf,
    file: File,
    vm: VmId,
    host: Option<String>,
    state: Mutex<State>,
    /// A record was written and may not have reached the disk.
    unsure: AtomicBool,
}

impl DiskLock {
    /// Opens the lock file, which is made when there is none. Takes nothing yet.
    pub fn open(path: &Path, vm: VmId) -> Result<Self, LockError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|source| LockError::File {
                what: "cannot open",
                path: path.to_owned(),
                source,
            })?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        Ok(Self {
            path: path.to_owned(),
            file,
            vm,
            host: host.map(|name| name.trim().to_owned()),
            state: Mutex::new(State::Unclaimed),
            unsure: AtomicBool::new(false),
        })
    }

    /// Takes the disk for this machine under `epoch`; waits a little for a holder to leave.
    pub fn claim(&self, epoch: Epoch) -> Result<(), LockError> {
        let mut state = self.state();
        self.take()?;
        let checked = self.admit(epoch).and_then(|()| self.record(epoch));
        match checked {
            Ok(()) => {
                *state = State::Held(epoch);
                Ok(())
            }
            Err(error) => {
                let _ = guest_io::unlock(&self.file);
                *state = State::Unclaimed;
                Err(error)
            }
        }
    }

    /// Gives the disk up. The record stays: an older epoch cannot come back.
    pub fn release(&self) -> Result<(), LockError> {
        let mut state = self.state();
        *state = State::Unclaimed;
        guest_io::unlock(&self.file).map_err(|source| self.failed("cannot unlock", source))
    }

    /// Whether a write may pass now. Once one may not, none may until the next claim.
    pub fn check(&self) -> Result<(), LockError> {
        let mut state = self.state();
        let epoch = match *state {
            State::Held(epoch) => epoch,
            State::Fenced(epoch) => {
                return Err(LockError::Newer {
                    path: self.path.clone(),
                    holder: self.holder(),
                    epoch,
                });
            }
            State::Unclaimed => {
                return Err(LockError::Unclaimed {
                    path: self.path.clone(),
                });
            }
        };
        let error = match self.read() {
            Ok(Some(record)) if record.vm == self.vm && record.epoch == epoch => return Ok(()),
            Ok(Some(record)) => LockError::Newer {
                path: self.path.clone(),
                holder: described(&record),
                epoch,
            },
            Ok(None) => LockError::Garbled {
                path: self.path.clone(),
            },
            Err(error) => error,
        };
        *state = State::Fenced(epoch);
        Err(error)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<(), LockError> {
        for attempt in 1..=CLAIM_ATTEMPTS {
            let taken = guest_io::lock_exclusively(&self.file)
                .map_err(|source| self.failed("cannot lock", source))?;
            if taken {
                return Ok(());
            }
            if attempt < CLAIM_ATTEMPTS {
                std::thread::sleep(CLAIM_PAUSE);
            }
        }
        Err(LockError::Held {
            path: self.path.clone(),
            holder: self.holder(),
        })
    }

    /// Epochs count per machine: another machine's record says only who had the disk before, and the lock that is
    /// held by now says that it has gone.
    fn admit(&self, epoch: Epoch) -> Result<(), LockError> {
        match self.read()? {
            Some(record) if record.vm == self.vm && record.epoch > epoch => Err(LockError::Newer {
                path: self.path.clone(),
                holder: described(&record),
                epoch,
            }),
            _ => Ok(()),
        }
    }

    fn record(&self, epoch: Epoch) -> Result<(), LockError> {
        let record = LockRecord {
            vm: self.vm,
            epoch,
            host: self.host.clone(),
        };
        // It is there already when the machine goes on in another process of its host, which stands still meanwhile:
        // the disk is not waited for.
        if !self.unsure.load(Ordering::Relaxed) && self.read()?.as_ref() == Some(&record) {
            return Ok(());
        }
        let mut bytes = serde_json::to_vec(&record)
            .map_err(|error| self.failed("cannot write", error.into()))?;
        if bytes.len() >= RECORD_BYTES {
            let short = LockRecord {
                host: None,
                ..record
            };
            bytes = serde_json::to_vec(&short)
                .map_err(|error| self.failed("cannot write", error.into()))?;
        }
        bytes.resize(RECORD_BYTES - 1, b' ');
        bytes.push(b'\n');
        self.unsure.store(true, Ordering::Relaxed);
        let written = pwrite(&self.file, &bytes, 0)
            .and_then(|written| fdatasync(&self.file).map(|()| written))
            .map_err(|error| self.failed("cannot write", error.into()))?;
        match written {
            RECORD_BYTES => {
                self.unsure.store(false, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(self.failed("cannot write", io::ErrorKind::WriteZero.into())),
        }
    }

    /// The record; nothing when the file is empty.
    fn read(&self) -> Result<Option<LockRecord>, LockError> {
        let mut bytes = [0; RECORD_BYTES];
        let length = pread(&self.file, &mut bytes, 0)
            .map_err(|error| self.failed("cannot read", error.into()))?;
        if length == 0 {
            return Ok(None);
        }
        serde_json::from_slice(&bytes[..length])
            .map(Some)
            .map_err(|_| LockError::Garbled {
                path: self.path.clone(),
            })
    }

    fn holder(&self) -> String {
        match self.read() {
            Ok(Some(record)) => described(&record),
            _ => "a process that left no record".to_owned(),
        }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> LockError {
        LockError::File {
            what,
            path: self.path.clone(),
            source,
        }
    }
}

fn described(record: &LockRecord) -> String {
    let LockRecord { vm, epoch, host } = record;
    match host {
        Some(host) => format!("machine {vm} on {host}, epoch {epoch}"),
        None => format!("machine {vm}, epoch {epoch}"),
    }
}
