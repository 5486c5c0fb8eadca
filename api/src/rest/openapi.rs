//! The API's description, made from the code.

use super::{
    Api, events, health, hosts, maintenances, networks, operations, serial, snapshots, storage, vms,
};
use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::LazyLock;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;

/// What the paths do not say.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Godwit",
        description = "Virtual machines on a pool of KVM hosts. Changes that take time answer 202 with an operation; \
            every change takes `?dry_run=true`; every refusal is an RFC 9457 problem with its remedy."
    ),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "hosts", description = "Hosts of the pool"),
        (name = "storage", description = "Storage pools, images and disks"),
        (name = "snapshots", description = "Saved VMs"),
        (name = "networks", description = "Networks and their addresses"),
        (name = "maintenances", description = "Taking every VM off a host, and back"),
        (name = "operations", description = "What takes time"),
        (name = "migrations", description = "Live migrations"),
        (name = "events", description = "What happened, and what changes"),
        (name = "server", description = "The server itself"),
    ),
    modifiers(&Token)
)]
struct Base;

struct Token;

impl Modify for Token {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let scheme =
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        openapi
            .components
            .get_or_insert_default()
            .add_security_scheme("token", scheme);
        // Not demanded on loopback.
        openapi.security = Some(vec![
            SecurityRequirement::default(),
            SecurityRequirement::new("token", Vec::<String>::new()),
        ]);
    }
}

/// All paths with their descriptions.
pub(super) fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Base::openapi())
        .merge(vms::routes())
        .merge(serial::routes())
        .merge(hosts::routes())
        .merge(storage::routes())
        .merge(snapshots::routes())
        .merge(networks::routes())
        .merge(maintenances::routes())
        .merge(operations::routes())
        .merge(events::routes())
        .merge(health::routes())
}

/// The OpenAPI document.
pub fn openapi_json() -> String {
    let (_, document) = described().split_for_parts();
    document
        .to_pretty_json()
        .expect("the description has string keys only")
}

pub(super) fn router() -> Router<Api> {
    static DOCUMENT: LazyLock<String> = LazyLock::new(openapi_json);
    let show = || async {
        (
            [(header::CONTENT_TYPE, "application/json")],
            DOCUMENT.as_str(),
        )
            .into_response()
    };
    Router::new().route("/openapi.json", get(show))
}
