//! Writes collected by a decider.

use super::Books;
use crate::model::limits::MAX_EVENTS;
use crate::model::{
    Actor, DeletedVm, Disk, Event, Host, Image, JoinToken, Maintenance, Migration, Network,
    Operation, Severity, Snapshot, Subject, Vm,
};
use crate::store::{Compare, Revision, Txn, Write};
use crate::view::{NamesAre, View, attachments, leases};
use godwit_wire::devices::DiskAccess;
use godwit_wire::id::{
    DiskId, HostId, ImageId, MaintenanceId, MigrationId, NetworkId, OperationId, SnapshotId, VmId,
};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Writes that become one transaction.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    view: &'a View,
    books: &'a Books,
    now: Timestamp,
    records: Records,
    /// Keys to compare and to write; `None` deletes.
    raw: BTreeMap<String, Option<Vec<u8>>>,
    tokens: BTreeMap<String, Option<JoinToken>>,
    deleted: Vec<DeletedVm>,
    forgotten: BTreeSet<VmId>,
    events: Vec<Arc<Event>>,
    broken: Option<serde_json::Error>,
}

/// Changed records; `None` is gone.
#[derive(Debug, Default)]
pub(super) struct Records {
    vms: BTreeMap<VmId, Option<Arc<Vm>>>,
    hosts: BTreeMap<HostId, Option<Arc<Host>>>,
    operations: BTreeMap<OperationId, Option<Arc<Operation>>>,
    maintenances: BTreeMap<MaintenanceId, Option<Arc<Maintenance>>>,
    migrations: BTreeMap<MigrationId, Option<Arc<Migration>>>,
    images: BTreeMap<ImageId, Option<Arc<Image>>>,
    disks: BTreeMap<DiskId, Option<Arc<Disk>>>,
    networks: BTreeMap<NetworkId, Option<Arc<Network>>>,
    snapshots: BTreeMap<SnapshotId, Option<Arc<Snapshot>>>,
}

/// A finished draft.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) txn: Txn,
    pub(super) records: Records,
    pub(super) tokens: BTreeMap<String, Option<JoinToken>>,
    pub(super) deleted: Vec<DeletedVm>,
    pub(super) forgotten: BTreeSet<VmId>,
    pub(super) events: Vec<Arc<Event>>,
}

/// Keys of the store.
pub(super) mod key {
    use std::fmt::Display;

    pub(in crate::ledger) const VM: &str = "vm/";
    pub(in crate::ledger) const HOST: &str = "host/";
    pub(in crate::ledger) const OPERATION: &str = "operation/";
    pub(in crate::ledger) const MAINTENANCE: &str = "maintenance/";
    pub(in crate::ledger) const MIGRATION: &str = "migration/";
    pub(in crate::ledger) const IMAGE: &str = "image/";
    pub(in crate::ledger) const DISK: &str = "disk/";
    pub(in crate::ledger) const NETWORK: &str = "network/";
    pub(in crate::ledger) const SNAPSHOT: &str = "snapshot/";
    pub(in crate::ledger) const EVENT: &str = "event/";
    pub(in crate::ledger) const TOKEN: &str = "token/";
    pub(in crate::ledger) const DELETED_VM: &str = "deleted-vm/";

    /// Held by the living VM of that name: what makes names unique.
    pub(in crate::ledger) fn vm_name(name: &str) -> String {
        format!("name/vm/{name}")
    }

    /// As [`vm_name`], for hosts.
    pub(in crate::ledger) fn host_name(name: &str) -> String {
        format!("name/host/{name}")
    }

    /// As [`vm_name`], for images.
    pub(in crate::ledger) fn image_name(name: &str) -> String {
        format!("name/image/{name}")
    }

    /// As [`vm_name`], for disks.
    pub(in crate::ledger) fn disk_name(name: &str) -> String {
        format!("name/disk/{name}")
    }

    /// As [`vm_name`], for networks.
    pub(in crate::ledger) fn network_name(name: &str) -> String {
        format!("name/network/{name}")
    }

    /// As [`vm_name`], for the snapshots of a VM.
    pub(in crate::ledger) fn snapshot_name(vm: impl Display, name: &str) -> String {
        format!("name/snapshot/{vm}/{name}")
    }

    /// Held by the VM that may write the disk: what keeps a disk to one writer.
    pub(in crate::ledger) fn attachment(disk: impl Display) -> String {
        format!("attachment/{disk}")
    }

    /// Held by the VM that has the address: what makes addresses unique.
    pub(in crate::ledger) fn lease(network: impl Display, address: impl Display) -> String {
        format!("lease/{network}/{address}")
    }

    pub(in crate::ledger) fn of(prefix: &str, id: impl Display) -> String {
        format!("{prefix}{id}")
    }

    /// Sorts by number.
    pub(in crate::ledger) fn event(revision: u64) -> String {
        format!("{EVENT}{revision:020}")
    }
}

impl<'a> Draft<'a> {
    pub(super) fn on(view: &'a View, books: &'a Books) -> Self {
        Self {
            view,
            books,
            now: Timestamp::now(),
            records: Records::default(),
            raw: BTreeMap::new(),
            tokens: BTreeMap::new(),
            deleted: Vec::new(),
            forgotten: BTreeSet::new(),
            events: Vec::new(),
            broken: None,
        }
    }

    /// Time to write into records.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    fn put_raw(&mut self, key: String, value: &impl Serialize) {
        match serde_json::to_vec(value) {
            Ok(bytes) => drop(self.raw.insert(key, Some(bytes))),
            Err(error) => self.broken = Some(error),
        }
    }

    /// Writes a VM; its name, its addresses and the disks it may write are taken or changed along with it.
    pub(crate) fn put_vm(&mut self, mut vm: Vm) {
        let before = match self.records.vms.get(&vm.id) {
            Some(drafted) => drafted.clone(),
            None => self.view.vms.get(&vm.id).cloned(),
        };
        let before = before.as_deref();
        if let Some(before) = before.filter(|before| before.name != vm.name) {
            self.raw.insert(key::vm_name(&before.name), None);
        }
        if before.is_none_or(|before| before.name != vm.name) {
            self.put_raw(key::vm_name(&vm.name), &vm.id);
        }
        let (gone, new) = (held(before), held(Some(&vm)));
        for key in gone.difference(&new) {
            self.raw.insert(key.clone(), None);
        }
        for key in new.difference(&gone) {
            self.put_raw(key.clone(), &vm.id);
        }
        vm.changed_at = self.now;
        self.put_raw(key::of(key::VM, vm.id), &vm);
        self.records.vms.insert(vm.id, Some(Arc::new(vm)));
    }

    /// Deletes a VM, frees its name and all it holds, and remembers its id.
    pub(crate) fn delete_vm(&mut self, vm: &Vm) {
        for key in held(self.view.vms.get(&vm.id).map(AsRef::as_ref)) {
            self.raw.insert(key, None);
        }
        self.raw.insert(key::of(key::VM, vm.id), None);
        self.raw.insert(key::vm_name(&vm.name), None);
        let deleted = DeletedVm {
            vm: vm.id,
            epoch: vm.epoch,
            left_behind: vm.left_behind.clone(),
        };
        self.put_deleted(deleted);
        self.records.vms.insert(vm.id, None);
    }

    /// Writes what is remembered of a deleted VM.
    pub(crate) fn put_deleted(&mut self, deleted: DeletedVm) {
        self.put_raw(key::of(key::DELETED_VM, deleted.vm), &deleted);
        self.deleted.push(deleted);
    }

    /// Forgets that a VM was deleted.
    pub(crate) fn forget_deleted(&mut self, vm: VmId) {
        self.raw.insert(key::of(key::DELETED_VM, vm), None);
        self.forgotten.insert(vm);
    }

    /// Writes a host; its name is taken along with it.
    pub(crate) fn put_host(&mut self, host: Host) {
        let before = self.view.hosts.get(&host.id);
        if let Some(before) = before.filter(|before| before.name() != host.name()) {
            self.raw.insert(key::host_name(before.name()), None);
        }
        if before.is_none_or(|before| before.name() != host.name()) {
            self.put_raw(key::host_name(host.name()), &host.id);
        }
        self.put_raw(key::of(key::HOST, host.id), &host);
        self.records.hosts.insert(host.id, Some(Arc::new(host)));
    }

    /// Deletes a host and frees its name.
    pub(crate) fn delete_host(&mut self, host: &Host) {
        self.raw.insert(key::of(key::HOST, host.id), None);
        self.raw.insert(key::host_name(host.name()), None);
        self.records.hosts.insert(host.id, None);
    }

    /// Writes an operation.
    pub(crate) fn put_operation(&mut self, operation: Operation) {
        self.put_raw(key::of(key::OPERATION, operation.id), &operation);
        self.records
            .operations
            .insert(operation.id, Some(Arc::new(operation)));
    }

    /// Forgets an operation.
    pub(crate) fn delete_operation(&mut self, id: OperationId) {
        self.raw.insert(key::of(key::OPERATION, id), None);
        self.records.operations.insert(id, None);
    }

    /// Writes a maintenance.
    pub(crate) fn put_maintenance(&mut self, mut maintenance: Maintenance) {
        maintenance.changed_at = self.now;
        self.put_raw(key::of(key::MAINTENANCE, maintenance.id), &maintenance);
        self.records
            .maintenances
            .insert(maintenance.id, Some(Arc::new(maintenance)));
    }

    /// Forgets a maintenance.
    pub(crate) fn delete_maintenance(&mut self, id: MaintenanceId) {
        self.raw.insert(key::of(key::MAINTENANCE, id), None);
        self.records.maintenances.insert(id, None);
    }

    /// Writes a migration.
    pub(crate) fn put_migration(&mut self, migration: Migration) {
        self.put_raw(key::of(key::MIGRATION, migration.id), &migration);
        self.records
            .migrations
            .insert(migration.id, Some(Arc::new(migration)));
    }

    /// Forgets a migration.
    pub(crate) fn delete_migration(&mut self, id: MigrationId) {
        self.raw.insert(key::of(key::MIGRATION, id), None);
        self.records.migrations.insert(id, None);
    }

    /// The disk as it stands in this draft.
    pub(crate) fn disk(&self, id: DiskId) -> Option<Disk> {
        match self.records.disks.get(&id) {
            Some(drafted) => drafted.as_deref().cloned(),
            None => self.view.disks.get(&id).map(|disk| disk.as_ref().clone()),
        }
    }

    /// Writes a disk; its name is taken along with it.
    pub(crate) fn put_disk(&mut self, mut disk: Disk) {
        if self.disk(disk.id).is_none() {
            self.put_raw(key::disk_name(&disk.name), &disk.id);
        }
        disk.changed_at = self.now;
        self.put_raw(key::of(key::DISK, disk.id), &disk);
        self.records.disks.insert(disk.id, Some(Arc::new(disk)));
    }

    /// Deletes a disk and frees its name.
    pub(crate) fn delete_disk(&mut self, disk: &Disk) {
        self.raw.insert(key::of(key::DISK, disk.id), None);
        self.raw.insert(key::disk_name(&disk.name), None);
        self.records.disks.insert(disk.id, None);
    }

    /// Writes an image; its name is taken along with it.
    pub(crate) fn put_image(&mut self, mut image: Image) {
        if !self.view.images.contains_key(&image.id) {
            self.put_raw(key::image_name(&image.name), &image.id);
        }
        image.changed_at = self.now;
        self.put_raw(key::of(key::IMAGE, image.id), &image);
        self.records.images.insert(image.id, Some(Arc::new(image)));
    }

    /// Deletes an image and frees its name.
    pub(crate) fn delete_image(&mut self, image: &Image) {
        self.raw.insert(key::of(key::IMAGE, image.id), None);
        self.raw.insert(key::image_name(&image.name), None);
        self.records.images.insert(image.id, None);
    }

    /// The snapshot as it stands in this draft.
    pub(crate) fn snapshot(&self, id: SnapshotId) -> Option<Snapshot> {
        match self.records.snapshots.get(&id) {
            Some(drafted) => drafted.as_deref().cloned(),
            None => self
                .view
                .snapshots
                .get(&id)
                .map(|snapshot| snapshot.as_ref().clone()),
        }
    }

    /// Writes a snapshot; its name is taken along with it.
    pub(crate) fn put_snapshot(&mut self, mut snapshot: Snapshot) {
        if self.snapshot(snapshot.id).is_none() {
            let name = key::snapshot_name(snapshot.vm, &snapshot.name);
            self.put_raw(name, &snapshot.id);
        }
        snapshot.changed_at = self.now;
        self.put_raw(key::of(key::SNAPSHOT, snapshot.id), &snapshot);
        self.records
            .snapshots
            .insert(snapshot.id, Some(Arc::new(snapshot)));
    }

    /// Deletes a snapshot and frees its name.
    pub(crate) fn delete_snapshot(&mut self, snapshot: &Snapshot) {
        self.raw.insert(key::of(key::SNAPSHOT, snapshot.id), None);
        let name = key::snapshot_name(snapshot.vm, &snapshot.name);
        self.raw.insert(name, None);
        self.records.snapshots.insert(snapshot.id, None);
    }

    /// Writes a network; its name is taken along with it.
    pub(crate) fn put_network(&mut self, mut network: Network) {
        if !self.view.networks.contains_key(&network.id()) {
            self.put_raw(key::network_name(network.name()), &network.id());
        }
        network.changed_at = self.now;
        self.put_raw(key::of(key::NETWORK, network.id()), &network);
        self.records
            .networks
            .insert(network.id(), Some(Arc::new(network)));
    }

    /// Deletes a network and frees its name.
    pub(crate) fn delete_network(&mut self, network: &Network) {
        self.raw.insert(key::of(key::NETWORK, network.id()), None);
        self.raw.insert(key::network_name(network.name()), None);
        self.records.networks.insert(network.id(), None);
    }

    /// The join token with this digest.
    pub(crate) fn token(&self, digest: &str) -> Option<&'a JoinToken> {
        self.books.tokens.get(digest)
    }

    /// All join tokens by digest.
    pub(crate) fn tokens(&self) -> &'a BTreeMap<String, JoinToken> {
        &self.books.tokens
    }

    /// Writes a join token.
    pub(crate) fn put_token(&mut self, digest: String, token: JoinToken) {
        self.put_raw(key::of(key::TOKEN, &digest), &token);
        self.tokens.insert(digest, Some(token));
    }

    /// Forgets a join token.
    pub(crate) fn delete_token(&mut self, digest: String) {
        self.raw.insert(key::of(key::TOKEN, &digest), None);
        self.tokens.insert(digest, None);
    }

    /// Tells what happens, in the same transaction.
    pub(crate) fn event(
        &mut self,
        severity: Severity,
        kind: &str,
        subject: Subject,
        actor: &Actor,
        message: impl Into<String>,
    ) {
        let revision = self.view.event_revision + 1 + self.events.len() as u64;
        let event = Event {
            revision,
            time: self.now,
            kind: kind.into(),
            severity,
            subject,
            message: message.into(),
            actor: actor.clone(),
        };
        self.put_raw(key::event(revision), &event);
        if let Some(oldest) = revision.checked_sub(MAX_EVENTS as u64)
            && oldest > 0
        {
            self.raw.insert(key::event(oldest), None);
        }
        self.events.push(Arc::new(event));
    }

    /// Tells that all is well.
    pub(crate) fn info(
        &mut self,
        kind: &str,
        subject: Subject,
        actor: &Actor,
        message: impl Into<String>,
    ) {
        self.event(Severity::Info, kind, subject, actor, message);
    }

    /// Tells that someone should look by day.
    pub(crate) fn warning(
        &mut self,
        kind: &str,
        subject: Subject,
        actor: &Actor,
        message: impl Into<String>,
    ) {
        self.event(Severity::Warning, kind, subject, actor, message);
    }

    /// Tells that someone should look now.
    pub(crate) fn error(
        &mut self,
        kind: &str,
        subject: Subject,
        actor: &Actor,
        message: impl Into<String>,
    ) {
        self.event(Severity::Error, kind, subject, actor, message);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.raw.is_empty() && self.broken.is_none()
    }

    pub(super) fn finish(self) -> Result<Written, serde_json::Error> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let compare = |key: &String| match self.books.revisions.get(key) {
            Some(revision) => Compare::Unchanged {
                key: key.clone(),
                revision: *revision,
            },
            None => Compare::Absent { key: key.clone() },
        };
        let compares = self.raw.keys().map(compare).collect();
        let writes = self.raw.into_iter().map(|(key, value)| match value {
            Some(value) => Write::Put { key, value },
            None => Write::Delete { key },
        });
        Ok(Written {
            txn: Txn {
                compares,
                writes: writes.collect(),
            },
            records: self.records,
            tokens: self.tokens,
            deleted: self.deleted,
            forgotten: self.forgotten,
            events: self.events,
        })
    }
}

impl Written {
    pub(super) fn note_revisions(
        &self,
        revisions: &mut BTreeMap<String, Revision>,
        revision: Revision,
    ) {
        for write in &self.txn.writes {
            match write {
                Write::Put { key, .. } => drop(revisions.insert(key.clone(), revision)),
                Write::Delete { key } => drop(revisions.remove(key)),
            }
        }
    }
}

impl Records {
    /// Whether a name comes, goes or changes with these records.
    pub(super) fn names(&self, before: &View) -> NamesAre {
        let same = |old: Option<&str>, new: Option<&str>| old == new;
        let vms = self.vms.iter().all(|(id, vm)| {
            let old = before.vms.get(id).map(|vm| vm.name.as_str());
            same(old, vm.as_ref().map(|vm| vm.name.as_str()))
        });
        let hosts = self.hosts.iter().all(|(id, host)| {
            same(
                before.hosts.get(id).map(|host| host.name()),
                host.as_ref().map(|host| host.name()),
            )
        });
        let images = self.images.iter().all(|(id, image)| {
            same(
                before.images.get(id).map(|image| image.name.as_str()),
                image.as_ref().map(|image| image.name.as_str()),
            )
        });
        let disks = self.disks.iter().all(|(id, disk)| {
            same(
                before.disks.get(id).map(|disk| disk.name.as_str()),
                disk.as_ref().map(|disk| disk.name.as_str()),
            )
        });
        let networks = self.networks.iter().all(|(id, network)| {
            same(
                before.networks.get(id).map(|network| network.name()),
                network.as_ref().map(|network| network.name()),
            )
        });
        if vms && hosts && images && disks && networks {
            NamesAre::Same
        } else {
            NamesAre::Changed
        }
    }

    pub(super) fn apply(self, view: &mut View) {
        merge(&mut view.vms, self.vms);
        merge(&mut view.hosts, self.hosts);
        merge(&mut view.operations, self.operations);
        merge(&mut view.maintenances, self.maintenances);
        merge(&mut view.migrations, self.migrations);
        merge(&mut view.images, self.images);
        merge(&mut view.disks, self.disks);
        merge(&mut view.networks, self.networks);
        merge(&mut view.snapshots, self.snapshots);
    }
}

/// Keys a VM holds besides its name: the disks it may write and its addresses.
fn held(vm: Option<&Vm>) -> BTreeSet<String> {
    let Some(vm) = vm else {
        return BTreeSet::new();
    };
    let written = attachments(&vm.spec)
        .filter(|attached| attached.access == DiskAccess::ReadWrite)
        .map(|attached| key::attachment(attached.disk));
    let addresses = leases(&vm.spec).map(|(network, address)| key::lease(network, address));
    written.chain(addresses).collect()
}

fn merge<Id: Ord + Copy, T>(
    records: &mut crate::view::Records<Id, T>,
    changed: BTreeMap<Id, Option<Arc<T>>>,
) {
    if changed.is_empty() {
        return;
    }
    let records = Arc::make_mut(records);
    for (id, record) in changed {
        match record {
            Some(record) => drop(records.insert(id, record)),
            None => drop(records.remove(&id)),
        }
    }
}
