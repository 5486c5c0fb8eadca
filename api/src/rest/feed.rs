//! One task that tells all event streams what has changed, so that each change is found and written once.
//!
//! ```text
//! controller's view ─▶ compare with what was told ─▶ one block of SSE text ─▶ every subscriber
//! ```
//! Every resource and every deletion is kept with the event revision at which it last changed, so that a stream
//! resumed after revision R is first told everything that has changed since. A subscriber that falls behind by
//! more than [`BLOCKS_KEPT`] blocks loses its place and has to resume.

use super::convert;
use crate::resource::{Deleted, Event};
use bytes::Bytes;
use godwit_controller::controller::Controller;
use godwit_controller::view::View;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Blocks a subscriber may be behind.
const BLOCKS_KEPT: usize = 256;
/// Deletions remembered.
const DELETIONS_KEPT: usize = 10_000;
/// Events told in one block.
const EVENTS_IN_BLOCK: usize = 1_000;
/// Changes within this time are told together.
const GATHER_TIME: Duration = Duration::from_millis(50);

/// Kinds of resources, as the stream names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Vm,
    Host,
    Operation,
    Maintenance,
    Migration,
    Image,
    Disk,
    Network,
    Pool,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Host => "host",
            Self::Operation => "operation",
            Self::Maintenance => "maintenance",
            Self::Migration => "migration",
            Self::Image => "image",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Pool => "pool",
        }
    }
}

type Key = (Kind, Uuid);

/// A resource as it was last told.
#[derive(Debug)]
struct Told {
    json: String,
    /// Event revision when it last changed.
    changed_at: u64,
}

#[derive(Debug, Default)]
struct Memory {
    resources: BTreeMap<Key, Told>,
    deletions: VecDeque<(u64, Key)>,
    /// What was deleted at or before this revision is not remembered.
    deletions_since: u64,
    /// Latest event told.
    revision: u64,
}

/// The block that brings a new subscriber up to date, and the blocks that follow it.
pub(super) struct Subscription {
    pub(super) first: Bytes,
    pub(super) following: broadcast::Receiver<Bytes>,
}

/// Hands out subscriptions; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Feed {
    controller: Controller,
    memory: Arc<Mutex<Memory>>,
    blocks: broadcast::Sender<Bytes>,
}

impl Feed {
    /// Starts the task; it ends with the controller or at shutdown.
    pub(super) fn start(controller: Controller, shutdown: CancellationToken) -> Self {
        let (blocks, _) = broadcast::channel(BLOCKS_KEPT);
        let feed = Self {
            controller,
            memory: Arc::default(),
            blocks,
        };
        let view = feed.controller.view();
        {
            let mut memory = feed.memory();
            memory.revision = view.event_revision;
            memory.deletions_since = view.event_revision;
            memory.update(&view);
        }
        let task = feed.clone();
        tokio::spawn(async move {
            let mut changed = task.controller.changed();
            loop {
                let waited = tokio::select! {
                    waited = changed.changed() => waited.is_ok(),
                    () = shutdown.cancelled() => false,
                };
                if !waited {
                    return;
                }
                let next = Instant::now() + GATHER_TIME;
                task.tell();
                tokio::time::sleep_until(next).await;
            }
        });
        feed
    }

    /// Everything that has changed since the event revision `after`, then every change as it comes.
    pub(super) fn subscribe(&self, after: u64) -> Subscription {
        let memory = self.memory();
        let mut block = Block::default();
        if after < memory.deletions_since || after > memory.revision {
            // What was deleted meanwhile is not known any more, or the revision is of another store.
            block.message(
                None,
                "reset",
                &serde_json::json!({ "revision": memory.revision }),
            );
        }
        for event in self.events_between(after, memory.revision, usize::MAX) {
            block.message(Some(event.revision), "event", &event);
        }
        for (_, key) in memory
            .deletions
            .iter()
            .filter(|(revision, _)| *revision >= after)
        {
            block.deleted(key);
        }
        for ((kind, _), told) in memory
            .resources
            .iter()
            .filter(|(_, told)| told.changed_at >= after)
        {
            block.raw(None, kind.name(), &told.json);
        }
        // Subscribed before the memory is let go: the next block is the first that is not in this one.
        Subscription {
            first: block.finish(),
            following: self.blocks.subscribe(),
        }
    }

    fn tell(&self) {
        let mut memory = self.memory();
        let view = self.controller.view();
        let mut block = Block::default();
        for event in self.events_between(memory.revision, view.event_revision, EVENTS_IN_BLOCK) {
            block.message(Some(event.revision), "event", &event);
        }
        memory.revision = view.event_revision;
        for change in memory.update(&view) {
            match change {
                Change::Put(kind, json) => block.raw(None, kind.name(), &json),
                Change::Deleted(key) => block.deleted(&key),
            }
        }
        if !block.is_empty() {
            // An error only says that nobody listens.
            let _ = self.blocks.send(block.finish());
        }
    }

    fn events_between(&self, after: u64, until: u64, limit: usize) -> Vec<Event> {
        if after >= until {
            return Vec::new();
        }
        match self.controller.events_after(after, limit) {
            Ok(events) => events
                .iter()
                .filter(|event| event.revision <= until)
                .map(|event| convert::event(event))
                .collect(),
            Err(problem) => {
                tracing::debug!(%problem, after, "events are gone");
                Vec::new()
            }
        }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        // Nothing in there is left half done by a panic that matters to readers.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Change {
    Put(Kind, String),
    Deleted(Key),
}

impl Memory {
    /// Takes in a view; gives what has changed.
    fn update(&mut self, view: &View) -> Vec<Change> {
        let revision = view.event_revision;
        let mut changes = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        let mut put = |key: Key, json: String| {
            seen.insert(key);
            match self.resources.get_mut(&key) {
                Some(told) if told.json == json => {}
                Some(told) => {
                    *told = Told {
                        json: json.clone(),
                        changed_at: revision,
                    };
                    changes.push(Change::Put(key.0, json));
                }
                None => {
                    self.resources.insert(
                        key,
                        Told {
                            json: json.clone(),
                            changed_at: revision,
                        },
                    );
                    changes.push(Change::Put(key.0, json));
                }
            }
        };
        for (id, host) in view.hosts.iter() {
            put((Kind::Host, id.0), json(&convert::host(view, host)));
        }
        for (id, vm) in view.vms.iter() {
            put((Kind::Vm, id.0), json(&convert::vm(view, vm)));
        }
        for (id, migration) in view.migrations.iter() {
            put(
                (Kind::Migration, id.0),
                json(&convert::migration(view, migration)),
            );
        }
        for (id, operation) in view.operations.iter() {
            put(
                (Kind::Operation, id.0),
                json(&convert::operation(view, operation)),
            );
        }
        for (id, pool) in &view.pools() {
            put((Kind::Pool, id.0), json(&convert::pool(view, pool)));
        }
        for (id, network) in view.networks.iter() {
            put(
                (Kind::Network, id.0),
                json(&convert::network(view, network)),
            );
        }
        for (id, image) in view.images.iter() {
            put((Kind::Image, id.0), json(&convert::image(view, image)));
        }
        for (id, disk) in view.disks.iter() {
            put((Kind::Disk, id.0), json(&convert::disk(view, disk)));
        }
        for (id, maintenance) in view.maintenances.iter() {
            put(
                (Kind::Maintenance, id.0),
                json(&convert::maintenance(maintenance)),
            );
        }
        let gone: Vec<Key> = self
            .resources
            .keys()
            .filter(|key| !seen.contains(key))
            .copied()
            .collect();
        for key in gone {
            self.resources.remove(&key);
            self.deletions.push_back((revision, key));
            changes.push(Change::Deleted(key));
        }
        while self.deletions.len() > DELETIONS_KEPT {
            if let Some((revision, _)) = self.deletions.pop_front() {
                self.deletions_since = revision;
            }
        }
        changes
    }
}

fn json(resource: &impl Serialize) -> String {
    serde_json::to_string(resource).expect("resources have string keys only")
}

/// SSE text.
#[derive(Default)]
struct Block {
    text: String,
}

impl Block {
    fn message(&mut self, id: Option<u64>, event: &str, data: &impl Serialize) {
        self.raw(id, event, &json(data));
    }

    fn deleted(&mut self, (kind, id): &Key) {
        self.message(
            None,
            "deleted",
            &Deleted {
                kind: kind.name().to_owned(),
                id: id.to_string(),
            },
        );
    }

    /// `json` is in one line, as serde_json writes it.
    fn raw(&mut self, id: Option<u64>, event: &str, json: &str) {
        if let Some(id) = id {
            self.text.push_str(&format!("id: {id}\n"));
        }
        self.text.push_str("event: ");
        self.text.push_str(event);
        self.text.push_str("\ndata: ");
        self.text.push_str(json);
        self.text.push_str("\n\n");
    }

    fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    fn finish(self) -> Bytes {
        self.text.into()
    }
}
