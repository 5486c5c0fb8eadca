//! CPU features: what the host offers and what a guest sees.

mod baseline;

use super::{KvmError, VcpuFd};
use godwit_wire::cpu::{CpuidLeaf, GuestCpu, Register, TscScaling};
use godwit_wire::machine::{CpuBaseline, CpuFacts};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
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
    // There is no name for less than the lowest level: a host below it offers what it has.
    let level = [CpuBaseline::V4, CpuBaseline::V3]
        .into_iter()
        .find(|&level| baseline::offers(&entries, level))
        .unwrap_or(CpuBaseline::V2);
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
    let supported = supported(kvm)?;
    let mut entries = match baseline {
        CpuBaseline::Host => supported,
        named => baseline::cpuid(named, &supported),
    };
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        place_vcpu(entry, vcpu, vcpus);
        if entry.function == 1 && deadline {
            entry.ecx |= 1 << 24;
        }
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks("room for the guest's CPUID"))
}

/// What a guest depends on, as the vCPU `vcpu` shows it; its CPUID has been set. `msrs` as from
/// [`super::readable_msrs`].
pub fn guest_cpu(cpuid: &CpuId, vcpu: &VcpuFd, msrs: &[u32]) -> Result<GuestCpu, KvmError> {
    Ok(GuestCpu {
        cpuid: cpuid
            .as_slice()
            .iter()
            .filter(|e| (e.eax, e.ebx, e.ecx, e.edx) != (0, 0, 0, 0))
            .map(|e| CpuidLeaf {
                leaf: e.function,
                index: e.index,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect(),
        tsc_khz: vcpu
            .get_tsc_khz()
            .map_err(KvmError::during("KVM_GET_TSC_KHZ"))?,
        msrs: msrs.iter().copied().collect(),
    })
}

/// Whether this host's KVM can run a guest's TSC at another rate than its own.
pub fn tsc_scaling(kvm: &Kvm) -> TscScaling {
    if kvm.check_extension(Cap::TscControl) {
        TscScaling::Available
    } else {
        TscScaling::Missing
    }
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
        // AMD's older way to say that a package has several cores.
        0x8000_0001 if entry.eax != 0 => {
            entry.ecx = entry.ecx & !(1 << 1) | u32::from(vcpus > 1) << 1;
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
    fn every_vcpu_has_its_own_apic_id() {
        for vcpu in 0..4 {
            let mut entry = leaf(1, 0, 0, 0);
            place_vcpu(&mut entry, vcpu, 4);
            assert_eq!(entry.ebx >> 24, u32::from(vcpu));
            assert_eq!(entry.ebx >> 16 & 0xff, 4);
        }
    }
}
