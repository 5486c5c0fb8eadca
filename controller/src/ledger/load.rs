//! Reading everything: at the start, and after a transaction whose outcome is unknown.

use super::Books;
use super::draft::key;
use crate::model::{DeletedVm, Event};
use crate::store::{Entry, Store, StoreError};
use crate::view::{Index, NamesAre, View};
use godwit_wire::id::VmId;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Everything in the store.
pub(super) struct Loaded {
    pub(super) view: View,
    pub(super) books: Books,
    pub(super) events: VecDeque<Arc<Event>>,
    pub(super) deleted: BTreeMap<VmId, DeletedVm>,
}

fn parse<T: DeserializeOwned>(entry: &Entry) -> Result<T, StoreError> {
    serde_json::from_slice(&entry.value).map_err(|error| {
        tracing::error!(key = entry.key, %error, "a record cannot be read");
        StoreError::Engine {
            action: "understand a record",
            source: Box::new(error),
        }
    })
}

/// One consistent picture: everything is read with one call.
pub(super) fn everything(store: &dyn Store) -> Result<Loaded, StoreError> {
    let (entries, revision) = store.list("")?;
    let mut view = View {
        version: 1,
        revision,
        ..View::default()
    };
    let mut books = Books::default();
    let mut events = VecDeque::new();
    let mut deleted = BTreeMap::new();
    let (mut vms, mut hosts, mut operations) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (mut maintenances, mut migrations) = (BTreeMap::new(), BTreeMap::new());
    let (mut images, mut disks, mut networks) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut snapshots = BTreeMap::new();
    for entry in &entries {
        books.revisions.insert(entry.key.clone(), entry.revision);
        let under = |prefix: &str| entry.key.starts_with(prefix);
        if under(key::VM) {
            let record: crate::model::Vm = parse(entry)?;
            vms.insert(record.id, Arc::new(record));
        } else if under(key::HOST) {
            let record: crate::model::Host = parse(entry)?;
            hosts.insert(record.id, Arc::new(record));
        } else if under(key::OPERATION) {
            let record: crate::model::Operation = parse(entry)?;
            operations.insert(record.id, Arc::new(record));
        } else if under(key::MAINTENANCE) {
            let record: crate::model::Maintenance = parse(entry)?;
            maintenances.insert(record.id, Arc::new(record));
        } else if under(key::MIGRATION) {
            let record: crate::model::Migration = parse(entry)?;
            migrations.insert(record.id, Arc::new(record));
        } else if under(key::IMAGE) {
            let record: crate::model::Image = parse(entry)?;
            images.insert(record.id, Arc::new(record));
        } else if under(key::DISK) {
            let record: crate::model::Disk = parse(entry)?;
            disks.insert(record.id, Arc::new(record));
        } else if under(key::NETWORK) {
            let record: crate::model::Network = parse(entry)?;
            networks.insert(record.id(), Arc::new(record));
        } else if under(key::SNAPSHOT) {
            let record: crate::model::Snapshot = parse(entry)?;
            snapshots.insert(record.id, Arc::new(record));
        } else if under(key::EVENT) {
            events.push_back(Arc::new(parse::<Event>(entry)?));
        } else if under(key::DELETED_VM) {
            let record: DeletedVm = parse(entry)?;
            deleted.insert(record.vm, record);
        } else if let Some(digest) = entry.key.strip_prefix(key::TOKEN) {
            books.tokens.insert(digest.to_owned(), parse(entry)?);
        }
    }
    view.vms = Arc::new(vms);
    view.hosts = Arc::new(hosts);
    view.operations = Arc::new(operations);
    view.maintenances = Arc::new(maintenances);
    view.migrations = Arc::new(migrations);
    view.images = Arc::new(images);
    view.disks = Arc::new(disks);
    view.networks = Arc::new(networks);
    view.snapshots = Arc::new(snapshots);
    view.event_revision = events.back().map_or(0, |event: &Arc<Event>| event.revision);
    view.index = Arc::new(Index::of(&view, NamesAre::Changed));
    Ok(Loaded {
        view,
        books,
        events,
        deleted,
    })
}
