//! CPU features: what the host offers and what a guest sees.

use super::KvmError;
use godwit_wire::machine::{CpuBaseline, CpuFacts};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// Bits of one CPUID register.
#[derive(Clone, Copy, Debug)]
struct Bits {
    leaf: u32,
    index: u32,
    register: Register,
    mask: u32,
}

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn bits(leaf: u32, index: u32, register: Register, mask: u32) -> Bits {
    Bits {
        leaf,
        index,
        register,
        mask,
    }
}

// The levels of the x86-64 psABI, chapter 3.1.1 "Processor Architecture".
const V3: &[Bits] = &[
    // FMA, MOVBE, AVX, F16C
    bits(1, 0, Register::Ecx, 1 << 12 | 1 << 22 | 1 << 28 | 1 << 29),
    // BMI1, AVX2, BMI2
    bits(7, 0, Register::Ebx, 1 << 3 | 1 << 5 | 1 << 8),
    // LZCNT
    bits(0x8000_0001, 0, Register::Ecx, 1 << 5),
];
const V4: &[Bits] = &[
    // AVX-512 F, DQ, CD, BW, VL
    bits(
        7,
        0,
        Register::Ebx,
        1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31,
    ),
];

/// What a guest below `x86-64-v4` must not see: all of AVX-512 and AMX.
const ABOVE_V3: &[Bits] = &[
    bits(
        7,
        0,
        Register::Ebx,
        1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31,
    ),
    bits(
        7,
        0,
        Register::Ecx,
        1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14,
    ),
    bits(
        7,
        0,
        Register::Edx,
        1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25,
    ),
    bits(7, 1, Register::Eax, 1 << 5),
    bits(0xd, 0, Register::Eax, 0b1110_0000 | 0b11 << 17),
];
/// What a guest below `x86-64-v3` must not see besides: AVX and what builds on it.
const ABOVE_V2: &[Bits] = &[
    bits(1, 0, Register::Ecx, 1 << 12 | 1 << 22 | 1 << 28 | 1 << 29),
    bits(7, 0, Register::Ebx, 1 << 3 | 1 << 5 | 1 << 8 | 1 << 19),
    bits(7, 0, Register::Ecx, 1 << 8 | 1 << 9 | 1 << 10),
    bits(7, 1, Register::Eax, 1 << 4 | 1 << 23),
    bits(
        0x8000_0001,
        0,
        Register::Ecx,
        1 << 5 | 1 << 11 | 1 << 15 | 1 << 16 | 1 << 21,
    ),
    bits(0xd, 0, Register::Eax, 1 << 2),
];

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

fn has(entries: &[kvm_cpuid_entry2], wanted: &[Bits]) -> bool {
    wanted.iter().all(|bits| {
        entries.iter().any(|e| {
            e.function == bits.leaf
                && e.index == bits.index
                && *register(&mut e.clone(), bits.register) & bits.mask == bits.mask
        })
    })
}

fn remove(entries: &mut [kvm_cpuid_entry2], unwanted: &[Bits]) {
    for bits in unwanted {
        for entry in entries
            .iter_mut()
            .filter(|e| e.function == bits.leaf && e.index == bits.index)
        {
            *register(entry, bits.register) &= !bits.mask;
        }
    }
}

fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::during("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(cpuid.as_slice().to_vec())
}

/// What this host's CPU and KVM can give to guests.
pub fn cpu_facts(kvm: &Kvm) -> Result<CpuFacts, KvmError> {
    let entries = supported(kvm)?;
    let level = if !has(&entries, V3) {
        CpuBaseline::V2
    } else if !has(&entries, V4) {
        CpuBaseline::V3
    } else {
        CpuBaseline::V4
    };
    Ok(CpuFacts {
        level,
        signature: signature(&entries),
        model: brand(&entries),
    })
}

/// Equal for hosts that may exchange guests which see all of the host's features.
fn signature(entries: &[kvm_cpuid_entry2]) -> String {
    let leaf = |function| {
        entries
            .iter()
            .find(|e| e.function == function)
            .copied()
            .unwrap_or_default()
    };
    let vendor: String = [leaf(0).ebx, leaf(0).edx, leaf(0).ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .map(char::from)
        .filter(char::is_ascii_alphanumeric)
        .collect();
    let eax = leaf(1).eax;
    let family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
    let model = eax >> 4 & 0xf | eax >> 12 & 0xf0;
    let mut features = Vec::new();
    for e in entries.iter().filter(|e| {
        matches!(
            e.function,
            1 | 7 | 0xd | 0x4000_0001 | 0x8000_0001 | 0x8000_0008
        )
    }) {
        // Leaf 1 EBX holds the APIC id of whichever core answered; it is no feature.
        let ebx = if e.function == 1 { 0 } else { e.ebx };
        for word in [e.function, e.index, e.eax, ebx, e.ecx, e.edx] {
            features.extend_from_slice(&word.to_le_bytes());
        }
    }
    format!(
        "{vendor}-{family}-{model}-{}-{:08x}",
        eax & 0xf,
        xxhash_rust::xxh3::xxh3_64(&features) as u32
    )
}

fn brand(entries: &[kvm_cpuid_entry2]) -> String {
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004u32)
        .filter_map(|function| entries.iter().find(|e| e.function == function))
        .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .collect();
    let brand = String::from_utf8_lossy(&bytes).trim().to_owned();
    if brand.is_empty() {
        model_name().unwrap_or_default()
    } else {
        brand
    }
}

/// The host kernel's word, where KVM passes no brand string on.
fn model_name() -> Option<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// CPUID of vCPU number `vcpu` of `vcpus` in a guest limited to `baseline`.
pub fn guest_cpuid(
    kvm: &Kvm,
    baseline: CpuBaseline,
    vcpu: u8,
    vcpus: u8,
) -> Result<CpuId, KvmError> {
    let mut entries = supported(kvm)?;
    match baseline {
        CpuBaseline::V2 => {
            remove(&mut entries, ABOVE_V3);
            remove(&mut entries, ABOVE_V2);
        }
        CpuBaseline::V3 => remove(&mut entries, ABOVE_V3),
        CpuBaseline::V4 | CpuBaseline::Host => {}
    }
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        place_vcpu(entry, vcpu, vcpus);
        if entry.function == 1 && deadline {
            entry.ecx |= 1 << 24;
        }
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks("room for the guest's CPUID"))
}

/// Topology: one package, `vcpus` cores of one thread each, APIC ids counted from 0.
fn place_vcpu(entry: &mut kvm_cpuid_entry2, vcpu: u8, vcpus: u8) {
    let id_bits = u32::from(vcpus).next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | u32::from(vcpus) << 16 | u32::from(vcpu) << 24;
            entry.edx = entry.edx & !(1 << 28) | u32::from(vcpus > 1) << 28;
            entry.ecx |= 1 << 31;
        }
        // Intel caches: cores per package less one in bits 31..26, threads sharing less one in 25..14.
        4 => entry.eax = entry.eax & 0x3fff | ((1 << id_bits) - 1) << 26,
        0xb | 0x1f => {
            entry.edx = u32::from(vcpu);
            match entry.index {
                0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                1 => (entry.eax, entry.ebx, entry.ecx) = (id_bits, u32::from(vcpus), 1 | 2 << 8),
                index => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
            }
        }
        0x8000_0008 => entry.ecx = id_bits << 12 | u32::from(vcpus - 1),
        // AMD: extended APIC id; one thread per core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(vcpu), u32::from(vcpu), 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ebx,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn a_v2_guest_sees_no_avx() {
        let mut entries = vec![leaf(1, 0, 0, u32::MAX), leaf(7, 0, u32::MAX, u32::MAX)];
        remove(&mut entries, ABOVE_V3);
        remove(&mut entries, ABOVE_V2);
        assert_eq!(entries[0].ecx & (1 << 28), 0);
        assert_eq!(entries[1].ebx & (1 << 5 | 1 << 16), 0);
        assert_ne!(entries[0].ecx & (1 << 20), 0, "SSE4.2 stays");
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        for vcpu in 0..4 {
            let mut entry = leaf(1, 0, 0, 0);
            place_vcpu(&mut entry, vcpu, 4);
            assert_eq!(entry.ebx >> 24, u32::from(vcpu));
            assert_eq!(entry.ebx >> 16 & 0xff, 4);
        }
    }
}
