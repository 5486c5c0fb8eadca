//! Where this host has what a spec names (pure): what the host agent says, or for a VMM that is used alone, what the
//! spec itself names.

use super::MachineError;
use godwit_wire::devices::Devices;
use godwit_wire::devices::{
    Attachments, Disk, DiskAccess, DiskAttachment, DiskSource, Nic, NicAttach, NicAttachment,
};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Largest payload of an ordinary Ethernet frame, for taps that no network speaks for.
const ETHERNET_MTU: u16 = 1500;

/// The files of all disks, in the guest's order; the seed disk last.
pub(super) fn disks(
    devices: &Devices,
    attachments: &Attachments,
) -> Result<Vec<DiskAttachment>, MachineError> {
    if attachments.disks.is_empty() {
        let mut found: Vec<_> = devices
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| own_file(index, disk))
            .collect::<Result<_, _>>()?;
        if devices.cloud_init.is_some() {
            return Err(missing(
                "cloud_init".into(),
                "no seed disk was made for it",
                "run the machine through a host agent, or attach a seed disk of your own",
            ));
        }
        found.shrink_to_fit();
        return Ok(found);
    }
    if attachments.disks.len() != devices.disk_count() {
        return Err(missing(
            "disks".into(),
            &format!(
                "{} files are attached for {} disks",
                attachments.disks.len(),
                devices.disk_count()
            ),
            "attach one file for each disk, in the spec's order, the seed disk last",
        ));
    }
    Ok(attachments.disks.clone())
}

fn own_file(index: usize, disk: &Disk) -> Result<DiskAttachment, MachineError> {
    match &disk.source {
        DiskSource::File { path, format } => Ok(DiskAttachment {
            path: path.clone(),
            format: *format,
            lock: match disk.access {
                DiskAccess::ReadWrite => lock_beside(path),
                DiskAccess::ReadOnly => None,
            },
        }),
        DiskSource::Volume { disk, .. } => Err(missing(
            format!("disks[{index}].source"),
            &format!("this VMM was not told where disk {disk} is"),
            "run the machine through a host agent, or name a file",
        )),
    }
}

/// The lock file beside an image; a block device has none.
fn lock_beside(path: &Path) -> Option<PathBuf> {
    if path.starts_with("/dev") {
        return None;
    }
    let mut name = OsString::from(path);
    name.push(".lock");
    Some(name.into())
}

/// The tap devices of all network cards, in the guest's order.
pub(super) fn nics(
    devices: &Devices,
    attachments: &Attachments,
) -> Result<Vec<NicAttachment>, MachineError> {
    if attachments.nics.is_empty() {
        return devices.nics.iter().enumerate().map(own_tap).collect();
    }
    if attachments.nics.len() != devices.nics.len() {
        return Err(missing(
            "nics".into(),
            &format!(
                "{} tap devices are attached for {} network cards",
                attachments.nics.len(),
                devices.nics.len()
            ),
            "attach one tap device for each network card, in the spec's order",
        ));
    }
    Ok(attachments.nics.clone())
}

fn own_tap((index, nic): (usize, &Nic)) -> Result<NicAttachment, MachineError> {
    match &nic.attach {
        NicAttach::Tap { tap } => Ok(NicAttachment {
            tap: tap.clone(),
            mtu: ETHERNET_MTU,
        }),
        NicAttach::Network { network } => Err(missing(
            format!("nics[{index}].attach"),
            &format!("this VMM was not told which tap device leads to network {network}"),
            "run the machine through a host agent, or name a tap device",
        )),
    }
}

/// The directory for the vsock's sockets, if the machine has a vsock.
pub(super) fn vsock(
    devices: &Devices,
    attachments: &Attachments,
) -> Result<Option<(u32, PathBuf)>, MachineError> {
    match (&devices.vsock, &attachments.vsock) {
        (None, _) => Ok(None),
        (Some(vsock), Some(directory)) => Ok(Some((vsock.cid, directory.clone()))),
        (Some(_), None) => Err(missing(
            "vsock".into(),
            "this VMM was not told where the vsock's sockets are to be",
            "run the machine through a host agent, or give a directory",
        )),
    }
}

fn missing(field: String, detail: &str, remedy: &'static str) -> MachineError {
    MachineError::Attachment {
        field,
        detail: detail.to_owned(),
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::devices::{CloudInit, DiskFormat, MacAddress, NicLimits};
    use godwit_wire::id::NetworkId;

    fn file(access: DiskAccess) -> Disk {
        Disk {
            name: "root".into(),
            source: DiskSource::File {
                path: "/images/root.img".into(),
                format: DiskFormat::Raw,
            },
            access,
            limits: Default::default(),
            on_error: Default::default(),
        }
    }

    #[test]
    fn a_machine_used_alone_locks_what_it_writes() {
        let devices = Devices {
            disks: vec![file(DiskAccess::ReadWrite), file(DiskAccess::ReadOnly)],
            ..Devices::default()
        };
        let locks: Vec<_> = disks(&devices, &Attachments::default())
            .unwrap()
            .into_iter()
            .map(|disk| disk.lock)
            .collect();
        assert_eq!(locks, [Some("/images/root.img.lock".into()), None]);
    }

    #[test]
    fn what_only_an_agent_knows_is_asked_for_by_its_field() {
        let nic = Nic {
            name: "lan".into(),
            mac: MacAddress::local(1),
            attach: NicAttach::Network {
                network: NetworkId::fresh(),
            },
            address: None,
            queue_pairs: 1,
            limits: NicLimits::default(),
        };
        let devices = Devices {
            disks: vec![file(DiskAccess::ReadWrite)],
            nics: vec![nic],
            cloud_init: Some(CloudInit::default()),
            ..Devices::default()
        };
        let attachments = Attachments::default();
        let field = |error: MachineError| error.problem("spec").fields[0].field.clone();
        assert_eq!(
            field(disks(&devices, &attachments).unwrap_err()),
            "spec.cloud_init"
        );
        assert_eq!(
            field(nics(&devices, &attachments).unwrap_err()),
            "spec.nics[0].attach"
        );
        let half = Attachments {
            disks: vec![DiskAttachment {
                path: "/a".into(),
                format: DiskFormat::Raw,
                lock: None,
            }],
            ..Attachments::default()
        };
        assert_eq!(field(disks(&devices, &half).unwrap_err()), "spec.disks");
    }
}
