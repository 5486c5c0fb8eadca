use super::*;
use crate::CallError;
use crate::pki::{Authority, HostRequest, Identity};
use axum::routing::get;
use axum::{Json, Router};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

struct Pool {
    authority: Authority,
    server: Identity,
}

impl Pool {
    fn new() -> Self {
        let authority = Authority::create().unwrap();
        let server = authority.issue_server(&["127.0.0.1".into()]).unwrap();
        Self { authority, server }
    }

    fn host(&self, host: HostId) -> Identity {
        let request = HostRequest::fresh().unwrap();
        let certificate = self
            .authority
            .sign_host(&request.request_pem, host)
            .unwrap();
        request.signed(certificate, self.authority.certificate_pem().to_owned())
    }
}

fn router() -> Router {
    Router::new()
        .route(
            "/who",
            get(|peer: Peer| async move { Json(format!("{peer:?}")) }),
        )
        .route(
            "/host",
            get(|HostPeer(host): HostPeer| async move { Json(host) }),
        )
        .route(
            "/echo",
            get(|request: axum::extract::Request| async {
                crate::upgrade::accept(request, "echo", |stream| async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                })
            }),
        )
}

/// Serves until the sender is dropped.
async fn start(config: Arc<rustls::ServerConfig>, router: Router) -> (String, oneshot::Sender<()>) {
    let listener = Listener::bind(([127, 0, 0, 1], 0).into(), config)
        .await
        .unwrap();
    let address = listener.local_address().unwrap().to_string();
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(serve(listener, router, async {
        let _ = stopped.await;
    }));
    (address, stop)
}

#[tokio::test]
async fn the_server_knows_which_host_is_calling() {
    let pool = Pool::new();
    let (address, _stop) = start(
        server_for_hosts_and_joiners(&pool.server).unwrap(),
        router(),
    )
    .await;
    let host = HostId::fresh();
    let caller = TlsClient::to_server(&address, client(&pool.host(host)).unwrap());
    assert_eq!(caller.get::<HostId>("/host").await.unwrap(), host);
    let mut stream = caller.upgrade("/echo", "echo").await.unwrap();
    stream.write_all(b"over TLS").await.unwrap();
    let mut back = [0; 8];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"over TLS");
}

#[tokio::test]
async fn a_joining_host_believes_only_the_authority_of_its_token() {
    let pool = Pool::new();
    let (address, _stop) = start(
        server_for_hosts_and_joiners(&pool.server).unwrap(),
        router(),
    )
    .await;
    let joiner = TlsClient::to_server(
        &address,
        client_pinned(pool.authority.fingerprint()).unwrap(),
    );
    assert_eq!(joiner.get::<String>("/who").await.unwrap(), "Anonymous");
    assert_eq!(
        joiner
            .get::<HostId>("/host")
            .await
            .unwrap_err()
            .problem()
            .unwrap()
            .status,
        403
    );

    let other = Authority::create().unwrap().fingerprint();
    let misled = TlsClient::to_server(&address, client_pinned(other).unwrap());
    assert!(matches!(
        misled.get::<String>("/who").await,
        Err(CallError::Unreachable { .. })
    ));
}

#[tokio::test]
async fn a_host_does_not_pass_for_the_server_nor_for_another_host() {
    let pool = Pool::new();
    let (id, other) = (HostId::fresh(), HostId::fresh());
    let guarded = router().layer(axum::middleware::from_fn(require_server));
    let (address, _stop) = start(server_for_server_only(&pool.host(id)).unwrap(), guarded).await;

    let from_server = client(&pool.server).unwrap();
    let right = TlsClient::to_host(&address, id, from_server.clone());
    assert_eq!(right.get::<String>("/who").await.unwrap(), "Server");
    let wrong_host = TlsClient::to_host(&address, other, from_server.clone());
    assert!(matches!(
        wrong_host.get::<String>("/who").await,
        Err(CallError::Unreachable { .. })
    ));
    let posing_as_server = TlsClient::to_server(&address, from_server);
    assert!(matches!(
        posing_as_server.get::<String>("/who").await,
        Err(CallError::Unreachable { .. })
    ));

    let from_host = TlsClient::to_host(&address, id, client(&pool.host(other)).unwrap());
    assert_eq!(
        from_host
            .get::<String>("/who")
            .await
            .unwrap_err()
            .problem()
            .unwrap()
            .status,
        403
    );
}

#[tokio::test]
async fn an_agent_turns_away_who_has_no_certificate_of_the_pool() {
    let pool = Pool::new();
    let id = HostId::fresh();
    let (address, _stop) = start(server_for_server_only(&pool.host(id)).unwrap(), router()).await;
    let anonymous = TlsClient::to_host(
        &address,
        id,
        client_pinned(pool.authority.fingerprint()).unwrap(),
    );
    anonymous.get::<String>("/who").await.unwrap_err();

    // A certificate of another pool, even with the right names.
    let stranger = Pool::new();
    let mut posing = stranger.server.clone();
    posing.authority_pem = pool.server.authority_pem.clone();
    let posing = TlsClient::to_host(&address, id, client(&posing).unwrap());
    posing.get::<String>("/who").await.unwrap_err();
}

#[tokio::test]
async fn a_server_that_went_away_and_came_back_is_reached_again() {
    let pool = Pool::new();
    let config = server_for_hosts_and_joiners(&pool.server).unwrap();
    let listener = Listener::bind(([127, 0, 0, 1], 0).into(), config.clone())
        .await
        .unwrap();
    let address = listener.local_address().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let first = tokio::spawn(serve(listener, router(), async {
        let _ = stopped.await;
    }));
    let caller = TlsClient::to_server(
        &address.to_string(),
        client(&pool.host(HostId::fresh())).unwrap(),
    );
    caller.get::<String>("/who").await.unwrap();
    drop(stop);
    first.await.unwrap();
    assert!(caller.get::<String>("/who").await.unwrap_err().is_silence());

    let listener = Listener::bind(address, config).await.unwrap();
    let _second = tokio::spawn(serve(listener, router(), std::future::pending()));
    caller.get::<String>("/who").await.unwrap();
}
