//! The pilot guest's shell, over the REST API's serial console.

use crate::client::{Client, ClientError, SerialStream};
use pilot::ReplyError;
use std::str::FromStr;
use std::time::Duration;

/// How long a guest may take for one answer; filling and verifying memory included.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a guest may take to answer the first time, booting included.
const FIRST_ANSWER: Duration = Duration::from_secs(20);
/// A guest that has just started may have missed what was sent before it listened.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Shows that the guest listens, and tells whoever opens its console later what it understands.
const GREETING: &str = "help";
/// How its answer begins.
const GREETING_ANSWER: &str = "ok commands=";
/// Longest line of the shell.
const MAX_LINE_BYTES: usize = 4 << 10;

/// Why a guest did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The console broke off.
    #[error("its serial console broke off")]
    Console(#[source] ClientError),
    /// The console ended.
    #[error("its serial console ended")]
    Ended,
    /// There was no answer.
    #[error("no answer to {command:?} within {limit_s} s")]
    Silent {
        /// What was asked.
        command: String,
        /// How long was waited.
        limit_s: u64,
    },
    /// The answer makes no sense.
    #[error("{command:?} was answered wrongly")]
    Reply {
        /// What was asked.
        command: String,
        /// What is wrong.
        #[source]
        source: ReplyError,
    },
}

/// A guest's shell. It stays attached while the guest moves.
#[derive(Debug)]
pub(super) struct Shell {
    serial: SerialStream,
    received: Vec<u8>,
}

impl Shell {
    /// Attaches and waits until the guest answers.
    pub(super) async fn attach(client: &Client, vm: &str) -> Result<Self, ShellError> {
        let serial = client.serial(vm).await.map_err(ShellError::Console)?;
        let mut shell = Self {
            serial,
            received: Vec::new(),
        };
        let greet = async {
            loop {
                shell.send(GREETING).await?;
                let answered = async {
                    while !shell.line().await?.starts_with(GREETING_ANSWER) {}
                    Ok::<_, ShellError>(())
                };
                if let Ok(answered) = tokio::time::timeout(ASK_AGAIN, answered).await {
                    return answered;
                }
            }
        };
        match tokio::time::timeout(FIRST_ANSWER, greet).await {
            Ok(greeted) => greeted.map(|()| shell),
            Err(_) => Err(ShellError::Silent {
                command: GREETING.to_owned(),
                limit_s: FIRST_ANSWER.as_secs(),
            }),
        }
    }

    /// Sends a command and reads its answer.
    pub(super) async fn ask<T: FromStr<Err = ReplyError>>(
        &mut self,
        command: &str,
    ) -> Result<T, ShellError> {
        let answer = async {
            self.send(command).await?;
            loop {
                let line = self.line().await?;
                // A greeting that was sent twice is answered twice.
                let is_answer = line.starts_with("ok ") || line.starts_with("error ");
                if is_answer && !line.starts_with(GREETING_ANSWER) {
                    return Ok::<_, ShellError>(line);
                }
            }
        };
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(line) => line?.parse().map_err(|source| ShellError::Reply {
                command: command.to_owned(),
                source,
            }),
            Err(_) => Err(ShellError::Silent {
                command: command.to_owned(),
                limit_s: ANSWER.as_secs(),
            }),
        }
    }

    async fn send(&mut self, line: &str) -> Result<(), ShellError> {
        self.serial
            .write(format!("{line}\n"))
            .await
            .map_err(ShellError::Console)
    }

    async fn line(&mut self) -> Result<String, ShellError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if self.received.len() > MAX_LINE_BYTES {
                self.received.clear();
            }
            match self.serial.read().await.map_err(ShellError::Console)? {
                Some(bytes) => self.received.extend_from_slice(&bytes),
                None => return Err(ShellError::Ended),
            }
        }
    }
}
