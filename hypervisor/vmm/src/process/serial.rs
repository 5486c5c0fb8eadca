//! The serial console: on a UNIX socket that any number of clients may attach to, or on this process's terminal.

use super::driver::DriverHandle;
use godwit_channel::uds::Listener;
use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Consoles attached at once.
const MAX_CLIENTS: usize = 64;
/// How long a client that sends nothing more still gets output.
const LINGER: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the guest's last output may take to reach the terminal.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Input is taken in pieces of at most this size.
const INPUT_BYTES: usize = 4096;

/// Serves consoles until the process ends.
pub(super) async fn serve(listener: Listener, driver: DriverHandle) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        match listener.accept().await {
            Ok(client) => match places.clone().try_acquire_owned() {
                Ok(place) => {
                    let driver = driver.clone();
                    tokio::spawn(async move {
                        attend(client, driver).await;
                        drop(place);
                    });
                }
                Err(_) => tracing::warn!(
                    limit = MAX_CLIENTS,
                    "a console was turned away: too many are attached"
                ),
            },
            Err(error) => {
                tracing::error!(%error, "a console could not attach");
                // Nothing announces when the kernel has file descriptors again.
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One attached client: first what the ring holds, then everything as it comes; input goes to the guest.
async fn attend(client: UnixStream, driver: DriverHandle) {
    let (mut from_client, mut to_client) = client.into_split();
    let mut output = driver.console().reader();
    let send = async {
        while let Some(bytes) = output.next().await {
            if to_client.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let receive = async {
        let mut buffer = [0; INPUT_BYTES];
        loop {
            match from_client.read(&mut buffer).await {
                Ok(read @ 1..) => {
                    if let Err(problem) = driver.type_in(&buffer[..read]) {
                        tracing::warn!(%problem, bytes = read, "serial input was dropped");
                    }
                }
                // A client may close its sending half and go on listening, but one that is gone looks the same.
                Ok(0) => return tokio::time::sleep(LINGER).await,
                Err(_) => return,
            }
        }
    };
    // A client that types something and leaves at once has still typed it.
    let send_and_linger = async {
        send.await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        () = send_and_linger => {}
        () = receive => {}
    }
}

/// This process's terminal as the console; given back when dropped.
pub(super) struct Terminal {
    output: JoinHandle<()>,
    written: tokio::sync::watch::Receiver<u64>,
    restore: Option<rustix::termios::Termios>,
}

/// Connects standard input and output with the guest. A terminal is put into raw mode.
pub(super) fn attach_terminal(driver: &DriverHandle) -> Terminal {
    let restore = io::stdin().is_terminal().then(raw_mode).flatten();
    let typist = driver.clone();
    // Reading standard input blocks and cannot be interrupted, so it has a thread that nothing waits for.
    let _ = std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut buffer = [0; INPUT_BYTES];
            while let Ok(read @ 1..) = io::stdin().read(&mut buffer) {
                let _ = typist.type_in(&buffer[..read]);
            }
        });
    let mut reader = driver.console().reader();
    let (progress, written) = tokio::sync::watch::channel(0);
    let output = tokio::spawn(async move {
        while let Some(bytes) = reader.next().await {
            // A pager that does not read must hold up nothing but the output.
            let wrote = tokio::task::spawn_blocking(move || {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&bytes).and_then(|()| stdout.flush())
            });
            if !matches!(wrote.await, Ok(Ok(()))) {
                return;
            }
            progress.send_replace(reader.position());
        }
    });
    Terminal {
        output,
        written,
        restore,
    }
}

impl Terminal {
    /// Writes what the guest still said.
    pub(super) async fn finish(mut self, driver: &DriverHandle) {
        let all = driver.console().written();
        let written = self.written.wait_for(|written| *written >= all);
        let _ = tokio::time::timeout(LAST_WORDS, written).await;
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.output.abort();
        if let Some(before) = &self.restore {
            let _ = rustix::termios::tcsetattr(
                io::stdin(),
                rustix::termios::OptionalActions::Now,
                before,
            );
        }
    }
}

fn raw_mode() -> Option<rustix::termios::Termios> {
    let before = rustix::termios::tcgetattr(io::stdin()).ok()?;
    let mut raw = before.clone();
    raw.make_raw();
    // Ctrl-C still ends the process.
    raw.local_modes |= rustix::termios::LocalModes::ISIG;
    rustix::termios::tcsetattr(io::stdin(), rustix::termios::OptionalActions::Now, &raw).ok()?;
    Some(before)
}
