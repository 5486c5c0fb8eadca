//! `/v1/vms/{vm}/serial`: a VM's serial console as a WebSocket that stays attached while the VM moves.
//!
//! ```text
//!          opened          the VM is another host's, or the host's stream ends: the VM moved, stopped, is cut off
//! waiting ────────▶ attached ─────────────────────────────────────────────────────────────────┐
//!    ▲   the next view, or RETRY                                                              │
//!    └────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! It ends when the client leaves, the VM is deleted or the server shuts down. Each host first sends the output it
//! has kept, so that after a move the client would see it twice: [`Replay`] takes out what it has had already. What
//! the client types waits until that is over: no answer to it can be taken for something said before.

use super::Api;
use super::access::WEBSOCKET_PROTOCOL;
use super::extract::{Refused, vm_named};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use bytes::Bytes;
use godwit_channel::problem::{PathArgs, Refusal};
use godwit_controller::controller::Duplex;
use godwit_wire::id::{HostId, VmId};
use godwit_wire::problem::Problem;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Longest message from a client.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Input kept for the guest while no host can be reached.
const MAX_WAITING_BYTES: usize = 64 << 10;
/// Output remembered to recognise it when it is sent again; what a host keeps at most.
const REMEMBERED_BYTES: usize = 64 << 10;
/// A host's kept output comes without a pause this long.
const REPLAY_PAUSE: Duration = Duration::from_millis(40);
/// A guest that speaks without end is taken for done with what was kept after this time.
const REPLAY_LIMIT: Duration = Duration::from_secs(1);
/// How long the last words of a guest that has moved are waited for, unless its former host's stream ends before.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// An overlap shorter than this may be chance: a prompt, an empty line.
const LEAST_OVERLAP_BYTES: usize = 24;
/// When nothing changes in the view, the host is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// Silence after which the client is asked whether it is still there.
const PING_EVERY: Duration = Duration::from_secs(20);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(attach))
}

/// Attaches to a VM's serial console (WebSocket, subprotocol `godwit`, binary messages both ways).
#[utoipa::path(
    get, path = "/v1/vms/{vm}/serial", tag = "vms", params(("vm" = String, Path, description = "Id or name")),
    responses((status = 101, description = "Bytes of the serial port follow, first the latest output."), Refused)
)]
async fn attach(
    State(api): State<Api>,
    PathArgs(name): PathArgs<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let vm = vm_named(&api.controller.view(), &name)?.id;
    let upgrade = upgrade.map_err(|rejection| {
        Refusal(
            Problem::new(
                426,
                "websocket-needed",
                "A WebSocket is needed",
                rejection.body_text(),
            )
            .with_remedy("use `godwit vm console`, the web console or another WebSocket client"),
        )
    })?;
    Ok(upgrade
        .protocols([WEBSOCKET_PROTOCOL])
        .max_message_size(MAX_MESSAGE_BYTES)
        .on_upgrade(move |socket| async move {
            Bridge {
                api,
                vm,
                socket,
                waiting: VecDeque::new(),
            }
            .run()
            .await
        }))
}

struct Bridge {
    api: Api,
    vm: VmId,
    socket: WebSocket,
    /// Input that no host has taken yet.
    waiting: VecDeque<Bytes>,
}

/// Why the bridge ends.
enum End {
    ClientGone,
    VmDeleted,
    ShuttingDown,
}

impl Bridge {
    async fn run(mut self) {
        let mut replay = Replay::default();
        let end = loop {
            let (owner, host) = match self.open().await {
                Ok(opened) => opened,
                Err(end) => break end,
            };
            if let Err(end) = self.pump(owner, host, &mut replay).await {
                break end;
            }
            replay.expect();
        };
        let (code, reason) = match end {
            End::ClientGone => return,
            End::VmDeleted => (close_code::NORMAL, "the VM was deleted"),
            End::ShuttingDown => (close_code::AWAY, "the server shuts down"),
        };
        let frame = CloseFrame {
            code,
            reason: reason.into(),
        };
        // The client may be gone meanwhile, which is the same to us.
        let _ = self.socket.send(Message::Close(Some(frame))).await;
    }

    /// Opens the console at the host that has the VM now, however long that takes.
    async fn open(&mut self) -> Result<(HostId, Box<dyn Duplex>), End> {
        let mut changed = self.api.controller.changed();
        let shutdown = self.api.shutdown.clone();
        loop {
            changed.mark_unchanged();
            let view = self.api.controller.view();
            let Some(vm) = view.vms.get(&self.vm) else {
                return Err(End::VmDeleted);
            };
            if let Some(owner) = vm.owner {
                match self.api.controller.serial(self.vm).await {
                    // Should it have moved just now, that is seen at once and the new owner's is opened.
                    Ok(host) => return Ok((owner, host)),
                    Err(problem) => {
                        tracing::debug!(vm = %self.vm, %problem, "serial console not open yet")
                    }
                }
            }
            let retry = tokio::time::sleep(RETRY);
            tokio::pin!(retry);
            loop {
                tokio::select! {
                    _ = changed.changed() => break,
                    () = &mut retry => break,
                    () = shutdown.cancelled() => return Err(End::ShuttingDown),
                    message = self.socket.recv() => self.keep(message)?,
                }
            }
        }
    }

    /// Keeps input for the guest until a host takes it; too much of it is dropped, oldest first.
    fn keep(&mut self, message: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        if let Some(bytes) = input(message)? {
            self.waiting.push_back(bytes);
            let mut kept: usize = self.waiting.iter().map(Bytes::len).sum();
            while kept > MAX_WAITING_BYTES {
                kept -= self
                    .waiting
                    .pop_front()
                    .map_or(kept, |dropped| dropped.len());
            }
        }
        Ok(())
    }

    /// Carries bytes both ways until the host's stream ends, or the VM is no longer `owner`'s: one that has left may
    /// have its process there for long, for memory that follows it. Its last words are taken along, and what is typed
    /// from then on waits for the new host.
    async fn pump(
        &mut self,
        owner: HostId,
        host: Box<dyn Duplex>,
        replay: &mut Replay,
    ) -> Result<(), End> {
        let (mut from_guest, mut to_guest) = tokio::io::split(host);
        let shutdown = self.api.shutdown.clone();
        let mut buffer = vec![0; 16 << 10];
        let replay_ends = Instant::now() + REPLAY_LIMIT;
        let mut leave_at = None;
        loop {
            // Looked at before each piece: what a host gets that has not the VM any more is lost.
            while !replay.is_expected()
                && !is_others(&self.api, self.vm, owner)
                && let Some(bytes) = self.waiting.front()
            {
                if to_guest.write_all(bytes).await.is_err() {
                    return Ok(());
                }
                self.waiting.pop_front();
            }
            if to_guest.flush().await.is_err() {
                return Ok(());
            }
            let until = |end: Instant| end.saturating_duration_since(Instant::now());
            let pause = match leave_at {
                Some(leave_at) => until(leave_at),
                None if replay.is_expected() => REPLAY_PAUSE.min(until(replay_ends)),
                None => PING_EVERY,
            };
            tokio::select! {
                read = tokio::time::timeout(pause, from_guest.read(&mut buffer)) => {
                    let fresh = match read {
                        Ok(Ok(0) | Err(_)) => {
                            self.tell(replay.settle()).await?;
                            return Ok(());
                        }
                        Ok(Ok(length)) => replay.pass(&buffer[..length]),
                        Err(_) if leave_at.is_some() => {
                            self.tell(replay.settle()).await?;
                            return Ok(());
                        }
                        Err(_) if replay.is_expected() => replay.settle(),
                        Err(_) => {
                            self.socket.send(Message::Ping(Bytes::new())).await.map_err(|_| End::ClientGone)?;
                            None
                        }
                    };
                    self.tell(fresh).await?;
                }
                message = self.socket.recv() => self.keep(message)?,
                () = has_left(&self.api, self.vm, owner), if leave_at.is_none() => {
                    leave_at = Some(Instant::now() + LAST_WORDS);
                }
                () = shutdown.cancelled() => return Err(End::ShuttingDown),
            }
        }
    }

    async fn tell(&mut self, output: Option<Bytes>) -> Result<(), End> {
        match output {
            Some(bytes) => self
                .socket
                .send(Message::Binary(bytes))
                .await
                .map_err(|_| End::ClientGone),
            None => Ok(()),
        }
    }
}

/// Whether `vm` is another host's than `owner`'s.
fn is_others(api: &Api, vm: VmId, owner: HostId) -> bool {
    let view = api.controller.view();
    let now = view.vms.get(&vm).and_then(|vm| vm.owner);
    now.is_some_and(|now| now != owner)
}

/// Waits until it is.
async fn has_left(api: &Api, vm: VmId, owner: HostId) {
    let mut changed = api.controller.changed();
    loop {
        changed.mark_unchanged();
        if is_others(api, vm, owner) {
            return;
        }
        if changed.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// What a client typed, if the message says anything.
fn input(message: Option<Result<Message, axum::Error>>) -> Result<Option<Bytes>, End> {
    match message {
        Some(Ok(Message::Binary(bytes))) => Ok(Some(bytes)),
        Some(Ok(Message::Text(text))) => Ok(Some(text.into())),
        Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(None),
        Some(Ok(Message::Close(_)) | Err(_)) | None => Err(End::ClientGone),
    }
}

/// Takes out of a host's kept output what the client has had already.
#[derive(Debug, Default)]
struct Replay {
    /// The latest output the client has had.
    told: Vec<u8>,
    /// Output of a new host, until its kept part is complete.
    held: Option<Vec<u8>>,
}

impl Replay {
    /// A new host is about to send what it has kept.
    fn expect(&mut self) {
        self.held = Some(Vec::new());
    }

    fn is_expected(&self) -> bool {
        self.held.is_some()
    }

    /// Output from the host; gives what the client shall have now.
    fn pass(&mut self, bytes: &[u8]) -> Option<Bytes> {
        match &mut self.held {
            None => self.tell(bytes.to_vec()),
            Some(held) => {
                held.extend_from_slice(bytes);
                // More than any host keeps: nothing older can follow.
                if held.len() > REMEMBERED_BYTES {
                    self.settle()
                } else {
                    None
                }
            }
        }
    }

    /// The kept part is complete.
    fn settle(&mut self) -> Option<Bytes> {
        let held = self.held.take()?;
        let known = overlap(&self.told, &held);
        self.tell(held[known..].to_vec())
    }

    fn tell(&mut self, bytes: Vec<u8>) -> Option<Bytes> {
        self.told.extend_from_slice(&bytes);
        let excess = self.told.len().saturating_sub(REMEMBERED_BYTES);
        self.told.drain(..excess);
        (!bytes.is_empty()).then(|| bytes.into())
    }
}

/// Length of the longest beginning of `sent` with which `told` ends; 0 when that may be chance.
fn overlap(told: &[u8], sent: &[u8]) -> usize {
    // Knuth, Morris and Pratt: how much of the beginning of `sent` ends at each place.
    let mut fallback = vec![0usize; sent.len()];
    let mut matched = 0;
    for at in 1..sent.len() {
        while matched > 0 && sent[at] != sent[matched] {
            matched = fallback[matched - 1];
        }
        matched += usize::from(sent[at] == sent[matched]);
        fallback[at] = matched;
    }
    matched = 0;
    for byte in told {
        if matched == sent.len() && matched > 0 {
            matched = fallback[matched - 1];
        }
        while matched > 0 && *byte != sent[matched] {
            matched = fallback[matched - 1];
        }
        matched += usize::from(sent.first().is_some_and(|_| *byte == sent[matched]));
    }
    if matched == told.len() || matched >= LEAST_OVERLAP_BYTES {
        matched
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(replay: &mut Replay, bytes: &str) -> String {
        let mut seen = replay.pass(bytes.as_bytes()).unwrap_or_default().to_vec();
        seen.extend(replay.settle().unwrap_or_default());
        String::from_utf8(seen).expect("text")
    }

    #[test]
    fn output_kept_by_the_new_host_is_not_told_twice() {
        let mut replay = Replay::default();
        assert_eq!(
            passed(
                &mut replay,
                "ok ticks=1 cpu=0 gap=2\nok ticks=2 cpu=0 gap=2\n"
            ),
            "ok ticks=1 cpu=0 gap=2\nok ticks=2 cpu=0 gap=2\n"
        );
        replay.expect();
        let kept = "ok ticks=1 cpu=0 gap=2\nok ticks=2 cpu=0 gap=2\nok ticks=3\n";
        assert_eq!(passed(&mut replay, kept), "ok ticks=3\n");
    }

    #[test]
    fn a_host_that_kept_nothing_loses_nothing() {
        let mut replay = Replay::default();
        passed(&mut replay, "pilot> ticks\nok ticks=1\npilot> ");
        replay.expect();
        assert_eq!(
            passed(&mut replay, "pilot> again\n"),
            "pilot> again\n",
            "a prompt is no overlap"
        );
    }

    #[test]
    fn the_overlap_is_the_longest_and_ends_where_the_client_is() {
        assert_eq!(overlap(b"", b"abc"), 0);
        assert_eq!(overlap(b"abc", b""), 0);
        let line = b"abcabcabcabcabcabcabcabcabcabc";
        assert_eq!(overlap(line, line), line.len());
        let longer = [line.as_slice(), b"abc"].concat();
        assert_eq!(overlap(line, &longer), line.len());
        assert_eq!(overlap(&longer, line), line.len());
    }

    proptest::proptest! {
        #[test]
        fn whatever_was_told_before_only_the_new_comes_through(
            told in proptest::collection::vec(0u8..255, 24..200), new in proptest::collection::vec(255u8..=255, 0..20)
        ) {
            let mut replay = Replay::default();
            replay.pass(&told);
            replay.expect();
            let mut seen = replay.pass(&[told, new.clone()].concat()).unwrap_or_default().to_vec();
            seen.extend(replay.settle().unwrap_or_default());
            proptest::prop_assert_eq!(seen, new);
        }
    }
}
