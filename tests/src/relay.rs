//! A TCP relay that a test can cut and mend: a network between two processes.

use std::io;
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Passes connections on to one address, while it is whole.
#[derive(Debug)]
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    whole: watch::Sender<bool>,
    _server: AbortOnDropHandle<()>,
}

impl Relay {
    /// A relay on loopback to `to`.
    pub async fn to(to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (whole, cut) = watch::channel(true);
        let server = AbortOnDropHandle::new(tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(pass_on(socket, to, cut.clone()));
            }
        }));
        Ok(Self {
            address,
            whole,
            _server: server,
        })
    }

    /// Ends all connections; new ones end at once until [`Self::mend`].
    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    /// Lets new connections through again.
    pub fn mend(&self) {
        self.whole.send_replace(true);
    }
}

async fn pass_on(mut from: TcpStream, to: SocketAddr, mut whole: watch::Receiver<bool>) {
    if !*whole.borrow() {
        return;
    }
    let Ok(mut to) = TcpStream::connect(to).await else {
        return;
    };
    // Whichever ends first drops both connections.
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
        _ = whole.wait_for(|whole| !whole) => {}
    }
}
