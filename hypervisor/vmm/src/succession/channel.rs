//! Messages with descriptors on a UNIX socket: bounded and timed.

use super::SuccessionError;
use godwit_wire::succession::{MAX_LENT_DESCRIPTORS, MAX_SUCCESSION_MESSAGE_BYTES};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A process that says nothing for this long when it is its turn is taken for dead.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes in front of every message: its length.
const LENGTH_BYTES: usize = 4;
const ANCILLARY_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_LENT_DESCRIPTORS));

/// A connection between the two processes.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(SILENCE_LIMIT))?;
        stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        Ok(Self { stream })
    }

    /// Waits this long for what comes next.
    pub(super) fn limit_silence(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(limit))
    }

    /// The same connection once more, to be watched or ended by others.
    pub(super) fn again(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Says no more, and hears no more.
    pub(super) fn close(&self) {
        // It may be down already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn send(
        &self,
        message: &impl Serialize,
        lent: &[BorrowedFd<'_>],
    ) -> Result<(), SuccessionError> {
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_SUCCESSION_MESSAGE_BYTES as usize {
            return Err(too_long("a message", body.len() as u64));
        }
        if lent.len() > MAX_LENT_DESCRIPTORS {
            return Err(SuccessionError::Descriptors {
                count: lent.len(),
                expected: MAX_LENT_DESCRIPTORS,
            });
        }
        let length = (body.len() as u32).to_le_bytes();
        let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !lent.is_empty() {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(lent));
            debug_assert!(fits, "the space is for as many as may be sent");
        }
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(
                &self.stream,
                &[IoSlice::new(&length)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )
        })
        .map_err(io::Error::from)?;
        self.send_bytes(&length[sent..])?;
        self.send_bytes(&body)
    }

    pub(super) fn send_bytes(&self, bytes: &[u8]) -> Result<(), SuccessionError> {
        Ok((&self.stream).write_all(bytes)?)
    }

    /// The next message, with the descriptors that came along.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
    ) -> Result<(T, Vec<OwnedFd>), SuccessionError> {
        let mut length = [0; LENGTH_BYTES];
        let (mut filled, mut lent) = (0, Vec::new());
        while filled < LENGTH_BYTES {
            match self.receive_some(&mut length[filled..], &mut lent)? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                more => filled += more,
            }
        }
        let length = u32::from_le_bytes(length);
        if length > MAX_SUCCESSION_MESSAGE_BYTES {
            return Err(too_long("a message", length.into()));
        }
        let body = self.receive_bytes(length)?;
        Ok((serde_json::from_slice(&body)?, lent))
    }

    fn receive_some(
        &self,
        buffer: &mut [u8],
        lent: &mut Vec<OwnedFd>,
    ) -> Result<usize, SuccessionError> {
        let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })
        .map_err(io::Error::from)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                lent.extend(descriptors);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // This process has no room for all of them.
            return Err(SuccessionError::Descriptors {
                count: lent.len(),
                expected: MAX_LENT_DESCRIPTORS,
            });
        }
        Ok(received.bytes)
    }

    /// So many bytes; whoever asks has judged how many those may be.
    pub(super) fn receive_bytes(&self, count: u32) -> Result<Vec<u8>, SuccessionError> {
        let mut bytes = vec![0; count as usize];
        (&self.stream).read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn too_long(what: &'static str, bytes: u64) -> SuccessionError {
    SuccessionError::TooLong {
        what,
        bytes,
        limit: MAX_SUCCESSION_MESSAGE_BYTES,
    }
}
