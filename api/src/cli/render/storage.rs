//! Pools, images, disks and networks as text.

use super::super::table::{Sheet, Table};
use super::super::words::{age, bytes, milliseconds_of_us, name, or_dash};
use super::short;
use crate::resource::{Disk, Image, Network, Pool, Snapshot, SnapshotState, Transport};
use jiff::Timestamp;
use std::fmt::Write;

pub(in crate::cli) fn pools(pools: &[Pool]) -> String {
    let mut table = Table::new(&["NAME", "SHARED", ">FREE", ">OF", "HOSTS", "ID", "NOTE"]);
    for pool in pools {
        let hosts: Vec<&str> = pool
            .hosts
            .iter()
            .map(|host| host.host_name.as_str())
            .collect();
        let trouble = pool.hosts.iter().find_map(|host| {
            let trouble = host.trouble.as_ref()?;
            Some(format!("{}: {trouble}", host.host_name))
        });
        table.row([
            pool.name.clone(),
            if pool.shared { "yes" } else { "no" }.to_owned(),
            bytes(pool.free_bytes),
            bytes(pool.total_bytes),
            short(&hosts.join(", ")),
            pool.id.to_string(),
            short(&trouble.unwrap_or_default()),
        ]);
    }
    table.to_string()
}

pub(in crate::cli) fn images(images: &[Image]) -> String {
    let mut table = Table::new(&[
        "NAME", "STATE", "POOL", "FORMAT", ">SIZE", ">ON DISK", ">DISKS", "NOTE",
    ]);
    for image in images {
        table.row([
            image.name.clone(),
            name(image.state),
            image.pool_name.clone(),
            or_dash(image.format.map(name)),
            bytes(image.virtual_bytes),
            bytes(image.file_bytes),
            image.disks.to_string(),
            short(image.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table.to_string()
}

pub(in crate::cli) fn image(image: &Image, now: Timestamp) -> String {
    Sheet::default()
        .line("Name", &image.name)
        .line("Id", image.id.to_string())
        .line("State", name(image.state))
        .maybe("Reason", image.reason.as_ref())
        .line("Pool", &image.pool_name)
        .line("Format", or_dash(image.format.map(name)))
        .line(
            "Size",
            format!(
                "{}, {} on disk",
                bytes(image.virtual_bytes),
                bytes(image.file_bytes)
            ),
        )
        .line("SHA-256", or_dash(image.sha256.as_ref()))
        .line("Disks", format!("{} based on it", image.disks))
        .maybe("Operation", image.operation.map(|id| id.to_string()))
        .line("Created", format!("{} ago", age(image.created_at, now)))
        .to_string()
}

pub(in crate::cli) fn disks(disks: &[Disk]) -> String {
    let mut table = Table::new(&[
        "NAME", "STATE", "POOL", "FORMAT", ">SIZE", "IMAGE", "VM", "NOTE",
    ]);
    for disk in disks {
        table.row([
            disk.name.clone(),
            name(disk.state),
            disk.pool_name.clone(),
            name(disk.format),
            or_dash(disk.bytes.map(bytes)),
            or_dash(disk.image_name.as_ref()),
            or_dash(disk.attached_to_name.as_ref()),
            short(disk.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table.to_string()
}

pub(in crate::cli) fn disk(disk: &Disk, now: Timestamp) -> String {
    Sheet::default()
        .line("Name", &disk.name)
        .line("Id", disk.id.to_string())
        .line("State", name(disk.state))
        .maybe("Reason", disk.reason.as_ref())
        .line("Pool", &disk.pool_name)
        .line("Format", name(disk.format))
        .line("Size", or_dash(disk.bytes.map(bytes)))
        .line("Image", or_dash(disk.image_name.as_ref()))
        .line("VM", or_dash(disk.attached_to_name.as_ref()))
        .line(
            "Goes with",
            match disk.created_with {
                Some(vm) if disk.attached_to == Some(vm) => "its VM, unless --keep-disks is given",
                _ => "nothing: it is deleted by hand",
            },
        )
        .maybe("Operation", disk.operation.map(|id| id.to_string()))
        .line("Created", format!("{} ago", age(disk.created_at, now)))
        .to_string()
}

pub(in crate::cli) fn snapshots(snapshots: &[Snapshot], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "NAME", "STATE", "POOL", ">SIZE", ">PAUSE", ">AGE", "DISKS", "NOTE",
    ]);
    for snapshot in snapshots {
        let ready = snapshot.state == SnapshotState::Ready;
        let disks = match snapshot.needs_disks {
            true => "until claimed again",
            false => "none",
        };
        table.row([
            snapshot.name.clone(),
            name(snapshot.state),
            snapshot.pool_name.clone(),
            or_dash(ready.then(|| bytes(snapshot.bytes))),
            or_dash(ready.then(|| milliseconds_of_us(snapshot.pause_us))),
            age(snapshot.created_at, now),
            disks.to_owned(),
            short(snapshot.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table.to_string()
}

fn transport(transport: &Transport) -> String {
    match transport {
        Transport::Local => "local".to_owned(),
        Transport::Bridge { bridge } => format!("bridge {bridge}"),
        Transport::Vlan { uplink, tag } => format!("vlan {tag} on {uplink}"),
        Transport::Vxlan { vni } => format!("vxlan {vni}"),
    }
}

pub(in crate::cli) fn networks(networks: &[Network]) -> String {
    let mut table = Table::new(&["NAME", "TRANSPORT", ">MTU", "SUBNET", ">LEASES", ">VMS"]);
    for network in networks {
        table.row([
            network.name.clone(),
            transport(&network.transport),
            network.mtu.to_string(),
            or_dash(network.subnet.as_ref().map(|subnet| &subnet.cidr)),
            network.leases.len().to_string(),
            network.vms.to_string(),
        ]);
    }
    table.to_string()
}

pub(in crate::cli) fn network(network: &Network) -> String {
    let subnet = network.subnet.as_ref();
    let dns = subnet
        .map(|subnet| subnet.dns.join(", "))
        .filter(|dns| !dns.is_empty());
    let mut text = Sheet::default()
        .line("Name", &network.name)
        .line("Id", network.id.to_string())
        .line("Transport", transport(&network.transport))
        .line("MTU", network.mtu.to_string())
        .line("Subnet", or_dash(subnet.map(|subnet| &subnet.cidr)))
        .maybe("Gateway", subnet.and_then(|subnet| subnet.gateway.as_ref()))
        .maybe("DNS", dns)
        .line("VMs", network.vms.to_string())
        .to_string();
    if !network.leases.is_empty() {
        let mut table = Table::new(&["ADDRESS", "VM"]);
        for lease in &network.leases {
            table.row([lease.address.clone(), lease.vm_name.clone()]);
        }
        let _ = write!(text, "\n{table}");
    }
    text
}
