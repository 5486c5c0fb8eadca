//! The machine a VM is: what must be the same on every host it runs on.

use crate::devices::Devices;
use crate::problem::FieldProblem;
use crate::unit::Mib;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most vCPUs a machine can have today.
pub const MAX_VCPUS: u8 = 64;
/// Least guest memory: kernel, page tables and a little room.
pub const MIN_MEMORY: Mib = Mib(16);
/// Most guest memory: keeps RAM below the 39-bit physical addresses every x86-64 CPU has.
pub const MAX_MEMORY: Mib = Mib(256 * 1024);
/// Longest kernel command line, as Linux on x86 limits it (`COMMAND_LINE_SIZE`).
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Everything the guest can tell apart: two VMMs given the same spec build the same machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Versioned platform; devices and addresses never change under one name.
    #[serde(default)]
    pub machine_type: MachineType,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: Mib,
    /// What the machine boots.
    pub boot: Boot,
    /// CPU features the guest sees.
    #[serde(default)]
    pub cpu: CpuBaseline,
    /// Disks, network cards and the rest.
    #[serde(flatten)]
    pub devices: Devices,
}

/// A versioned machine platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum MachineType {
    /// In-kernel irqchip, COM1, ACPI, keyboard-controller reset. No PCI bus, so no disks and no network.
    #[serde(rename = "godwit-1")]
    Godwit1,
    /// `godwit-1` with a PCI Express bus (ECAM, MSI-X), virtio devices and an ACPI power button.
    #[default]
    #[serde(rename = "godwit-2")]
    Godwit2,
}

/// What a machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Boot {
    /// The test and demo guest that is built into the program.
    Pilot,
    /// A Linux kernel: bzImage, or an uncompressed x86-64 ELF (`vmlinux`).
    Linux {
        /// Path of the kernel on the host.
        kernel: PathBuf,
        /// Path of the initial RAM disk on the host.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<PathBuf>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
}

/// Named CPU feature level a guest is limited to, so that it can run on every host that has it.
///
/// The levels are those of the x86-64 psABI; `host` passes the host's own features through and ties the VM to
/// hosts with the same CPU signature.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum CpuBaseline {
    /// SSE4.2, POPCNT, CMPXCHG16B.
    #[default]
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA, MOVBE.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL.
    #[serde(rename = "x86-64-v4")]
    V4,
    /// Whatever the host has.
    #[serde(rename = "host")]
    Host,
}

impl CpuBaseline {
    /// The name used in specs and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
            Self::Host => "host",
        }
    }
}

/// What a host's CPU can give to guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Highest named level the host supports (never [`CpuBaseline::Host`]).
    pub level: CpuBaseline,
    /// Vendor, family, model and stepping plus a digest of the features KVM offers; equal signatures may
    /// exchange `host` baseline guests.
    pub signature: String,
    /// Human-readable model name.
    pub model: String,
}

/// Why a CPU cannot run a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum CpuMismatch {
    /// The guest needs a level the host does not have.
    #[error("the guest needs {} and the host offers {}", needed.name(), offered.name())]
    LevelTooLow {
        /// Level in the guest's spec.
        needed: CpuBaseline,
        /// Level the host has.
        offered: CpuBaseline,
    },
    /// The guest sees another CPU's own features.
    #[error("the guest uses the features of CPU {guest} and the host is {host}")]
    SignatureDiffers {
        /// Signature the guest runs with.
        guest: String,
        /// Signature of the host.
        host: String,
    },
    /// The guest uses what the host cannot give.
    #[error("the guest sees CPU features the host lacks: {}", names.join(", "))]
    MissingFeatures {
        /// Their names, as Linux shows them.
        names: Vec<String>,
    },
    /// Guests know their CPU's vendor and use its instructions.
    #[error("the guest runs on a CPU of {guest} and the host has one of {host}")]
    VendorDiffers {
        /// Vendor of the CPU the guest runs on.
        guest: String,
        /// Vendor of the host's.
        host: String,
    },
    /// The host's CPU saves registers in another order than the guest knows.
    #[error("XSAVE component {component} has another size or place on the host")]
    XsaveLayout {
        /// Number of the component.
        component: u32,
    },
    /// The guest's clock would run at another speed.
    #[error(
        "the guest counts time at {guest_khz} kHz, the host's TSC runs at {host_khz} kHz and cannot be scaled"
    )]
    TscRate {
        /// Rate the guest knows.
        guest_khz: u32,
        /// Rate of the host.
        host_khz: u32,
    },
    /// A register of the guest does not exist on the host.
    #[error("the host's KVM has no MSR {index:#x}, which the guest's state holds")]
    MsrMissing {
        /// The register.
        index: u32,
    },
}

impl CpuFacts {
    /// Whether a guest with `baseline` can run here. `running_on` is the signature of the CPU the guest runs
    /// on now, if it runs.
    pub fn admits(
        &self,
        baseline: CpuBaseline,
        running_on: Option<&str>,
    ) -> Result<(), CpuMismatch> {
        match (baseline, running_on) {
            (CpuBaseline::Host, Some(guest)) if guest != self.signature => {
                Err(CpuMismatch::SignatureDiffers {
                    guest: guest.to_owned(),
                    host: self.signature.clone(),
                })
            }
            (CpuBaseline::Host, _) => Ok(()),
            (needed, _) if needed > self.level => Err(CpuMismatch::LevelTooLow {
                needed,
                offered: self.level,
            }),
            _ => Ok(()),
        }
    }
}

impl MachineSpec {
    /// Checks every field that can be judged without touching the host; an empty list means acceptable.
    ///
    /// `prefix` is the path under which the caller knows the spec, such as `spec`.
    pub fn problems(&self, prefix: &str) -> Vec<FieldProblem> {
        let at = |field: &str| format!("{prefix}.{field}");
        let mut found = Vec::new();
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            found.push(FieldProblem::new(
                at("vcpus"),
                format!("{} vCPUs is outside 1..={MAX_VCPUS}", self.vcpus),
                format!("choose a number from 1 to {MAX_VCPUS}"),
            ));
        }
        if self.memory_mib < MIN_MEMORY || self.memory_mib > MAX_MEMORY {
            found.push(FieldProblem::new(
                at("memory_mib"),
                format!(
                    "{} is outside {MIN_MEMORY} to {MAX_MEMORY}",
                    self.memory_mib
                ),
                "choose a size within the limits",
            ));
        }
        if self.machine_type == MachineType::Godwit1 && self.devices != Devices::default() {
            found.push(FieldProblem::new(
                at("machine_type"),
                "a machine of type godwit-1 has no disks, network cards or other devices",
                "use godwit-2",
            ));
        }
        self.devices.problems(prefix, self.memory_mib, &mut found);
        if let Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } = &self.boot
        {
            if cmdline.len() > MAX_CMDLINE_BYTES || cmdline.contains('\0') {
                found.push(FieldProblem::new(
                    at("boot.cmdline"),
                    format!(
                        "the command line has {} bytes or contains a NUL",
                        cmdline.len()
                    ),
                    format!("keep it at {MAX_CMDLINE_BYTES} bytes or less, without NUL"),
                ));
            }
            let absolute = |field: &str, path: &PathBuf, found: &mut Vec<FieldProblem>| {
                if !path.is_absolute() {
                    found.push(FieldProblem::new(
                        at(field),
                        format!("{} is not an absolute path", path.display()),
                        "give the full path of the file on the host",
                    ));
                }
            };
            absolute("boot.kernel", kernel, &mut found);
            if let Some(initrd) = initrd {
                absolute("boot.initrd", initrd, &mut found);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_with_no_vcpus_names_the_field_and_the_remedy() {
        let spec = MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: 0,
            memory_mib: Mib(64),
            boot: Boot::Pilot,
            cpu: CpuBaseline::V2,
            devices: Devices::default(),
        };
        let problems = spec.problems("spec");
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].field, "spec.vcpus");
        assert!(problems[0].remedy.contains("1 to 64"));
    }

    #[test]
    fn a_host_baseline_guest_moves_only_between_equal_cpus() {
        let facts = CpuFacts {
            level: CpuBaseline::V3,
            signature: "a".into(),
            model: "m".into(),
        };
        assert_eq!(facts.admits(CpuBaseline::Host, None), Ok(()));
        assert_eq!(facts.admits(CpuBaseline::Host, Some("a")), Ok(()));
        assert!(facts.admits(CpuBaseline::Host, Some("b")).is_err());
        assert!(facts.admits(CpuBaseline::V4, Some("a")).is_err());
        assert_eq!(facts.admits(CpuBaseline::V2, Some("b")), Ok(()));
    }
}
