//! `/v1/events`: the event log as a list, or as a stream of events and changes.
//!
//! The stream (`Accept: text/event-stream`) sends
//!
//! | `event:` | data | `id:` |
//! |---|---|---|
//! | `event` | an event | its revision |
//! | `vm`, `host`, `operation`, `maintenance`, `migration` | the resource as it is now | |
//! | `deleted` | `{kind, id}` | |
//! | `reset` | `{revision}`: what was deleted meanwhile is not known any more, load the lists again | |
//! | `end` | `{reason}`: the server ends the stream; resume with the last id | |
//!
//! It starts with everything that has changed since `Last-Event-ID` or `?after=`. A comment comes at least every
//! [`KEEP_ALIVE`].

use super::extract::Refused;
use super::feed::Subscription;
use super::page::limit;
use super::{Api, convert};
use crate::resource::{Event, List};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, stream};
use godwit_channel::problem::{QueryArgs, Refusal};
use serde::Deserialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Longest silence on a stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const LAST_EVENT_ID: &str = "last-event-id";

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list_or_follow))
}

#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct EventsQuery {
    /// Only what came after this revision. Without it a stream starts now, and a list ends with the latest event.
    after: Option<u64>,
    /// Most events to answer with, 1 to 5000; 500 when absent. A stream has no limit.
    limit: Option<usize>,
}

/// Lists events, or follows them together with every change (`Accept: text/event-stream`).
#[utoipa::path(
    get, path = "/v1/events", tag = "events",
    params(EventsQuery, ("Last-Event-ID" = Option<u64>, Header, description = "Resumes a stream after this revision")),
    responses(
        (status = 200, description = "Events, oldest first; or the stream.", content((List<Event> = "application/json"), (String = "text/event-stream"))),
        Refused
    )
)]
async fn list_or_follow(
    State(api): State<Api>,
    headers: HeaderMap,
    QueryArgs(query): QueryArgs<EventsQuery>,
) -> Result<Response, Refusal> {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .unwrap_or_default();
    if accept.contains("text/event-stream") {
        let last = headers
            .get(LAST_EVENT_ID)
            .and_then(|id| id.to_str().ok()?.parse().ok());
        return Ok(follow(&api, last.or(query.after)));
    }
    let limit = limit(query.limit)?;
    let revision = api.controller.view().event_revision;
    let latest = revision.saturating_sub(limit as u64);
    let mut events = api
        .controller
        .events_after(query.after.unwrap_or(latest), limit + 1)?;
    let more = events.len() > limit;
    events.truncate(limit);
    let items: Vec<Event> = events.iter().map(|event| convert::event(event)).collect();
    let next = items
        .last()
        .filter(|_| more)
        .map(|event| event.revision.to_string());
    Ok(Json(List {
        items,
        next,
        revision,
    })
    .into_response())
}

fn follow(api: &Api, after: Option<u64>) -> Response {
    let after = after.unwrap_or_else(|| api.controller.view().event_revision);
    let subscription = api.feed.subscribe(after);
    let body = Body::from_stream(blocks(subscription, api.shutdown.clone()));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that buffer would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

enum Following {
    Live(Box<Subscription>, CancellationToken),
    Over,
}

fn blocks(
    subscription: Subscription,
    shutdown: CancellationToken,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold(
        Following::Live(Box::new(subscription), shutdown),
        |following| async move {
            let Following::Live(mut subscription, shutdown) = following else {
                return None;
            };
            let first = std::mem::take(&mut subscription.first);
            if !first.is_empty() {
                return Some((Ok(first), Following::Live(subscription, shutdown)));
            }
            let received = tokio::select! {
                received = tokio::time::timeout(KEEP_ALIVE, subscription.following.recv()) => received,
                () = shutdown.cancelled() => Ok(Err(RecvError::Closed)),
            };
            match received {
                Ok(Ok(block)) => Some((Ok(block), Following::Live(subscription, shutdown))),
                Err(_) => Some((
                    Ok(Bytes::from_static(b": alive\n\n")),
                    Following::Live(subscription, shutdown),
                )),
                Ok(Err(error)) => {
                    let reason = match error {
                        RecvError::Lagged(_) => "this reader is too slow; resume with the last id",
                        RecvError::Closed => "the server shuts down",
                    };
                    let end = format!(
                        "event: end\ndata: {}\n\n",
                        serde_json::json!({ "reason": reason })
                    );
                    Some((Ok(end.into()), Following::Over))
                }
            }
        },
    )
}
