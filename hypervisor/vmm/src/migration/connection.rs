//! A connection of a migration: TCP, or TLS on it.

use super::stream::StreamError;
use godwit_channel::tls::{MigrationTls, TlsError};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Plaintext that rustls keeps back when the socket does not take it at once; frames are longer than its default.
const TLS_BUFFER_BYTES: usize = 4 << 20;
/// Read from the socket at a time: a few records of TLS, which stay in the CPU's cache until they are decrypted.
const READ_AHEAD_BYTES: usize = 128 << 10;

/// A connection to the other end.
#[derive(Debug)]
pub(super) enum Connection {
    Plain(TcpStream),
    Source(Box<StreamOwned<ClientConnection, ReadAhead>>),
    Target(Box<StreamOwned<ServerConnection, ReadAhead>>),
}

/// A socket from which more is read than was asked for: rustls asks for 4 KiB at a time.
#[derive(Debug)]
pub(super) struct ReadAhead(BufReader<TcpStream>);

impl ReadAhead {
    fn new(socket: TcpStream) -> Self {
        Self(BufReader::with_capacity(READ_AHEAD_BYTES, socket))
    }

    fn socket(&self) -> &TcpStream {
        self.0.get_ref()
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for ReadAhead {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket().write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket().write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket().flush()
    }
}

impl Connection {
    /// Reaches the target; with `tls` only the target of this very migration is believed.
    pub(super) fn to_target(
        target: SocketAddr,
        tls: Option<&MigrationTls>,
    ) -> Result<Self, StreamError> {
        let socket = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT)?;
        prepare(&socket)?;
        let Some(tls) = tls else {
            return Ok(Self::Plain(socket));
        };
        let mut stream = Box::new(StreamOwned::new(tls.source()?, ReadAhead::new(socket)));
        stream.conn.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self::Source(stream))
    }

    /// Takes a connection that came in; with `tls` it must be from the source of this very migration, and say so
    /// before `deadline`.
    pub(super) fn from_source(
        socket: TcpStream,
        tls: Option<&MigrationTls>,
        deadline: Instant,
    ) -> Result<Self, StreamError> {
        prepare(&socket)?;
        let Some(tls) = tls else {
            return Ok(Self::Plain(socket));
        };
        let mut stream = Box::new(StreamOwned::new(tls.target()?, ReadAhead::new(socket)));
        stream.conn.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        while stream.conn.is_handshaking() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            stream.sock.socket().set_read_timeout(Some(left))?;
            // One read at a time, so that a peer that trickles its bytes does not outlast the deadline.
            if stream.conn.wants_write() {
                stream.conn.write_tls(&mut stream.sock)?;
            } else if stream.conn.read_tls(&mut stream.sock)? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            } else {
                stream
                    .conn
                    .process_new_packets()
                    .map_err(TlsError::Rustls)?;
            }
        }
        while stream.conn.wants_write() {
            stream.conn.write_tls(&mut stream.sock)?;
        }
        tls.check_source(stream.conn.peer_certificates())?;
        Ok(Self::Target(stream))
    }

    /// The socket, if nothing is between it and what is said.
    pub(super) const fn plain(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Source(_) | Self::Target(_) => None,
        }
    }

    /// The socket below.
    pub(super) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Source(stream) => stream.sock.socket(),
            Self::Target(stream) => stream.sock.socket(),
        }
    }
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    use super::stream::{SILENCE_LIMIT, UNACKNOWLEDGED_LIMIT_MS};
    use rustix::net::sockopt;
    const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
    const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
    const KEEPALIVE_PROBES: u32 = 5;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(SILENCE_LIMIT))?;
    socket.set_write_timeout(Some(SILENCE_LIMIT))?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(socket, UNACKNOWLEDGED_LIMIT_MS)?;
    Ok(())
}

/// Which traffic goes first where queues and links know classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The guests' own does.
    Bulk,
    /// None does: somebody waits for this, too.
    Usual,
}

/// Marks what is sent from here on. A mark that cannot be had costs nothing but courtesy.
pub(super) fn mark(socket: &TcpStream, class: Class) {
    use rustix::net::sockopt;
    let bits = match class {
        // AF11, high-throughput data (RFC 4594). Linux takes these bits of an IPv4 header for its own class of bulk
        // traffic, too, and takes it back with them.
        Class::Bulk => 0b00_1010 << 2,
        Class::Usual => 0,
    };
    let marked = sockopt::set_ip_tos(socket, bits).and_then(|()| match socket.local_addr() {
        Ok(SocketAddr::V6(_)) => sockopt::set_ipv6_tclass(socket, u32::from(bits)),
        _ => Ok(()),
    });
    if let Err(error) = marked {
        tracing::debug!(%error, ?class, "a lane is not marked");
    }
}

/// How long a lane waits for an end that takes in what is sent, but not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TakesIn {
    /// It is busy making disks durable, perhaps, and reads nothing meanwhile. An end that is dead is found on the
    /// control connection, or here after as long.
    AsDisksAllow,
    /// Within this time, and what has not reached it within a few seconds is lost.
    Within(Duration),
}

/// Says how long what is sent may wait.
pub(super) fn expect_to_take_in(socket: &TcpStream, takes_in: TakesIn) -> io::Result<()> {
    use super::stream::{FLUSH_LIMIT, UNACKNOWLEDGED_LIMIT_MS};
    let (write, unacknowledged_ms) = match takes_in {
        TakesIn::AsDisksAllow => {
            let limit = u32::try_from(FLUSH_LIMIT.as_millis()).unwrap_or(u32::MAX);
            (FLUSH_LIMIT, limit)
        }
        TakesIn::Within(limit) => (limit, UNACKNOWLEDGED_LIMIT_MS),
    };
    socket.set_write_timeout(Some(write))?;
    // It counts for a peer that acknowledges, but whose window is closed, too.
    rustix::net::sockopt::set_tcp_user_timeout(socket, unacknowledged_ms)?;
    Ok(())
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Source(stream) => stream.read(buffer),
            Self::Target(stream) => stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Source(stream) => stream.write(bytes),
            Self::Target(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Source(stream) => stream.flush(),
            Self::Target(stream) => stream.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::stream::{FLUSH_LIMIT, SILENCE_LIMIT, UNACKNOWLEDGED_LIMIT_MS};
    use rustix::net::sockopt::tcp_user_timeout;
    use std::net::TcpListener;

    #[test]
    fn a_lane_is_marked_as_bulk_data_and_no_more() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            for (class, bits) in [(Class::Bulk, 0x28), (Class::Usual, 0)] {
                mark(&socket, class);
                assert_eq!(rustix::net::sockopt::ip_tos(&socket).unwrap(), bits);
                if address.starts_with('[') {
                    let class = rustix::net::sockopt::ipv6_tclass(&socket).unwrap();
                    assert_eq!(class, u32::from(bits));
                }
            }
        }
    }

    #[test]
    fn a_lane_waits_for_disks_and_for_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        prepare(&socket).unwrap();
        let limits = || {
            let write = socket.write_timeout().unwrap().unwrap();
            (write, tcp_user_timeout(&socket).unwrap())
        };
        let usual = (SILENCE_LIMIT, UNACKNOWLEDGED_LIMIT_MS);
        assert_eq!(limits(), usual);
        expect_to_take_in(&socket, TakesIn::AsDisksAllow).unwrap();
        let long = u32::try_from(FLUSH_LIMIT.as_millis()).unwrap();
        assert_eq!(limits(), (FLUSH_LIMIT, long));
        expect_to_take_in(&socket, TakesIn::Within(SILENCE_LIMIT)).unwrap();
        assert_eq!(limits(), usual);
    }
}
