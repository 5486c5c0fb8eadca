//! Devices, pools, images, disks and networks.

use crate::resource as api;
use godwit_controller::model;
use godwit_controller::view::{Pool, View};
use godwit_wire::devices;
use godwit_wire::network::Transport;

/// The disks of a VM.
pub(in crate::rest) fn vm_disks(view: &View, vm: &model::Vm) -> Vec<api::VmDisk> {
    let convert = |disk: &devices::Disk| {
        let (record, pool, name) = match &disk.source {
            devices::DiskSource::Volume { pool, disk } => {
                let record = view.disks.get(disk);
                let name = record.map_or_else(|| disk.to_string(), |record| record.name.clone());
                (record, Some((*pool, *disk)), name)
            }
            devices::DiskSource::File { path, .. } => {
                (None, None, path.to_string_lossy().into_owned())
            }
        };
        api::VmDisk {
            name: disk.name.clone(),
            disk: pool.map(|(_, disk)| disk.0),
            disk_name: name,
            pool: pool.map(|(pool, _)| pool.0),
            pool_name: pool.map(|(pool, _)| view.pool_name(pool)),
            bytes: record.and_then(|record| record.bytes).map(|bytes| bytes.0),
            image_name: record
                .and_then(|record| record.base())
                .map(|image| view.image_name(image)),
            access: match disk.access {
                devices::DiskAccess::ReadWrite => api::DiskAccess::ReadWrite,
                devices::DiskAccess::ReadOnly => api::DiskAccess::ReadOnly,
            },
            limits: api::DiskLimits {
                requests_per_s: disk.limits.requests_per_s,
                bytes_per_s: disk.limits.bytes_per_s,
            },
            on_error: match disk.on_error {
                devices::OnIoError::PauseWhenFull => api::OnIoError::PauseWhenFull,
                devices::OnIoError::Pause => api::OnIoError::Pause,
                devices::OnIoError::Report => api::OnIoError::Report,
            },
        }
    };
    vm.spec.devices.disks.iter().map(convert).collect()
}

/// The network cards of a VM.
pub(in crate::rest) fn vm_nics(view: &View, vm: &model::Vm) -> Vec<api::VmNic> {
    let convert = |nic: &devices::Nic| {
        let (network, name) = match &nic.attach {
            devices::NicAttach::Network { network } => {
                let record = view.networks.get(network);
                let name =
                    record.map_or_else(|| network.to_string(), |record| record.name().to_owned());
                (Some(network.0), name)
            }
            devices::NicAttach::Tap { tap } => (None, tap.clone()),
        };
        api::VmNic {
            name: nic.name.clone(),
            network,
            network_name: name,
            mac: nic.mac.to_string(),
            address: nic.address.map(|address| address.to_string()),
            queue_pairs: nic.queue_pairs,
            limits: api::NicLimits {
                receive_bytes_per_s: nic.limits.receive_bytes_per_s,
                transmit_bytes_per_s: nic.limits.transmit_bytes_per_s,
            },
        }
    };
    vm.spec.devices.nics.iter().map(convert).collect()
}

/// What cloud-init finds.
pub(in crate::rest) fn cloud_init(seed: &devices::CloudInit) -> api::CloudInit {
    api::CloudInit {
        instance_id: seed.instance_id.clone(),
        hostname: seed.hostname.clone(),
        ssh_keys: seed.ssh_keys.clone(),
        user_data: seed.user_data.clone(),
        network_config: seed.network_config.clone(),
    }
}

pub(in crate::rest) fn console(kind: devices::ConsoleKind) -> api::ConsoleKind {
    match kind {
        devices::ConsoleKind::Serial => api::ConsoleKind::Serial,
        devices::ConsoleKind::Virtio => api::ConsoleKind::Virtio,
    }
}

pub(in crate::rest) fn memory_backing(backing: devices::MemoryBacking) -> api::MemoryBacking {
    match backing {
        devices::MemoryBacking::Standard => api::MemoryBacking::Standard,
        devices::MemoryBacking::Huge2M => api::MemoryBacking::Huge2M,
    }
}

fn format(format: devices::DiskFormat) -> api::DiskFormat {
    match format {
        devices::DiskFormat::Raw => api::DiskFormat::Raw,
        devices::DiskFormat::Qcow2 => api::DiskFormat::Qcow2,
    }
}

/// A pool as the API shows it.
pub(in crate::rest) fn pool(view: &View, pool: &Pool) -> api::Pool {
    let (total, free) = pool.room();
    let hosts = pool.hosts.iter().map(|host| api::PoolHost {
        host: host.host.0,
        host_name: view.host_name(host.host),
        trouble: match host.heard {
            true => host.report.trouble.clone(),
            false => Some("the host is silent".into()),
        },
    });
    api::Pool {
        id: pool.id.0,
        name: pool.name.clone(),
        shared: pool.is_shared(),
        total_bytes: total.0,
        free_bytes: free.0,
        hosts: hosts.collect(),
    }
}

/// An image as the API shows it.
pub(in crate::rest) fn image(view: &View, image: &model::Image) -> api::Image {
    let (state, reason) = match &image.state {
        model::ImageState::Importing => (api::ImageState::Importing, None),
        model::ImageState::Uploading { host } => (
            api::ImageState::Uploading,
            Some(format!("{} receives it", view.host_name(*host))),
        ),
        model::ImageState::Ready => (api::ImageState::Ready, None),
        model::ImageState::Failed { reason } => (api::ImageState::Failed, Some(reason.clone())),
    };
    api::Image {
        id: image.id.0,
        name: image.name.clone(),
        pool: image.pool.0,
        pool_name: view.pool_name(image.pool),
        state,
        reason,
        format: image.format.map(self::format),
        virtual_bytes: image.virtual_bytes.0,
        file_bytes: image.file_bytes.0,
        sha256: image.sha256.clone(),
        disks: view.disks_of(image.id).count() as u64,
        operation: image.operation.map(|id| id.0),
        created_at: image.created_at,
        changed_at: image.changed_at,
    }
}

/// A disk as the API shows it.
pub(in crate::rest) fn disk(view: &View, disk: &model::Disk) -> api::Disk {
    let attached = view.attached_to(disk.id);
    let (state, reason) = match &disk.state {
        model::DiskState::Creating => (api::DiskState::Creating, None),
        model::DiskState::Ready => (api::DiskState::Ready, None),
        model::DiskState::Failed { reason } => (api::DiskState::Failed, Some(reason.clone())),
    };
    api::Disk {
        id: disk.id.0,
        name: disk.name.clone(),
        pool: disk.pool.0,
        pool_name: view.pool_name(disk.pool),
        bytes: disk.bytes.map(|bytes| bytes.0),
        format: format(disk.format),
        image: disk.base().map(|image| image.0),
        image_name: disk.base().map(|image| view.image_name(image)),
        attached_to: attached.map(|vm| vm.0),
        attached_to_name: attached
            .and_then(|vm| view.vms.get(&vm))
            .map(|vm| vm.name.clone()),
        created_with: disk.created_with.map(|vm| vm.0),
        state,
        reason,
        operation: disk.operation.map(|id| id.0),
        created_at: disk.created_at,
        changed_at: disk.changed_at,
    }
}

/// A snapshot as the API shows it.
pub(in crate::rest) fn snapshot(view: &View, snapshot: &model::Snapshot) -> api::Snapshot {
    let (state, reason) = match &snapshot.state {
        model::SnapshotState::Creating => (api::SnapshotState::Creating, None),
        model::SnapshotState::Ready => (api::SnapshotState::Ready, None),
        model::SnapshotState::Failed { reason } => {
            (api::SnapshotState::Failed, Some(reason.clone()))
        }
    };
    api::Snapshot {
        id: snapshot.id.0,
        name: snapshot.name.clone(),
        vm: snapshot.vm.0,
        vm_name: view
            .vms
            .get(&snapshot.vm)
            .map_or_else(|| snapshot.vm.to_string(), |vm| vm.name.clone()),
        pool: snapshot.pool.0,
        pool_name: view.pool_name(snapshot.pool),
        state,
        reason,
        needs_disks: model::writable_disk(&snapshot.spec).is_some(),
        bytes: snapshot.bytes.0,
        pause_us: snapshot.pause_us,
        operation: snapshot.operation.map(|id| id.0),
        created_at: snapshot.created_at,
        changed_at: snapshot.changed_at,
    }
}

/// A network as the API shows it.
pub(in crate::rest) fn network(view: &View, network: &model::Network) -> api::Network {
    let told = &network.network;
    let leases = view
        .leases_of(network.id())
        .map(|(address, vm)| api::Lease {
            address: address.to_string(),
            vm: vm.0,
            vm_name: view
                .vms
                .get(&vm)
                .map_or_else(|| vm.to_string(), |vm| vm.name.clone()),
        });
    api::Network {
        id: told.network.0,
        name: told.name.clone(),
        transport: match &told.transport {
            Transport::Local => api::Transport::Local,
            Transport::Bridge { bridge } => api::Transport::Bridge {
                bridge: bridge.clone(),
            },
            Transport::Vlan { uplink, tag } => api::Transport::Vlan {
                uplink: uplink.clone(),
                tag: *tag,
            },
            Transport::Vxlan { vni } => api::Transport::Vxlan { vni: *vni },
        },
        mtu: told.mtu,
        subnet: told.subnet.as_ref().map(|subnet| api::Subnet {
            cidr: format!("{}/{}", subnet.address, subnet.prefix),
            gateway: subnet.gateway.map(|gateway| gateway.to_string()),
            dns: subnet.dns.iter().map(ToString::to_string).collect(),
        }),
        leases: leases.collect(),
        vms: view.plugged_into(network.id()).len() as u64,
        created_at: network.created_at,
        changed_at: network.changed_at,
    }
}
