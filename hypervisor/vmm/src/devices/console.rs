//! What the guest wrote to its serial port: a ring of the latest output that any number of readers follow.
//!
//! Readers keep their own position in the stream; one that falls behind by more than the ring misses the oldest
//! bytes, so no reader can slow the guest down or hold memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Output kept for a reader that attaches later.
pub const CONSOLE_RING_BYTES: usize = 64 * 1024;

#[derive(Debug, Default)]
struct Ring {
    /// The latest bytes, in order; at most [`CONSOLE_RING_BYTES`] long after each write.
    bytes: std::collections::VecDeque<u8>,
    /// Bytes ever written: the stream position of the ring's end.
    end: u64,
}

/// The guest's end.
#[derive(Clone, Debug)]
pub struct Console {
    ring: Arc<Mutex<Ring>>,
    end: watch::Sender<u64>,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            ring: Arc::default(),
            end: watch::Sender::new(0),
        }
    }
}

impl Console {
    /// Appends guest output.
    pub fn write(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(CONSOLE_RING_BYTES);
        ring.bytes.drain(..excess);
        ring.end += bytes.len() as u64;
        let end = ring.end;
        drop(ring);
        self.end.send_replace(end);
    }

    /// Goes on from what another console held, and where its end was in all that was ever written.
    pub fn go_on_from(&self, bytes: &[u8], end: u64) {
        let mut ring = self.lock();
        let kept = &bytes[bytes.len().saturating_sub(CONSOLE_RING_BYTES)..];
        ring.bytes = kept.iter().copied().collect();
        ring.end = end.max(kept.len() as u64);
        let end = ring.end;
        drop(ring);
        self.end.send_replace(end);
    }

    /// What the ring holds, and where its end is in all that was ever written.
    pub fn held(&self) -> (Vec<u8>, u64) {
        let ring = self.lock();
        (ring.bytes.iter().copied().collect(), ring.end)
    }

    /// What the ring holds now.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().bytes.iter().copied().collect()
    }

    /// Bytes ever written.
    pub fn written(&self) -> u64 {
        self.lock().end
    }

    /// A reader that begins with what the ring holds.
    pub fn reader(&self) -> ConsoleReader {
        let ring = self.lock();
        ConsoleReader {
            ring: self.ring.clone(),
            position: ring.end - ring.bytes.len() as u64,
            end: self.end.subscribe(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that writes to the console.
impl std::io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Self::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One follower of the guest's output.
#[derive(Debug)]
pub struct ConsoleReader {
    ring: Arc<Mutex<Ring>>,
    position: u64,
    end: watch::Receiver<u64>,
}

impl ConsoleReader {
    /// Stream position up to which output was taken or missed.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Waits for output that this reader has not had, and takes it. `None` when the machine's process ends.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        let position = self.position;
        self.end.wait_for(|&end| end > position).await.ok()?;
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let start = ring.end - ring.bytes.len() as u64;
        let skip = self.position.max(start) - start;
        self.position = ring.end;
        Some(ring.bytes.iter().skip(skip as usize).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_late_reader_gets_the_ring_and_then_what_follows() {
        let console = Console::default();
        console.write(b"boot ");
        let mut reader = console.reader();
        assert_eq!(reader.next().await.unwrap(), b"boot ");
        console.write(b"done");
        assert_eq!(reader.next().await.unwrap(), b"done");
    }

    #[tokio::test]
    async fn a_console_goes_on_where_another_was() {
        let (before, console) = (Console::default(), Console::default());
        before.write(&[b'x'; CONSOLE_RING_BYTES]);
        before.write(b"said before");
        let (bytes, end) = before.held();
        console.go_on_from(&bytes, end);
        assert_eq!(console.written(), before.written());
        let mut reader = console.reader();
        assert_eq!(reader.next().await.unwrap(), before.contents());
        console.write(b"!");
        assert_eq!(reader.next().await.unwrap(), b"!");
    }

    #[tokio::test]
    async fn a_slow_reader_misses_the_oldest_bytes_only() {
        let console = Console::default();
        let mut reader = console.reader();
        for byte in 0..=255u8 {
            console.write(&[byte; 1024]);
        }
        let got = reader.next().await.unwrap();
        assert_eq!(got.len(), CONSOLE_RING_BYTES);
        assert_eq!(got.first(), Some(&192));
        assert_eq!(got.last(), Some(&255));
    }
}
