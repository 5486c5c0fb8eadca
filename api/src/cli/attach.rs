//! `godwit vm console`: this terminal becomes the VM's serial console.

use super::Failure;
use crate::client::SerialStream;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io::{self, Read, Write};
use std::time::Duration;
use tokio::sync::mpsc;

/// Ctrl-]: leaves the console, as in telnet and virsh.
const LEAVE: u8 = 0x1d;
/// When the input is a file or a pipe that has ended, silence for this long means that the guest has answered.
const LAST_ANSWER: Duration = Duration::from_secs(1);
const INPUT_BLOCKS: usize = 16;

/// Carries bytes between this terminal and a serial console until the operator leaves or the console ends.
pub(super) async fn attach(mut serial: SerialStream, vm: &str) -> Result<(), Failure> {
    let raw = RawTerminal::enter()?;
    if raw.is_some() {
        eprint!("Attached to the serial console of {vm}; Ctrl-] leaves.\r\n");
    }
    let mut input = read_input();
    let mut ended = false;
    loop {
        let silence = async {
            if ended {
                tokio::time::sleep(LAST_ANSWER).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            output = serial.read() => match output? {
                Some(bytes) => show(&bytes)?,
                None => break,
            },
            block = input.recv(), if !ended => match block {
                None => ended = true,
                Some(block) => {
                    let leave = raw.is_some().then(|| block.iter().position(|byte| *byte == LEAVE)).flatten();
                    let typed = &block[..leave.unwrap_or(block.len())];
                    if !typed.is_empty() {
                        serial.write(typed.to_vec()).await?;
                    }
                    if leave.is_some() {
                        break;
                    }
                }
            },
            () = silence => break,
        }
    }
    drop(raw);
    eprintln!();
    Ok(())
}

fn show(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|source| Failure::Io {
            action: "cannot write to the terminal",
            source,
        })
}

/// Input, read by a thread of its own: reading a terminal cannot be called off, and the process ends soon after.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(INPUT_BLOCKS);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

/// A terminal that hands over every key as it is typed; as it was before when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` when the input is no terminal.
    fn enter() -> Result<Option<Self>, Failure> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let failed = |error: rustix::io::Errno| Failure::Io {
            action: "cannot set up the terminal",
            source: error.into(),
        };
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing more can be done about a terminal that is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
