//! Stream sockets between guest and host: an echo for host processes that connect, and calls to an echo of theirs.

use crate::sys::{self, VsockListener};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};

/// Bytes that are echoed at once.
const ECHO_BYTES: usize = 4096;

/// Answers `vsock …`.
pub(crate) fn execute(words: &[&str]) -> Result<String, String> {
    match words {
        ["serve", port] => {
            let port = port_number(port)?;
            serve(port)
                .map(|()| format!("ok serving={port}"))
                .map_err(|error| format!("port {port}: {error}"))
        }
        ["call", port, text] => {
            let port = port_number(port)?;
            call(port, text)
                .map(|heard| format!("ok heard={heard}"))
                .map_err(|error| format!("port {port} of the host: {error}"))
        }
        _ => Err("usage: vsock serve PORT, vsock call PORT TEXT".into()),
    }
}

fn port_number(text: &str) -> Result<u32, String> {
    let number = super::number("port", text)?;
    u32::try_from(number).map_err(|_| format!("port {number} is beyond 32 bits"))
}

/// Echoes what comes to `port`, each connection on a thread of its own: one that ends does not keep the next waiting.
fn serve(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind(port)?;
    std::thread::spawn(move || {
        while let Ok(stream) = listener.accept() {
            std::thread::spawn(move || echo(stream));
        }
    });
    Ok(())
}

/// Until the other end has said everything, or the connection ends otherwise.
fn echo(mut stream: File) {
    let mut bytes = [0; ECHO_BYTES];
    while let Ok(read @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..read]).is_err() {
            return;
        }
    }
}

/// Says a line to whoever listens at the host's `port`; the line that is answered.
fn call(port: u32, text: &str) -> io::Result<String> {
    let mut stream = sys::connect_to_host(port)?;
    stream.write_all(format!("{text}\n").as_bytes())?;
    let mut heard = String::new();
    BufReader::new(stream).read_line(&mut heard)?;
    Ok(heard.trim_end().to_owned())
}
