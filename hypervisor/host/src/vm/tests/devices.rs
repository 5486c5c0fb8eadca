//! What a driver does about disks, seeds and networks.

use super::fake::{Host, start};
use super::prepare;
use crate::vm::{Command, Resize};
use godwit_wire::devices::{
    CloudInit, Disk, DiskAccess, DiskAttachment, DiskFormat, DiskSource, Nic, NicAttach, Vsock,
};
use godwit_wire::host_api::{PrepareIncoming, StartVm};
use godwit_wire::id::{DiskId, MigrationId, NetworkId, VmId};
use godwit_wire::storage::{CreateDisk, DiskOrigin};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{PauseReason, VmmState};

fn disk(name: &str, source: DiskSource, access: DiskAccess) -> Disk {
    Disk {
        name: name.into(),
        source,
        access,
        limits: Default::default(),
        on_error: Default::default(),
    }
}

/// A machine with a file, writable and read-only, a disk of a pool, a seed and sockets.
async fn machine(host: &Host) -> (StartVm, DiskAttachment) {
    let storage = host.registry.context().storage.clone();
    storage.sample().await;
    let (pool, id) = (storage.reports()[0].pool, DiskId::fresh());
    let ask = CreateDisk {
        bytes: Some(Bytes(1 << 20)),
        format: DiskFormat::Qcow2,
        from: DiskOrigin::Blank,
        made_for: None,
    };
    let making = storage.clone();
    tokio::task::spawn_blocking(move || making.create_disk(pool, id, &ask))
        .await
        .unwrap()
        .unwrap();
    let located = storage.locate(pool, id).unwrap();
    let path = host.root.path().join("file.img");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let file = DiskSource::File {
        path,
        format: DiskFormat::Raw,
    };
    let mut ask = start(1, 1);
    let devices = &mut ask.spec.devices;
    devices.disks = vec![
        disk("file", file.clone(), DiskAccess::ReadWrite),
        disk("base", file, DiskAccess::ReadOnly),
        disk(
            "root",
            DiskSource::Volume { pool, disk: id },
            DiskAccess::ReadWrite,
        ),
    ];
    devices.cloud_init = Some(CloudInit {
        hostname: "web".into(),
        ..CloudInit::default()
    });
    devices.vsock = Some(Vsock { cid: 3 });
    let attachment = DiskAttachment {
        path: located.path,
        format: DiskFormat::Qcow2,
        lock: Some(located.lock),
    };
    (ask, attachment)
}

#[tokio::test]
async fn a_vmm_is_told_where_everything_is_and_the_seed_comes_last() {
    let host = Host::new().await;
    let vm = VmId::fresh();
    let (ask, root) = machine(&host).await;
    let spec = ask.spec.clone();
    host.registry
        .ask(vm, |reply| Command::Start(ask, reply))
        .await
        .unwrap();
    let told = host.fakes.attachments(vm);
    let file = host.root.path().join("file.img");
    let directory = host.registry.context().state.vm(vm);
    let raw = |path, lock| DiskAttachment {
        path,
        format: DiskFormat::Raw,
        lock,
    };
    assert_eq!(
        told.disks,
        [
            raw(file.clone(), Some(host.root.path().join("file.img.lock"))),
            raw(file, None),
            root,
            raw(directory.seed(), None),
        ]
    );
    assert_eq!(told.vsock.as_deref(), Some(directory.path()));
    let seed = std::fs::read(directory.seed()).unwrap();
    let wanted = crate::seed::seed(vm, spec.devices.cloud_init.as_ref().unwrap()).unwrap();
    assert!(seed == wanted);

    let resize = Resize {
        disk: "root".into(),
        bytes: Bytes(2 << 20),
    };
    host.registry
        .ask(vm, |reply| Command::Resize(resize, reply))
        .await
        .unwrap();
    assert_eq!(host.fakes.calls(vm, "/v1/disks/root/resize"), 1);
}

#[tokio::test]
async fn what_this_host_does_not_have_is_named_and_nothing_is_left() {
    let host = Host::new().await;
    let (good, _) = machine(&host).await;
    let mut no_disk = good.clone();
    if let DiskSource::Volume { disk, .. } = &mut no_disk.spec.devices.disks[2].source {
        *disk = DiskId::fresh();
    }
    let mut no_file = good.clone();
    if let DiskSource::File { path, .. } = &mut no_file.spec.devices.disks[0].source {
        *path = "/nowhere/disk.img".into();
    }
    let mut no_network = good;
    no_network.spec.devices.nics.push(Nic {
        name: "lan".into(),
        mac: "52:54:00:00:00:01".parse().unwrap(),
        attach: NicAttach::Network {
            network: NetworkId::fresh(),
        },
        address: None,
        queue_pairs: 1,
        limits: Default::default(),
    });
    for (ask, field) in [
        (no_disk, "spec.disks[2].source"),
        (no_file, "spec.disks[0].source.path"),
        (no_network, "spec.nics[0].attach.network"),
    ] {
        let vm = VmId::fresh();
        let refused = host
            .registry
            .ask(vm, |reply| Command::Start(ask, reply))
            .await
            .unwrap_err();
        assert_eq!(refused.fields[0].field, field, "{refused}");
        assert!(!host.registry.context().state.vm(vm).path().exists());
    }
    assert_eq!(host.fakes.spawned(), 0);
}

/// The machine on its way to this host, with disks whose content comes with it.
async fn on_its_way(host: &Host, arriving: &[&str]) -> PrepareIncoming {
    let (ask, _) = machine(host).await;
    PrepareIncoming {
        spec: ask.spec,
        arriving_disks: arriving.iter().map(|name| (*name).to_owned()).collect(),
        ..prepare(MigrationId::fresh(), 4, 7)
    }
}

#[tokio::test]
async fn an_incoming_vm_finds_the_blank_disk_that_its_content_goes_to() {
    let host = Host::new().await;
    let vm = VmId::fresh();
    let ask = on_its_way(&host, &["root"]).await;
    host.registry
        .ask(vm, |reply| Command::Prepare(ask, reply))
        .await
        .unwrap();
    assert_eq!(host.fakes.spawned(), 1);
}

#[tokio::test]
async fn an_incoming_vm_whose_blank_disk_is_missing_is_refused_by_name() {
    let host = Host::new().await;
    let mut missing = on_its_way(&host, &["root"]).await;
    if let DiskSource::Volume { disk, .. } = &mut missing.spec.devices.disks[2].source {
        *disk = DiskId::fresh();
    }
    let no_volume = on_its_way(&host, &["file"]).await;
    let unknown = on_its_way(&host, &["data"]).await;
    for (ask, kind, named) in [
        (missing, "no-blank-disk", "root"),
        (no_volume, "invalid-request", "file is no writable disk"),
        (unknown, "invalid-request", "data is no writable disk"),
    ] {
        let vm = VmId::fresh();
        let refused = host
            .registry
            .ask(vm, |reply| Command::Prepare(ask, reply))
            .await
            .unwrap_err();
        assert_eq!(refused.kind, kind, "{refused}");
        assert!(format!("{refused}").contains(named), "{refused}");
        assert!(!host.registry.context().state.vm(vm).path().exists());
    }
    assert_eq!(host.fakes.spawned(), 0);
}

#[tokio::test]
async fn a_vm_that_waits_for_room_runs_again_when_there_is_some() {
    let host = Host::new().await;
    let vm = VmId::fresh();
    let (ask, _) = machine(&host).await;
    host.registry
        .ask(vm, |reply| Command::Start(ask, reply))
        .await
        .unwrap();
    let stalled = VmmState::Paused {
        reason: PauseReason::Storage {
            disk: "root".into(),
            detail: "no space left on device".into(),
        },
    };
    host.fakes.set_state(vm, stalled.clone());
    host.until(vm, |report| report.state == Some(stalled.clone()))
        .await;
    host.until(vm, |report| report.state == Some(VmmState::Running))
        .await;
    assert_eq!(host.fakes.calls(vm, "/v1/resume"), 1);
}
