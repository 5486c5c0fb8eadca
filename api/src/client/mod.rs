//! A thin client of the REST API: what the command line, the demo and the tests speak through.
//!
//! Each call has its own connection. Nothing is retried here except the event stream, which resumes where it was
//! cut; whoever calls decides about the rest.

mod connect;
mod events;
mod serial;
mod upload;

pub use connect::{ConnectOptions, DEFAULT_SERVER};
pub use events::{Follow, StreamItem};
pub use serial::SerialStream;
pub use upload::Content;

use crate::resource::{List, Problem};
use bytes::Bytes;
use connect::Server;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long a server may take to answer; long polls stay below it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Items asked for in each page of a list.
const PAGE_ITEMS: usize = 1_000;

/// Why a call did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address makes no sense.
    #[error(
        "{address:?} is not a server address: {reason}\n  remedy: give it as http://HOST:PORT or https://HOST:PORT"
    )]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The CA certificates could not be read.
    #[error(
        "cannot use the CA certificates in {path}: {reason}\n  remedy: give the pool's CA certificate with --ca-file"
    )]
    BadCa {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There was no answer.
    #[error(
        "no answer from {server}: {reason}\n  remedy: check that `godwit server` runs there, or give its address with --server or GODWIT_SERVER"
    )]
    Unreachable {
        /// The server.
        server: String,
        /// What happened.
        reason: String,
    },
    /// Something answered, and could not prove to be the server.
    #[error(
        "{server} is not trusted: {reason}\n  remedy: give the pool's CA certificate (`ca.pem` in the server's state directory) with --ca-file or GODWIT_CA_FILE"
    )]
    Untrusted {
        /// The server.
        server: String,
        /// What is wrong with its certificate.
        reason: String,
    },
    /// The server said no.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The answer was not what this version expects.
    #[error("{server} gave an answer that this version of godwit does not understand: {reason}")]
    Malformed {
        /// The server.
        server: String,
        /// What was wrong.
        reason: String,
    },
}

impl ClientError {
    /// The problem's kind, when the server said no.
    pub fn kind(&self) -> Option<&str> {
        match self {
            Self::Problem(problem) => Some(&problem.kind),
            _ => None,
        }
    }
}

/// A server and how to reach it; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    server: Server,
}

impl Client {
    /// Prepares to speak to a server; nothing is sent yet.
    pub fn new(options: &ConnectOptions) -> Result<Self, ClientError> {
        Ok(Self {
            server: Server::new(options)?,
        })
    }

    /// The server's address.
    pub fn server(&self) -> &str {
        self.server.address()
    }

    /// Reads one resource.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Option::<&()>::None).await
    }

    /// Reads a whole list, page after page.
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<List<T>, ClientError> {
        let joiner = if path.contains('?') { '&' } else { '?' };
        let mut all = List {
            items: Vec::new(),
            next: None,
            revision: 0,
        };
        loop {
            let cursor = all
                .next
                .take()
                .map(|cursor| format!("&cursor={cursor}"))
                .unwrap_or_default();
            let page: List<T> = self
                .get(&format!("{path}{joiner}limit={PAGE_ITEMS}{cursor}"))
                .await?;
            // What changed while paging is seen by whoever follows from the first page's revision.
            if all.items.is_empty() {
                all.revision = page.revision;
            }
            all.items.extend(page.items);
            all.next = page.next;
            if all.next.is_none() {
                return Ok(all);
            }
        }
    }

    /// Sends a change.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Changes fields of a resource.
    pub async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    /// Removes a resource.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, Option::<&()>::None).await
    }

    /// Follows events and changes from `after` on.
    pub fn follow(&self, after: u64) -> Follow {
        Follow::new(self.clone(), after)
    }

    /// Attaches to a VM's serial console.
    pub async fn serial(&self, vm: &str) -> Result<SerialStream, ClientError> {
        SerialStream::open(&self.server, vm).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let answer = self.send(method, path, body, "application/json").await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| self.malformed(error.to_string()))?
            .to_bytes();
        if !status.is_success() {
            return Err(self.problem(status, &body));
        }
        let body = if body.is_empty() { &b"null"[..] } else { &body };
        serde_json::from_slice(body).map_err(|error| self.malformed(format!("{path}: {error}")))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        accept: &str,
    ) -> Result<http::Response<Incoming>, ClientError> {
        let body = match body {
            Some(body) => {
                serde_json::to_vec(body).map_err(|error| self.malformed(error.to_string()))?
            }
            None => Vec::new(),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.server.authority())
            .header(header::ACCEPT, accept);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = self.server.token() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::BadAddress {
                address: path.to_owned(),
                reason: error.to_string(),
            })?;
        let exchange = async {
            let stream = TokioIo::new(self.server.connect().await?);
            let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
                .await
                .map_err(|error| self.unreachable(&error))?;
            // Ends with the answer's body or when the sender is dropped.
            tokio::spawn(connection);
            sender
                .send_request(request)
                .await
                .map_err(|error| self.unreachable(&error))
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Unreachable {
                server: self.server().to_owned(),
                reason: format!("it took longer than {} s", ANSWER_TIMEOUT.as_secs()),
            }),
        }
    }

    fn unreachable(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Unreachable {
            server: self.server().to_owned(),
            reason: chain(error),
        }
    }

    fn malformed(&self, reason: String) -> ClientError {
        ClientError::Malformed {
            server: self.server().to_owned(),
            reason,
        }
    }

    fn problem(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<Problem>(body) {
            Ok(problem) => ClientError::Problem(problem),
            Err(_) => self.malformed(format!("status {status} without a problem body")),
        }
    }
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
