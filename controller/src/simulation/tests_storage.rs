//! Images, disks and networks, from their making to their end.

use super::*;
use crate::intent::{
    NewDevices, NewDisk, NewDiskSource, NewImage, NewNetwork, NewNic, NewVmDisk, NicAddress,
    Resource, VmChange,
};
use crate::model::{DisksOnDelete, ImageState};
use godwit_wire::devices::{DiskAccess, MacAddress};
use godwit_wire::host_api::StopMode;
use godwit_wire::id::{DiskId, ImageId, NetworkId};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::network::{Subnet, Transport};
use godwit_wire::storage::{DiskOrigin, ImportSource};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use std::net::Ipv4Addr;

pub(super) const GIB: u64 = 1 << 30;

fn new_image(name: &str, path: &str) -> Intent {
    Intent::CreateImage(NewImage {
        name: name.into(),
        pool: Some(SHARED),
        host: None,
        source: ImportSource::Path { path: path.into() },
        format: None,
        sha256: None,
    })
}

pub(super) fn blank(pool: PoolId, bytes: u64) -> NewVmDisk {
    disk_of(NewDiskSource::New {
        pool: Some(pool),
        bytes: Some(Bytes(bytes)),
        format: None,
        from: DiskOrigin::Blank,
    })
}

fn disk_of(source: NewDiskSource) -> NewVmDisk {
    NewVmDisk {
        name: None,
        source,
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
    }
}

pub(super) fn from_image(image: ImageId) -> NewVmDisk {
    disk_of(NewDiskSource::New {
        pool: None,
        bytes: None,
        format: None,
        from: DiskOrigin::Image { image },
    })
}

fn nic(network: NetworkId, address: NicAddress) -> NewNic {
    NewNic {
        name: None,
        network,
        mac: None,
        address,
        queue_pairs: None,
        limits: Default::default(),
    }
}

pub(super) fn with_disks(name: &str, disks: Vec<NewVmDisk>) -> NewVm {
    NewVm {
        devices: NewDevices {
            disks: Some(disks),
            ..NewDevices::default()
        },
        ..new_vm(name)
    }
}

impl Pool {
    async fn image(&self, name: &str) -> ImageId {
        let accepted = self.submit(new_image(name, "/image")).await.unwrap();
        self.succeeds(accepted).await;
        self.view().find_image(name).unwrap().id
    }

    async fn network(&self, name: &str, prefix: u8) -> NetworkId {
        let new = NewNetwork {
            name: name.into(),
            transport: Transport::Local,
            mtu: None,
            subnet: Some(Subnet {
                address: Ipv4Addr::new(10, 0, 0, 0),
                prefix,
                gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
                dns: Vec::new(),
            }),
        };
        match self.submit(Intent::CreateNetwork(new)).await.unwrap() {
            Accepted {
                resource: Resource::Network(id),
                operation: None,
            } => id,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn created(&self, new: NewVm) -> VmId {
        let name = new.name.clone();
        let accepted = self.submit(Intent::CreateVm(new)).await.unwrap();
        self.succeeds(accepted).await;
        let id = self.view().find_vm(&name).unwrap().id;
        self.running(id).await;
        id
    }

    pub(super) fn disk(&self, name: &str) -> DiskId {
        self.view().find_disk(name).expect("the disk exists").id
    }

    pub(super) async fn refusal(&self, intent: Intent) -> String {
        let problem = self.submit(intent).await.expect_err("it is refused");
        format!("{}: {problem}", problem.kind)
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_gets_its_disks_with_it_and_takes_them_with_it() {
    let pool = Pool::of(2).await;
    let image = pool.image("debian").await;
    let disks = vec![from_image(image), blank(SHARED, 4 * GIB)];
    let vm = pool.created(with_disks("a", disks)).await;
    let (root, data) = (pool.disk("a-root"), pool.disk("a-disk-2"));
    assert_eq!(pool.view().attached_to(root), Some(vm));
    assert_eq!(pool.view().disks[&data].bytes, Some(Bytes(4 * GIB)));
    assert_eq!(pool.view().disks[&root].base(), Some(image));

    assert!(
        pool.refusal(Intent::DeleteImage { image })
            .await
            .contains("a-root is a thin copy of debian")
    );
    assert!(
        pool.refusal(Intent::DeleteDisk { disk: data })
            .await
            .contains("attached to a")
    );
    let other = with_disks("b", vec![disk_of(NewDiskSource::Existing(data))]);
    assert!(
        pool.refusal(Intent::CreateVm(other))
            .await
            .contains("a writes the disk a-disk-2")
    );

    let disks = DisksOnDelete::Delete;
    pool.succeeds(pool.submit(Intent::DeleteVm { vm, disks }).await.unwrap())
        .await;
    pool.settled().await;
    assert!(pool.view().disks.is_empty());
    pool.succeeds(pool.submit(Intent::DeleteImage { image }).await.unwrap())
        .await;
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn kept_disks_can_be_grown_cloned_attached_elsewhere_and_deleted() {
    let pool = Pool::of(2).await;
    let vm = pool
        .created(with_disks("a", vec![blank(SHARED, GIB)]))
        .await;
    let disk = pool.disk("a-disk-1");
    let bytes = Bytes(2 * GIB);
    pool.succeeds(pool.submit(Intent::GrowDisk { disk, bytes }).await.unwrap())
        .await;
    let shared = pool.host(1).pool(SHARED).unwrap();
    assert_eq!(shared.disk_bytes(disk), Some(bytes));
    let clone = |name: &str| {
        Intent::CreateDisk(NewDisk {
            name: name.into(),
            pool: None,
            bytes: None,
            format: None,
            from: DiskOrigin::Disk { disk },
        })
    };
    assert!(
        pool.refusal(clone("copy"))
            .await
            .contains("a may be writing the disk")
    );
    let disks = DisksOnDelete::Keep;
    pool.succeeds(pool.submit(Intent::DeleteVm { vm, disks }).await.unwrap())
        .await;
    pool.succeeds(pool.submit(clone("copy")).await.unwrap())
        .await;
    let existing = disk_of(NewDiskSource::Existing(disk));
    let b = pool.created(with_disks("b", vec![existing])).await;
    let disks = DisksOnDelete::Delete;
    let delete = Intent::DeleteVm { vm: b, disks };
    pool.succeeds(pool.submit(delete).await.unwrap()).await;
    pool.settled().await;
    assert_eq!(
        pool.view().disks.len(),
        2,
        "it was not created with the VM, so it stays"
    );
    for disk in [disk, pool.disk("copy")] {
        pool.succeeds(pool.submit(Intent::DeleteDisk { disk }).await.unwrap())
            .await;
    }
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_second_disk_cannot_be_made_leaves_nothing_behind() {
    let pool = Pool::of(2).await;
    let network = pool.network("net", 24).await;
    pool.host(1).pool(SHARED).unwrap().has_room_for_one_disk();
    let mut new = with_disks("a", vec![blank(SHARED, GIB), blank(SHARED, GIB)]);
    new.devices.nics = Some(vec![nic(network, NicAddress::Auto)]);
    let accepted = pool.submit(Intent::CreateVm(new)).await.unwrap();
    let state = pool.ended(accepted.operation.unwrap()).await;
    assert_eq!(state, OperationState::Failed);
    let operation = &pool.view().operations[&accepted.operation.unwrap()];
    expect_test::expect!["a was not created: a-disk-2: no space left"]
        .assert_eq(&operation.error.as_ref().unwrap().detail);
    assert!(pool.view().vms.is_empty());
    pool.settled().await;
    assert!(pool.view().disks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_read_is_not_kept() {
    let pool = Pool::of(1).await;
    let accepted = pool.submit(new_image("a", "/missing")).await.unwrap();
    let state = pool.ended(accepted.operation.unwrap()).await;
    assert_eq!(state, OperationState::Failed);
    pool.settled().await;
    assert!(pool.view().images.is_empty());
    pool.image("a").await;
}

#[tokio::test(start_paused = true)]
async fn an_upload_finds_its_host_in_the_image_and_is_given_up_when_nothing_comes() {
    let pool = Pool::of(2).await;
    let upload = |name: &str| {
        Intent::CreateImage(NewImage {
            name: name.into(),
            pool: Some(SHARED),
            host: None,
            source: ImportSource::Upload { bytes: Bytes(1024) },
            format: None,
            sha256: None,
        })
    };
    let accepted = pool.submit(upload("a")).await.unwrap();
    let uploading = |view: &View, name: &str| {
        let image = view.find_image(name);
        image.is_some_and(|image| matches!(image.state, ImageState::Uploading { .. }))
    };
    pool.wait("a host receives it", |view| uploading(view, "a"))
        .await;
    let image = pool.view().find_image("a").unwrap().id;
    pool.controller
        .upload_image(image, 1024, axum::body::Body::empty())
        .await
        .unwrap();
    pool.succeeds(accepted).await;
    assert_eq!(pool.view().images[&image].state, ImageState::Ready);

    let accepted = pool.submit(upload("b")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(uploading(&pool.view(), "b"));
    let state = pool.ended(accepted.operation.unwrap()).await;
    assert_eq!(state, OperationState::Failed);
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn addresses_are_the_lowest_free_ones_and_come_back_with_the_vm() {
    let pool = Pool::of(1).await;
    let network = pool.network("net", 29).await;
    let plugged = |name: &str, address| {
        let mut new = new_vm(name);
        new.devices.nics = Some(vec![nic(network, address)]);
        new
    };
    let address = |vm: VmId| pool.view().vms[&vm].spec.devices.nics[0].address.unwrap();
    let at = |last| Ipv4Addr::new(10, 0, 0, last);
    let a = pool.created(plugged("a", NicAddress::Auto)).await;
    let b = pool.created(plugged("b", NicAddress::Auto)).await;
    let c = pool.created(plugged("c", NicAddress::Fixed(at(6)))).await;
    assert_eq!((address(a), address(b), address(c)), (at(2), at(3), at(6)));
    assert!(
        pool.refusal(Intent::CreateVm(plugged("d", NicAddress::Fixed(at(3)))))
            .await
            .contains("10.0.0.3 belongs to b")
    );
    assert!(
        pool.refusal(Intent::CreateVm(plugged("d", NicAddress::Fixed(at(1)))))
            .await
            .contains("no machine's address")
    );
    assert!(
        pool.refusal(Intent::DeleteNetwork { network })
            .await
            .contains("plugged into the network net")
    );
    let disks = DisksOnDelete::Delete;
    pool.succeeds(
        pool.submit(Intent::DeleteVm { vm: a, disks })
            .await
            .unwrap(),
    )
    .await;
    let d = pool.created(plugged("d", NicAddress::Auto)).await;
    assert_eq!(address(d), at(2), "freed with its VM");
    let mac = |vm: VmId| pool.view().vms[&vm].spec.devices.nics[0].mac;
    let all: BTreeSet<MacAddress> = [mac(b), mac(c), mac(d)].into();
    assert_eq!(all.len(), 3);
    for name in ["e", "f"] {
        pool.created(plugged(name, NicAddress::Auto)).await;
    }
    assert!(
        pool.refusal(Intent::CreateVm(plugged("g", NicAddress::Auto)))
            .await
            .contains("no free address")
    );
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_changes_keeps_its_addresses_and_gets_further_disks() {
    let pool = Pool::of(1).await;
    let network = pool.network("net", 24).await;
    let mut new = with_disks("a", vec![blank(SHARED, GIB)]);
    new.devices.nics = Some(vec![nic(network, NicAddress::Auto)]);
    let vm = pool.created(new).await;
    let before = pool.view().vms[&vm].spec.devices.nics.clone();
    let first = pool.disk("a-disk-1");
    let change = VmChange {
        devices: NewDevices {
            disks: Some(vec![
                disk_of(NewDiskSource::Existing(first)),
                blank(SHARED, 2 * GIB),
            ]),
            nics: Some(vec![
                nic(network, NicAddress::Auto),
                nic(network, NicAddress::Auto),
            ]),
            ..NewDevices::default()
        },
        ..VmChange::default()
    };
    let intent = Intent::ChangeVm { vm, change };
    assert!(pool.refusal(intent.clone()).await.contains("not off"));
    let mode = StopMode::Kill;
    pool.succeeds(pool.submit(Intent::StopVm { vm, mode }).await.unwrap())
        .await;
    pool.succeeds(pool.submit(intent).await.unwrap()).await;
    let view = pool.view();
    let devices = &view.vms[&vm].spec.devices;
    assert_eq!(devices.nics[0], before[0]);
    assert_eq!(devices.nics[1].address, Some(Ipv4Addr::new(10, 0, 0, 3)));
    assert_eq!(
        view.attached_to(pool.disk("a-disk-2")),
        Some(vm),
        "the new disk is there"
    );
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_with_a_local_disk_stays_with_its_host_and_blocks_its_maintenance() {
    let pool = Pool::of(2).await;
    let disks = vec![blank(Pool::local(1), GIB)];
    let vm = pool.created(with_disks("a", disks)).await;
    assert_eq!(pool.owner(vm), Some(1), "only host 1 has the pool");
    let migrate = Intent::MigrateVm {
        vm,
        target: Some(Pool::id(2)),
        policy: MigrationPolicy::default(),
        disks: Default::default(),
    };
    expect_test::expect![[r#"
        no-room: no host takes a: host-2: the host does not have the storage pool local-1, and disks do not move along unless asked to
          remedy: host-2: move the VM with its disks (`godwit vm migrate NAME --with-disks`), move the disk to a shared pool, or give the host the directory of local-1"#]]
    .assert_eq(&pool.refusal(migrate).await);
    let plan = pool
        .controller
        .preview(&Intent::CreateMaintenance(crate::intent::NewMaintenance {
            host: Pool::id(1),
            reason: String::new(),
            return_policy: Default::default(),
            overrides: BTreeMap::new(),
        }))
        .unwrap()
        .plan
        .unwrap();
    assert_eq!(plan.blockers.len(), 1);
    assert!(plan.blockers[0].remedy.contains("shared pool"));

    pool.host(1).cut();
    pool.wait("it waits for its host", |view| {
        let status = view.vm_status(&view.vms[&vm]);
        let reason = status.reason.unwrap_or_default();
        status.state == VmState::Unreachable
            && reason.contains("does not have the storage pool local-1")
    })
    .await;
    pool.host(1).mend();
    pool.running(vm).await;
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_on_a_shared_disk_is_restarted_elsewhere_when_its_host_is_lost() {
    let pool = Pool::of(2).await;
    let mut new = with_disks("a", vec![blank(SHARED, GIB)]);
    new.host = Some(Pool::id(1));
    let vm = pool.created(new).await;
    pool.host(1).cut();
    pool.wait("it runs on the other host", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
            && view.vm_status(&view.vms[&vm]).state == VmState::Running
    })
    .await;
    pool.host(1).mend();
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_pool_is_told_when_it_stops_a_vm_and_when_the_vm_goes_on() {
    let pool = Pool::of(1).await;
    let vm = pool
        .created(with_disks("a", vec![blank(SHARED, GIB)]))
        .await;
    let full = VmmState::Paused {
        reason: PauseReason::Storage {
            disk: "disk-1".into(),
            detail: "the pool is full".into(),
        },
    };
    pool.host(1).stall(vm, full);
    pool.wait("it is paused", |view| {
        let status = view.vm_status(&view.vms[&vm]);
        status.state == VmState::Paused && status.reason.as_deref() == Some("the pool is full")
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(pool.events("vm.storage_full"), 1, "told once");
    pool.host(1).stall(vm, VmmState::Running);
    pool.running(vm).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(pool.events("vm.storage_resumed"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_is_called_off_leaves_nothing_behind() {
    let pool = Pool::of(1).await;
    let new = with_disks("a", vec![blank(SHARED, GIB), blank(SHARED, GIB)]);
    let accepted = pool.submit(Intent::CreateVm(new)).await.unwrap();
    let operation = accepted.operation.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    pool.submit(Intent::CancelOperation { operation })
        .await
        .unwrap();
    assert_eq!(pool.ended(operation).await, OperationState::Cancelled);
    assert!(pool.view().vms.is_empty() && pool.view().disks.is_empty());
    pool.settled().await;
}

/// Kills the server after its 1st, 2nd, 3rd … transaction of an intent; afterwards everything must have settled.
async fn at_every_step<F>(prepare: impl Fn() -> F, intent: impl Fn(&Pool) -> Intent) -> u64
where
    F: Future<Output = Pool>,
{
    for transactions in 1..100 {
        let mut pool = prepare().await;
        let intent = intent(&pool);
        let died = pool.dies_during(intent, transactions).await;
        pool.settled().await;
        if !died {
            return transactions - 1;
        }
    }
    panic!("the operation never ends");
}

async fn with_an_image() -> Pool {
    let pool = Pool::of(2).await;
    pool.image("debian").await;
    pool.network("net", 24).await;
    pool
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_creation_with_disks_resumes() {
    let create = |pool: &Pool| {
        let image = pool.view().find_image("debian").unwrap().id;
        let network = pool.view().find_network("net").unwrap().id();
        let mut new = with_disks("a", vec![from_image(image), blank(SHARED, GIB)]);
        new.devices.nics = Some(vec![nic(network, NicAddress::Auto)]);
        Intent::CreateVm(new)
    };
    let killed = at_every_step(with_an_image, create).await;
    assert!(killed >= 6, "killed {killed} times");
    let failing = || async {
        let pool = with_an_image().await;
        pool.host(1).pool(SHARED).unwrap().has_room_for_one_disk();
        pool
    };
    let killed = at_every_step(failing, create).await;
    assert!(killed >= 6, "killed {killed} times");
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_work_on_images_and_disks_resumes() {
    let killed = at_every_step(with_an_image, |_| new_image("b", "/image")).await;
    assert!(killed >= 2, "killed {killed} times");
    let killed = at_every_step(with_an_image, |_| new_image("b", "/missing")).await;
    assert!(killed >= 3, "killed {killed} times");
    let image = |pool: &Pool| pool.view().find_image("debian").unwrap().id;
    let delete = |pool: &Pool| Intent::DeleteImage { image: image(pool) };
    let killed = at_every_step(with_an_image, delete).await;
    assert!(killed >= 2, "killed {killed} times");
    let thin = |pool: &Pool| {
        Intent::CreateDisk(NewDisk {
            name: "d".into(),
            pool: None,
            bytes: Some(Bytes(2 * GIB)),
            format: None,
            from: DiskOrigin::Image { image: image(pool) },
        })
    };
    let killed = at_every_step(with_an_image, thin).await;
    assert!(killed >= 2, "killed {killed} times");
    let with_a_vm = || async {
        let pool = with_an_image().await;
        pool.created(with_disks(
            "a",
            vec![blank(SHARED, GIB), blank(SHARED, GIB)],
        ))
        .await;
        pool
    };
    let grow = |pool: &Pool| Intent::GrowDisk {
        disk: pool.disk("a-disk-1"),
        bytes: Bytes(3 * GIB),
    };
    let killed = at_every_step(with_a_vm, grow).await;
    assert!(killed >= 2, "killed {killed} times");
    let delete = |pool: &Pool| Intent::DeleteVm {
        vm: pool.view().find_vm("a").unwrap().id,
        disks: DisksOnDelete::Delete,
    };
    let killed = at_every_step(with_a_vm, delete).await;
    assert!(killed >= 3, "killed {killed} times");
}
