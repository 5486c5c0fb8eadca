//! One connection between a port of the guest and a UNIX socket of the host.
//!
//! ```text
//! accepted ──"CONNECT port\n"──▶ requested ──response──▶ open ──both ends done──▶ gone
//!                                    guest's request ────▶ open
//! ```
//!
//! Anything unexpected is answered with a reset, and the connection is gone.

use super::packet::Operation;
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// Bytes from the guest that are kept for a host process that does not read.
pub(super) const BUFFER_BYTES: u32 = 128 * 1024;
/// Longest first line of a host process: `CONNECT 4294967295\n`.
const MAX_LINE_BYTES: usize = 19;

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A host process has connected and not yet said to which port.
    Accepted(Vec<u8>),
    /// The guest was asked.
    Requested,
    /// Bytes flow.
    Open,
}

/// Who may send how much (virtio 1.2, 5.10.6.3). Counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// Room the guest has in all, as it said last.
    guest_buffer: u32,
    /// What the guest has consumed, as it said last.
    guest_forwarded: u32,
    /// What was sent to it.
    sent: u32,
    /// What the host process has taken.
    pub(super) forwarded: u32,
    /// The value of `forwarded` that the guest knows.
    told: u32,
}

impl Credit {
    pub(super) fn heard(&mut self, buffer: u32, forwarded: u32) {
        (self.guest_buffer, self.guest_forwarded) = (buffer, forwarded);
    }

    /// Bytes the guest has room for.
    pub(super) fn free(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(in_flight)
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    fn taken(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest believes that less than half the buffer is free when more is.
    fn update_is_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= BUFFER_BYTES / 2
    }

    pub(super) fn told(&mut self) {
        self.told = self.forwarded;
    }
}

/// How a first line goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Incomplete,
    Connect { port: u32 },
    Nonsense,
}

pub(super) fn read_line(line: &[u8]) -> Line {
    let Some(text) = line.strip_suffix(b"\n") else {
        return if line.len() < MAX_LINE_BYTES {
            Line::Incomplete
        } else {
            Line::Nonsense
        };
    };
    let port = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.strip_prefix("CONNECT "))
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|port| port.parse().ok());
    port.map_or(Line::Nonsense, |port| Line::Connect { port })
}

/// Whether a direction still carries bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Going,
    Ended,
}

/// Whether the stream has bytes for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readable {
    /// As far as is known; reading tells.
    Maybe,
    /// Not before epoll says so.
    No,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) phase: Phase,
    pub(super) stream: UnixStream,
    pub(super) credit: Credit,
    /// From the guest, not yet taken by the host process.
    buffered: VecDeque<u8>,
    /// Packets without data that the guest is to get.
    pub(super) owed: BTreeSet<Operation>,
    pub(super) readable: Readable,
    /// From the guest to the host.
    pub(super) inbound: Flow,
    /// From the host to the guest.
    pub(super) outbound: Flow,
    /// It waits for its turn to send to the guest.
    pub(super) in_line: bool,
    /// What epoll watches it for.
    pub(super) watched: EventFlags,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, key: Key, phase: Phase) -> Self {
        Self {
            key,
            phase,
            stream,
            credit: Credit::default(),
            buffered: VecDeque::new(),
            owed: BTreeSet::new(),
            readable: Readable::No,
            inbound: Flow::Going,
            outbound: Flow::Going,
            in_line: false,
            watched: EventFlags::empty(),
        }
    }

    /// What epoll should watch it for.
    pub(super) fn wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        let awaits_bytes = match self.phase {
            Phase::Accepted(_) => true,
            Phase::Requested => false,
            Phase::Open => self.outbound == Flow::Going && self.readable == Readable::No,
        };
        if awaits_bytes {
            wanted |= EventFlags::IN;
        }
        if !self.buffered.is_empty() {
            wanted |= EventFlags::OUT;
        }
        wanted
    }

    /// Whether there is anything to tell the guest now.
    pub(super) fn has_something(&self) -> bool {
        !self.owed.is_empty()
            || (self.phase == Phase::Open
                && self.outbound == Flow::Going
                && self.readable == Readable::Maybe
                && self.credit.free() > 0)
    }

    /// Whether `bytes` more may be buffered: a guest that keeps to its credit never asks for more.
    pub(super) fn has_room(&self, bytes: u32) -> bool {
        self.buffered.len() as u64 + u64::from(bytes) <= u64::from(BUFFER_BYTES)
    }

    /// Passes bytes on, now or when the host process takes them.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffered.extend(bytes);
        self.flush()
    }

    /// Passes on what is buffered, as far as the host process takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.buffered.is_empty() {
            match self.stream.write(self.buffered.as_slices().0) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.buffered.drain(..written);
                    self.credit.taken(written as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.credit.update_is_due() {
            self.owed.insert(Operation::CreditUpdate);
        }
        if self.inbound == Flow::Ended && self.buffered.is_empty() {
            self.stream.shutdown(std::net::Shutdown::Write)?;
        }
        Ok(())
    }

    /// The guest wants no more bytes: the host process learns it when it writes.
    pub(super) fn stop_reading(&mut self) {
        self.outbound = Flow::Ended;
        // A socket whose other end is gone needs no shutdown.
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
    }

    /// Both directions have ended and nothing is left to pass on.
    pub(super) fn is_done(&self) -> bool {
        self.inbound == Flow::Ended && self.outbound == Flow::Ended && self.buffered.is_empty()
    }

    /// Reads on in the first line, byte by byte: what follows it belongs to the guest.
    pub(super) fn read_on(&mut self) -> io::Result<Line> {
        let Phase::Accepted(line) = &mut self.phase else {
            return Ok(Line::Nonsense);
        };
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Line::Incomplete),
                Err(error) => return Err(error),
            }
            match read_line(line) {
                Line::Incomplete => {}
                known => return Ok(known),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_a_whole_connect_line_connects() {
        assert_eq!(read_line(b"CONNECT 52\n"), Line::Connect { port: 52 });
        assert_eq!(
            read_line(b"CONNECT 4294967295\n"),
            Line::Connect { port: u32::MAX }
        );
        assert_eq!(read_line(b"CONNECT 52"), Line::Incomplete);
        for nonsense in [
            &b"CONNECT 4294967296\n"[..],
            b"CONNECT \n",
            b"CONNECT +5\n",
            b"connect 5\n",
            b"\xff\n",
            b"CONNECT 000000000000000001",
        ] {
            assert_eq!(read_line(nonsense), Line::Nonsense, "{nonsense:?}");
        }
    }

    proptest! {
        #[test]
        fn credit_never_exceeds_what_the_guest_has(
            buffer in any::<u32>(),
            forwarded in any::<u32>(),
            sent in prop::collection::vec(any::<u32>(), 0..8),
        ) {
            let mut credit = Credit::default();
            credit.heard(buffer, forwarded);
            for bytes in sent {
                credit.sent(bytes);
                prop_assert!(credit.free() <= buffer);
            }
        }
    }
}
