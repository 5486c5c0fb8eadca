//! Frames on a connection: bounded, timed, and never trusted.

use godwit_wire::migration::{
    FRAME_HEADER_BYTES, FrameError, FrameHeader, FrameKind, MAX_CONTROL_BYTES,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

/// A peer that says nothing for this long is taken for dead.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// Unacknowledged data older than this ends the connection (TCP_USER_TIMEOUT).
const UNACKNOWLEDGED_LIMIT_MS: u32 = 10_000;
/// Longest reason that is passed on.
const MAX_REASON_CHARS: usize = 512;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 5;

/// The connection or what came over it is no good.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection broke or went silent.
    #[error("the connection to the other end failed: {0}")]
    Io(#[from] io::Error),
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

/// One migration connection.
#[derive(Debug)]
pub(super) struct FrameStream {
    socket: TcpStream,
}

impl FrameStream {
    /// Prepares `socket` for a migration: no delay, dead peers noticed.
    pub(super) fn new(socket: TcpStream) -> io::Result<Self> {
        use rustix::net::sockopt;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE_LIMIT))?;
        socket.set_write_timeout(Some(SILENCE_LIMIT))?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
        sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED_LIMIT_MS)?;
        Ok(Self { socket })
    }

    /// A second handle on the same connection.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
        })
    }

    /// Takes a peer that says nothing for long for dead again, after [`Self::wait_without_limit`].
    pub(super) fn limit_silence(&self) -> io::Result<()> {
        self.socket.set_read_timeout(Some(SILENCE_LIMIT))
    }

    /// Lets reads wait as long as the other end needs; keepalive still notices a dead peer.
    pub(super) fn wait_without_limit(&self) -> io::Result<()> {
        self.socket.set_read_timeout(None)
    }

    /// Ends the connection for every handle.
    pub(super) fn shutdown(&self) {
        // It may be down already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// The socket, for payloads.
    pub(super) const fn socket(&mut self) -> &mut TcpStream {
        &mut self.socket
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
        frame.extend_from_slice(&header.encode());
        frame.extend_from_slice(payload);
        Ok(self.socket.write_all(&frame)?)
    }

    /// Sends a header and the guest memory it announces, without a copy of ours in between.
    pub(super) fn send_memory(
        &mut self,
        header: FrameHeader,
        memory: &VolatileSlice<'_, impl BitmapSlice>,
    ) -> Result<(), StreamError> {
        assert_eq!(
            header.length as usize,
            memory.len(),
            "the header announces the payload"
        );
        let bytes = header.encode();
        let mut sent = 0;
        while sent < bytes.len() {
            // MORE: the payload follows at once, so the header needs no packet of its own.
            sent +=
                match rustix::net::send(&self.socket, &bytes[sent..], rustix::net::SendFlags::MORE)
                {
                    Err(rustix::io::Errno::INTR) => 0,
                    sent => sent.map_err(io::Error::from)?,
                };
        }
        self.socket
            .write_all_volatile(memory)
            .map_err(|error| match error {
                VolatileMemoryError::IOError(error) => StreamError::Io(error),
                error => StreamError::Io(io::Error::other(error)),
            })
    }

    /// Reads the next header; the payload is still to be read.
    pub(super) fn header(&mut self) -> Result<FrameHeader, StreamError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        self.socket.read_exact(&mut bytes)?;
        Ok(FrameHeader::decode(&bytes)?)
    }

    /// Reads the payload behind `header`.
    pub(super) fn payload(&mut self, header: &FrameHeader) -> Result<Vec<u8>, StreamError> {
        let mut bytes = vec![0; header.length as usize];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a control message that must have arrived whole after `limit`, however slowly its bytes come.
    pub(super) fn receive_within<T: DeserializeOwned>(
        &mut self,
        limit: Duration,
    ) -> Result<T, StreamError> {
        let deadline = Instant::now() + limit;
        let mut header = [0; FRAME_HEADER_BYTES];
        self.read_until(deadline, &mut header)?;
        let header = FrameHeader::decode(&header)?;
        if header.kind != FrameKind::Control {
            return Err(StreamError::Unexpected {
                got: header.kind,
                expected: "a control message",
            });
        }
        let mut payload = vec![0; header.length as usize];
        self.read_until(deadline, &mut payload)?;
        Ok(serde_json::from_slice(&payload)?)
    }

    fn read_until(&mut self, deadline: Instant, buffer: &mut [u8]) -> io::Result<()> {
        let mut read = 0;
        while read < buffer.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut buffer[read..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes writes fail that take longer than `limit`.
    pub(super) fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        self.socket.set_write_timeout(Some(limit))
    }

    /// Reads a control message and refuses anything else.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<T, StreamError> {
        let header = self.header()?;
        if header.kind != FrameKind::Control {
            return Err(StreamError::Unexpected {
                got: header.kind,
                expected: "a control message",
            });
        }
        Ok(serde_json::from_slice(&self.payload(&header)?)?)
    }
}
