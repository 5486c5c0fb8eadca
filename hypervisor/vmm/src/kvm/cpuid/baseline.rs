//! Named baselines as allow-lists: a guest sees these bits and no others, with the same values on every host.
//!
//! A level holds what the x86-64 psABI (chapter 3.1.1) asks of it, and what every CPU of that level and every KVM
//! gives besides. What describes the host rather than the level is made up: family, caches, name, topology. The
//! vendor stays, because guests choose instructions by it; they cannot move between vendors.

use super::{Register, register};
use godwit_wire::machine::CpuBaseline;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits of one CPUID register.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits {
    leaf: u32,
    index: u32,
    register: Register,
    mask: u32,
}

const fn bits(leaf: u32, index: u32, register: Register, numbers: &[u32]) -> Bits {
    let (mut mask, mut next) = (0, 0);
    while next < numbers.len() {
        mask |= 1 << numbers[next];
        next += 1;
    }
    Bits {
        leaf,
        index,
        register,
        mask,
    }
}

const V2: &[Bits] = &[
    // FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR, SSE,
    // SSE2. Not VME, which 64-bit systems have no use for: where the host is itself emulated there is none, and a
    // level that asks for it would be refused there.
    bits(
        1,
        0,
        Register::Edx,
        &[
            0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26,
        ],
    ),
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT
    bits(1, 0, Register::Ecx, &[0, 9, 13, 19, 20, 23]),
    // LAHF
    bits(0x8000_0001, 0, Register::Ecx, &[0]),
    // SYSCALL, NX, RDTSCP, long mode
    bits(0x8000_0001, 0, Register::Edx, &[11, 20, 27, 29]),
];
const V3: &[Bits] = &[
    // PCLMULQDQ, FMA, MOVBE, AES, XSAVE, AVX, F16C
    bits(1, 0, Register::Ecx, &[1, 12, 22, 25, 26, 28, 29]),
    // FSGSBASE, BMI1, AVX2, SMEP, BMI2
    bits(7, 0, Register::Ebx, &[0, 3, 5, 7, 8]),
    // x87, SSE and AVX registers; XSAVEOPT
    bits(0xd, 0, Register::Eax, &[0, 1, 2]),
    bits(0xd, 1, Register::Eax, &[0]),
    // LZCNT; pages of 1 GiB
    bits(0x8000_0001, 0, Register::Ecx, &[5]),
    bits(0x8000_0001, 0, Register::Edx, &[26]),
];
const V4: &[Bits] = &[
    // AVX-512 F, DQ, CD, BW, VL; ADX, SMAP, CLFLUSHOPT, CLWB
    bits(7, 0, Register::Ebx, &[16, 17, 19, 20, 23, 24, 28, 30, 31]),
    // AVX-512 registers; XSAVEC, XGETBV1
    bits(0xd, 0, Register::Eax, &[5, 6, 7]),
    bits(0xd, 1, Register::Eax, &[1, 2]),
];
/// What KVM brings by itself, whatever the CPU.
const FROM_KVM: &[Bits] = &[
    // x2APIC, TSC deadline timer, hypervisor
    bits(1, 0, Register::Ecx, &[21, 24, 31]),
    // ARAT: the local APIC's timer never stops.
    bits(6, 0, Register::Eax, &[2]),
    // Clock source (old and new), no I/O delay, steal time, PV EOI, PV unhalt, PV TLB flush, PV IPIs, PV yield,
    // stable clock
    bits(
        0x4000_0001,
        0,
        Register::Eax,
        &[0, 1, 3, 5, 6, 7, 9, 11, 13, 24],
    ),
];

/// Most of the components that the standard XSAVE area of `x86-64-v4` has; KVM's buffer has room for all of them.
const XSAVE_COMPONENTS: u32 = 8;
/// Legacy region and header of an XSAVE area.
const XSAVE_LEAST_BYTES: u32 = 576;
const XSAVE_FEATURE: u32 = 1 << 26;

/// Family 15, model 107, stepping 1: what QEMU's `x86-64-v2` and its kin have shown to guests of both vendors for
/// years, without a kernel taking it for a CPU with errata of its own.
const SIGNATURE: u32 = 0x0006_0fb1;
const HIGHEST_LEAF: u32 = 0xd;
const HIGHEST_HYPERVISOR_LEAF: u32 = 0x4000_0001;
const HIGHEST_EXTENDED_LEAF: u32 = 0x8000_0008;
/// 64 bytes, in units of 8, in leaf 1's EBX.
const CACHE_LINE: u32 = 8 << 8;
/// 48 virtual and 39 physical bits of address: what every 64-bit CPU for servers and desktops has.
const VIRTUAL_BITS: u32 = 48;
const PHYSICAL_BITS: u32 = 39;
/// Bits of leaf 1's EDX that AMD repeats in the extended leaf.
const AMD_REPEATED: u32 = 0x0183_f3ff;
const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// Everything `baseline` allows.
fn allowed(baseline: CpuBaseline) -> impl Iterator<Item = &'static Bits> {
    levels(baseline).chain(FROM_KVM)
}

fn levels(baseline: CpuBaseline) -> impl Iterator<Item = &'static Bits> {
    let upper: (&[Bits], &[Bits]) = match baseline {
        CpuBaseline::V2 => (&[], &[]),
        CpuBaseline::V3 => (V3, &[]),
        CpuBaseline::V4 | CpuBaseline::Host => (V3, V4),
    };
    V2.iter().chain(upper.0).chain(upper.1)
}

/// Whether a host offers all of `baseline`.
pub(super) fn offers(supported: &[kvm_cpuid_entry2], baseline: CpuBaseline) -> bool {
    levels(baseline)
        .all(|bits| word(supported, bits.leaf, bits.index, bits.register) & bits.mask == bits.mask)
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> kvm_cpuid_entry2 {
    entries
        .iter()
        .find(|e| (e.function, e.index) == (leaf, index))
        .copied()
        .unwrap_or_default()
}

fn word(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32, which: Register) -> u32 {
    *register(&mut find(entries, leaf, index), which)
}

/// CPUID of a guest of `baseline` before its vCPUs are told apart. A host below the level gives what it has of it:
/// then the guest finds fewer features, and moves only where it finds no fewer.
pub(super) fn cpuid(
    baseline: CpuBaseline,
    supported: &[kvm_cpuid_entry2],
) -> Vec<kvm_cpuid_entry2> {
    let vendor = find(supported, 0, 0);
    let is_intel = [vendor.ebx, vendor.edx, vendor.ecx] == INTEL;
    let mask = |leaf: u32, index: u32, which: Register| {
        allowed(baseline)
            .filter(|b| (b.leaf, b.index, b.register) == (leaf, index, which))
            .fold(0, |mask, bits| mask | bits.mask)
            & word(supported, leaf, index, which)
    };
    let mut entries = vec![
        kvm_cpuid_entry2 {
            eax: HIGHEST_LEAF,
            ..vendor
        },
        kvm_cpuid_entry2 {
            eax: SIGNATURE,
            ebx: CACHE_LINE,
            ecx: mask(1, 0, Register::Ecx),
            edx: mask(1, 0, Register::Edx),
            ..leaf(1)
        },
        kvm_cpuid_entry2 {
            eax: mask(6, 0, Register::Eax),
            ..leaf(6)
        },
        kvm_cpuid_entry2 {
            ebx: mask(7, 0, Register::Ebx),
            ..indexed(7, 0)
        },
        // Topology: filled in for each vCPU.
        indexed(0xb, 0),
        indexed(0xb, 1),
    ];
    let has_xsave = entries[1].ecx & XSAVE_FEATURE != 0;
    if is_intel {
        entries.extend(intel_caches());
    }
    if has_xsave {
        let components = mask(0xd, 0, Register::Eax);
        entries.extend(xsave(components, mask(0xd, 1, Register::Eax), supported));
    }
    entries.push(kvm_cpuid_entry2 {
        eax: HIGHEST_HYPERVISOR_LEAF,
        ..find(supported, 0x4000_0000, 0)
    });
    entries.push(kvm_cpuid_entry2 {
        eax: mask(0x4000_0001, 0, Register::Eax),
        ..leaf(0x4000_0001)
    });
    entries.push(kvm_cpuid_entry2 {
        eax: HIGHEST_EXTENDED_LEAF,
        ..find(supported, 0x8000_0000, 0)
    });
    let (signature, repeated) = if is_intel {
        (0, 0)
    } else {
        (SIGNATURE, entries[1].edx & AMD_REPEATED)
    };
    entries.push(kvm_cpuid_entry2 {
        eax: signature,
        ecx: mask(0x8000_0001, 0, Register::Ecx),
        edx: mask(0x8000_0001, 0, Register::Edx) | repeated,
        ..leaf(0x8000_0001)
    });
    entries.extend(brand(baseline));
    if !is_intel {
        entries.push(kvm_cpuid_entry2 {
            eax: 0x01ff_01ff,
            ebx: 0x01ff_01ff,
            ecx: 0x4002_0140,
            edx: 0x4002_0140,
            ..leaf(0x8000_0005)
        });
    }
    entries.push(kvm_cpuid_entry2 {
        eax: if is_intel { 0 } else { 0x4200_4200 },
        ebx: if is_intel { 0 } else { 0x4200_4200 },
        // 512 KiB, 16 ways, 64 bytes a line
        ecx: 0x0200_8140,
        edx: if is_intel { 0 } else { 0x0080_9140 },
        ..leaf(0x8000_0006)
    });
    entries.push(kvm_cpuid_entry2 {
        eax: VIRTUAL_BITS << 8 | PHYSICAL_BITS.min(find(supported, 0x8000_0008, 0).eax & 0xff),
        ..leaf(0x8000_0008)
    });
    entries
}

fn leaf(function: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        ..Default::default()
    }
}

fn indexed(function: u32, index: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..Default::default()
    }
}

/// Leaf 0xd. Where a component lies is up to the CPU, so its place is taken from the host and compared before a
/// guest moves.
fn xsave(
    components: u32,
    instructions: u32,
    supported: &[kvm_cpuid_entry2],
) -> Vec<kvm_cpuid_entry2> {
    let own: Vec<_> = (2..XSAVE_COMPONENTS)
        .filter(|number| components >> number & 1 != 0)
        .map(|number| find(supported, 0xd, number))
        .collect();
    let bytes = own
        .iter()
        .map(|component| component.eax.saturating_add(component.ebx))
        .fold(XSAVE_LEAST_BYTES, u32::max);
    let mut entries = vec![
        kvm_cpuid_entry2 {
            eax: components,
            ebx: bytes,
            ecx: bytes,
            ..indexed(0xd, 0)
        },
        kvm_cpuid_entry2 {
            eax: instructions,
            ..indexed(0xd, 1)
        },
    ];
    entries.extend(own);
    entries
}

/// Leaf 4: 32 KiB of data and of instructions, 8 ways each, 512 KiB, 16 ways, for each core.
fn intel_caches() -> [kvm_cpuid_entry2; 3] {
    const SELF_INITIALISING: u32 = 1 << 8;
    let cache = |index: u32, kind: u32, level: u32, ways: u32, sets: u32| kvm_cpuid_entry2 {
        eax: kind | level << 5 | SELF_INITIALISING,
        ebx: 63 | (ways - 1) << 22,
        ecx: sets - 1,
        ..indexed(4, index)
    };
    [
        cache(0, 1, 1, 8, 64),
        cache(1, 2, 1, 8, 64),
        cache(2, 3, 2, 16, 512),
    ]
}

fn brand(baseline: CpuBaseline) -> Vec<kvm_cpuid_entry2> {
    let mut name = format!("Godwit {}", baseline.name()).into_bytes();
    name.resize(48, 0);
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    (0..3)
        .map(|part| {
            let at = part * 16;
            kvm_cpuid_entry2 {
                eax: word(at),
                ebx: word(at + 4),
                ecx: word(at + 8),
                edx: word(at + 12),
                ..leaf(0x8000_0002 + part as u32)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with every bit set, whose description of itself is `own`.
    fn host(own: u32) -> Vec<kvm_cpuid_entry2> {
        let full = |entry: kvm_cpuid_entry2| kvm_cpuid_entry2 {
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..entry
        };
        let mut entries = vec![kvm_cpuid_entry2 {
            eax: own,
            ebx: 0x6874_7541,
            ecx: 0x444d_4163,
            edx: 0x6974_6e65,
            ..leaf(0)
        }];
        entries.extend([1, 6, 0x4000_0001, 0x8000_0001].map(|l| full(leaf(l))));
        entries.extend([(7, 0), (0xd, 0), (0xd, 1)].map(|(l, i)| full(indexed(l, i))));
        for number in [2, 5, 6, 7] {
            entries.push(kvm_cpuid_entry2 {
                eax: 64,
                ebx: 512 + number * 64,
                ..indexed(0xd, number)
            });
        }
        for l in [2, 4, 0x8000_0002, 0x8000_0005, 0x8000_0007, 0x8000_001e] {
            entries.push(kvm_cpuid_entry2 {
                eax: own,
                edx: own,
                ..leaf(l)
            });
        }
        entries.push(kvm_cpuid_entry2 {
            eax: 0x3030,
            ebx: own,
            ecx: own,
            ..leaf(0x8000_0008)
        });
        entries
    }

    #[test]
    fn hosts_of_a_level_show_their_guests_the_same_cpu() {
        for baseline in [CpuBaseline::V2, CpuBaseline::V3, CpuBaseline::V4] {
            assert!(offers(&host(1), baseline));
            let (one, other) = (cpuid(baseline, &host(1)), cpuid(baseline, &host(77)));
            assert_eq!(one, other, "{baseline:?}");
        }
    }

    #[test]
    fn a_guest_sees_its_level_and_nothing_above() {
        let v2 = cpuid(CpuBaseline::V2, &host(1));
        assert_ne!(word(&v2, 1, 0, Register::Ecx) & 1 << 20, 0, "SSE4.2");
        assert_eq!(word(&v2, 1, 0, Register::Ecx) & (1 << 28 | 1 << 26), 0);
        assert_eq!(word(&v2, 7, 0, Register::Ebx), 0);
        assert!(v2.iter().all(|e| e.function != 0xd));
        let v3 = cpuid(CpuBaseline::V3, &host(1));
        assert_ne!(word(&v3, 7, 0, Register::Ebx) & 1 << 5, 0, "AVX2");
        assert_eq!(word(&v3, 7, 0, Register::Ebx) & 1 << 16, 0, "AVX-512");
        assert_eq!(word(&v3, 0xd, 0, Register::Eax), 0b111);
        let v4 = cpuid(CpuBaseline::V4, &host(1));
        assert_ne!(word(&v4, 7, 0, Register::Ebx) & 1 << 31, 0, "AVX-512 VL");
        assert_eq!(word(&v4, 0x8000_0007, 0, Register::Edx), 0);
        assert_eq!(word(&v4, 0x8000_0001, 0, Register::Ecx) & 1 << 2, 0, "SVM");
    }

    #[test]
    fn a_host_that_lacks_one_bit_of_a_level_is_below_it() {
        let mut lesser = host(1);
        for entry in lesser.iter_mut().filter(|e| e.function == 7) {
            entry.ebx &= !(1 << 8);
        }
        assert!(offers(&lesser, CpuBaseline::V2));
        assert!(!offers(&lesser, CpuBaseline::V3));
        assert!(!offers(&lesser, CpuBaseline::V4));
    }

    /// QEMU's emulation has all of `x86-64-v3` and no virtual-8086 mode extensions.
    #[test]
    fn an_emulated_host_is_of_its_level_too() {
        let mut emulated = host(1);
        for entry in emulated.iter_mut().filter(|e| e.function == 1) {
            entry.edx &= !(1 << 1);
        }
        assert!(offers(&emulated, CpuBaseline::V3));
        assert_eq!(
            cpuid(CpuBaseline::V3, &emulated),
            cpuid(CpuBaseline::V3, &host(1))
        );
    }
}
