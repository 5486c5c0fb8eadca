//! The responder's socket on one bridge.

use super::{Leases, SERVER_PORT, answer};
use crate::sys;
use godwit_wire::devices::MacAddress;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::task::AbortOnDropHandle;

/// Longest question looked at: DHCP's limit is far below an Ethernet frame's.
const MAX_FRAME_BYTES: usize = 2048;

/// Answers on one bridge until it is dropped.
#[derive(Debug)]
pub(crate) struct Responder {
    /// Changes when the bridge was made anew.
    pub(crate) interface: u32,
    leases: Arc<Mutex<Leases>>,
    task: AbortOnDropHandle<()>,
}

impl Responder {
    /// Begins to answer; must be called inside a tokio runtime.
    pub(crate) fn start(
        bridge: &str,
        interface: u32,
        own: MacAddress,
        leases: Leases,
    ) -> io::Result<Self> {
        let socket = sys::watch_readable(sys::udp_frames_of(interface, SERVER_PORT)?)?;
        let leases = Arc::new(Mutex::new(leases));
        let (shared, bridge) = (leases.clone(), bridge.to_owned());
        let task = tokio::spawn(async move {
            let mut frame = vec![0; MAX_FRAME_BYTES];
            loop {
                if let Err(error) = serve_one(&socket, &mut frame, own, &shared).await {
                    // The bridge is gone; should it come back, a new responder comes with it.
                    tracing::debug!(bridge, %error, "addresses are not given any more");
                    return;
                }
            }
        });
        Ok(Self {
            interface,
            leases,
            task: AbortOnDropHandle::new(task),
        })
    }

    pub(crate) fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Gives these from now on.
    pub(crate) fn give(&self, leases: Leases) {
        *self.leases.lock().unwrap_or_else(PoisonError::into_inner) = leases;
    }
}

async fn serve_one(
    socket: &tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
    frame: &mut [u8],
    own: MacAddress,
    leases: &Mutex<Leases>,
) -> io::Result<()> {
    let mut ready = socket.readable().await?;
    let received = ready.try_io(|socket| {
        rustix::net::recv(socket, &mut *frame, RecvFlags::empty())
            .map(|(_, length)| length)
            .map_err(io::Error::from)
    });
    let length = match received {
        // Woken for nothing.
        Err(_) => return Ok(()),
        Ok(length) => length?,
    };
    let frame = frame.get(..length).unwrap_or_default();
    let reply = answer(
        &leases.lock().unwrap_or_else(PoisonError::into_inner),
        own,
        frame,
    );
    if let Some(reply) = reply
        && let Err(error) = rustix::net::send(socket, &reply, SendFlags::empty())
    {
        // The guest asks again.
        tracing::debug!(%error, "an address could not be given");
    }
    Ok(())
}
