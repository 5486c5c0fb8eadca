//! All connections of a guest, between its queues and the host's sockets.

use super::connection::{BUFFER_BYTES, Connection, Flow, Key, Line, Phase, Readable};
use super::packet::{HEADER_BYTES, HOST_CID, Header, NO_RECEIVE, NO_SEND, Operation, STREAM};
use super::rings::{EVENT, RECEIVE, Rings, TRANSMIT};
use super::{Counters, SOCKET_NAME};
use crate::chain::{Chain, ChainError};
use crate::device::QueuePosition;
use crate::worker::{Poll, Service};
use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

/// Most connections at a time, the ones that are being made included.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Most resets kept for a guest that gives no buffers; later ones are lost, and the guest's connections time out.
const MAX_RESETS: usize = 256;
/// Most packets in one direction before the other has its turn.
const PACKETS_PER_TURN: usize = 128;
/// Most bytes of a packet to the guest.
const MAX_DATA_BYTES: u32 = 64 * 1024;
/// Host ports of connections that host processes make begin here, away from ports that guests connect to.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The event that tells the guest that all connections are gone (virtio 1.2, 5.10.6.8).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

const LISTENER: u32 = 3;
const FIRST_CONNECTION: u32 = 16;

/// Why the device stops.
#[derive(Debug, thiserror::Error)]
pub(super) enum MuxError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a packet of {len} bytes has no header")]
    NoHeader { len: u32 },
    #[error("a packet claims {claimed} bytes of data and has {there}")]
    Length { claimed: u32, there: u32 },
    #[error("a buffer of {len} bytes holds no packet")]
    SmallBuffer { len: u32 },
}

#[derive(Debug)]
pub(super) struct Muxer {
    pub(super) cid: u64,
    pub(super) directory: PathBuf,
    pub(super) listener: Arc<UnixListener>,
    pub(super) counters: Arc<Counters>,
    rings: Rings,
    /// The guest is to be told that its connections are gone.
    pub(super) reset_owed: bool,
    pub(super) failed: bool,
    slots: Vec<Option<Connection>>,
    by_key: BTreeMap<Key, usize>,
    /// Connections that have something for the guest.
    line: VecDeque<usize>,
    resets: VecDeque<Key>,
    next_host_port: u32,
    scratch: Box<[u8]>,
}

/// What a muxer is made from.
pub(super) struct Parts {
    pub(super) cid: u64,
    pub(super) directory: PathBuf,
    pub(super) listener: Arc<UnixListener>,
    pub(super) counters: Arc<Counters>,
    pub(super) rings: Rings,
    pub(super) reset_owed: bool,
}

impl Muxer {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            cid: parts.cid,
            directory: parts.directory,
            listener: parts.listener,
            counters: parts.counters,
            rings: parts.rings,
            reset_owed: parts.reset_owed,
            failed: false,
            slots: (0..MAX_CONNECTIONS).map(|_| None).collect(),
            by_key: BTreeMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            scratch: vec![0; BUFFER_BYTES as usize].into(),
        }
    }

    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        self.rings.positions()
    }

    fn work(&mut self, poll: &Poll) {
        if self.failed {
            return;
        }
        let done = self
            .tell_of_reset()
            .and_then(|()| self.take_from_guest(poll))
            .and_then(|()| self.give_to_guest(poll));
        self.rings.signal();
        if let Err(error) = done {
            tracing::warn!(%error, "the driver broke the rules; vsock has stopped");
            self.failed = true;
            self.rings.needs_reset(&error.to_string());
            for slot in 0..self.slots.len() {
                self.forget(slot, poll);
            }
            // A listener that nobody accepts from would wake the thread for ever.
            let _ = poll.remove(&*self.listener);
        }
    }

    fn tell_of_reset(&mut self) -> Result<(), MuxError> {
        if !self.reset_owed {
            return Ok(());
        }
        let Some(chain) = self.rings.pop(EVENT)? else {
            return Ok(());
        };
        let len = chain.writable_bytes();
        if (len as usize) < TRANSPORT_RESET.len() {
            return Err(MuxError::SmallBuffer { len });
        }
        chain.write(self.rings.memory(), 0, &TRANSPORT_RESET);
        self.reset_owed = false;
        let len = TRANSPORT_RESET.len() as u32;
        Ok(self.rings.publish(EVENT, chain.head(), len)?)
    }

    // From the guest.

    fn take_from_guest(&mut self, poll: &Poll) -> Result<(), MuxError> {
        for _ in 0..PACKETS_PER_TURN {
            let Some(chain) = self.rings.pop(TRANSMIT)? else {
                return Ok(());
            };
            self.take(&chain, poll)?;
            self.rings.publish(TRANSMIT, chain.head(), 0)?;
        }
        self.rings.come_back(TRANSMIT);
        Ok(())
    }

    fn take(&mut self, chain: &Chain, poll: &Poll) -> Result<(), MuxError> {
        let len = chain.readable_bytes();
        let mut bytes = [0; HEADER_BYTES as usize];
        if chain.read(self.rings.memory(), 0, &mut bytes) < bytes.len() {
            return Err(MuxError::NoHeader { len });
        }
        let header = Header::parse(&bytes);
        let (claimed, there) = (header.len, len - HEADER_BYTES);
        if claimed > there {
            return Err(MuxError::Length { claimed, there });
        }
        self.counters.tx_packets.add(1);
        // Other senders than the guest are not to be believed, and other receivers than the host not reached.
        if header.source_cid != self.cid || header.target_cid != HOST_CID {
            return Ok(());
        }
        let key = Key {
            guest_port: header.source_port,
            host_port: header.target_port,
        };
        let operation = Operation::of(header.operation);
        let slot = self.by_key.get(&key).copied();
        if header.socket_type != STREAM {
            self.reset(key);
            return Ok(());
        }
        match (operation, slot) {
            (Some(Operation::Reset), Some(slot)) => self.forget(slot, poll),
            (Some(Operation::Reset), None) => {}
            (Some(Operation::Request), None) => self.connect(key, &header, poll),
            (Some(operation), Some(slot)) => self.act(slot, operation, &header, chain, poll),
            (_, Some(slot)) => self.end(slot, poll),
            (_, None) => self.reset(key),
        }
        Ok(())
    }

    /// The guest wants to reach the host process that listens at the port's path.
    fn connect(&mut self, key: Key, header: &Header, poll: &Poll) {
        let path = self
            .directory
            .join(format!("{SOCKET_NAME}_{}", key.host_port));
        let stream = connect(&path);
        let (Ok(stream), Some(slot)) = (stream, self.free_slot()) else {
            self.counters.refused.add(1);
            self.reset(key);
            return;
        };
        let mut connection = Connection::new(stream, key, Phase::Open);
        connection
            .credit
            .heard(header.buffer_bytes, header.forwarded);
        connection.owed.insert(Operation::Response);
        self.counters.connections.add(1);
        self.by_key.insert(key, slot);
        self.slots[slot] = Some(connection);
        self.settle(slot, poll);
    }

    fn act(
        &mut self,
        slot: usize,
        operation: Operation,
        header: &Header,
        chain: &Chain,
        poll: &Poll,
    ) {
        let Some(connection) = self.slots[slot].as_mut() else {
            return;
        };
        connection
            .credit
            .heard(header.buffer_bytes, header.forwarded);
        let done = match (operation, &connection.phase) {
            (Operation::Response, Phase::Requested) => {
                connection.phase = Phase::Open;
                let port = connection.key.host_port;
                connection
                    .stream
                    .write_all(format!("OK {port}\n").as_bytes())
            }
            (Operation::Data, Phase::Open)
                if connection.inbound == Flow::Going && connection.has_room(header.len) =>
            {
                let bytes = &mut self.scratch[..header.len as usize];
                chain.read(self.rings.memory(), HEADER_BYTES, bytes);
                self.counters.tx_bytes.add(bytes.len() as u64);
                connection.push(bytes)
            }
            (Operation::Shutdown, Phase::Open) => {
                if header.flags & NO_RECEIVE != 0 {
                    connection.stop_reading();
                }
                if header.flags & NO_SEND != 0 {
                    connection.inbound = Flow::Ended;
                }
                connection.flush()
            }
            (Operation::CreditUpdate, Phase::Open) => Ok(()),
            (Operation::CreditRequest, Phase::Open) => {
                connection.owed.insert(Operation::CreditUpdate);
                Ok(())
            }
            // A second request, data without credit or after a shutdown, anything before the answer.
            _ => Err(ErrorKind::InvalidData.into()),
        };
        match done {
            Ok(()) => self.settle(slot, poll),
            Err(_) => self.end(slot, poll),
        }
    }

    // To the guest.

    fn give_to_guest(&mut self, poll: &Poll) -> Result<(), MuxError> {
        for _ in 0..PACKETS_PER_TURN {
            if self.resets.is_empty() && self.line.is_empty() {
                return Ok(());
            }
            let Some(chain) = self.rings.pop(RECEIVE)? else {
                return Ok(());
            };
            let len = chain.writable_bytes();
            if len <= HEADER_BYTES {
                return Err(MuxError::SmallBuffer { len });
            }
            let Some((header, data)) = self.next_packet(len - HEADER_BYTES, poll) else {
                self.rings.put_back(RECEIVE);
                continue;
            };
            chain.write(self.rings.memory(), 0, &header.bytes());
            chain.write(self.rings.memory(), HEADER_BYTES, &self.scratch[..data]);
            self.counters.rx_packets.add(1);
            self.counters.rx_bytes.add(data as u64);
            self.rings
                .publish(RECEIVE, chain.head(), HEADER_BYTES + data as u32)?;
        }
        self.rings.come_back(RECEIVE);
        Ok(())
    }

    /// The next packet for the guest with at most `room` bytes of data, which are in `scratch`.
    fn next_packet(&mut self, room: u32, poll: &Poll) -> Option<(Header, usize)> {
        if let Some(key) = self.resets.pop_front() {
            return Some((self.header(key, Operation::Reset), 0));
        }
        let slot = self.line.pop_front()?;
        let connection = self.slots[slot].as_mut()?;
        connection.in_line = false;
        let key = connection.key;
        let (operation, flags, data) = if let Some(operation) = connection.owed.pop_first() {
            let flags = if operation == Operation::Shutdown {
                NO_SEND
            } else {
                0
            };
            (operation, flags, 0)
        } else {
            let most = room.min(MAX_DATA_BYTES).min(connection.credit.free());
            match connection.stream.read(&mut self.scratch[..most as usize]) {
                _ if most == 0 => {
                    self.settle(slot, poll);
                    return None;
                }
                Ok(0) => {
                    connection.outbound = Flow::Ended;
                    (Operation::Shutdown, NO_SEND, 0)
                }
                Ok(read) => {
                    connection.credit.sent(read as u32);
                    if connection.credit.free() == 0 {
                        connection.owed.insert(Operation::CreditRequest);
                    }
                    (Operation::Data, 0, read)
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    connection.readable = Readable::No;
                    self.settle(slot, poll);
                    return None;
                }
                Err(_) => {
                    self.end(slot, poll);
                    return None;
                }
            }
        };
        connection.credit.told();
        let forwarded = connection.credit.forwarded;
        self.settle(slot, poll);
        let header = Header {
            flags,
            len: data as u32,
            forwarded,
            ..self.header(key, operation)
        };
        Some((header, data))
    }

    fn header(&self, key: Key, operation: Operation) -> Header {
        Header {
            source_cid: HOST_CID,
            target_cid: self.cid,
            source_port: key.host_port,
            target_port: key.guest_port,
            socket_type: STREAM,
            operation: operation as u16,
            buffer_bytes: BUFFER_BYTES,
            ..Header::default()
        }
    }

    // From host processes.

    fn accept(&mut self, poll: &Poll) {
        for _ in 0..MAX_CONNECTIONS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) => return,
            };
            let Some(slot) = self
                .free_slot()
                .filter(|_| stream.set_nonblocking(true).is_ok())
            else {
                self.counters.refused.add(1);
                continue;
            };
            let unknown = Key {
                guest_port: 0,
                host_port: 0,
            };
            let phase = Phase::Accepted(Vec::new());
            self.slots[slot] = Some(Connection::new(stream, unknown, phase));
            self.settle(slot, poll);
        }
    }

    /// A connection's socket can be read or written.
    fn stir(&mut self, slot: usize, poll: &Poll) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        if let Phase::Accepted(_) = connection.phase {
            match connection.read_on() {
                Ok(Line::Incomplete) => {}
                Ok(Line::Connect { port }) => self.request(slot, port),
                Ok(Line::Nonsense) | Err(_) => {
                    self.counters.refused.add(1);
                    self.forget(slot, poll);
                }
            }
        } else {
            if connection.watched.contains(EventFlags::IN) {
                connection.readable = Readable::Maybe;
                // Without credit the guest is asked once, and says when it has room.
                if connection.credit.free() == 0 {
                    connection.owed.insert(Operation::CreditRequest);
                }
            }
            if connection.flush().is_err() {
                self.end(slot, poll);
            }
        }
        self.settle(slot, poll);
    }

    /// A host process wants to reach a port of the guest.
    fn request(&mut self, slot: usize, guest_port: u32) {
        let mut key = Key {
            guest_port,
            host_port: self.next_host_port,
        };
        while self.by_key.contains_key(&key) {
            key.host_port = key.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        self.next_host_port = key.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        if let Some(connection) = self.slots[slot].as_mut() {
            connection.key = key;
            connection.phase = Phase::Requested;
            connection.owed.insert(Operation::Request);
            self.by_key.insert(key, slot);
            self.counters.connections.add(1);
        }
    }

    // Bookkeeping.

    fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Puts a connection into line if it has something to say, and watches its socket for what it waits for.
    fn settle(&mut self, slot: usize, poll: &Poll) {
        let Some(connection) = self.slots[slot].as_mut() else {
            return;
        };
        if connection.is_done() && connection.owed.is_empty() {
            self.end(slot, poll);
            return;
        }
        if connection.has_something() && !connection.in_line {
            connection.in_line = true;
            self.line.push_back(slot);
        }
        let (wanted, watched) = (connection.wanted(), connection.watched);
        if wanted == watched {
            return;
        }
        // Taken off rather than muted: a socket whose other end is gone is always "in error" to epoll.
        let token = FIRST_CONNECTION + slot as u32;
        let changed = match (watched.is_empty(), wanted.is_empty()) {
            (true, _) => poll.add_for(&connection.stream, token, wanted),
            (false, true) => poll.remove(&connection.stream),
            (false, false) => poll.change(&connection.stream, token, wanted),
        };
        connection.watched = wanted;
        if changed.is_err() {
            self.end(slot, poll);
        }
    }

    /// Ends a connection that the guest knows of.
    fn end(&mut self, slot: usize, poll: &Poll) {
        if let Some(connection) = &self.slots[slot] {
            let key = connection.key;
            self.forget(slot, poll);
            self.reset(key);
        }
    }

    fn forget(&mut self, slot: usize, poll: &Poll) {
        let Some(connection) = self.slots[slot].take() else {
            return;
        };
        if !connection.watched.is_empty() {
            // Closing it takes it off too.
            let _ = poll.remove(&connection.stream);
        }
        if self.by_key.get(&connection.key) == Some(&slot) {
            self.by_key.remove(&connection.key);
        }
        if connection.in_line {
            self.line.retain(|waiting| *waiting != slot);
        }
    }

    fn reset(&mut self, key: Key) {
        self.counters.resets.add(1);
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }
}

impl Service for Muxer {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        self.rings.register(poll)?;
        poll.add(&*self.listener, LISTENER)
    }

    fn ready(&mut self, token: u32, poll: &Poll) {
        match token {
            RECEIVE | TRANSMIT | EVENT => self.rings.hear(token),
            LISTENER if !self.failed => self.accept(poll),
            _ if !self.failed => self.stir((token - FIRST_CONNECTION) as usize, poll),
            _ => {}
        }
        self.work(poll);
    }

    fn quiesce(&mut self, _: &Poll) {}

    fn resume(&mut self, poll: &Poll) {
        self.work(poll);
    }
}

/// Connects without waiting: a listener with a full backlog refuses.
fn connect(path: &std::path::Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
