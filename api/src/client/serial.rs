//! A VM's serial console over WebSocket.

use super::ClientError;
use super::connect::{Server, Stream};
use crate::resource::Problem;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::header;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Bytes from and to a VM's serial port. It stays attached while the VM moves.
pub struct SerialStream {
    socket: WebSocketStream<Box<dyn Stream>>,
    server: String,
}

impl std::fmt::Debug for SerialStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialStream")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl SerialStream {
    pub(super) async fn open(server: &Server, vm: &str) -> Result<Self, ClientError> {
        let stream = server.connect().await?;
        let malformed = |reason: String| ClientError::Malformed {
            server: server.address().to_owned(),
            reason,
        };
        let mut request = format!("ws://{}/v1/vms/{vm}/serial", server.authority())
            .into_client_request()
            .map_err(|error| malformed(error.to_string()))?;
        if let Some(token) = server.token() {
            let value = format!("Bearer {token}")
                .parse()
                .map_err(|_| malformed("bad token".to_owned()))?;
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(Self {
                socket,
                server: server.address().to_owned(),
            }),
            Err(Error::Http(answer)) => {
                let problem = answer
                    .body()
                    .as_ref()
                    .and_then(|body| serde_json::from_slice::<Problem>(body).ok());
                Err(match problem {
                    Some(problem) => ClientError::Problem(problem),
                    None => malformed(format!(
                        "status {} instead of a serial console",
                        answer.status()
                    )),
                })
            }
            Err(error) => Err(malformed(error.to_string())),
        }
    }

    /// Sends bytes to the guest.
    pub async fn write(&mut self, bytes: impl Into<Bytes>) -> Result<(), ClientError> {
        self.socket
            .send(Message::Binary(bytes.into()))
            .await
            .map_err(|error| self.cut(&error))
    }

    /// Bytes from the guest; `None` when the server has ended the console.
    pub async fn read(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Binary(bytes))) => return Ok(Some(bytes)),
                Some(Ok(Message::Text(text))) => {
                    return Ok(Some(Bytes::copy_from_slice(text.as_bytes())));
                }
                Some(Ok(Message::Close(frame))) => match frame {
                    Some(frame) if !frame.reason.is_empty() && u16::from(frame.code) != 1000 => {
                        return Err(self.cut(&frame.reason));
                    }
                    _ => return Ok(None),
                },
                Some(Ok(_)) => {}
                None => return Ok(None),
                Some(Err(error)) => return Err(self.cut(&error)),
            }
        }
    }

    fn cut(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Unreachable {
            server: self.server.clone(),
            reason: reason.to_string(),
        }
    }
}
