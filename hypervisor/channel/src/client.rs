//! One HTTP/1.1 client for every kind of connection: bounded answers, time limits, kept-alive connections, and
//! errors that tell whether the peer can have acted.

use crate::upgrade::Stream;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use bytes::Bytes;
use godwit_wire::problem::Problem;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// Longest answer a client reads.
pub const MAX_ANSWER_BYTES: usize = 8 << 20;
/// How long making a connection may take, handshakes included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an answer may take when the caller does not say otherwise.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an unused connection is kept; shorter than servers keep theirs, so that no request meets a closing one.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Most unused connections kept to one peer.
pub const MAX_IDLE_CONNECTIONS: usize = 4;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The peer refused, and says why.
    #[error("{peer} refused: {problem}")]
    Problem {
        /// Who.
        peer: String,
        /// What it said.
        problem: Problem,
    },
    /// No connection came about: the peer has certainly not acted.
    #[error("{peer} cannot be reached")]
    Unreachable {
        /// Who.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The request may have been received, but no answer came: the peer may or may not have acted.
    #[error("{peer} did not answer {request}")]
    Unanswered {
        /// Who.
        peer: String,
        /// Method and path.
        request: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer answered with something this program does not understand.
    #[error("{peer} answered {request} with something unexpected: {detail}")]
    Malformed {
        /// Who.
        peer: String,
        /// Method and path.
        request: String,
        /// What was wrong with it.
        detail: String,
    },
}

impl CallError {
    /// What the peer said, if it said something.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem { problem, .. } => Some(problem),
            _ => None,
        }
    }

    /// Whether the peer refused with this kind of problem, such as `stale-epoch`.
    pub fn is_kind(&self, kind: &str) -> bool {
        self.problem().is_some_and(|problem| problem.kind == kind)
    }

    /// Whether the peer was silent, so that trying again later makes sense.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unanswered { .. })
    }

    /// The problem to hand on to one's own caller: the peer's own words, or `502`/`504` in ours.
    pub fn into_problem(self) -> Problem {
        let detail = match std::error::Error::source(&self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        };
        match self {
            Self::Problem { problem, .. } => problem,
            Self::Unreachable { .. } => {
                Problem::new(502, "peer-unreachable", "A peer cannot be reached", detail)
            }
            Self::Unanswered { .. } => {
                Problem::new(504, "peer-unanswered", "A peer did not answer", detail)
            }
            Self::Malformed { .. } => Problem::new(
                502,
                "peer-malformed",
                "A peer's answer makes no sense",
                detail,
            ),
        }
    }
}

/// Makes connections to one peer.
pub trait Dial: Clone + Send + Sync + 'static {
    /// What a connection is.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Makes one; the caller limits the time.
    fn dial(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;

    /// Name of the peer for errors.
    fn peer(&self) -> String;

    /// Value of the `Host` header, a valid URI authority.
    fn authority(&self) -> String;
}

/// An HTTP client of one peer. Clones share connections.
#[derive(Clone)]
pub struct HttpClient<D: Dial> {
    dial: D,
    client: Client<Connector<D>, Body>,
}

impl<D: Dial> fmt::Debug for HttpClient<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient")
            .field("peer", &self.dial.peer())
            .finish_non_exhaustive()
    }
}

/// For calls without a body: `request(Method::GET, path, NO_BODY)`.
pub const NO_BODY: Option<&()> = None;

impl<D: Dial> HttpClient<D> {
    /// A client that connects when it is first used.
    pub fn with_dial(dial: D) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .build(Connector(dial.clone()));
        Self { dial, client }
    }

    /// The peer's name, as in errors.
    pub fn peer(&self) -> String {
        self.dial.peer()
    }

    /// Sends a request and reads its JSON answer within [`ANSWER_TIMEOUT`]. An empty answer reads as `null`, so
    /// `T = ()` suits a `204`.
    pub async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CallError> {
        self.request_within(ANSWER_TIMEOUT, method, path, body)
            .await
    }

    /// As [`request`](Self::request), with a limit of one's own on connecting and answering together.
    pub async fn request_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CallError> {
        let name = format!("{method} {path}");
        let request = self.build(method, path, &name, body)?;
        self.exchange(limit, &name, request).await
    }

    /// Sends a request and reads the answer, all within `limit`.
    async fn exchange<T: DeserializeOwned>(
        &self,
        limit: Duration,
        name: &str,
        request: Request<Body>,
    ) -> Result<T, CallError> {
        let answer = async {
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| self.failed(name, error))?;
            self.read(name, response).await
        };
        match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(self.unanswered(name, too_late(limit))),
        }
    }

    /// `GET`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.request(Method::GET, path, NO_BODY).await
    }

    /// `POST` with a JSON body.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        self.request(Method::POST, path, Some(body)).await
    }

    /// `PUT` with a JSON body.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        self.request(Method::PUT, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.request(Method::DELETE, path, NO_BODY).await
    }

    /// `PUT`s `length` bytes that come as a stream, within `limit`. A stream that ends early or fails cuts the
    /// connection, so that the peer does not take a part for the whole.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        limit: Duration,
        path: &str,
        length: u64,
        content: Body,
    ) -> Result<T, CallError> {
        let name = format!("PUT {path} ({length} bytes)");
        let mut request = self.build(Method::PUT, path, &name, NO_BODY)?;
        *request.body_mut() = content;
        request
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        request.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        self.exchange(limit, &name, request).await
    }

    /// Asks for an HTTP upgrade to `protocol`; the stream then belongs to the caller.
    pub async fn upgrade(&self, path: &str, protocol: &'static str) -> Result<Stream, CallError> {
        let name = format!("GET {path} (upgrade to {protocol})");
        let mut request = self.build(Method::GET, path, &name, NO_BODY)?;
        request
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request
            .headers_mut()
            .insert(header::UPGRADE, HeaderValue::from_static(protocol));
        let switch = async {
            let mut response = self
                .client
                .request(request)
                .await
                .map_err(|error| self.failed(&name, error))?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                // Either a problem, which `read` turns into an error, or an answer that makes no sense here.
                let status = response.status();
                let _: serde_json::Value = self.read(&name, response).await?;
                return Err(self.malformed(&name, format!("status {status} instead of an upgrade")));
            }
            let upgraded = hyper::upgrade::on(&mut response).await;
            upgraded
                .map(TokioIo::new)
                .map_err(|error| self.unanswered(&name, io::Error::other(error)))
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, switch).await {
            Ok(stream) => stream,
            Err(_) => Err(self.unanswered(&name, too_late(ANSWER_TIMEOUT))),
        }
    }

    fn build(
        &self,
        method: Method,
        path: &str,
        name: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Request<Body>, CallError> {
        let unsendable =
            |detail: String| self.malformed(name, format!("the request cannot be sent: {detail}"));
        let uri: Uri = format!("http://{}{path}", self.dial.authority())
            .parse()
            .map_err(|error: axum::http::uri::InvalidUri| unsendable(error.to_string()))?;
        let mut request = Request::builder().method(method).uri(uri);
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(
                    serde_json::to_vec(body).map_err(|error| unsendable(error.to_string()))?,
                )
            }
            None => Bytes::new(),
        };
        request
            .body(Body::from(bytes))
            .map_err(|error| unsendable(error.to_string()))
    }

    async fn read<T: DeserializeOwned>(
        &self,
        name: &str,
        response: axum::http::Response<Incoming>,
    ) -> Result<T, CallError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| match error.downcast::<hyper::Error>() {
                Ok(error) => self.unanswered(name, io::Error::other(error)),
                Err(_) => self.malformed(name, format!("more than {MAX_ANSWER_BYTES} bytes")),
            })?;
        let bytes = body.to_bytes();
        if !status.is_success() {
            return Err(match serde_json::from_slice::<Problem>(&bytes) {
                Ok(problem) => CallError::Problem {
                    peer: self.dial.peer(),
                    problem,
                },
                Err(_) => {
                    self.malformed(name, format!("status {status} without a problem document"))
                }
            });
        }
        let json: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(json).map_err(|error| self.malformed(name, error.to_string()))
    }

    fn failed(&self, name: &str, error: ClientError) -> CallError {
        if error.is_connect() {
            CallError::Unreachable {
                peer: self.dial.peer(),
                source: innermost(error),
            }
        } else {
            self.unanswered(name, innermost(error))
        }
    }

    fn unanswered(&self, name: &str, source: io::Error) -> CallError {
        CallError::Unanswered {
            peer: self.dial.peer(),
            request: name.to_owned(),
            source,
        }
    }

    fn malformed(&self, name: &str, detail: String) -> CallError {
        CallError::Malformed {
            peer: self.dial.peer(),
            request: name.to_owned(),
            detail,
        }
    }
}

fn too_late(limit: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("nothing came within {limit:?}"),
    )
}

/// The last error of a chain says what the operator needs ("connection refused"), the ones around it only that
/// "a request failed".
fn innermost(error: ClientError) -> io::Error {
    let mut deepest: &(dyn std::error::Error + 'static) = &error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    match deepest.downcast_ref::<io::Error>() {
        Some(io) => io::Error::new(io.kind(), io.to_string()),
        None => io::Error::other(deepest.to_string()),
    }
}

/// Fits a [`Dial`] to hyper's client.
#[derive(Clone)]
struct Connector<D>(D);

impl<D: Dial> tower_service::Service<Uri> for Connector<D> {
    type Response = Wire<D::Io>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let dial = self.0.clone();
        Box::pin(async move {
            match tokio::time::timeout(CONNECT_TIMEOUT, dial.dial()).await {
                Ok(io) => io.map(|io| Wire(TokioIo::new(io))),
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no connection within {CONNECT_TIMEOUT:?}"),
                )),
            }
        })
    }
}

/// A connection in the form hyper's client wants.
struct Wire<Io>(TokioIo<Io>);

impl<Io> Connection for Wire<Io> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl<Io: AsyncRead + Unpin> Read for Wire<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite + Unpin> Write for Wire<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
