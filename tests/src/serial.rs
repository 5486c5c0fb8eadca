//! A guest's serial console: lines in, lines out, and the replies of the pilot and the Linux guest agent.

use crate::lines::Lines;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::time::Instant;

/// Longest wait for a reply; filling or verifying a large guest takes seconds.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// Lines kept for failure messages.
const TRANSCRIPT_LINES: usize = 10_000;

/// An attached console; dropping it detaches.
#[derive(Debug)]
pub struct Serial {
    writer: OwnedWriteHalf,
    lines: Lines,
}

/// A guest's `ok key=value …`.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// The line after `ok`.
    pub text: String,
    values: BTreeMap<String, String>,
}

impl Serial {
    /// Attaches to the console behind a VMM's serial socket; what its ring holds comes first.
    pub async fn attach(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("serial {}", socket.display()))?;
        let (from, writer) = stream.into_split();
        let lines = Lines::of("the guest", from, TRANSCRIPT_LINES);
        Ok(Self { writer, lines })
    }

    /// Sends raw bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.writer.write_all(bytes).await?)
    }

    /// Sends a line without waiting for an answer.
    pub async fn send_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.send(format!("{line}\n").as_bytes()).await
    }

    /// The next line that contains `text`.
    pub async fn wait_for(&mut self, text: &str, patience: Duration) -> anyhow::Result<String> {
        self.lines.wait_for(text, patience).await
    }

    /// Sends a command line and waits for its reply; `error …` is an error.
    pub async fn command(&mut self, line: &str) -> anyhow::Result<Reply> {
        self.send_line(line).await?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        loop {
            let answer = self
                .lines
                .next(deadline)
                .await
                .with_context(|| format!("waiting for the reply to {line:?}"))?;
            if let Some(text) = answer.strip_prefix("ok") {
                return Ok(Reply::parse(text.trim()));
            }
            if answer.starts_with("error") {
                bail!("the guest answered {line:?} with {answer:?}");
            }
        }
    }

    /// Skips everything the guest said before now, the ring's content included.
    pub async fn sync(&mut self) -> anyhow::Result<()> {
        // Never said before, on this console or on an earlier one whose words are still in the ring.
        static SYNCS: AtomicU32 = AtomicU32::new(0);
        let word = format!(
            "sync-{}-{}",
            std::process::id(),
            SYNCS.fetch_add(1, Ordering::Relaxed)
        );
        self.send_line(&word).await?;
        self.wait_for(&format!("unknown command '{word}'"), REPLY_TIMEOUT)
            .await?;
        Ok(())
    }
}

impl Reply {
    fn parse(text: &str) -> Self {
        let values = text
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self {
            text: text.to_owned(),
            values,
        }
    }

    /// The number under `key`.
    ///
    /// # Panics
    /// When the reply has none: the test and the guest speak different languages.
    pub fn number(&self, key: &str) -> u64 {
        let value = self.values.get(key).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no number {key} in {:?}", self.text))
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_gives_its_numbers_by_key() {
        let reply = Reply::parse("verified_pages=25600 torn=0 clock=tsc");
        assert_eq!(reply.number("verified_pages"), 25600);
        assert_eq!(reply.number("torn"), 0);
    }
}
