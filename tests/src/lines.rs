//! Lines that something far away prints, as they come.

use anyhow::{Context, anyhow};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

/// The reading end of a console.
#[derive(Debug)]
pub(crate) struct Lines {
    /// Whose, for messages.
    name: String,
    received: mpsc::UnboundedReceiver<String>,
    reader: JoinHandle<()>,
    /// The latest lines, for failure messages.
    transcript: VecDeque<String>,
    kept: usize,
}

impl Lines {
    /// Reads lines from `from`; the latest `kept` are remembered.
    pub(crate) fn of(
        name: &str,
        from: impl AsyncRead + Send + Unpin + 'static,
        kept: usize,
    ) -> Self {
        Self::each_to(name, from, kept, |_| {})
    }

    /// The same; every line goes into `log` too, as it comes and whether or not somebody waits for it.
    pub(crate) fn logged(
        name: &str,
        from: impl AsyncRead + Send + Unpin + 'static,
        kept: usize,
        mut log: File,
    ) -> Self {
        // A log that cannot be written is missed only when something else has failed.
        Self::each_to(name, from, kept, move |line| _ = writeln!(log, "{line}"))
    }

    fn each_to(
        name: &str,
        mut from: impl AsyncRead + Send + Unpin + 'static,
        kept: usize,
        mut note: impl FnMut(&str) + Send + 'static,
    ) -> Self {
        let (sender, received) = mpsc::unbounded_channel();
        let reader = tokio::spawn(async move {
            let (mut chunk, mut line) = ([0; 4096], Vec::new());
            while let Ok(read @ 1..) = from.read(&mut chunk).await {
                for byte in &chunk[..read] {
                    match byte {
                        b'\n' => {
                            let text = String::from_utf8_lossy(&line).into_owned();
                            line.clear();
                            note(&text);
                            if sender.send(text).is_err() {
                                return;
                            }
                        }
                        b'\r' => {}
                        byte => line.push(*byte),
                    }
                }
            }
        });
        Self {
            name: name.to_owned(),
            received,
            reader,
            transcript: VecDeque::new(),
            kept,
        }
    }

    /// The next line that contains `text`.
    pub(crate) async fn wait_for(
        &mut self,
        text: &str,
        patience: Duration,
    ) -> anyhow::Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let line = self
                .next(deadline)
                .await
                .with_context(|| format!("waiting {patience:?} for {text:?}"))?;
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// The next line.
    pub(crate) async fn next(&mut self, deadline: Instant) -> anyhow::Result<String> {
        let line = match timeout_at(deadline, self.received.recv()).await {
            Ok(Some(line)) => line,
            Ok(None) => return Err(anyhow!("{} hung up; {}", self.name, self.last_words())),
            Err(_) => return Err(anyhow!("{} is silent; {}", self.name, self.last_words())),
        };
        if self.transcript.len() == self.kept {
            self.transcript.pop_front();
        }
        self.transcript.push_back(line.clone());
        Ok(line)
    }

    /// What is remembered.
    pub(crate) fn transcript(&self) -> String {
        let lines: Vec<_> = self.transcript.iter().map(String::as_str).collect();
        lines.join("\n")
    }

    fn last_words(&self) -> String {
        format!("it said last:\n{}", self.transcript())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
