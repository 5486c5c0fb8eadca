//! The connections of a migration, to be ended by whoever calls it off.

use super::stream::FrameStream;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every connection; the first is the control connection, the others are lanes.
#[derive(Debug, Default)]
pub(super) struct Sockets(Mutex<Vec<TcpStream>>);

impl Sockets {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// From here on this connection is ended with the others.
    pub(super) fn add(&self, stream: &FrameStream) -> io::Result<()> {
        self.lock().push(stream.socket()?);
        Ok(())
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Forgets all but the first `count`.
    pub(super) fn keep(&self, count: usize) {
        self.lock().truncate(count);
    }

    /// Ends all lanes, and what is being read from the control connection: the thread of the migration can still say
    /// goodbye there.
    pub(super) fn hang_up(&self) {
        if let Some(control) = self.lock().first() {
            // It may be down already.
            let _ = control.shutdown(Shutdown::Read);
        }
        self.end_lanes();
    }

    /// Ends all connections and forgets them.
    pub(super) fn close(&self) {
        for socket in self.lock().drain(..) {
            // It may be down already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends all lanes.
    pub(super) fn end_lanes(&self) {
        for lane in self.lock().iter().skip(1) {
            // It may be down already.
            let _ = lane.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
