//! The virtual Ethernet between emulated hosts: a switch that learns addresses, with one UNIX socket as its wall of
//! sockets (`-netdev stream`: each frame follows its length, 32 bits big-endian).

use anyhow::Context;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Frames that wait for a host; more are dropped, as by any switch.
const PORT_QUEUE_FRAMES: usize = 4096;
/// Largest frame QEMU sends, with its offloads off.
const MAX_FRAME_BYTES: u32 = 128 * 1024;
const ADDRESS_BYTES: usize = 6;

type Address = [u8; ADDRESS_BYTES];

/// The switch; dropping it cuts all cables.
#[derive(Debug)]
pub struct Switch {
    path: PathBuf,
    acceptor: JoinHandle<()>,
}

#[derive(Default)]
struct Ports {
    next: usize,
    queues: BTreeMap<usize, mpsc::Sender<Vec<u8>>>,
    /// Behind which port an address was seen last: a guest that migrates is found where it speaks next.
    learned: BTreeMap<Address, usize>,
}

impl Switch {
    /// A switch that hosts plug into at the UNIX socket `path`.
    pub fn start(path: &Path) -> anyhow::Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
        let ports = Arc::new(Mutex::new(Ports::default()));
        let acceptor = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                plug_in(stream, &ports);
            }
        });
        Ok(Self {
            path: path.to_owned(),
            acceptor,
        })
    }

    /// Where to plug in.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

fn plug_in(stream: UnixStream, ports: &Arc<Mutex<Ports>>) {
    let (reader, writer) = stream.into_split();
    let (queue, frames) = mpsc::channel(PORT_QUEUE_FRAMES);
    let port = lock(ports).add(queue);
    let ports = Arc::clone(ports);
    tokio::spawn(send(writer, frames));
    tokio::spawn(async move {
        // The emulated host has ended, or it speaks nonsense: either way its cable is out.
        let _ = receive(reader, port, &ports).await;
        lock(&ports).remove(port);
    });
}

async fn receive(
    mut reader: OwnedReadHalf,
    port: usize,
    ports: &Mutex<Ports>,
) -> std::io::Result<()> {
    loop {
        let length = reader.read_u32().await?;
        if length > MAX_FRAME_BYTES {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let mut frame = vec![0; length as usize];
        reader.read_exact(&mut frame).await?;
        lock(ports).forward(port, &frame);
    }
}

async fn send(mut writer: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    let mut message = Vec::new();
    while let Some(frame) = frames.recv().await {
        message.clear();
        message.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        message.extend_from_slice(&frame);
        if writer.write_all(&message).await.is_err() {
            return;
        }
    }
}

impl Ports {
    fn add(&mut self, queue: mpsc::Sender<Vec<u8>>) -> usize {
        self.next += 1;
        self.queues.insert(self.next, queue);
        self.next
    }

    fn remove(&mut self, port: usize) {
        self.queues.remove(&port);
        self.learned.retain(|_, behind| *behind != port);
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        let (Some(to), Some(source)) = (address(frame, 0), address(frame, ADDRESS_BYTES)) else {
            return;
        };
        if !is_group(source) {
            self.learned.insert(source, from);
        }
        let target = self.learned.get(&to).filter(|_| !is_group(to));
        for (port, queue) in &self.queues {
            if *port != from && target.is_none_or(|target| target == port) {
                // A full queue drops the frame.
                let _ = queue.try_send(frame.to_vec());
            }
        }
    }
}

fn address(frame: &[u8], at: usize) -> Option<Address> {
    frame.get(at..at + ADDRESS_BYTES)?.try_into().ok()
}

const fn is_group(address: Address) -> bool {
    address[0] & 1 == 1
}

fn lock(ports: &Mutex<Ports>) -> std::sync::MutexGuard<'_, Ports> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_goes_to_where_its_target_spoke_last() {
        let mut ports = Ports::default();
        let mut queues: Vec<_> = (0..3)
            .map(|_| {
                let (queue, frames) = mpsc::channel(8);
                (ports.add(queue), frames)
            })
            .collect();
        let frame = |to: u8, from: u8| {
            let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from];
            frame.push(from);
            frame
        };
        let mut seen = |ports: &mut Ports, from: usize, frame: &[u8]| {
            ports.forward(queues[from].0, frame);
            queues
                .iter_mut()
                .map(|(_, frames)| frames.try_recv().is_ok())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            seen(&mut ports, 0, &frame(9, 1)),
            [false, true, true],
            "unknown: to all others"
        );
        assert_eq!(seen(&mut ports, 1, &frame(1, 2)), [true, false, false]);
        // The machine with address 1 has moved to the third port and announces itself.
        let mut announcement = frame(0, 1);
        announcement[..6].fill(0xff);
        assert_eq!(seen(&mut ports, 2, &announcement), [true, true, false]);
        assert_eq!(seen(&mut ports, 1, &frame(1, 2)), [false, false, true]);
        assert_eq!(
            seen(&mut ports, 1, b"short"),
            [false, false, false],
            "a runt is dropped"
        );
    }
}
