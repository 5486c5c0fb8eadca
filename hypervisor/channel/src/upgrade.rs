//! HTTP upgrades to a raw byte stream: how a serial console crosses processes.

use crate::problem::Refusal;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use godwit_wire::problem::Problem;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::future::Future;

/// Raw bytes both ways after an upgrade; implements tokio's `AsyncRead` and `AsyncWrite`.
pub type Stream = TokioIo<Upgraded>;

/// Answers an upgrade to `protocol` and, once the switch has happened, runs `serve` on the stream in its own task.
///
/// # Errors
/// `426 upgrade-required` when the request does not ask for `protocol`.
pub fn accept<F, Fut>(
    mut request: Request,
    protocol: &'static str,
    serve: F,
) -> Result<Response, Refusal>
where
    F: FnOnce(Stream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let asked = request
        .headers()
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok());
    if !asked.is_some_and(|asked| asked.eq_ignore_ascii_case(protocol)) {
        let detail = format!("this path speaks {protocol} after an HTTP upgrade");
        return Err(Refusal(
            Problem::new(426, "upgrade-required", "Upgrade required", detail).with_remedy(format!(
                "send `Connection: upgrade` and `Upgrade: {protocol}`"
            )),
        ));
    }
    let switched = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match switched.await {
            Ok(upgraded) => serve(TokioIo::new(upgraded)).await,
            Err(error) => {
                tracing::debug!(protocol, %error, "the peer went away before the upgrade")
            }
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response
        .headers_mut()
        .insert(header::UPGRADE, HeaderValue::from_static(protocol));
    Ok(response)
}
