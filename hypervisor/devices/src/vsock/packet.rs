//! Headers of vsock packets (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub const HEADER_BYTES: u32 = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Type of stream sockets.
pub const STREAM: u16 = 1;
/// Flag of a shutdown: its sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// Flag of a shutdown: its sender sends no more.
pub const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Operation {
    /// Connect.
    Request = 1,
    /// Connected.
    Response = 2,
    /// There is no such connection, or no longer.
    Reset = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much the sender has room for.
    CreditUpdate = 6,
    /// How much has the receiver room for?
    CreditRequest = 7,
}

impl Operation {
    /// The operation of that number.
    pub fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header, as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub target_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub target_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Type of the sockets.
    pub socket_type: u16,
    /// Number of the [`Operation`].
    pub operation: u16,
    /// Flags of a shutdown.
    pub flags: u32,
    /// Bytes the sender has room for in all.
    pub buffer_bytes: u32,
    /// Bytes the sender has consumed so far, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_BYTES as usize]) -> Self {
        let mut rest = &bytes[..];
        let mut take = |count: usize| {
            let (field, behind) = rest.split_at(count);
            rest = behind;
            field
                .iter()
                .rev()
                .fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        Self {
            source_cid: take(8),
            target_cid: take(8),
            source_port: take(4) as u32,
            target_port: take(4) as u32,
            len: take(4) as u32,
            socket_type: take(2) as u16,
            operation: take(2) as u16,
            flags: take(4) as u32,
            buffer_bytes: take(4) as u32,
            forwarded: take(4) as u32,
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.target_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.target_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.socket_type.to_le_bytes());
        put(&self.operation.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buffer_bytes.to_le_bytes());
        put(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0; HEADER_BYTES as usize];
        for (nth, byte) in (0..).zip(&mut bytes) {
            *byte = nth;
        }
        let header = Header::parse(&bytes);
        assert_eq!(header.target_port, u32::from_le_bytes([20, 21, 22, 23]));
        assert_eq!(header.operation, u16::from_le_bytes([30, 31]));
        assert_eq!(header.forwarded, u32::from_le_bytes([40, 41, 42, 43]));
    }

    proptest! {
        #[test]
        fn headers_survive_their_bytes(bytes in prop::collection::vec(any::<u8>(), 44)) {
            let bytes: [u8; 44] = bytes.try_into().unwrap();
            prop_assert_eq!(Header::parse(&bytes).bytes(), bytes);
        }
    }
}
