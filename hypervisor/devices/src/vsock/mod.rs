//! Sockets between the guest and its host (virtio 1.2, 5.10), on the host's side UNIX sockets in a directory, laid
//! out as Firecracker's: a host process connects to `vsock.sock` and writes `CONNECT port\n`, and gets `OK port\n`
//! when the guest has accepted; a guest that connects to port 52 of the host reaches the listener at
//! `vsock.sock_52`.
//!
//! ```text
//! packet      headers                      (pure)
//! connection  one connection and its credit
//! rings       the guest's queues
//! muxer       all of them, on one thread: a guest has few, and order between queues is kept for nothing
//! ```
//!
//! Packets are read and written here rather than with a crate: the one there is takes packets of at most two
//! descriptors, and Linux sends data in more.
//!
//! Connections do not outlive a move to another host: after [`VirtioDevice::restore`] the guest is told that all of
//! them are gone.

mod connection;
mod muxer;
pub mod packet;
mod rings;

#[cfg(test)]
mod tests;

use crate::counters::counters;
use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceKind, DeviceMetrics, Plug, QueuePosition,
    SavedBody, VirtioDevice,
};
use crate::worker::{Worker, WorkerError};
use godwit_wire::devices::MIN_VSOCK_CID;
use godwit_wire::id::Epoch;
use muxer::{Muxer, Parts};
use rings::Rings;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the device.
const NAME: &str = "vsock";
/// The socket that host processes connect to; with `_PORT` behind it, the one that guests reach.
pub const SOCKET_NAME: &str = "vsock.sock";
/// Stream sockets.
const F_STREAM: u64 = 1;
/// Receive, transmit, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Longest path of a UNIX socket (`sun_path`, with its end).
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Version of the saved state.
const SAVED_VERSION: u32 = 1;

/// The guest's vsock.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    directory: PathBuf,
    /// None while it is to be inherited.
    listener: Option<Arc<UnixListener>>,
    socket_file: SocketFile,
    counters: Arc<Counters>,
    worker: Option<Worker<Muxer>>,
    /// The guest may believe in connections of another host.
    moved: bool,
}

/// Whose the socket's file is: that of the process the machine runs in, which removes it at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SocketFile {
    Ours,
    Others,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    version: u32,
    cid: u32,
    #[serde(default)]
    counters: SavedCounters,
}

counters! {
    /// Packets given to the guest.
    rx_packets,
    /// Bytes of data in them.
    rx_bytes,
    /// Packets the guest sent.
    tx_packets,
    /// Bytes of data of connections in them.
    tx_bytes,
    /// Connections that were made.
    connections,
    /// Connections that were refused.
    refused,
    /// How often the guest was told that there is no such connection, or no more.
    resets,
}

impl Vsock {
    /// A vsock for the guest with context id `cid`, whose sockets are in `directory`.
    pub fn new(cid: u32, directory: PathBuf) -> Result<Self, DeviceError> {
        Self::plugged(cid, directory, Plug::Opened)
    }

    /// The same, or a vsock that gets its listening socket from [`VirtioDevice::inherit`].
    pub fn plugged(cid: u32, directory: PathBuf, plug: Plug) -> Result<Self, DeviceError> {
        if cid < MIN_VSOCK_CID || cid == u32::MAX {
            return Err(unusable(format!(
                "context id {cid} is reserved; use one from {MIN_VSOCK_CID} up"
            )));
        }
        let path = directory.join(SOCKET_NAME);
        let longest = path.as_os_str().len() + "_4294967295".len();
        if longest > MAX_SOCKET_PATH_BYTES {
            return Err(unusable(format!(
                "{} is too long for a socket's path; use a directory of at most {} bytes",
                path.display(),
                MAX_SOCKET_PATH_BYTES - "/vsock.sock_4294967295".len()
            )));
        }
        let listener = match plug {
            Plug::Inherited => None,
            Plug::Opened => Some(listen(&path).map_err(|source| DeviceError::Host {
                device: NAME.into(),
                what: format!("{} cannot be listened on", path.display()),
                source,
            })?),
        };
        let socket_file = match plug {
            Plug::Opened => SocketFile::Ours,
            Plug::Inherited => SocketFile::Others,
        };
        Ok(Self {
            cid,
            directory,
            listener: listener.map(Arc::new),
            socket_file,
            counters: Arc::default(),
            worker: None,
            moved: false,
        })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        if self.socket_file == SocketFile::Others {
            return;
        }
        // A socket that is left over is replaced by the next listener.
        let _ = std::fs::remove_file(self.directory.join(SOCKET_NAME));
    }
}

/// Listens, in place of a socket that nobody listens on any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Err(error) = UnixStream::connect(path)
        && error.kind() == ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let bytes = u64::from(self.cid).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (nth, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(from.saturating_add(nth)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker = None;
        let Some(listener) = &self.listener else {
            return Err(bad_state("its listening socket was not inherited"));
        };
        let mut queues = activation.queues;
        queues.sort_by_key(|queue| queue.index);
        let complete = queues.iter().map(|queue| queue.index).eq(0..3);
        let queues: Result<[ActiveQueue; 3], _> = queues.try_into();
        let (Ok(queues), true) = (queues, complete) else {
            // Not this host's fault: the driver left queues out. It may try again after a reset.
            activation
                .interrupt
                .needs_reset("vsock works with all of its three queues only");
            return Ok(());
        };
        let muxer = Muxer::new(Parts {
            cid: self.cid.into(),
            directory: self.directory.clone(),
            listener: Arc::clone(listener),
            counters: Arc::clone(&self.counters),
            rings: Rings::new(activation.memory, queues, activation.interrupt),
            reset_owed: std::mem::take(&mut self.moved),
        });
        let worker = Worker::start(NAME, muxer, activation.start);
        self.worker = Some(worker.map_err(worker_failed)?);
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        let Some(worker) = &self.worker else {
            return Ok(Vec::new());
        };
        worker.pause().map_err(worker_failed)?;
        worker
            .call(|muxer| muxer.positions())
            .map_err(worker_failed)
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        match &self.worker {
            Some(worker) => worker.resume().map_err(worker_failed),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.worker = None;
        self.moved = false;
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        let saved = Saved {
            version: SAVED_VERSION,
            cid: self.cid,
            counters: self.counters.save(),
        };
        SavedBody::serialized(&saved).map_err(bad_state)
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved.deserialized().map_err(bad_state)?;
        if saved.version != SAVED_VERSION {
            return Err(bad_state(format!(
                "version {}, and only {SAVED_VERSION} is known",
                saved.version
            )));
        }
        if saved.cid != self.cid {
            return Err(bad_state(format!(
                "context id {} there, {} here",
                saved.cid, self.cid
            )));
        }
        self.counters.restore(&saved.counters);
        self.moved = true;
        Ok(())
    }

    fn claim(&mut self, _: Epoch) -> Result<(), DeviceError> {
        self.socket_file = SocketFile::Ours;
        Ok(())
    }

    fn step_aside(&mut self) -> Result<(), DeviceError> {
        self.socket_file = SocketFile::Others;
        Ok(())
    }

    fn lend(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        let lent = self.listener.iter().map(|listener| {
            let lent = listener.try_clone().map(OwnedFd::from);
            lent.map_err(|source| DeviceError::host(NAME, "a descriptor is refused", source))
        });
        lent.collect()
    }

    fn inherit(&mut self, lent: Vec<OwnedFd>) -> Result<(), DeviceError> {
        let count = lent.len();
        let [listener] = <[OwnedFd; 1]>::try_from(lent)
            .map_err(|_| bad_state(format!("{count} descriptors for one listening socket")))?;
        self.listener = Some(Arc::new(listener.into()));
        Ok(())
    }

    fn metrics(&self) -> DeviceMetrics {
        self.counters.metrics()
    }
}

fn unusable(reason: String) -> DeviceError {
    DeviceError::Unusable {
        device: NAME.into(),
        reason,
    }
}

fn bad_state(reason: impl ToString) -> DeviceError {
    DeviceError::bad_state(NAME, reason)
}

fn worker_failed(error: WorkerError) -> DeviceError {
    error.of(NAME)
}
