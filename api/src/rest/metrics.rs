//! Counters for `/metrics`, and the log line of every request.

mod devices;
mod migrations;

use super::{Api, convert};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use godwit_controller::view::View;
use jiff::Timestamp;
use migrations::MigrationFigures;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use serde::Serialize;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

const REQUEST_ID: &str = "x-request-id";
/// Longest request id taken from outside.
const MAX_REQUEST_ID_BYTES: usize = 64;
/// Upper bounds of the duration buckets, in seconds.
const DURATION_BUCKETS_S: [f64; 9] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0, 10.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    path: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HostLabel {
    host: String,
}

type DurationFamily = Family<RequestLabels, Histogram, fn() -> Histogram>;

/// What the API counts by itself; everything else is counted in the view when it is asked for.
#[derive(Debug)]
pub(super) struct Metrics {
    durations: DurationFamily,
    migrations: MigrationFigures,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(DURATION_BUCKETS_S);
        Self {
            durations: Family::new_with_constructor(histogram),
            migrations: MigrationFigures::since(Timestamp::now()),
        }
    }

    /// Everything in the text format of OpenMetrics.
    pub(super) fn text(&self, view: &View) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("godwit");
        registry.register_with_unit(
            "api_request_duration",
            "Time to answer API requests",
            Unit::Seconds,
            self.durations.clone(),
        );
        count(
            &mut registry,
            "hosts",
            "Hosts by state",
            view.hosts
                .values()
                .map(|host| convert::host(view, host).state),
        );
        count(
            &mut registry,
            "vms",
            "VMs by state",
            view.vms.values().map(|vm| convert::vm(view, vm).state),
        );
        let operations = view
            .operations
            .values()
            .map(|operation| convert::operation(view, operation).state);
        count(
            &mut registry,
            "operations",
            "Remembered operations by state",
            operations,
        );
        let migrations = view
            .migrations
            .values()
            .map(|migration| convert::migration(view, migration).state);
        count(
            &mut registry,
            "migrations",
            "Remembered migrations by state",
            migrations,
        );
        self.migrations.observe(view);
        self.migrations.register(&mut registry);
        let maintenances = view
            .maintenances
            .values()
            .map(|record| convert::maintenance(record).state);
        count(
            &mut registry,
            "maintenances",
            "Remembered maintenances by state",
            maintenances,
        );
        devices::register(&mut registry, view);
        let cpu = Family::<HostLabel, Gauge<f64, AtomicU64>>::default();
        let memory = Family::<HostLabel, Gauge>::default();
        let kept = Family::<HostLabel, Gauge>::default();
        let committed = Family::<HostLabel, Gauge>::default();
        for record in view.hosts.values() {
            let host = convert::host(view, record);
            let label = HostLabel { host: host.name };
            cpu.get_or_create(&label).set(host.usage.cpu_percent);
            memory
                .get_or_create(&label)
                .set(signed(host.usage.memory_used_bytes));
            kept.get_or_create(&label)
                .set(signed(host.usage.kept_memory_bytes));
            committed
                .get_or_create(&label)
                .set(signed(host.committed.memory_mib.saturating_mul(1 << 20)));
        }
        registry.register("host_cpu_percent", "Busy share of a host's cores", cpu);
        registry.register(
            "host_memory_used_bytes",
            "Memory of a host that is not available to new work",
            memory,
        );
        registry.register(
            "host_memory_kept_bytes",
            "Memory of VMs that have moved away, kept on a host for their return",
            kept,
        );
        registry.register(
            "host_memory_committed_bytes",
            "Memory of a host promised to VMs",
            committed,
        );
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

fn count(
    registry: &mut Registry,
    name: &str,
    help: &str,
    states: impl Iterator<Item = impl Serialize>,
) {
    let family = Family::<StateLabel, Gauge>::default();
    for state in states {
        let state = serde_json::to_value(state)
            .ok()
            .and_then(|state| state.as_str().map(str::to_owned));
        family
            .get_or_create(&StateLabel {
                state: state.unwrap_or_default(),
            })
            .inc();
    }
    registry.register(name, help, family);
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Middleware: gives the request an id, logs it and counts its duration.
pub(super) async fn watch(State(api): State<Api>, request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let matched = request
        .extensions()
        .get::<MatchedPath>()
        .map(|matched| matched.as_str().to_owned());
    let span = tracing::info_span!("request", id, %method, path);
    let began = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let took = began.elapsed();
    let status = response.status();
    span.in_scope(|| {
        if status.is_server_error() {
            tracing::error!(
                status = status.as_u16(),
                took_us = took.as_micros() as u64,
                "answered"
            );
        } else {
            tracing::debug!(
                status = status.as_u16(),
                took_us = took.as_micros() as u64,
                "answered"
            );
        }
    });
    // Only known paths: a stranger must not be able to grow the table.
    if let Some(path) = matched {
        let labels = RequestLabels {
            method: method.to_string(),
            path,
            status: status.as_u16(),
        };
        api.metrics
            .durations
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

fn request_id(request: &Request) -> String {
    let plain = |id: &&str| {
        !id.is_empty()
            && id.len() <= MAX_REQUEST_ID_BYTES
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(plain);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

/// The answer to `GET /metrics`.
pub(super) fn answer(api: &Api) -> Response {
    match api.metrics.text(&api.controller.view()) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => {
            let problem = godwit_wire::problem::Problem::internal(format!(
                "metrics cannot be written: {error}"
            ));
            godwit_channel::problem::Refusal(problem).into_response()
        }
    }
}
