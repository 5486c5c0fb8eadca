//! The CPU a guest sees, and whether another host can go on with it.

use crate::machine::CpuMismatch;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Clock rates may differ by this much without the guest noticing: NTP corrects up to 500 ppm, and some of that is
/// the guest's own.
pub const TSC_TOLERANCE_PPM: u64 = 250;
/// Most differences that one refusal names.
const MAX_NAMED: usize = 16;

/// One CPUID leaf as a guest reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry, where the leaf looks at it.
    #[serde(default)]
    pub index: u32,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// What of a CPU a running guest depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCpu {
    /// CPUID of the first vCPU.
    pub cpuid: Vec<CpuidLeaf>,
    /// Rate of its time-stamp counter.
    pub tsc_khz: u32,
    /// Registers that are saved with it.
    pub msrs: BTreeSet<u32>,
}

/// Whether a host can give a guest another TSC rate than its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TscScaling {
    /// It can.
    Available,
    /// It cannot.
    Missing,
}

/// One of the registers in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    const fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }

    const fn of(self, leaf: &CpuidLeaf) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }
}

/// Words of CPUID whose bits are features; `ignored` bits follow the guest's own doing or its number of vCPUs.
struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    ignored: u32,
}

const fn word(leaf: u32, index: u32, register: Register) -> Word {
    Word {
        leaf,
        index,
        register,
        ignored: 0,
    }
}

const WORDS: &[Word] = &[
    Word {
        // OSXSAVE mirrors CR4.
        ignored: 1 << 27,
        ..word(1, 0, Register::Ecx)
    },
    word(1, 0, Register::Edx),
    word(6, 0, Register::Eax),
    word(7, 0, Register::Ebx),
    Word {
        // OSPKE mirrors CR4.
        ignored: 1 << 4,
        ..word(7, 0, Register::Ecx)
    },
    word(7, 0, Register::Edx),
    word(7, 1, Register::Eax),
    word(7, 1, Register::Edx),
    word(0xd, 0, Register::Eax),
    word(0xd, 1, Register::Eax),
    word(0x4000_0001, 0, Register::Eax),
    word(0x8000_0001, 0, Register::Ecx),
    word(0x8000_0001, 0, Register::Edx),
    word(0x8000_0007, 0, Register::Edx),
    word(0x8000_0008, 0, Register::Ebx),
    word(0x8000_0021, 0, Register::Eax),
];

/// Names as Linux shows them in `/proc/cpuinfo`.
const NAMES: &[(u32, u32, Register, u8, &str)] = &[
    (1, 0, Register::Ecx, 0, "sse3"),
    (1, 0, Register::Ecx, 1, "pclmulqdq"),
    (1, 0, Register::Ecx, 9, "ssse3"),
    (1, 0, Register::Ecx, 12, "fma"),
    (1, 0, Register::Ecx, 13, "cx16"),
    (1, 0, Register::Ecx, 17, "pcid"),
    (1, 0, Register::Ecx, 19, "sse4_1"),
    (1, 0, Register::Ecx, 20, "sse4_2"),
    (1, 0, Register::Ecx, 21, "x2apic"),
    (1, 0, Register::Ecx, 22, "movbe"),
    (1, 0, Register::Ecx, 23, "popcnt"),
    (1, 0, Register::Ecx, 24, "tsc_deadline_timer"),
    (1, 0, Register::Ecx, 25, "aes"),
    (1, 0, Register::Ecx, 26, "xsave"),
    (1, 0, Register::Ecx, 28, "avx"),
    (1, 0, Register::Ecx, 29, "f16c"),
    (1, 0, Register::Ecx, 30, "rdrand"),
    (6, 0, Register::Eax, 2, "arat"),
    (7, 0, Register::Ebx, 0, "fsgsbase"),
    (7, 0, Register::Ebx, 3, "bmi1"),
    (7, 0, Register::Ebx, 5, "avx2"),
    (7, 0, Register::Ebx, 7, "smep"),
    (7, 0, Register::Ebx, 8, "bmi2"),
    (7, 0, Register::Ebx, 9, "erms"),
    (7, 0, Register::Ebx, 10, "invpcid"),
    (7, 0, Register::Ebx, 16, "avx512f"),
    (7, 0, Register::Ebx, 17, "avx512dq"),
    (7, 0, Register::Ebx, 18, "rdseed"),
    (7, 0, Register::Ebx, 19, "adx"),
    (7, 0, Register::Ebx, 20, "smap"),
    (7, 0, Register::Ebx, 23, "clflushopt"),
    (7, 0, Register::Ebx, 24, "clwb"),
    (7, 0, Register::Ebx, 28, "avx512cd"),
    (7, 0, Register::Ebx, 29, "sha_ni"),
    (7, 0, Register::Ebx, 30, "avx512bw"),
    (7, 0, Register::Ebx, 31, "avx512vl"),
    (7, 0, Register::Edx, 4, "fsrm"),
    (7, 0, Register::Edx, 26, "spec_ctrl"),
    (7, 0, Register::Edx, 29, "arch_capabilities"),
    (0xd, 0, Register::Eax, 2, "xsave of avx"),
    (0xd, 0, Register::Eax, 5, "xsave of avx512 masks"),
    (0xd, 0, Register::Eax, 6, "xsave of avx512 upper halves"),
    (0xd, 0, Register::Eax, 7, "xsave of avx512 upper registers"),
    (0xd, 1, Register::Eax, 0, "xsaveopt"),
    (0xd, 1, Register::Eax, 1, "xsavec"),
    (0xd, 1, Register::Eax, 2, "xgetbv1"),
    (0xd, 1, Register::Eax, 3, "xsaves"),
    (0x4000_0001, 0, Register::Eax, 3, "kvm clock"),
    (0x4000_0001, 0, Register::Eax, 5, "kvm steal time"),
    (0x4000_0001, 0, Register::Eax, 6, "kvm pv eoi"),
    (0x4000_0001, 0, Register::Eax, 7, "kvm pv unhalt"),
    (0x4000_0001, 0, Register::Eax, 24, "kvm stable clock"),
    (0x8000_0001, 0, Register::Ecx, 0, "lahf_lm"),
    (0x8000_0001, 0, Register::Ecx, 5, "abm"),
    (0x8000_0001, 0, Register::Ecx, 6, "sse4a"),
    (0x8000_0001, 0, Register::Edx, 11, "syscall"),
    (0x8000_0001, 0, Register::Edx, 20, "nx"),
    (0x8000_0001, 0, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Register::Edx, 27, "rdtscp"),
    (0x8000_0001, 0, Register::Edx, 29, "lm"),
    (0x8000_0007, 0, Register::Edx, 8, "constant tsc"),
    (0x8000_0008, 0, Register::Ebx, 12, "ibpb"),
];

impl GuestCpu {
    /// Whether a guest that sees this CPU can go on where the same machine would see `there`.
    pub fn can_go_on(&self, there: &Self, scaling: TscScaling) -> Result<(), CpuMismatch> {
        let (vendor, other) = (self.vendor(), there.vendor());
        if vendor != other {
            return Err(CpuMismatch::VendorDiffers {
                guest: vendor,
                host: other,
            });
        }
        let names = self.missing(there);
        if !names.is_empty() {
            return Err(CpuMismatch::MissingFeatures { names });
        }
        if let Some(component) = self.moved_component(there) {
            return Err(CpuMismatch::XsaveLayout { component });
        }
        let apart = u64::from(self.tsc_khz.abs_diff(there.tsc_khz)) * 1_000_000;
        if scaling == TscScaling::Missing && apart > u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Err(CpuMismatch::TscRate {
                guest_khz: self.tsc_khz,
                host_khz: there.tsc_khz,
            });
        }
        match self.msrs.difference(&there.msrs).next() {
            Some(&index) => Err(CpuMismatch::MsrMissing { index }),
            None => Ok(()),
        }
    }

    /// The vendor's name, as leaf 0 spells it.
    pub fn vendor(&self) -> String {
        let leaf = self.leaf(0, 0);
        [leaf.ebx, leaf.edx, leaf.ecx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .filter(u8::is_ascii_graphic)
            .map(char::from)
            .collect()
    }

    /// Names of features this CPU has and `there` lacks.
    pub fn missing(&self, there: &Self) -> Vec<String> {
        let mut names = Vec::new();
        for word in WORDS {
            let bits = |cpu: &Self| word.register.of(&cpu.leaf(word.leaf, word.index));
            let missing = bits(self) & !bits(there) & !word.ignored;
            names.extend(
                (0..32u8)
                    .filter(|bit| missing >> bit & 1 != 0)
                    .map(|bit| feature_name(word, bit)),
            );
        }
        names.truncate(MAX_NAMED);
        names
    }

    /// An XSAVE component that lies elsewhere there: the guest's saved registers would be misread.
    fn moved_component(&self, there: &Self) -> Option<u32> {
        let components = self.leaf(0xd, 0).eax;
        (2..32)
            .filter(|bit| components >> bit & 1 != 0)
            .find(|&bit| {
                let (ours, theirs) = (self.leaf(0xd, bit), there.leaf(0xd, bit));
                (ours.eax, ours.ebx) != (theirs.eax, theirs.ebx)
            })
    }

    fn leaf(&self, leaf: u32, index: u32) -> CpuidLeaf {
        self.cpuid
            .iter()
            .find(|entry| (entry.leaf, entry.index) == (leaf, index))
            .copied()
            .unwrap_or_default()
    }
}

fn feature_name(word: &Word, bit: u8) -> String {
    NAMES
        .iter()
        .find(|(leaf, index, register, number, _)| {
            (*leaf, *index, *register, *number) == (word.leaf, word.index, word.register, bit)
        })
        .map_or_else(
            || {
                format!(
                    "CPUID {:#x}.{} {} bit {bit}",
                    word.leaf,
                    word.index,
                    word.register.name()
                )
            },
            |(.., name)| (*name).to_owned(),
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(leaf: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf {
            leaf,
            index,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn cpu() -> GuestCpu {
        GuestCpu {
            cpuid: vec![
                leaf(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
                leaf(1, 0, [0, 0, 1 << 28 | 1 << 27 | 1 << 31, 0]),
                leaf(7, 0, [0, 1 << 5 | 1 << 16, 0, 0]),
                leaf(0xd, 0, [7, 0, 0, 0]),
                leaf(0xd, 2, [256, 576, 0, 0]),
            ],
            tsc_khz: 3_000_000,
            msrs: BTreeSet::from([0x10, 0x174]),
        }
    }

    #[test]
    fn a_guest_goes_on_on_an_equal_and_on_a_larger_cpu() {
        let (guest, mut host) = (cpu(), cpu());
        assert_eq!(guest.can_go_on(&host, TscScaling::Missing), Ok(()));
        host.cpuid[2].ebx = u32::MAX;
        host.msrs.insert(0x175);
        host.tsc_khz += 700;
        assert_eq!(guest.can_go_on(&host, TscScaling::Missing), Ok(()));
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let (guest, mut host) = (cpu(), cpu());
        // OSXSAVE only mirrors what the guest has switched on.
        host.cpuid[1].ecx = 0;
        host.cpuid[2].ebx = 1 << 5;
        assert_eq!(
            guest.can_go_on(&host, TscScaling::Missing),
            Err(CpuMismatch::MissingFeatures {
                names: vec![
                    "avx".into(),
                    "CPUID 0x1.0 ECX bit 31".into(),
                    "avx512f".into()
                ]
            })
        );
    }

    #[test]
    fn guests_do_not_change_the_vendor() {
        let (guest, mut host) = (cpu(), cpu());
        host.cpuid[0] = leaf(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        assert_eq!(
            guest.can_go_on(&host, TscScaling::Available),
            Err(CpuMismatch::VendorDiffers {
                guest: "AuthenticAMD".into(),
                host: "GenuineIntel".into()
            })
        );
    }

    #[test]
    fn registers_that_would_lie_elsewhere_are_noticed() {
        let (guest, mut host) = (cpu(), cpu());
        host.cpuid[4].ebx = 832;
        assert_eq!(
            guest.can_go_on(&host, TscScaling::Missing),
            Err(CpuMismatch::XsaveLayout { component: 2 })
        );
    }

    #[test]
    fn another_tsc_rate_needs_scaling() {
        let (guest, mut host) = (cpu(), cpu());
        host.tsc_khz = 3_000_751;
        assert!(matches!(
            guest.can_go_on(&host, TscScaling::Missing),
            Err(CpuMismatch::TscRate {
                guest_khz: 3_000_000,
                host_khz: 3_000_751
            })
        ));
        assert_eq!(guest.can_go_on(&host, TscScaling::Available), Ok(()));
    }

    #[test]
    fn a_register_that_could_not_be_set_is_named() {
        let (guest, mut host) = (cpu(), cpu());
        host.msrs.remove(&0x174);
        assert_eq!(
            guest.can_go_on(&host, TscScaling::Missing),
            Err(CpuMismatch::MsrMissing { index: 0x174 })
        );
    }

    proptest! {
        #[test]
        fn no_peers_words_panic_the_judge(
            words in prop::collection::vec(any::<[u32; 6]>(), 0..20), tsc_khz in any::<u32>()
        ) {
            let stranger = GuestCpu {
                cpuid: words.iter().map(|w| leaf(w[0] % 16, w[1] % 4, [w[2], w[3], w[4], w[5]])).collect(),
                tsc_khz,
                msrs: BTreeSet::new(),
            };
            let _ = stranger.can_go_on(&cpu(), TscScaling::Missing);
            prop_assert_eq!(stranger.missing(&stranger), Vec::<String>::new());
        }
    }
}
