//! What a VM has besides CPUs and memory, as it is shown and as it is asked for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Name of the device; the guest finds it as `/dev/disk/by-id/virtio-NAME`.
    pub name: String,
    /// The disk; null when it is a file outside all pools.
    pub disk: Option<Uuid>,
    /// Its name, or the file's path.
    pub disk_name: String,
    /// Its pool.
    pub pool: Option<Uuid>,
    /// Name of that pool.
    pub pool_name: Option<String>,
    /// Size the guest sees; null while that is not known.
    pub bytes: Option<u64>,
    /// Name of the image it is a thin copy of.
    pub image_name: Option<String>,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// Rate limits.
    #[serde(default)]
    pub limits: DiskLimits,
    /// What an I/O error does.
    #[serde(default)]
    pub on_error: OnIoError,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNic {
    /// Name of the device.
    pub name: String,
    /// The network; null when it is a tap device of the host.
    pub network: Option<Uuid>,
    /// Its name, or the tap device's.
    pub network_name: String,
    /// Ethernet address.
    pub mac: String,
    /// Address that DHCP gives it.
    pub address: Option<String>,
    /// Receive and transmit queue pairs.
    pub queue_pairs: u8,
    /// Rate limits.
    #[serde(default)]
    pub limits: NicLimits,
}

/// A disk that a VM shall have: an existing one (`disk`), or a new one from an image, a copy or blank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateVmDisk {
    /// Name of the device, 1 to 20 of `a`-`z`, digits and `-`; `root` or `disk-N` when absent. A new disk is called
    /// VM-NAME.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Id or name of an existing disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Id or name of the image a new disk is a thin copy of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Id or name of the disk a new disk is a full copy of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
    /// Size of a new disk; that of what it is made from when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Id or name of the pool of a new disk; the image's, or the only choice, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Format of a new disk; what suits it when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// Rate limits.
    pub limits: DiskLimits,
    /// What an I/O error does.
    pub on_error: OnIoError,
}

/// A network card that a VM shall have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVmNic {
    /// Name of the device; `nic-N` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Id or name of the network.
    pub network: String,
    /// Ethernet address such as `52:54:00:12:34:56`; made from the VM's id when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Address: `auto` for the lowest free one of the network, `none`, or an IPv4 address.
    #[serde(default = "auto")]
    pub address: String,
    /// Receive and transmit queue pairs; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u8>,
    /// Rate limits.
    #[serde(default)]
    pub limits: NicLimits,
}

fn auto() -> String {
    "auto".into()
}

/// What cloud-init finds on the VM's seed disk (data source NoCloud).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CloudInit {
    /// A new one sets the guest up anew; the VM's id when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub instance_id: String,
    /// Host name of the guest; the VM's name when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// Public keys for the image's default user.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// The `user-data` document.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_data: String,
    /// The `network-config` document; DHCP on every card when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub network_config: String,
}

/// Sockets between guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, at least 3.
    #[serde(default = "usual_cid")]
    #[schema(minimum = 3)]
    pub cid: u32,
}

fn usual_cid() -> u32 {
    3
}

/// Which console the serial stream talks to.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleKind {
    /// COM1 (`ttyS0`).
    #[default]
    Serial,
    /// virtio-console (`hvc0`).
    Virtio,
}

/// How the host backs guest memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBacking {
    /// Ordinary pages.
    #[default]
    Standard,
    /// 2 MiB pages from the host's reserved pool.
    #[serde(rename = "huge_2m")]
    #[value(name = "huge-2m")]
    Huge2M,
}

/// Whether a guest may write a disk.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum DiskAccess {
    /// Read and write; no other VM has the disk then.
    #[default]
    ReadWrite,
    /// Read only.
    ReadOnly,
}

/// Format of a disk or an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// What an I/O error of the host does to the guest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum OnIoError {
    /// A full pool pauses the VM until there is room; other errors are reported to the guest.
    #[default]
    PauseWhenFull,
    /// Every error pauses the VM.
    Pause,
    /// Every error is reported to the guest.
    Report,
}

/// Rate limits of a disk; absent means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_s: Option<u64>,
    /// Bytes per second, read and written together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

/// Rate limits of a network card; absent means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NicLimits {
    /// Bytes per second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_bytes_per_s: Option<u64>,
    /// Bytes per second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_bytes_per_s: Option<u64>,
}
