//! Devices, disks and networks in requests: names become ids, texts become addresses.

use crate::resource as api;
use godwit_controller::intent::{NewDevices, NewDiskSource, NewNic, NewVmDisk, NicAddress};
use godwit_controller::view::View;
use godwit_wire::devices::{
    CloudInit, ConsoleKind, DiskAccess, DiskFormat, DiskLimits, MemoryBacking, NicLimits,
    OnIoError, Vsock,
};
use godwit_wire::id::PoolId;
use godwit_wire::network::{Subnet, Transport};
use godwit_wire::problem::FieldProblem;
use godwit_wire::storage::DiskOrigin;
use godwit_wire::unit::Bytes;
use std::net::Ipv4Addr;

/// What the devices of a request are, each absent or given.
pub(super) struct Asked<'a> {
    pub(super) disks: Option<&'a [api::CreateVmDisk]>,
    pub(super) nics: Option<&'a [api::CreateVmNic]>,
    pub(super) cloud_init: Option<api::CloudInit>,
    pub(super) vsock: Option<api::Vsock>,
    pub(super) console: Option<api::ConsoleKind>,
    pub(super) memory_backing: Option<api::MemoryBacking>,
}

/// Devices as the controller takes them.
pub(super) fn devices(view: &View, asked: Asked<'_>) -> Result<NewDevices, Vec<FieldProblem>> {
    let mut problems = Vec::new();
    let disks = asked.disks.map(|disks| {
        let disks = disks.iter().enumerate();
        let disks = disks.filter_map(|(index, asked)| {
            let made = disk(view, &format!("disks[{index}]"), asked);
            made.map_err(|problem| problems.push(problem)).ok()
        });
        disks.collect::<Vec<_>>()
    });
    let nics = asked.nics.map(|nics| {
        let nics = nics.iter().enumerate();
        let nics = nics.filter_map(|(index, asked)| {
            let made = nic(view, &format!("nics[{index}]"), asked);
            made.map_err(|problem| problems.push(problem)).ok()
        });
        nics.collect::<Vec<_>>()
    });
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(NewDevices {
        disks,
        nics,
        cloud_init: asked.cloud_init.map(|seed| CloudInit {
            instance_id: seed.instance_id,
            hostname: seed.hostname,
            ssh_keys: seed.ssh_keys,
            user_data: seed.user_data,
            network_config: seed.network_config,
        }),
        vsock: asked.vsock.map(|vsock| Vsock { cid: vsock.cid }),
        console: asked.console.map(|kind| match kind {
            api::ConsoleKind::Serial => ConsoleKind::Serial,
            api::ConsoleKind::Virtio => ConsoleKind::Virtio,
        }),
        memory_backing: asked.memory_backing.map(|backing| match backing {
            api::MemoryBacking::Standard => MemoryBacking::Standard,
            api::MemoryBacking::Huge2M => MemoryBacking::Huge2M,
        }),
    })
}

fn unknown(field: String, what: &str, name: &str) -> FieldProblem {
    FieldProblem::new(
        field,
        format!("there is no {what} {name}"),
        format!("`godwit {what} list` shows what there is"),
    )
}

/// The pool with this id or name.
pub(super) fn pool(view: &View, field: &str, name: &str) -> Result<PoolId, FieldProblem> {
    let pools = view.pools();
    if let Some(id) = name.parse().ok().filter(|id| pools.contains_key(id)) {
        return Ok(id);
    }
    let named: Vec<_> = pools.values().filter(|pool| pool.name == name).collect();
    match named.as_slice() {
        [] => Err(unknown(field.into(), "pool", name)),
        [only] => Ok(only.id),
        _ => Err(FieldProblem::new(
            field,
            format!("several pools are called {name}"),
            "give the id that `godwit pool list` shows",
        )),
    }
}

/// What a new disk is made from: at most one of the two.
pub(super) fn origin(
    view: &View,
    path: &str,
    image: Option<&str>,
    clone_of: Option<&str>,
) -> Result<DiskOrigin, FieldProblem> {
    match (image, clone_of) {
        (None, None) => Ok(DiskOrigin::Blank),
        (Some(name), None) => match view.find_image(name) {
            Some(image) => Ok(DiskOrigin::Image { image: image.id }),
            None => Err(unknown(format!("{path}image"), "image", name)),
        },
        (None, Some(name)) => match view.find_disk(name) {
            Some(disk) => Ok(DiskOrigin::Disk { disk: disk.id }),
            None => Err(unknown(format!("{path}clone_of"), "disk", name)),
        },
        (Some(_), Some(_)) => Err(FieldProblem::new(
            format!("{path}clone_of"),
            "both `image` and `clone_of` are given",
            "leave one of them out",
        )),
    }
}

pub(super) fn format(format: api::DiskFormat) -> DiskFormat {
    match format {
        api::DiskFormat::Raw => DiskFormat::Raw,
        api::DiskFormat::Qcow2 => DiskFormat::Qcow2,
    }
}

fn disk(view: &View, path: &str, asked: &api::CreateVmDisk) -> Result<NewVmDisk, FieldProblem> {
    let source = match &asked.disk {
        Some(name) => {
            let new = [&asked.image, &asked.clone_of, &asked.pool];
            if new.iter().any(|field| field.is_some()) || asked.bytes.is_some() {
                return Err(FieldProblem::new(
                    format!("{path}.disk"),
                    "an existing disk is named and a new one is described",
                    "leave out `disk`, or everything that describes a new one",
                ));
            }
            let disk = view
                .find_disk(name)
                .ok_or_else(|| unknown(format!("{path}.disk"), "disk", name))?;
            NewDiskSource::Existing(disk.id)
        }
        None => NewDiskSource::New {
            pool: match &asked.pool {
                Some(name) => Some(pool(view, &format!("{path}.pool"), name)?),
                None => None,
            },
            bytes: asked.bytes.map(Bytes),
            format: asked.format.map(self::format),
            from: origin(
                view,
                &format!("{path}."),
                asked.image.as_deref(),
                asked.clone_of.as_deref(),
            )?,
        },
    };
    Ok(NewVmDisk {
        name: asked.name.clone(),
        source,
        access: match asked.access {
            api::DiskAccess::ReadWrite => DiskAccess::ReadWrite,
            api::DiskAccess::ReadOnly => DiskAccess::ReadOnly,
        },
        limits: DiskLimits {
            requests_per_s: asked.limits.requests_per_s,
            bytes_per_s: asked.limits.bytes_per_s,
        },
        on_error: match asked.on_error {
            api::OnIoError::PauseWhenFull => OnIoError::PauseWhenFull,
            api::OnIoError::Pause => OnIoError::Pause,
            api::OnIoError::Report => OnIoError::Report,
        },
    })
}

fn nic(view: &View, path: &str, asked: &api::CreateVmNic) -> Result<NewNic, FieldProblem> {
    let network = view
        .find_network(&asked.network)
        .ok_or_else(|| unknown(format!("{path}.network"), "network", &asked.network))?;
    let mac = match &asked.mac {
        None => None,
        Some(mac) => Some(mac.parse().map_err(|error| {
            let remedy = "write it as six pairs of hexadecimal digits, or leave it out";
            let error: godwit_wire::devices::BadMacAddress = error;
            FieldProblem::new(format!("{path}.mac"), error.to_string(), remedy)
        })?),
    };
    let address = match asked.address.as_str() {
        "auto" => NicAddress::Auto,
        "none" => NicAddress::Unmanaged,
        text => NicAddress::Fixed(address(&format!("{path}.address"), text)?),
    };
    Ok(NewNic {
        name: asked.name.clone(),
        network: network.id(),
        mac,
        address,
        queue_pairs: asked.queue_pairs,
        limits: NicLimits {
            receive_bytes_per_s: asked.limits.receive_bytes_per_s,
            transmit_bytes_per_s: asked.limits.transmit_bytes_per_s,
        },
    })
}

fn address(field: &str, text: &str) -> Result<Ipv4Addr, FieldProblem> {
    text.parse().map_err(|_| {
        let problem = format!("{text:?} is no IPv4 address");
        FieldProblem::new(field, problem, "write it as 10.1.2.3")
    })
}

pub(super) fn transport(transport: api::Transport) -> Transport {
    match transport {
        api::Transport::Local => Transport::Local,
        api::Transport::Bridge { bridge } => Transport::Bridge { bridge },
        api::Transport::Vlan { uplink, tag } => Transport::Vlan { uplink, tag },
        api::Transport::Vxlan { vni } => Transport::Vxlan { vni },
    }
}

pub(super) fn subnet(asked: &api::Subnet) -> Result<Subnet, FieldProblem> {
    let bad = || {
        FieldProblem::new(
            "subnet.cidr",
            format!("{:?} is no subnet", asked.cidr),
            "write it as 10.1.0.0/16",
        )
    };
    let (network, prefix) = asked.cidr.split_once('/').ok_or_else(bad)?;
    let gateway = match &asked.gateway {
        Some(text) => Some(address("subnet.gateway", text)?),
        None => None,
    };
    let dns = asked.dns.iter().enumerate();
    let dns = dns.map(|(index, text)| address(&format!("subnet.dns[{index}]"), text));
    Ok(Subnet {
        address: network.parse().map_err(|_| bad())?,
        prefix: prefix.parse().map_err(|_| bad())?,
        gateway,
        dns: dns.collect::<Result<_, _>>()?,
    })
}
