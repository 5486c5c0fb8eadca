//! Model-specific registers: which there are, and moving their values.

use super::KvmError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use std::ops::RangeInclusive;

/// MSRs of KVM's own range. KVM lists only some of them, and a backend may keep per-vCPU state in others, so all
/// that can be read are saved.
const KVM_MSRS: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// Written once by the guest as an acknowledgement; reads back as zero and means nothing to save.
const MSR_KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;
/// The guest's TSC, which travels as a point in time (see `cpu_state`).
pub(super) const MSR_IA32_TSC: u32 = 0x10;
/// Armed timers compare against the TSC and fire at once when set before the LAPIC is in deadline mode.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The MSRs of this vCPU that can be read, in the order in which they must be set.
///
/// Probed once per machine after CPUID is set: since Linux 6.13 KVM refuses MSRs the guest's CPUID does not have.
pub fn readable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let listed = kvm
        .get_msr_index_list()
        .map_err(KvmError::during("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices: Vec<u32> = listed.as_slice().iter().copied().chain(KVM_MSRS).collect();
    indices.sort_unstable();
    indices.dedup();
    indices.retain(|&index| {
        index != MSR_IA32_TSC && index != MSR_KVM_ASYNC_PF_ACK && read(vcpu, index).is_some()
    });
    indices.sort_by_key(|&index| index == MSR_IA32_TSC_DEADLINE);
    Ok(indices)
}

/// Value of one MSR, or `None` if it cannot be read.
pub(super) fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .ok()?;
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => Some(msrs.as_slice()[0].data),
        _ => None,
    }
}

/// Reads `indices`, which must be readable.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut saved = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).expect("a chunk holds at most KVM_MAX_MSR_ENTRIES");
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::during("KVM_GET_MSRS"))?;
        if read < chunk.len() {
            return Err(KvmError::Msr {
                index: chunk[read],
                wanted: 0,
                present: None,
            });
        }
        saved.extend(
            msrs.as_slice()
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
    }
    Ok(saved)
}

/// Sets MSRs in the given order. One that cannot be set is accepted only where it already has the value (some are
/// constants of the CPU).
pub(super) fn restore(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = chunk
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("a chunk holds at most KVM_MAX_MSR_ENTRIES");
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(KvmError::during("KVM_SET_MSRS"))?;
        rest = &rest[set..];
        if set < chunk.len() {
            let (index, wanted) = rest[0];
            let present = read(vcpu, index);
            if present != Some(wanted) {
                return Err(KvmError::Msr {
                    index,
                    wanted,
                    present,
                });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}
