//! Devices on the command line of `godwit vmm`.

use godwit_wire::devices::{
    ConsoleKind, Devices, Disk, DiskAccess, DiskFormat, DiskLimits, DiskSource, MacAddress,
    MemoryBacking, Nic, NicAttach, NicLimits, OnIoError, Vsock,
};
use std::path::PathBuf;

/// The devices of a machine that boots at once.
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArgs {
    /// A disk: PATH[,format=raw|qcow2][,name=NAME][,ro][,requests-per-s=N][,bytes-per-s=N]
    /// [,on-error=pause-when-full|pause|report]. The format is raw unless it is given. May be repeated.
    #[arg(long = "disk", value_name = "DISK", value_parser = parse_disk)]
    disks: Vec<DiskArg>,
    /// A network card on a tap device: TAP[,mac=ADDRESS][,queues=PAIRS][,receive-bytes-per-s=N]
    /// [,transmit-bytes-per-s=N]. May be repeated.
    #[arg(long = "nic", value_name = "NIC", value_parser = parse_nic)]
    nics: Vec<NicArg>,
    /// Context id of the guest's vsock, from 3 up; its UNIX sockets appear beside the API socket.
    #[arg(long, value_name = "CID")]
    vsock_cid: Option<u32>,
    /// Console on this terminal: serial (COM1) or virtio (hvc0).
    #[arg(long, value_name = "KIND", default_value = "serial", value_parser = parse_console)]
    console: ConsoleKind,
    /// Back guest memory with 2 MiB pages that the host has reserved.
    #[arg(long)]
    huge_pages: bool,
}

#[derive(Clone, Debug)]
struct DiskArg {
    path: PathBuf,
    format: DiskFormat,
    name: Option<String>,
    access: DiskAccess,
    limits: DiskLimits,
    on_error: OnIoError,
}

#[derive(Clone, Debug)]
struct NicArg {
    tap: String,
    mac: Option<MacAddress>,
    queue_pairs: u8,
    limits: NicLimits,
}

fn parse_disk(text: &str) -> Result<DiskArg, String> {
    let mut words = text.split(',');
    let path = words.next().filter(|path| !path.is_empty());
    let path = path.ok_or("give the path of the image first")?;
    let mut disk = DiskArg {
        path: std::path::absolute(path).map_err(|error| error.to_string())?,
        format: DiskFormat::Raw,
        name: None,
        access: DiskAccess::ReadWrite,
        limits: DiskLimits::default(),
        on_error: OnIoError::default(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("format", "raw")) => disk.format = DiskFormat::Raw,
            Some(("format", "qcow2")) => disk.format = DiskFormat::Qcow2,
            Some(("name", name)) => disk.name = Some(name.to_owned()),
            Some(("requests-per-s", count)) => disk.limits.requests_per_s = Some(rate(count)?),
            Some(("bytes-per-s", count)) => disk.limits.bytes_per_s = Some(rate(count)?),
            Some(("on-error", "pause-when-full")) => disk.on_error = OnIoError::PauseWhenFull,
            Some(("on-error", "pause")) => disk.on_error = OnIoError::Pause,
            Some(("on-error", "report")) => disk.on_error = OnIoError::Report,
            None if word == "ro" => disk.access = DiskAccess::ReadOnly,
            _ => {
                return Err(format!(
                    "{word:?} is none of format=raw|qcow2, name=NAME, ro, requests-per-s=N, bytes-per-s=N, \
                     on-error=pause-when-full|pause|report"
                ));
            }
        }
    }
    Ok(disk)
}

fn parse_nic(text: &str) -> Result<NicArg, String> {
    let mut words = text.split(',');
    let tap = words.next().unwrap_or_default().to_owned();
    let mut nic = NicArg {
        tap,
        mac: None,
        queue_pairs: 1,
        limits: NicLimits::default(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("mac", mac)) => {
                nic.mac = Some(mac.parse().map_err(|error| format!("{error}"))?);
            }
            Some(("queues", pairs)) => {
                nic.queue_pairs = pairs
                    .parse()
                    .map_err(|_| format!("{pairs:?} is no number"))?;
            }
            Some(("receive-bytes-per-s", count)) => {
                nic.limits.receive_bytes_per_s = Some(rate(count)?);
            }
            Some(("transmit-bytes-per-s", count)) => {
                nic.limits.transmit_bytes_per_s = Some(rate(count)?);
            }
            _ => {
                return Err(format!(
                    "{word:?} is none of mac=ADDRESS, queues=PAIRS, receive-bytes-per-s=N, transmit-bytes-per-s=N"
                ));
            }
        }
    }
    Ok(nic)
}

/// A limit of nothing at all would stop the device for good.
fn rate(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(count @ 1..) => Ok(count),
        _ => Err(format!("{text:?} is no whole number from 1 up")),
    }
}

fn parse_console(text: &str) -> Result<ConsoleKind, String> {
    match text {
        "serial" => Ok(ConsoleKind::Serial),
        "virtio" => Ok(ConsoleKind::Virtio),
        _ => Err("choose serial or virtio".into()),
    }
}

impl DeviceArgs {
    /// What they say, as part of a machine's spec.
    pub(super) fn devices(&self) -> Devices {
        let disk = |(index, disk): (usize, &DiskArg)| Disk {
            name: disk.name.clone().unwrap_or_else(|| format!("disk{index}")),
            source: DiskSource::File {
                path: disk.path.clone(),
                format: disk.format,
            },
            access: disk.access,
            limits: disk.limits,
            on_error: disk.on_error,
        };
        let nic = |(index, nic): (usize, &NicArg)| Nic {
            name: format!("nic{index}"),
            mac: nic
                .mac
                .unwrap_or_else(|| MacAddress::local(index as u64 + 1)),
            attach: NicAttach::Tap {
                tap: nic.tap.clone(),
            },
            address: None,
            queue_pairs: nic.queue_pairs,
            limits: nic.limits,
        };
        Devices {
            disks: self.disks.iter().enumerate().map(disk).collect(),
            nics: self.nics.iter().enumerate().map(nic).collect(),
            cloud_init: None,
            console: self.console,
            vsock: self.vsock_cid.map(|cid| Vsock { cid }),
            memory_backing: if self.huge_pages {
                MemoryBacking::Huge2M
            } else {
                MemoryBacking::Standard
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_raw_and_writable_unless_it_says_otherwise() {
        let plain = parse_disk("/a.img").unwrap();
        assert_eq!(
            (plain.format, plain.access),
            (DiskFormat::Raw, DiskAccess::ReadWrite)
        );
        let other = parse_disk("/b,format=qcow2,name=data,ro").unwrap();
        assert_eq!(
            (other.format, other.access),
            (DiskFormat::Qcow2, DiskAccess::ReadOnly)
        );
        assert_eq!(other.name.as_deref(), Some("data"));
        let slow = parse_disk("/c,requests-per-s=100,bytes-per-s=5000,on-error=report").unwrap();
        assert_eq!(slow.limits.requests_per_s, Some(100));
        assert_eq!(slow.limits.bytes_per_s, Some(5000));
        assert_eq!(slow.on_error, OnIoError::Report);
        for bad in [
            "",
            ",ro",
            "/a,format=vmdk",
            "/a,rw",
            "/a,bytes-per-s=0",
            "/a,on-error=retry",
        ] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_card_names_its_tap_first() {
        let nic = parse_nic("tap0,mac=52:54:00:00:00:09,queues=2").unwrap();
        assert_eq!((nic.tap.as_str(), nic.queue_pairs), ("tap0", 2));
        let slow = parse_nic("tap0,receive-bytes-per-s=1000,transmit-bytes-per-s=2000").unwrap();
        assert_eq!(slow.limits.receive_bytes_per_s, Some(1000));
        assert_eq!(slow.limits.transmit_bytes_per_s, Some(2000));
        assert!(parse_nic("tap0,mac=52:54").is_err());
        assert!(parse_nic("tap0,speed=9").is_err());
    }
}
