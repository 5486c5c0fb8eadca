//! The serial console: on a UNIX socket that any number of clients may attach to, or on this process's terminal.

use super::driver::DriverHandle;
use godwit_channel::uds::Listener;
use std::io::{self, IsTerminal, Read, Write};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Input is taken in pieces of at most this size.
const INPUT_BYTES: usize = 4096;

/// Serves consoles until the process ends.
pub(super) async fn serve(listener: Listener, driver: DriverHandle) {
    loop {
        match listener.accept().await {
            Ok(client) => {
                tokio::spawn(attend(client, driver.clone()));
            }
            Err(error) => {
                tracing::error!(%error, "consoles can no longer attach");
                return;
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
                // A client may close its sending half and go on listening.
                Ok(0) => return std::future::pending().await,
                Err(_) => return,
            }
        }
    };
    tokio::select! {
        () = send => {}
        () = receive => {}
    }
}

/// This process's terminal as the console.
pub(super) struct Terminal {
    output: JoinHandle<()>,
    written: tokio::sync::watch::Receiver<u64>,
    restore: Option<rustix::termios::Termios>,
}

/// Connects standard input and output with the guest. A terminal is put into raw mode until [`Terminal::finish`].
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
            let mut stdout = io::stdout().lock();
            if stdout
                .write_all(&bytes)
                .and_then(|()| stdout.flush())
                .is_err()
            {
                return;
            }
            progress.send_modify(|written| *written += bytes.len() as u64);
        }
    });
    Terminal {
        output,
        written,
        restore,
    }
}

impl Terminal {
    /// Writes what the guest still said, and gives the terminal back.
    pub(super) async fn finish(mut self, driver: &DriverHandle) {
        let all = driver.console().written();
        let _ = self.written.wait_for(|written| *written >= all).await;
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
