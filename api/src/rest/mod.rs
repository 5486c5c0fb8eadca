//! The REST API and the web console, as one axum router.
//!
//! ```text
//! watch    request id, log line, duration metric
//!   guard    Host and Origin: no DNS rebinding, no requests from other sites
//!     access   API token → actor
//!       routes   check the request, hand an intent to the controller, answer with a resource or an operation
//! ```
//!
//! Every refusal is an RFC 9457 problem body, also for paths that do not exist.

mod convert;

mod devices;

mod extract;

mod page;
mod policy;

mod metrics;

mod access;

mod guard;

mod feed;

mod events;

mod serial;

mod vms;

mod hosts;

mod storage;

mod networks;

mod snapshots;

mod maintenances;

mod operations;

mod health;

mod console;

mod openapi;

#[cfg(test)]
mod tests;

pub use access::{Access, ApiTokens, TokenError};
pub use openapi::openapi_json;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use feed::Feed;
use godwit_channel::problem::method_not_allowed;
use godwit_controller::controller::Controller;
use metrics::Metrics;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Longest request body.
const MAX_BODY_BYTES: usize = 1 << 20;

/// What the API needs besides the controller.
#[derive(Debug)]
pub struct ApiConfig {
    /// Who may use it.
    pub access: Access,
    /// Address under which new hosts reach the server.
    pub agents_address: String,
    /// Cancelled when the server shuts down: streams end then.
    pub shutdown: CancellationToken,
}

/// Shared by all handlers; cheap to clone.
#[derive(Clone, Debug)]
struct Api {
    controller: Controller,
    feed: Feed,
    metrics: Arc<Metrics>,
    access: Arc<Access>,
    agents_address: Arc<str>,
    shutdown: CancellationToken,
}

/// The API and the console on top of a running controller. Needs a tokio runtime.
pub fn router(controller: Controller, config: ApiConfig) -> Router {
    let api = Api {
        feed: Feed::start(controller.clone(), config.shutdown.clone()),
        controller,
        metrics: Arc::new(Metrics::new()),
        access: Arc::new(config.access),
        agents_address: config.agents_address.into(),
        shutdown: config.shutdown,
    };
    let (described, _) = openapi::described().split_for_parts();
    described
        .merge(openapi::router())
        .merge(console::router())
        .fallback(extract::no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(api.clone(), access::demand_token))
        .layer(from_fn_with_state(api.clone(), guard::refuse_other_sites))
        .layer(from_fn_with_state(api.clone(), metrics::watch))
        .layer(from_fn(guard::add_safety_headers))
        .with_state(api)
}

/// Whether `address` can be reached from this machine only.
pub fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().is_loopback()
}
