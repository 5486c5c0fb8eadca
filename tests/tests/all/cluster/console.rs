//! A console session stays where the operator is while its VM moves.

use super::{HOST_MIB, create_busy_pilot, text, verify};
use futures_util::{SinkExt, StreamExt};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::{require, skip};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// A guest answers within this time, also one that has just moved.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// A WebSocket as a browser's, and all that came over it.
struct Session {
    socket: WebSocketStream<TcpStream>,
    shown: String,
}

impl Session {
    async fn open(cluster: &Cluster, vm: &str) -> Self {
        let stream = TcpStream::connect(cluster.api_address)
            .await
            .expect("the server listens");
        let address = format!("ws://{}/v1/vms/{vm}/serial", cluster.api_address);
        let (socket, _) = tokio_tungstenite::client_async(address, stream)
            .await
            .expect("a console");
        Self {
            socket,
            shown: String::new(),
        }
    }

    /// Types a word that is no command, and waits until the guest has said so.
    async fn ask(&mut self, word: &str) {
        self.socket
            .send(Message::binary(format!("{word}\n").into_bytes()))
            .await
            .expect("the session is open");
        let answered = tokio::time::timeout(ANSWER_PATIENCE, async {
            while self.answers(word) == 0 {
                match self.socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => {
                        self.shown.push_str(&String::from_utf8_lossy(&bytes));
                    }
                    // Asked whether it is still there, it has answered by being read.
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => panic!("the session ended: {other:?}"),
                }
            }
        });
        let answered = answered.await;
        assert!(answered.is_ok(), "no answer to {word}: {}", self.shown);
    }

    /// How often the guest's answer to `word` was shown.
    fn answers(&self, word: &str) -> usize {
        self.shown
            .matches(&format!("unknown command '{word}'; send: help"))
            .count()
    }
}

#[tokio::test]
async fn an_open_console_session_goes_on_where_its_vm_goes() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    create_busy_pilot(&cluster, "wader", "host-1").await;
    let mut session = Session::open(&cluster, "wader").await;
    let mut asked = Vec::new();
    for (flight, target) in ["host-2", "host-1"].into_iter().enumerate() {
        let before = format!("before-{flight}");
        session.ask(&before).await;
        let operation = cluster.migrate("wader", target).await.expect("accepted");
        let ended = cluster
            .wait_for(
                &format!("/v1/operations/{operation}"),
                OPERATION_PATIENCE,
                |operation| !matches!(text(operation, "state"), "pending" | "running"),
            )
            .await
            .expect("it ends");
        assert_eq!(ended["state"], "succeeded", "{ended:#}");
        let after = format!("after-{flight}");
        session.ask(&after).await;
        asked.extend([before, after]);
    }
    // The last one also means that all that came before it has been shown.
    session.ask("at-last").await;
    asked.push("at-last".to_owned());
    for word in &asked {
        assert_eq!(session.answers(word), 1, "{word}: {}", session.shown);
    }
    drop(session);
    verify(&cluster, "wader").await;
}
