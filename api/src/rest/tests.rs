//! The API over a real controller with a store on disk and no hosts.

use super::{Access, ApiConfig, ApiTokens, openapi_json, router};
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use axum::response::Response;
use expect_test::{expect, expect_file};
use godwit_controller::controller::{Controller, ControllerConfig};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

struct Server {
    router: Router,
    controller: Controller,
    shutdown: CancellationToken,
    directory: TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

async fn server() -> Server {
    let directory = tempfile::tempdir().expect("a directory");
    let (tokens, _) = ApiTokens::load_or_create(directory.path()).expect("tokens");
    with_access(directory, Access::Local(tokens)).await
}

async fn with_access(directory: TempDir, access: Access) -> Server {
    let config = ControllerConfig {
        state_dir: directory.path().to_owned(),
        agents_listen: "127.0.0.1:0".parse().expect("an address"),
        agents_names: vec!["127.0.0.1".to_owned()],
        migrations_per_host: 2,
    };
    let controller = Controller::start(config).await.expect("a controller");
    let shutdown = CancellationToken::new();
    let agents_address = controller.agents_address().to_string();
    let router = router(
        controller.clone(),
        ApiConfig {
            access,
            agents_address,
            shutdown: shutdown.clone(),
        },
    );
    Server {
        router,
        controller,
        shutdown,
        directory,
    }
}

impl Server {
    async fn send(&self, request: Request<Body>) -> Response {
        self.router
            .clone()
            .oneshot(request)
            .await
            .expect("the router always answers")
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let request = request(method, path)
            .body(body.map_or_else(Body::empty, |body| body.to_string().into()));
        read(self.send(request.expect("a request")).await).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, Some(body)).await
    }

    /// A VM that is off.
    async fn create(&self, name: &str) -> Value {
        let answer = self
            .post(
                "/v1/vms",
                json!({ "name": name, "template": "pilot", "start": false }),
            )
            .await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        answer.body["vm"].clone()
    }
}

fn request(method: Method, path: &str) -> axum::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "127.0.0.1:7070")
}

async fn read(response: Response) -> Answer {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.expect("a body").to_bytes();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    }
}

fn assert_problem(answer: &Answer, status: u16, kind: &str) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.body);
    assert_eq!(
        answer.headers[header::CONTENT_TYPE],
        "application/problem+json"
    );
    assert_eq!(answer.body["type"], kind, "{}", answer.body);
    assert_eq!(answer.body["status"], status);
    let has_text = |field: &str| {
        answer.body[field]
            .as_str()
            .is_some_and(|text| !text.is_empty())
    };
    assert!(has_text("title") && has_text("detail"), "{}", answer.body);
}

/// The next block of an event stream.
async fn block(stream: &mut Body) -> Option<String> {
    let frame = tokio::time::timeout(Duration::from_secs(5), stream.frame())
        .await
        .expect("something in time")?;
    let data = frame
        .expect("no transport error")
        .into_data()
        .expect("data");
    Some(String::from_utf8(data.to_vec()).expect("text"))
}

#[tokio::test]
async fn a_vm_is_created_shown_renamed_and_deleted() {
    let server = server().await;
    let answer = server
        .post(
            "/v1/vms",
            json!({ "name": "web-1", "template": "pilot", "start": false }),
        )
        .await;
    assert_eq!(answer.status, StatusCode::CREATED);
    let id = answer.body["vm"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(answer.headers[header::LOCATION], format!("/v1/vms/{id}"));
    assert_eq!(answer.body["operation"], Value::Null);
    assert_eq!(answer.body["vm"]["state"], "stopped");
    for name in ["web-1", &id] {
        assert_eq!(
            server.get(&format!("/v1/vms/{name}")).await.body["name"],
            "web-1"
        );
    }
    let renamed = server
        .call(
            Method::PATCH,
            "/v1/vms/web-1",
            Some(json!({ "name": "web-2" })),
        )
        .await;
    assert_eq!(
        (renamed.status, &renamed.body["vm"]["name"]),
        (StatusCode::OK, &json!("web-2"))
    );
    assert_problem(&server.get("/v1/vms/web-1").await, 404, "not-found");
    let deleted = server.call(Method::DELETE, "/v1/vms/web-2", None).await;
    assert!(
        deleted.status.is_success(),
        "{} {}",
        deleted.status,
        deleted.body
    );
}

#[tokio::test]
async fn a_vm_that_no_host_takes_is_refused_with_the_way_out() {
    let server = server().await;
    let answer = server
        .post("/v1/vms", json!({ "name": "web-1", "template": "pilot" }))
        .await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.body);
    assert!(
        answer.body["remedy"]
            .as_str()
            .is_some_and(|remedy| remedy.contains("join a host")),
        "{}",
        answer.body
    );
    assert_problem(&server.get("/v1/vms/web-1").await, 404, "not-found");
}

#[tokio::test]
async fn a_request_that_cannot_be_accepted_names_every_field_and_its_remedy() {
    let server = server().await;
    let spec = json!({ "vcpus": 99, "memory_mib": 1, "boot": { "kind": "pilot" } });
    let answer = server
        .post(
            "/v1/vms",
            json!({ "name": "Not A Name", "spec": spec, "start": false }),
        )
        .await;
    assert_problem(&answer, 422, "invalid-request");
    let fields = answer.body["fields"].as_array().expect("fields");
    let named: BTreeSet<_> = fields
        .iter()
        .filter_map(|field| field["field"].as_str())
        .collect();
    assert_eq!(
        named,
        BTreeSet::from(["name", "spec.memory_mib", "spec.vcpus"])
    );
    assert!(fields.iter().all(|field| {
        field["remedy"]
            .as_str()
            .is_some_and(|remedy| !remedy.is_empty())
    }));
    for (body, field) in [
        (json!({ "template": "pilot" }), "name"),
        (json!({ "name": "a" }), "spec"),
        (
            json!({ "name": "a", "template": "pilot", "memory": 5 }),
            "memory",
        ),
        (
            json!({ "name": "a", "spec": { "vcpus": "two", "memory_mib": 64, "boot": { "kind": "pilot" } } }),
            "spec.vcpus",
        ),
        (
            json!({ "name": "a", "template": "pilot", "host": "nowhere" }),
            "host",
        ),
    ] {
        let answer = server.post("/v1/vms", body.clone()).await;
        assert_problem(&answer, 422, "invalid-request");
        assert_eq!(answer.body["fields"][0]["field"], field, "{body}");
    }
    let broken = request(Method::POST, "/v1/vms")
        .body(Body::from("{\"name\":"))
        .expect("a request");
    assert_problem(
        &read(server.send(broken).await).await,
        422,
        "invalid-request",
    );
    assert_eq!(
        server.get("/v1/vms").await.body["items"],
        json!([]),
        "nothing was created"
    );
}

#[tokio::test]
async fn what_does_not_exist_is_a_problem_too() {
    let server = server().await;
    for path in [
        "/v1/vms/none",
        "/v1/hosts/none",
        "/v1/maintenances/none",
        "/v1/operations/none",
        "/v1/migrations/01930000-0000-7000-8000-000000000000",
        "/v1/nothing",
        "/nothing",
    ] {
        let answer = server.get(path).await;
        assert_problem(&answer, 404, "not-found");
        assert!(answer.body["remedy"].is_string(), "{path} has a remedy");
    }
    assert_problem(
        &server.call(Method::PUT, "/v1/vms", None).await,
        405,
        "method-not-allowed",
    );
    assert_problem(
        &server.post("/v1/vms/none/start", json!({})).await,
        404,
        "not-found",
    );
    assert_problem(&server.get("/v1/vms/none/serial").await, 404, "not-found");
}

#[tokio::test]
async fn a_second_vm_of_the_same_name_is_refused() {
    let server = server().await;
    server.create("web-1").await;
    let answer = server
        .post(
            "/v1/vms",
            json!({ "name": "web-1", "template": "pilot", "start": false }),
        )
        .await;
    assert!(
        matches!(answer.status.as_u16(), 409 | 422),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn a_dry_run_says_what_would_happen_and_changes_nothing() {
    let server = server().await;
    let body = json!({ "name": "web-1", "template": "pilot", "start": false });
    let answer = server.post("/v1/vms?dry_run=true", body.clone()).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    assert_eq!(answer.body["dry_run"], true);
    assert!(
        answer.body["changes"]
            .as_array()
            .is_some_and(|changes| !changes.is_empty()),
        "{}",
        answer.body
    );
    assert_problem(&server.get("/v1/vms/web-1").await, 404, "not-found");
    let refused = server
        .post(
            "/v1/vms?dry_run=true",
            json!({ "name": "", "template": "pilot" }),
        )
        .await;
    assert_problem(&refused, 422, "invalid-request");
    assert_problem(
        &server.post("/v1/vms?dry_run=maybe", body).await,
        422,
        "invalid-request",
    );
}

#[tokio::test]
async fn a_list_is_paged_through_without_gaps_or_repetition() {
    let server = server().await;
    for number in 0..7 {
        server.create(&format!("vm-{number}")).await;
    }
    let mut seen = Vec::new();
    let mut path = "/v1/vms?limit=3".to_owned();
    let mut pages = 0;
    loop {
        let page = server.get(&path).await;
        assert_eq!(page.status, StatusCode::OK);
        pages += 1;
        let items = page.body["items"].as_array().expect("items");
        seen.extend(
            items
                .iter()
                .map(|vm| vm["name"].as_str().expect("a name").to_owned()),
        );
        match page.body["next"].as_str() {
            Some(next) => path = format!("/v1/vms?limit=3&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(pages, 3);
    assert_eq!(
        seen,
        (0..7)
            .map(|number| format!("vm-{number}"))
            .collect::<Vec<_>>()
    );
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=5001", "limit"),
        ("cursor=x", "cursor"),
    ] {
        let answer = server.get(&format!("/v1/vms?{query}")).await;
        assert_problem(&answer, 422, "invalid-request");
        assert_eq!(answer.body["fields"][0]["field"], field);
    }
}

#[tokio::test]
async fn a_stream_resumed_later_tells_what_was_missed() {
    let server = server().await;
    server.create("old").await;
    let revision = server.get("/v1/vms").await.body["revision"]
        .as_u64()
        .expect("a revision");
    server.create("new").await;
    let follow = || {
        let request =
            request(Method::GET, "/v1/events").header(header::ACCEPT, "text/event-stream");
        request
            .header("last-event-id", revision.to_string())
            .body(Body::empty())
            .expect("a request")
    };
    let response = server.send(follow()).await;
    assert_eq!(
        response.headers()[header::CONTENT_TYPE],
        "text/event-stream"
    );
    let mut stream = response.into_body();
    let mut text = String::new();
    while !text.contains("event: vm\ndata: ")
        || !text.contains("event: event\ndata: ")
        || !text.contains("\"name\":\"new\"")
    {
        text.push_str(&block(&mut stream).await.expect("the stream goes on"));
    }
    assert!(text.contains(&format!("id: {}\n", revision + 1)), "{text}");
    server.call(Method::DELETE, "/v1/vms/new", None).await;
    while !text.contains("event: deleted\ndata: {\"kind\":\"vm\"") {
        text.push_str(&block(&mut stream).await.expect("the stream goes on"));
    }
    let mut again = server.send(follow()).await.into_body();
    let first = block(&mut again).await.expect("a block");
    assert!(
        first.contains("event: deleted\ndata: {\"kind\":\"vm\""),
        "deletions are remembered: {first}"
    );
}

#[tokio::test]
async fn a_stream_ends_with_a_reason_when_the_server_shuts_down() {
    let server = server().await;
    let request = request(Method::GET, "/v1/events").header(header::ACCEPT, "text/event-stream");
    let mut stream = server
        .send(request.body(Body::empty()).expect("a request"))
        .await
        .into_body();
    server.shutdown.cancel();
    let mut last = String::new();
    while let Some(block) = block(&mut stream).await {
        last = block;
    }
    assert!(
        last.contains("event: end") && last.contains("shuts down"),
        "{last}"
    );
    server.controller.shutdown().await;
}

#[tokio::test]
async fn events_are_listed_with_who_did_it() {
    let server = server().await;
    server.create("web-1").await;
    let list = server.get("/v1/events?after=0").await;
    let events = list.body["items"].as_array().expect("events");
    let created = events
        .iter()
        .find(|event| event["kind"] == "vm.created")
        .expect("the creation");
    assert_eq!(
        (&created["actor"], &created["subject"]["name"]),
        (&json!("local"), &json!("web-1"))
    );
}

#[tokio::test]
async fn beyond_loopback_nothing_is_told_without_the_token() {
    let directory = tempfile::tempdir().expect("a directory");
    let (tokens, made) = ApiTokens::load_or_create(directory.path()).expect("tokens");
    let server = with_access(directory, Access::Token(tokens)).await;
    for path in [
        "/v1/vms",
        "/v1/events",
        "/v1/hosts/x",
        "/v1/vms/x/serial",
        "/metrics",
    ] {
        let answer = server.get(path).await;
        assert_problem(&answer, 401, "unauthorized");
        assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
    }
    let bearer = format!("Bearer {}", made.expect("the first token"));
    let with_token = request(Method::GET, "/v1/vms").header(header::AUTHORIZATION, &bearer);
    assert_eq!(
        server
            .send(with_token.body(Body::empty()).expect("a request"))
            .await
            .status(),
        StatusCode::OK
    );
    let elsewhere = Request::builder()
        .uri("/v1/vms")
        .header(header::HOST, "godwit.example")
        .header(header::AUTHORIZATION, &bearer);
    assert_eq!(
        server
            .send(elsewhere.body(Body::empty()).expect("a request"))
            .await
            .status(),
        StatusCode::OK
    );
    assert_eq!(
        server.get("/").await.status,
        StatusCode::OK,
        "the console asks for the token itself"
    );
    assert_eq!(server.get("/healthz").await.body["status"], "ok");
}

#[tokio::test]
async fn another_site_is_refused() {
    let server = server().await;
    let rebound = Request::builder()
        .uri("/v1/vms")
        .header(header::HOST, "evil.example:7070")
        .body(Body::empty());
    assert_problem(
        &read(server.send(rebound.expect("a request")).await).await,
        403,
        "foreign-site",
    );
    let cross = request(Method::POST, "/v1/vms").header(header::ORIGIN, "http://evil.example");
    let cross = cross
        .body(Body::from(r#"{"name":"a","template":"pilot"}"#))
        .expect("a request");
    assert_problem(&read(server.send(cross).await).await, 403, "foreign-site");
    assert_eq!(server.get("/v1/vms").await.body["items"], json!([]));
}

#[tokio::test]
async fn a_join_token_comes_with_the_command_to_run() {
    let server = server().await;
    let answer = server.post("/v1/join-tokens", json!({ "ttl_s": 60 })).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    let token = answer.body["token"].as_str().expect("a token");
    assert!(token.starts_with("gwj1."));
    let command = answer.body["command"].as_str().expect("a command");
    assert!(
        command.contains(token)
            && command.contains(&server.controller.agents_address().to_string())
    );
    assert_problem(
        &server.post("/v1/join-tokens", json!({ "ttl_s": 0 })).await,
        422,
        "invalid-request",
    );
}

#[tokio::test]
async fn the_console_is_served_with_a_policy_and_is_not_sent_twice() {
    let server = server().await;
    let get = |tag: Option<&str>| {
        let request = request(Method::GET, "/");
        let request = tag.into_iter().fold(request, |request, tag| {
            request.header(header::IF_NONE_MATCH, tag)
        });
        request.body(Body::empty()).expect("a request")
    };
    let first = server.send(get(None)).await;
    assert_eq!(first.status(), StatusCode::OK);
    assert_eq!(
        first.headers()[header::CONTENT_TYPE],
        "text/html; charset=utf-8"
    );
    let policy = first.headers()[header::CONTENT_SECURITY_POLICY]
        .to_str()
        .expect("text");
    assert!(
        policy.starts_with("default-src 'self'") && !policy.contains("script-src"),
        "{policy}"
    );
    let etag = first.headers()[header::ETAG]
        .to_str()
        .expect("text")
        .to_owned();
    assert_eq!(
        server.send(get(Some(&etag))).await.status(),
        StatusCode::NOT_MODIFIED
    );
}

#[tokio::test]
async fn metrics_count_vms_by_state_and_requests_by_route() {
    let server = server().await;
    server.create("web-1").await;
    server.get("/v1/vms/web-1").await;
    let request = request(Method::GET, "/metrics")
        .body(Body::empty())
        .expect("a request");
    let body = server
        .send(request)
        .await
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let text = String::from_utf8(body.to_vec()).expect("text");
    assert!(text.contains("godwit_vms{state=\"stopped\"} 1\n"), "{text}");
    let route = "godwit_api_request_duration_seconds_count{method=\"GET\",path=\"/v1/vms/{vm}\",status=\"200\"} 1\n";
    assert!(text.contains(route), "{text}");
}

#[tokio::test]
async fn every_answer_carries_the_requests_id() {
    let server = server().await;
    let given = request(Method::GET, "/v1/vms")
        .header("x-request-id", "abc-1")
        .body(Body::empty());
    let answer = server.send(given.expect("a request")).await;
    assert_eq!(answer.headers()["x-request-id"], "abc-1");
    let made = server.get("/v1/vms").await;
    expect!["36"].assert_eq(&made.headers["x-request-id"].len().to_string());
    drop(server.directory);
}

#[test]
fn the_description_of_the_api_is_as_published() {
    let mut document = openapi_json();
    document.push('\n');
    expect_file!["../../openapi.json"].assert_eq(&document);
}

#[tokio::test]
async fn a_network_gives_addresses_to_vms_and_cannot_go_before_them() {
    let server = server().await;
    let asked = json!({
        "name": "web", "transport": { "kind": "vxlan", "vni": 100 },
        "subnet": { "cidr": "10.1.2.99/24", "gateway": "10.1.2.1", "dns": ["10.1.2.1"] }
    });
    let made = server.post("/v1/networks", asked.clone()).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    assert_eq!(made.body["network"]["mtu"], 1450);
    assert_eq!(made.body["network"]["subnet"]["cidr"], "10.1.2.0/24");
    assert_problem(
        &server.post("/v1/networks", asked).await,
        422,
        "invalid-request",
    );
    let vm = json!({
        "name": "a", "template": "pilot", "start": false, "nics": [{ "network": "web" }],
        "cloud_init": { "ssh_keys": ["ssh-ed25519 AAAA me"] }, "console": "virtio"
    });
    let made = server.post("/v1/vms", vm).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    let vm = &made.body["vm"];
    assert_eq!(vm["nics"][0]["address"], "10.1.2.2");
    assert_eq!(vm["nics"][0]["network_name"], "web");
    assert_eq!(vm["cloud_init"]["hostname"], "a");
    assert_eq!(vm["console"], "virtio");
    let shown = server.get("/v1/networks/web").await;
    assert_eq!(shown.body["leases"][0]["vm_name"], "a");
    let refused = server.call(Method::DELETE, "/v1/networks/web", None).await;
    assert_problem(&refused, 409, "in-use");
    let gone = server.call(Method::DELETE, "/v1/vms/a", None).await;
    assert!(gone.status.is_success(), "{}", gone.body);
    while server.get("/v1/vms/a").await.status.is_success() {
        let mut changed = server.controller.changed();
        changed.changed().await.expect("the controller lives");
    }
    let gone = server.call(Method::DELETE, "/v1/networks/web", None).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn storage_without_a_pool_is_refused_with_the_way_to_get_one() {
    let server = server().await;
    let image = json!({ "name": "debian", "source": { "kind": "upload", "bytes": 1024 } });
    let refused = server.post("/v1/images", image).await;
    assert_problem(&refused, 422, "invalid-request");
    assert!(
        refused.body["fields"][0]["remedy"]
            .as_str()
            .is_some_and(|remedy| remedy.contains("--storage")),
        "{}",
        refused.body
    );
    let vm = json!({
        "name": "a", "template": "pilot", "start": false,
        "disks": [{ "bytes": 1_073_741_824u64 }, { "disk": "nothing" }]
    });
    let refused = server.post("/v1/vms", vm).await;
    assert_problem(&refused, 422, "invalid-request");
    assert_eq!(refused.body["fields"][0]["field"], "disks[1].disk");
    for path in ["/v1/pools", "/v1/images", "/v1/disks"] {
        let listed = server.get(path).await;
        assert_eq!(listed.body["items"], json!([]), "{path}");
    }
    for path in ["/v1/images/x", "/v1/disks/x", "/v1/networks/x"] {
        assert_problem(&server.get(path).await, 404, "not-found");
    }
    let request = request(Method::PUT, "/v1/images/x/content").body(Body::from("bytes"));
    let refused = read(server.send(request.expect("a request")).await).await;
    assert_problem(&refused, 404, "not-found");
    assert_problem(
        &server.post("/v1/hosts/x/confirm-off", json!({})).await,
        404,
        "not-found",
    );
}
