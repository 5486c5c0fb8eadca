//! What plain TCP carries over loopback: the yardstick for a migration's connections.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

/// Bytes in all, shared out among the connections.
const BYTES: usize = 512 << 20;
const WRITE_BYTES: usize = 1 << 20;

/// Which memory the bytes of a plain TCP transfer come from and go to.
#[derive(Clone, Copy)]
pub(crate) enum Buffers {
    /// One small buffer at each end of each connection, over and over: the link alone.
    Reused,
    /// As much memory as bytes at each end, as a migration has it.
    Distinct,
}

/// So many connections at once, each with a thread at either end and writes of 1 MiB: from the first byte to the
/// last receiver's word that it has all.
pub(crate) fn mb_per_s(connections: u8, buffers: Buffers) -> anyhow::Result<f64> {
    let writes = BYTES / WRITE_BYTES / usize::from(connections);
    let memory = match buffers {
        Buffers::Reused => WRITE_BYTES,
        Buffers::Distinct => writes * WRITE_BYTES,
    };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..connections {
        // Written once, so that no page fault is measured.
        let (source, mut sink) = (vec![0x5a_u8; memory], vec![0xa5_u8; memory]);
        let mut sending = TcpStream::connect(address)?;
        let (mut receiving, _) = listener.accept()?;
        senders.push(move || -> std::io::Result<()> {
            for write in 0..writes {
                sending.write_all(piece(&source, write))?;
            }
            sending.read_exact(&mut [0])
        });
        receivers.push(move || -> std::io::Result<()> {
            for write in 0..writes {
                let at = write * WRITE_BYTES % memory;
                receiving.read_exact(&mut sink[at..at + WRITE_BYTES])?;
            }
            receiving.write_all(&[1])
        });
    }
    let start = Instant::now();
    std::thread::scope(|scope| -> std::io::Result<()> {
        let receiving: Vec<_> = receivers
            .into_iter()
            .map(|work| scope.spawn(work))
            .collect();
        let sending: Vec<_> = senders.into_iter().map(|work| scope.spawn(work)).collect();
        for thread in sending.into_iter().chain(receiving) {
            thread.join().expect("a plain transfer does not panic")?;
        }
        Ok(())
    })?;
    let bytes = writes * WRITE_BYTES * usize::from(connections);
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e6)
}

fn piece(source: &[u8], write: usize) -> &[u8] {
    let at = write * WRITE_BYTES % source.len();
    &source[at..at + WRITE_BYTES]
}
