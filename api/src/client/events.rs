//! The event stream (server-sent events), resumed by itself when the connection is cut.

use super::{Client, ClientError};
use crate::resource::{Deleted, Event, Host, Maintenance, Migration, Operation, Vm};
use http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Longest message; a longer one ends the stream.
const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Times in a row that a cut stream is taken up again.
const MAX_RESUMES: u32 = 20;
const RESUME_PAUSE: Duration = Duration::from_millis(500);
/// The server sends a sign of life every 15 s; silence for this long means that the connection is dead.
const SILENCE_LIMIT: Duration = Duration::from_secs(45);

/// Something the server told.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamItem {
    /// Something happened.
    Event(Event),
    /// A VM as it is now.
    Vm(Box<Vm>),
    /// A host as it is now.
    Host(Host),
    /// An operation as it is now.
    Operation(Operation),
    /// A maintenance as it is now.
    Maintenance(Maintenance),
    /// A migration as it is now.
    Migration(Migration),
    /// A resource is gone.
    Deleted(Deleted),
}

/// Follows events and changes, in order.
#[derive(Debug)]
pub struct Follow {
    client: Client,
    after: u64,
    body: Option<Incoming>,
    parser: Parser,
    resumes: u32,
}

impl Follow {
    pub(super) fn new(client: Client, after: u64) -> Self {
        Self {
            client,
            after,
            body: None,
            parser: Parser::default(),
            resumes: 0,
        }
    }

    /// The next item. Fails when the server stays away or refuses.
    pub async fn next(&mut self) -> Result<StreamItem, ClientError> {
        loop {
            while let Some(message) = self.parser.next() {
                if let Some(revision) = message.id {
                    self.after = revision;
                }
                if let Some(item) = self.understand(&message)? {
                    return Ok(item);
                }
            }
            if let Err(reason) = self.receive().await? {
                self.body = None;
                self.parser = Parser::default();
                self.resumes += 1;
                if self.resumes > MAX_RESUMES {
                    return Err(ClientError::Unreachable {
                        server: self.client.server().to_owned(),
                        reason,
                    });
                }
                tokio::time::sleep(RESUME_PAUSE).await;
            }
        }
    }

    /// Reads some more; the inner error is a cut that can be healed.
    async fn receive(&mut self) -> Result<Result<(), String>, ClientError> {
        let body = match &mut self.body {
            Some(body) => body,
            None => {
                let path = format!("/v1/events?after={}", self.after);
                let answer = self
                    .client
                    .send(Method::GET, &path, Option::<&()>::None, "text/event-stream")
                    .await;
                match answer {
                    Ok(answer) if answer.status().is_success() => {
                        self.body.insert(answer.into_body())
                    }
                    Ok(answer) => {
                        let status = answer.status();
                        let bytes = answer
                            .into_body()
                            .collect()
                            .await
                            .map(|b| b.to_bytes())
                            .unwrap_or_default();
                        return Err(self.client.problem(status, &bytes));
                    }
                    Err(ClientError::Unreachable { reason, .. }) => return Ok(Err(reason)),
                    Err(other) => return Err(other),
                }
            }
        };
        match tokio::time::timeout(SILENCE_LIMIT, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                self.resumes = 0;
                if let Some(data) = frame.data_ref()
                    && self.parser.feed(data).is_err()
                {
                    return Err(self.client.malformed("an event is too long".to_owned()));
                }
                Ok(Ok(()))
            }
            Ok(Some(Err(error))) => Ok(Err(error.to_string())),
            Ok(None) => Ok(Err("the server ended the event stream".to_owned())),
            Err(_) => Ok(Err(format!(
                "nothing heard for {} s",
                SILENCE_LIMIT.as_secs()
            ))),
        }
    }

    fn understand(&self, message: &Message) -> Result<Option<StreamItem>, ClientError> {
        Ok(Some(match message.event.as_str() {
            "event" => StreamItem::Event(self.parse(message)?),
            "vm" => StreamItem::Vm(Box::new(self.parse(message)?)),
            "host" => StreamItem::Host(self.parse(message)?),
            "operation" => StreamItem::Operation(self.parse(message)?),
            "maintenance" => StreamItem::Maintenance(self.parse(message)?),
            "migration" => StreamItem::Migration(self.parse(message)?),
            "deleted" => StreamItem::Deleted(self.parse(message)?),
            // A later server may say more.
            _ => return Ok(None),
        }))
    }

    fn parse<T: DeserializeOwned>(&self, message: &Message) -> Result<T, ClientError> {
        serde_json::from_str(&message.data).map_err(|error| {
            self.client
                .malformed(format!("event {:?}: {error}", message.event))
        })
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    id: Option<u64>,
    event: String,
    data: String,
}

/// Cuts the byte stream into messages (HTML standard, "server-sent events").
#[derive(Debug, Default)]
struct Parser {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were consumed.
    consumed: usize,
    message: Message,
}

impl Parser {
    fn feed(&mut self, data: &[u8]) -> Result<(), ()> {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        if self.buffer.len() + data.len() > MAX_MESSAGE_BYTES {
            return Err(());
        }
        self.buffer.extend_from_slice(data);
        Ok(())
    }

    fn next(&mut self) -> Option<Message> {
        loop {
            let rest = &self.buffer[self.consumed..];
            let end = rest.iter().position(|byte| *byte == b'\n')?;
            let line = String::from_utf8_lossy(&rest[..end])
                .trim_end_matches('\r')
                .to_owned();
            self.consumed += end + 1;
            if line.is_empty() {
                let message = std::mem::take(&mut self.message);
                if message != Message::default() {
                    return Some(message);
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.message.id = value.parse().ok(),
                "event" => value.clone_into(&mut self.message.event),
                "data" => {
                    if !self.message.data.is_empty() {
                        self.message.data.push('\n');
                    }
                    self.message.data.push_str(value);
                }
                // Comments (keep-alive) and fields that do not matter here.
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_being_cut_anywhere() {
        let text = b": alive\n\nid: 7\nevent: vm\ndata: {\"a\":\ndata: 1}\n\nevent: deleted\r\ndata: x\r\n\r\n";
        for cut in 0..text.len() {
            let mut parser = Parser::default();
            let mut seen = Vec::new();
            for part in [&text[..cut], &text[cut..]] {
                parser.feed(part).expect("short");
                seen.extend(std::iter::from_fn(|| parser.next()));
            }
            assert_eq!(
                seen,
                [
                    Message {
                        id: Some(7),
                        event: "vm".into(),
                        data: "{\"a\":\n1}".into()
                    },
                    Message {
                        id: None,
                        event: "deleted".into(),
                        data: "x".into()
                    },
                ],
                "cut at {cut}"
            );
        }
    }
}
