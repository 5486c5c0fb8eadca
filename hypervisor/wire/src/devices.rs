//! The devices of a machine: disks, network cards, console, sockets.

use crate::id::{DiskId, NetworkId, PoolId};
use crate::problem::FieldProblem;
use crate::unit::Mib;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Most disks of a machine: PCI slots 8 to 23. The seed disk takes one of them.
pub const MAX_DISKS: usize = 16;
/// Most network cards of a machine: PCI slots 24 to 31.
pub const MAX_NICS: usize = 8;
/// Longest name of a disk: the guest sees it as the disk's serial number, which has 20 bytes (virtio 1.2, 5.2.6).
pub const MAX_DISK_NAME_BYTES: usize = 20;
/// Most queue pairs of one network card.
pub const MAX_QUEUE_PAIRS: u8 = 8;
/// Largest user-data document of cloud-init.
pub const MAX_USER_DATA_BYTES: usize = 64 * 1024;
/// Lowest context id a guest's vsock may have; lower ones are reserved (virtio 1.2, 5.10.4).
pub const MIN_VSOCK_CID: u32 = 3;

/// Everything the guest finds on its PCI bus, and how its memory is backed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Devices {
    /// Disks, in the order the guest finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Network cards, in the order the guest finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// A cloud-init seed: a read-only disk after all others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Which console the operator's serial stream talks to.
    #[serde(skip_serializing_if = "is_default")]
    pub console: ConsoleKind,
    /// Sockets between the guest and this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// How the host backs guest memory.
    #[serde(skip_serializing_if = "is_default")]
    pub memory_backing: MemoryBacking,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Unique in the machine; the guest sees it as serial number (`/dev/disk/by-id/virtio-NAME`). 1 to 20 of
    /// `a–z`, `0–9` and `-`.
    pub name: String,
    /// Where its bytes are.
    pub source: DiskSource,
    /// Whether the guest may write.
    #[serde(default)]
    pub access: DiskAccess,
    /// Rate limits.
    #[serde(default, skip_serializing_if = "is_default")]
    pub limits: DiskLimits,
    /// What an I/O error does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_error: OnIoError,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DiskSource {
    /// A disk of a storage pool; the host agent knows the file.
    Volume {
        /// The pool.
        pool: PoolId,
        /// The disk.
        disk: DiskId,
    },
    /// A file, under the same path wherever the machine runs.
    File {
        /// Absolute path.
        path: PathBuf,
        /// What is in it. Never guessed: a guest could write another format's header into a raw disk.
        format: DiskFormat,
    },
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 3 (2 is read).
    Qcow2,
}

/// Whether the guest may write a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAccess {
    /// Read and write; exclusive.
    #[default]
    ReadWrite,
    /// Read only; shared.
    ReadOnly,
}

/// Rate limits of a disk; absent means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskLimits {
    /// Requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_s: Option<u64>,
    /// Bytes per second, read and written together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

/// What an I/O error of the host does to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnIoError {
    /// A full pool pauses the machine until there is room; other errors are reported to the guest.
    #[default]
    PauseWhenFull,
    /// Every error pauses the machine.
    Pause,
    /// Every error is reported to the guest.
    Report,
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Unique in the machine: 1 to 20 of `a–z`, `0–9` and `-`.
    pub name: String,
    /// Stays with the machine wherever it runs.
    pub mac: MacAddress,
    /// What it is plugged into.
    pub attach: NicAttach,
    /// Address that DHCP gives it, when its network has addresses to give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Receive and transmit queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    #[serde(default = "one")]
    pub queue_pairs: u8,
    /// Rate limits.
    #[serde(default, skip_serializing_if = "is_default")]
    pub limits: NicLimits,
}

const fn one() -> u8 {
    1
}

/// What a network card is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NicAttach {
    /// A network of the pool; the host agent makes the tap device.
    Network {
        /// The network.
        network: NetworkId,
    },
    /// A tap device that exists on the host.
    Tap {
        /// Its name.
        tap: String,
    },
}

/// Rate limits of a network card; absent means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NicLimits {
    /// Bytes per second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_bytes_per_s: Option<u64>,
    /// Bytes per second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_bytes_per_s: Option<u64>,
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether a card may have it: not a group address, not zero.
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && !matches!(self.0, [0, 0, 0, 0, 0, 0])
    }

    /// A locally administered address from the low 40 bits of `number`.
    pub const fn local(number: u64) -> Self {
        let bytes = number.to_be_bytes();
        Self([0x52, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six pairs of hexadecimal digits between colons.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no Ethernet address such as 52:54:00:12:34:56")]
pub struct BadMacAddress(String);

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadMacAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = BadMacAddress;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// What cloud-init finds on the seed disk (data source NoCloud).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CloudInit {
    /// Changes when the guest shall be set up anew; the VM's id at first.
    pub instance_id: String,
    /// Host name of the guest.
    pub hostname: String,
    /// Public keys for the image's default user, one `authorized_keys` line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// `user-data`, as the operator wrote it; empty means only what the other fields say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_data: String,
    /// `network-config`, version 2; empty leaves the network to DHCP.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub network_config: String,
}

/// Which console the operator's serial stream talks to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleKind {
    /// COM1 (`ttyS0`).
    #[default]
    Serial,
    /// virtio-console (`hvc0`); what the guest writes to COM1 is shown too.
    Virtio,
}

/// Sockets between the guest and this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context id, at least [`MIN_VSOCK_CID`].
    pub cid: u32,
}

/// How the host backs guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBacking {
    /// Ordinary pages.
    #[default]
    Standard,
    /// 2 MiB pages from the host's reserved pool (`vm.nr_hugepages`).
    #[serde(rename = "huge_2m")]
    Huge2M,
}

/// What the host adds to a machine's spec: where the things are that the spec names.
///
/// Differs between hosts, is never seen by the guest, and is given with each command that builds a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachments {
    /// For each disk, in the spec's order; the seed disk last.
    pub disks: Vec<DiskAttachment>,
    /// For each network card, in the spec's order.
    pub nics: Vec<NicAttachment>,
    /// Directory for the vsock's UNIX sockets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<PathBuf>,
}

/// The file behind a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskAttachment {
    /// The file.
    pub path: PathBuf,
    /// What is in it.
    pub format: DiskFormat,
    /// The lock file beside it that a writer must hold under the machine's epoch; absent for read-only disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<PathBuf>,
}

/// The tap device behind a network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicAttachment {
    /// Its name.
    pub tap: String,
    /// Largest frame payload of the network.
    pub mtu: u16,
}

impl Devices {
    /// How many disks the guest sees.
    pub fn disk_count(&self) -> usize {
        self.disks.len() + usize::from(self.cloud_init.is_some())
    }

    /// Least memory-independent checks; see [`MachineSpec::problems`](crate::machine::MachineSpec::problems).
    pub(crate) fn problems(&self, prefix: &str, memory: Mib, found: &mut Vec<FieldProblem>) {
        let mut bad = |field: String, detail: String, remedy: String| {
            found.push(FieldProblem::new(
                format!("{prefix}.{field}"),
                detail,
                remedy,
            ));
        };
        if self.disk_count() > MAX_DISKS {
            bad(
                "disks".into(),
                format!("{} disks are too many", self.disk_count()),
                format!("use at most {MAX_DISKS}, the cloud-init seed included"),
            );
        }
        if self.nics.len() > MAX_NICS {
            bad(
                "nics".into(),
                format!("{} network cards are too many", self.nics.len()),
                format!("use at most {MAX_NICS}"),
            );
        }
        let (mut names, mut macs) = (BTreeSet::new(), BTreeSet::new());
        for (index, disk) in self.disks.iter().enumerate() {
            check_name(
                &format!("disks[{index}].name"),
                &disk.name,
                &mut names,
                &mut bad,
            );
            if let DiskSource::File { path, .. } = &disk.source
                && !path.is_absolute()
            {
                bad(
                    format!("disks[{index}].source.path"),
                    format!("{} is not an absolute path", path.display()),
                    "give the full path of the file on the host".into(),
                );
            }
            for (field, limit) in [
                ("requests_per_s", disk.limits.requests_per_s),
                ("bytes_per_s", disk.limits.bytes_per_s),
            ] {
                if limit == Some(0) {
                    bad(
                        format!("disks[{index}].limits.{field}"),
                        "a limit of 0 would stop the disk".into(),
                        "leave it out for no limit".into(),
                    );
                }
            }
        }
        for (index, nic) in self.nics.iter().enumerate() {
            check_name(
                &format!("nics[{index}].name"),
                &nic.name,
                &mut names,
                &mut bad,
            );
            if !nic.mac.is_unicast() {
                bad(
                    format!("nics[{index}].mac"),
                    format!("{} is a group address or zero", nic.mac),
                    "use a unicast address such as 52:54:00:12:34:56".into(),
                );
            } else if !macs.insert(nic.mac) {
                bad(
                    format!("nics[{index}].mac"),
                    format!("{} is given twice", nic.mac),
                    "give every card its own".into(),
                );
            }
            if nic.queue_pairs == 0 || nic.queue_pairs > MAX_QUEUE_PAIRS {
                bad(
                    format!("nics[{index}].queue_pairs"),
                    format!("{} is outside 1..={MAX_QUEUE_PAIRS}", nic.queue_pairs),
                    "choose a number within the limits; one per vCPU is plenty".into(),
                );
            }
            if let NicAttach::Tap { tap } = &nic.attach
                && (tap.is_empty() || tap.len() > 15 || tap.contains(['/', ' ', '\0']))
            {
                bad(
                    format!("nics[{index}].attach.tap"),
                    format!("{tap:?} is no name of a network interface"),
                    "give the name of a tap device, at most 15 bytes".into(),
                );
            }
            for (field, limit) in [
                ("receive_bytes_per_s", nic.limits.receive_bytes_per_s),
                ("transmit_bytes_per_s", nic.limits.transmit_bytes_per_s),
            ] {
                if limit == Some(0) {
                    bad(
                        format!("nics[{index}].limits.{field}"),
                        "a limit of 0 would stop the card".into(),
                        "leave it out for no limit".into(),
                    );
                }
            }
        }
        if let Some(seed) = &self.cloud_init
            && seed.user_data.len() + seed.network_config.len() > MAX_USER_DATA_BYTES
        {
            bad(
                "cloud_init.user_data".into(),
                format!(
                    "the documents have {} bytes",
                    seed.user_data.len() + seed.network_config.len()
                ),
                format!(
                    "keep them at {MAX_USER_DATA_BYTES} bytes together; let user-data fetch the rest"
                ),
            );
        }
        if let Some(vsock) = self.vsock
            && (vsock.cid < MIN_VSOCK_CID || vsock.cid == u32::MAX)
        {
            bad(
                "vsock.cid".into(),
                format!("{} is reserved", vsock.cid),
                format!("choose a context id from {MIN_VSOCK_CID} up"),
            );
        }
        if self.memory_backing == MemoryBacking::Huge2M && !memory.0.is_multiple_of(2) {
            bad(
                "memory_backing".into(),
                format!("{memory} is no whole number of 2 MiB pages"),
                "use an even number of MiB or standard pages".into(),
            );
        }
    }
}

fn check_name(
    field: &str,
    name: &str,
    names: &mut BTreeSet<String>,
    bad: &mut impl FnMut(String, String, String),
) {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > MAX_DISK_NAME_BYTES || !name.bytes().all(allowed) {
        bad(
            field.into(),
            format!("{name:?} is no name of a device"),
            format!("use 1 to {MAX_DISK_NAME_BYTES} of a-z, 0-9 and -"),
        );
    } else if ["rng", "balloon", "console", "vsock", "seed"].contains(&name) {
        bad(
            field.into(),
            format!("{name} names one of the machine's own devices"),
            "choose another name".into(),
        );
    } else if !names.insert(name.to_owned()) {
        bad(
            field.into(),
            format!("{name:?} is given twice"),
            "give every disk and network card its own name".into(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_machine_refuses_two_devices_of_one_name() {
        let disk = |name: &str| Disk {
            name: name.into(),
            source: DiskSource::File {
                path: "/disk.img".into(),
                format: DiskFormat::Raw,
            },
            access: DiskAccess::ReadWrite,
            limits: DiskLimits::default(),
            on_error: OnIoError::default(),
        };
        let devices = Devices {
            disks: vec![disk("root"), disk("root"), disk("Äh")],
            ..Devices::default()
        };
        let mut found = Vec::new();
        devices.problems("spec", Mib(64), &mut found);
        let fields: Vec<_> = found.iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(fields, ["spec.disks[1].name", "spec.disks[2].name"]);
    }

    proptest! {
        #[test]
        fn addresses_survive_their_text(bytes in any::<[u8; 6]>()) {
            let mac = MacAddress(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn no_text_panics_the_parser(text in ".{0,24}") {
            let _ = text.parse::<MacAddress>();
        }
    }
}
