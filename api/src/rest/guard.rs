//! What keeps other web sites out of a browser that can reach this server.
//!
//! A page of another site can make the browser send requests here and open WebSockets, and by rebinding its DNS
//! name it can even read the answers. The browser's `Origin` gives the first away, the `Host` header the second.

use super::Api;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use godwit_channel::problem::Refusal;
use godwit_wire::problem::Problem;
use std::net::IpAddr;

/// Where scripts, styles and connections may come from. xterm.js adds style elements for its glyphs.
const CONTENT_SECURITY_POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
    object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// Middleware: refuses requests that another site made a browser send.
pub(super) async fn refuse_other_sites(
    State(api): State<Api>,
    request: Request,
    next: Next,
) -> Response {
    match judge(request.headers(), api.access.is_local()) {
        Ok(()) => next.run(request).await,
        Err(problem) => Refusal(problem).into_response(),
    }
}

/// Middleware: tells browsers what this site does not do.
pub(super) async fn add_safety_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(CONTENT_SECURITY_POLICY),
    );
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    );
    response
}

fn judge(headers: &HeaderMap, is_local: bool) -> Result<(), Problem> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let host = text(header::HOST).unwrap_or_default();
    // With a token there is nothing to gain by rebinding: the other site does not have it.
    if is_local && !names_this_machine(host) {
        return Err(foreign(
            format!("the Host header says {host:?}, which is not a name of this machine"),
            "use http://localhost or http://127.0.0.1, or let the server listen beyond loopback with TLS and a token",
        ));
    }
    if let Some(origin) = text(header::ORIGIN) {
        let same = origin
            .split_once("://")
            .is_some_and(|(_, authority)| authority.eq_ignore_ascii_case(host));
        if !same {
            return Err(foreign(
                format!("a page of {origin} made this request to {host}"),
                "use the console that this server serves at /",
            ));
        }
    }
    Ok(())
}

fn names_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority.host();
    let name = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

fn foreign(detail: String, remedy: &str) -> Problem {
    Problem::new(
        403,
        "foreign-site",
        "Requests from other sites are refused",
        detail,
    )
    .with_remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, origin: Option<&str>) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_str(text).expect("a header value");
        let mut headers = HeaderMap::from_iter([(header::HOST, value(host))]);
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, value(origin));
        }
        headers
    }

    #[test]
    fn a_rebound_name_is_refused_on_loopback() {
        for good in [
            "localhost:7070",
            "127.0.0.1:7070",
            "127.0.0.2",
            "[::1]:7070",
            "LOCALHOST",
        ] {
            assert_eq!(judge(&request(good, None), true), Ok(()), "{good}");
        }
        for bad in [
            "evil.example:7070",
            "127.0.0.1.evil.example",
            "",
            "10.0.0.1:7070",
            "localhost@evil.example",
        ] {
            let refused = judge(&request(bad, None), true).map_err(|problem| problem.status);
            assert_eq!(refused, Err(403), "{bad}");
        }
        assert_eq!(judge(&request("godwit.example:7070", None), false), Ok(()));
    }

    #[test]
    fn another_sites_page_is_refused_whatever_it_asks_for() {
        let own = request("127.0.0.1:7070", Some("http://127.0.0.1:7070"));
        assert_eq!(judge(&own, true), Ok(()));
        for origin in [
            "http://evil.example",
            "null",
            "http://127.0.0.1:8080",
            "http://localhost:7070",
        ] {
            assert!(
                judge(&request("127.0.0.1:7070", Some(origin)), true).is_err(),
                "{origin}"
            );
        }
    }
}
