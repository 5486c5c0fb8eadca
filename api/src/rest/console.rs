//! The web console's files, embedded in the program.

use super::Api;
use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::collections::BTreeMap;
use std::sync::LazyLock;

// `FILES: &[(path, content)]`, made by build.rs from `console/`.
include!(concat!(env!("OUT_DIR"), "/console_files.rs"));

struct File {
    content: &'static [u8],
    kind: &'static str,
    etag: HeaderValue,
}

static BY_PATH: LazyLock<BTreeMap<&'static str, File>> = LazyLock::new(|| {
    let file = |content: &'static [u8], path: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, content);
        let hex: String = digest.as_ref()[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let etag = HeaderValue::from_str(&format!("\"{hex}\"")).expect("hex digits in quotes");
        File {
            content,
            kind: content_type(path),
            etag,
        }
    };
    FILES
        .iter()
        .map(|(path, content)| (*path, file(content, path)))
        .collect()
});

pub(super) fn router() -> Router<Api> {
    let mut router = Router::new();
    for path in BY_PATH.keys() {
        router = router.route(
            &format!("/{path}"),
            get(move |headers: HeaderMap| async move { serve(path, &headers) }),
        );
    }
    router.route(
        "/",
        get(|headers: HeaderMap| async move { serve("index.html", &headers) }),
    )
}

fn serve(path: &str, headers: &HeaderMap) -> Response {
    let Some(file) = BY_PATH.get(path) else {
        return (
            StatusCode::NOT_FOUND,
            "This build of godwit has no web console.\n",
        )
            .into_response();
    };
    let known = headers
        .get(header::IF_NONE_MATCH)
        .and_then(|tags| tags.to_str().ok())
        .is_some_and(|tags| {
            let etag = file.etag.to_str().unwrap_or_default();
            tags.split(',')
                .any(|tag| tag.trim().trim_start_matches("W/") == etag)
        });
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        file.content.into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::ETAG, file.etag.clone());
    // Asked for again each time, answered with 304: a new version of the program shows at once.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(file.kind));
    response
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json" | "map") => "application/json",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        Some("ico") => "image/x-icon",
        Some("woff2") => "font/woff2",
        Some("txt" | "md") => "text/plain; charset=utf-8",
        _ if path.ends_with("LICENSE") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}
