//! How much of its host's disks and networks a VM may take, and what it does when they fail.

use super::words::size;
use crate::resource::{CreateVmDisk, CreateVmNic, DiskLimits, NicLimits, OnIoError};
use clap::Args;

/// They hold for every disk and network card the VM is created with.
#[derive(Debug, Default, Args)]
pub(super) struct LimitArgs {
    /// Most requests per second of each disk.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Limits")]
    disk_requests_per_s: Option<u64>,
    /// Most bytes per second of each disk, read and written together, such as 50M.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Limits")]
    disk_bytes_per_s: Option<u64>,
    /// What an I/O error of the host does to the VM.
    #[arg(long, value_enum, default_value_t, help_heading = "Limits")]
    on_disk_error: OnIoError,
    /// Most bytes per second to and from each network card, such as 12M.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Limits")]
    nic_bytes_per_s: Option<u64>,
}

impl LimitArgs {
    /// The disk, bound by these.
    pub(super) fn bind_disk(&self, disk: CreateVmDisk) -> CreateVmDisk {
        CreateVmDisk {
            limits: DiskLimits {
                requests_per_s: self.disk_requests_per_s,
                bytes_per_s: self.disk_bytes_per_s,
            },
            on_error: self.on_disk_error,
            ..disk
        }
    }

    /// The network card, bound by these.
    pub(super) fn bind_nic(&self, nic: CreateVmNic) -> CreateVmNic {
        CreateVmNic {
            limits: NicLimits {
                receive_bytes_per_s: self.nic_bytes_per_s,
                transmit_bytes_per_s: self.nic_bytes_per_s,
            },
            ..nic
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn what_is_not_said_is_not_limited() {
        let limits = Line::parse_from(["x"]).limits;
        assert_eq!(
            limits.bind_disk(CreateVmDisk::default()),
            CreateVmDisk::default()
        );
    }

    #[test]
    fn what_is_said_holds_for_a_disk() {
        let line = [
            "x",
            "--disk-requests-per-s=500",
            "--disk-bytes-per-s=50M",
            "--on-disk-error=pause",
        ];
        let disk = Line::parse_from(line)
            .limits
            .bind_disk(CreateVmDisk::default());
        assert_eq!(disk.limits.requests_per_s, Some(500));
        assert_eq!(disk.limits.bytes_per_s, Some(50 << 20));
        assert_eq!(disk.on_error, OnIoError::Pause);
        assert!(Line::try_parse_from(["x", "--disk-requests-per-s=0"]).is_err());
    }
}
