//! A plain HTTP/1.1 + JSON client for UNIX sockets and loopback TCP.
//!
//! The tests bring their own, so that a mistake shared by the product's client and server cannot hide.

use anyhow::{Context, bail};
use bytes::Bytes;
use godwit_wire::problem::Problem;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Longest wait for one answer; long polls stay well below.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// TCP without TLS.
    Tcp(SocketAddr),
}

/// A client that keeps one idle connection warm.
#[derive(Debug)]
pub struct Client {
    address: Address,
    idle: Mutex<Option<SendRequest<Full<Bytes>>>>,
}

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Value of `Content-Type`.
    pub content_type: String,
    /// Body.
    pub body: Bytes,
}

impl Client {
    /// A client of the server behind a UNIX socket.
    pub fn unix(path: &Path) -> Self {
        Self::new(Address::Unix(path.to_owned()))
    }

    /// A client of the server at `address`.
    pub fn tcp(address: SocketAddr) -> Self {
        Self::new(Address::Tcp(address))
    }

    fn new(address: Address) -> Self {
        Self {
            address,
            idle: Mutex::new(None),
        }
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.send(Method::GET, path, None::<&()>).await?.into_json()
    }

    /// `POST path`.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.send(Method::POST, path, Some(body)).await?.into_json()
    }

    /// `PUT path`.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.send(Method::PUT, path, Some(body)).await?.into_json()
    }

    /// `DELETE path`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.send(Method::DELETE, path, None::<&()>)
            .await?
            .into_json()
    }

    /// Sends a request and takes any answer.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<Answer> {
        let body = match body {
            Some(body) => Bytes::from(serde_json::to_vec(body)?),
            None => Bytes::new(),
        };
        let what = format!("{method} {path} at {:?}", self.address);
        let exchange = self.exchange(method, path, body);
        tokio::time::timeout(ANSWER_TIMEOUT, exchange)
            .await
            .with_context(|| format!("{what}: no answer"))?
            .context(what)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Answer> {
        let warm = self
            .idle
            .lock()
            .expect("no holder of the lock panics")
            .take()
            .filter(|sender| !sender.is_closed());
        let mut sender = match warm {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        sender.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        let content_type = head
            .headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let answer = Answer {
            status: head.status,
            content_type: content_type.to_owned(),
            body,
        };
        *self.idle.lock().expect("no holder of the lock panics") = Some(sender);
        Ok(answer)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        match &self.address {
            Address::Unix(path) => open(UnixStream::connect(path).await?).await,
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                open(stream).await
            }
        }
    }
}

async fn open<S>(stream: S) -> anyhow::Result<SendRequest<Full<Bytes>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

impl Answer {
    /// The body of a success; a problem becomes the error.
    pub fn into_json<T: DeserializeOwned>(self) -> anyhow::Result<T> {
        if !self.status.is_success() {
            return Err(match self.problem() {
                Ok(problem) => anyhow::Error::new(problem),
                Err(error) => error,
            });
        }
        serde_json::from_slice(&self.body)
            .with_context(|| format!("unexpected body {:?}", self.text()))
    }

    /// The problem in a refusal.
    pub fn problem(&self) -> anyhow::Result<Problem> {
        if self.status.is_success() {
            bail!("expected a problem, got {} {:?}", self.status, self.text());
        }
        serde_json::from_slice(&self.body)
            .with_context(|| format!("{} with body {:?}", self.status, self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}
