//! Frames on a connection: bounded, timed, checked, and never trusted.

use super::connection::Connection;
use godwit_channel::tls::TlsError;
use godwit_wire::migration::{
    FRAME_HEADER_BYTES, FrameError, FrameHeader, FrameKind, MAX_CONTROL_BYTES, PayloadCheck,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// A peer that says nothing for this long is taken for dead.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// What came of disks may take this long to become durable, while the other end waits.
pub(super) const FLUSH_LIMIT: Duration = Duration::from_secs(600);
/// Unacknowledged data older than this ends the connection (TCP_USER_TIMEOUT).
pub(super) const UNACKNOWLEDGED_LIMIT_MS: u32 = 10_000;
/// What arrived in guest memory is checked in pieces that stay in the CPU's first cache.
const CHECKED_PIECE_BYTES: usize = 16 << 10;
/// Longest reason that is passed on.
const MAX_REASON_CHARS: usize = 512;

/// The connection or what came over it is no good.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection broke or went silent.
    #[error("the connection to the other end failed: {0}")]
    Io(#[from] io::Error),
    /// The other end is not who it should be.
    #[error("the other end did not prove itself: {0}")]
    Tls(#[from] TlsError),
    /// Not a frame of ours.
    #[error("the other end does not speak this protocol: {0}")]
    Frame(#[from] FrameError),
    /// A control message that cannot be read.
    #[error("a control message cannot be read: {0}")]
    Message(#[from] serde_json::Error),
    /// A control message longer than the other end would read.
    #[error("a control message of {0} bytes is too long to send")]
    TooLong(usize),
    /// A frame that does not belong here.
    #[error("a {got:?} frame came where {expected} was expected")]
    Unexpected {
        /// What came.
        got: FrameKind,
        /// What should have come.
        expected: &'static str,
    },
}

/// `reason` as far as it goes on the wire and into a status: peers' words come back in it.
pub(super) fn brief(reason: &str) -> String {
    reason.chars().take(MAX_REASON_CHARS).collect()
}

/// A header that was read, whose payload is still to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Announced {
    pub(super) header: FrameHeader,
    bytes: [u8; FRAME_HEADER_BYTES],
}

/// One migration connection.
#[derive(Debug)]
pub(super) struct FrameStream {
    connection: Connection,
}

impl FrameStream {
    pub(super) const fn new(connection: Connection) -> Self {
        Self { connection }
    }

    /// A handle with which others can end the connection.
    pub(super) fn socket(&self) -> io::Result<TcpStream> {
        self.connection.socket().try_clone()
    }

    /// Takes a peer that says nothing for long for dead again, after [`Self::wait_without_limit`].
    pub(super) fn limit_silence(&self) -> io::Result<()> {
        self.limit_reads(SILENCE_LIMIT)
    }

    /// Lets reads wait as long as the other end needs; keepalive still notices a dead peer.
    pub(super) fn wait_without_limit(&self) -> io::Result<()> {
        self.connection.socket().set_read_timeout(None)
    }

    /// Makes writes fail that wait longer than `limit`.
    pub(super) fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        self.connection.socket().set_write_timeout(Some(limit))
    }

    /// Makes reads fail that wait longer than `limit`.
    pub(super) fn limit_reads(&self, limit: Duration) -> io::Result<()> {
        self.connection.socket().set_read_timeout(Some(limit))
    }

    /// Ends the connection.
    pub(super) fn shutdown(&self) {
        // It may be down already.
        let _ = self.connection.socket().shutdown(Shutdown::Both);
    }

    /// Sends one control message.
    pub(super) fn send<T: Serialize>(&mut self, message: &T) -> Result<(), StreamError> {
        let payload = serde_json::to_vec(message)?;
        if payload.len() > MAX_CONTROL_BYTES as usize {
            return Err(StreamError::TooLong(payload.len()));
        }
        self.send_frame(FrameHeader::control(payload.len() as u32), &payload)
    }

    /// Sends a header and its payload in one write.
    pub(super) fn send_frame(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
    ) -> Result<(), StreamError> {
        assert_eq!(
            header.length as usize,
            payload.len(),
            "the header announces the payload"
        );
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + payload.len());
        frame.extend_from_slice(&header.encode(payload));
        frame.extend_from_slice(payload);
        self.write(&frame)
    }

    /// Sends what is a frame already.
    pub(super) fn write(&mut self, frame: &[u8]) -> Result<(), StreamError> {
        self.connection.write_all(frame)?;
        Ok(self.connection.flush()?)
    }

    /// Reads the next header; the payload is still to be read.
    pub(super) fn announced(&mut self) -> Result<Announced, StreamError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        self.connection.read_exact(&mut bytes)?;
        let header = FrameHeader::decode(&bytes)?;
        Ok(Announced { header, bytes })
    }

    /// Reads the payload behind `announced` into `payload`, which has its length, and checks it.
    pub(super) fn read_payload(
        &mut self,
        announced: &Announced,
        payload: &mut [u8],
    ) -> Result<(), StreamError> {
        self.connection.read_exact(payload)?;
        Ok(FrameHeader::verify(&announced.bytes, payload)?)
    }

    /// Reads the payload behind `announced` into guest memory, where it is checked: it is there even if this fails.
    /// `room`, as long, is for what cannot go there directly, and for looking at what did.
    pub(super) fn read_payload_into<B: BitmapSlice>(
        &mut self,
        announced: &Announced,
        place: &VolatileSlice<'_, B>,
        room: &mut [u8],
    ) -> Result<(), StreamError> {
        let Some(mut socket) = self.connection.plain() else {
            self.read_payload(announced, room)?;
            place.copy_from(room);
            return Ok(());
        };
        let memory = |error: VolatileMemoryError| match error {
            VolatileMemoryError::IOError(error) => error,
            other => io::Error::other(other),
        };
        socket
            .read_exact_volatile(&mut place.offset(0).map_err(memory)?)
            .map_err(memory)?;
        let mut check = PayloadCheck::behind(&announced.bytes);
        for at in (0..place.len()).step_by(CHECKED_PIECE_BYTES) {
            let piece = &mut room[..CHECKED_PIECE_BYTES.min(place.len() - at)];
            place.offset(at).map_err(memory)?.copy_to(piece);
            check.add(piece);
        }
        Ok(check.end()?)
    }

    /// Reads and checks the payload behind `announced`.
    pub(super) fn payload(&mut self, announced: &Announced) -> Result<Vec<u8>, StreamError> {
        let mut payload = vec![0; announced.header.length as usize];
        self.read_payload(announced, &mut payload)?;
        Ok(payload)
    }

    /// Reads the control message behind `announced`.
    pub(super) fn message<T: DeserializeOwned>(
        &mut self,
        announced: &Announced,
    ) -> Result<T, StreamError> {
        let kind = announced.header.kind;
        if kind != FrameKind::Control {
            return Err(StreamError::Unexpected {
                got: kind,
                expected: "a control message",
            });
        }
        Ok(serde_json::from_slice(&self.payload(announced)?)?)
    }

    /// Reads a control message and refuses anything else.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<T, StreamError> {
        let announced = self.announced()?;
        self.message(&announced)
    }

    /// Reads a control message that must have arrived whole before `deadline`, however slowly its bytes come.
    pub(super) fn receive_before<T: DeserializeOwned>(
        &mut self,
        deadline: Instant,
    ) -> Result<T, StreamError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        self.read_before(deadline, &mut bytes)?;
        let header = FrameHeader::decode(&bytes)?;
        if header.kind != FrameKind::Control {
            return Err(StreamError::Unexpected {
                got: header.kind,
                expected: "a control message",
            });
        }
        let mut payload = vec![0; header.length as usize];
        self.read_before(deadline, &mut payload)?;
        FrameHeader::verify(&bytes, &payload)?;
        Ok(serde_json::from_slice(&payload)?)
    }

    fn read_before(&mut self, deadline: Instant, buffer: &mut [u8]) -> io::Result<()> {
        let mut read = 0;
        while read < buffer.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.connection.socket().set_read_timeout(Some(left))?;
            match self.connection.read(&mut buffer[read..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
