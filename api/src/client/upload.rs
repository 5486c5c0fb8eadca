//! Sending a file.

use super::{Client, ClientError, MAX_ANSWER_BYTES, chain};
use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::Path;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

/// Bytes read and sent at once.
const PIECE_BYTES: usize = 256 << 10;

/// A file to send.
#[derive(Debug)]
pub struct Content {
    file: File,
    length: u64,
}

impl Content {
    /// Opens a file.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path).await?;
        let length = file.metadata().await?.len();
        Ok(Self { file, length })
    }

    /// How many bytes it has.
    pub const fn length(&self) -> u64 {
        self.length
    }
}

impl Client {
    /// Sends a file with `PUT`; `sent` hears of every piece. There is no limit on the time as a whole: the server ends
    /// what stands still.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        content: Content,
        sent: impl Fn(u64) + Send + 'static,
    ) -> Result<T, ClientError> {
        let length = content.length;
        let pieces = stream::try_unfold((content.file, sent), |(mut file, sent)| async move {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            let mut limited = (&mut file).take(PIECE_BYTES as u64);
            if limited.read_to_end(&mut piece).await? == 0 {
                return Ok::<_, io::Error>(None);
            }
            sent(piece.len() as u64);
            Ok(Some((Frame::data(Bytes::from(piece)), (file, sent))))
        });
        let mut request = Request::builder()
            .method(Method::PUT)
            .uri(path)
            .header(header::HOST, self.server.authority())
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, length);
        if let Some(token) = self.server.token() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = StreamBody::new(pieces).boxed_unsync();
        let request = request
            .body(body)
            .map_err(|error| ClientError::BadAddress {
                address: path.to_owned(),
                reason: error.to_string(),
            })?;
        let stream = TokioIo::new(self.server.connect().await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(|error| self.unreachable(&error))?;
        tokio::spawn(connection);
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| self.malformed(chain(error.as_ref())))?
            .to_bytes();
        if !status.is_success() {
            return Err(self.problem(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| self.malformed(format!("{path}: {error}")))
    }
}
