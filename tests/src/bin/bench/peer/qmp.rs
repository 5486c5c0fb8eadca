//! QEMU's machine protocol: commands, answers and events, one JSON object a line.

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout_at};

/// QEMU listens within this time of its start and answers a command within it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait before the socket is looked for again.
const LOOK: Duration = Duration::from_millis(5);
/// More events than this between two looks mean that nobody looks.
const MAX_EVENTS: usize = 10_000;

/// A connection to one QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    writer: OwnedWriteHalf,
    lines: Lines<BufReader<OwnedReadHalf>>,
    /// What happened and was not asked for yet.
    events: VecDeque<Event>,
}

/// Something that QEMU told by itself.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Its name, such as `STOP`.
    pub(crate) name: String,
    /// Host time at which it happened, in microseconds since 1970.
    pub(crate) at_us: i64,
    /// What else it says.
    pub(crate) data: Value,
}

impl Qmp {
    /// Waits for the socket and speaks first.
    pub(crate) async fn connect(socket: &Path) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        // The socket's file appears when QEMU listens; there is nothing else to wait for.
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| socket.display().to_string());
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        };
        let (from, writer) = stream.into_split();
        let mut qmp = Self {
            writer,
            lines: BufReader::new(from).lines(),
            events: VecDeque::new(),
        };
        qmp.next(deadline).await.context("QEMU's greeting")?;
        qmp.command("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Sends a command and returns its answer.
    pub(crate) async fn command(&mut self, name: &str, arguments: Value) -> anyhow::Result<Value> {
        let line = json!({ "execute": name, "arguments": arguments }).to_string() + "\n";
        self.writer.write_all(line.as_bytes()).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut message = self.next(deadline).await.with_context(|| name.to_owned())?;
            if message.get("event").is_some() {
                self.note(&message);
            } else if let Some(error) = message.get("error") {
                bail!("QEMU answers {name} with {error}");
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Forgets what happened until now.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// The first event that satisfies `accept`, among those not forgotten and those to come until `deadline`.
    pub(crate) async fn event(
        &mut self,
        deadline: Instant,
        accept: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        loop {
            if let Some(found) = self.events.iter().find(|event| accept(event)) {
                return Ok(found.clone());
            }
            let message = self.next(deadline).await?;
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Value) {
        let Some(name) = message["event"].as_str() else {
            return;
        };
        let time = |part: &str| message["timestamp"][part].as_i64().unwrap_or_default();
        self.events.push_back(Event {
            name: name.to_owned(),
            at_us: time("seconds") * 1_000_000 + time("microseconds"),
            data: message["data"].clone(),
        });
        if self.events.len() > MAX_EVENTS {
            self.events.pop_front();
        }
    }

    async fn next(&mut self, deadline: Instant) -> anyhow::Result<Value> {
        let line = timeout_at(deadline, self.lines.next_line())
            .await
            .context("QEMU is silent")??
            .context("QEMU is gone")?;
        Ok(serde_json::from_str(&line)?)
    }
}
