//! KVM: the only place that speaks to `/dev/kvm`.

mod cpu_state;
mod cpuid;
mod dirty_log;
mod error;
mod ioctl;
mod irq;
mod kick;
mod msr;
mod vm_state;

pub use cpu_state::{ClockAdvance, VcpuState, is_settled};
pub use cpuid::{cpu_facts, guest_cpu, guest_cpuid, tsc_scaling};
pub use dirty_log::{DirtyBitmap, DirtyLog, DirtyLogSource, LoggedSlot, Watch, words_of};
pub use error::KvmError;
pub use irq::Interrupts;
pub use kick::{Kick, Kickable, install_kick_handler};
pub use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
pub use msr::readable_msrs;
pub use vm_state::VmState;

use kvm_ioctls::Kvm;

/// Lowest guest physical address KVM may use for the pages Intel CPUs need in real mode (4 pages, below the
/// BIOS area, above any RAM this machine has there).
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Opens `/dev/kvm` and checks what every machine needs.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::open)?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(KvmError::ApiVersion(version));
    }
    for (cap, name) in [
        (kvm_ioctls::Cap::Irqchip, "in-kernel irqchip"),
        (kvm_ioctls::Cap::Irqfd, "irqfd"),
        (kvm_ioctls::Cap::UserMemory, "user memory"),
        (kvm_ioctls::Cap::ImmediateExit, "immediate exit"),
        (kvm_ioctls::Cap::AdjustClock, "clock adjustment"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// Creates a VM with irqchip and PIT, ready for vCPUs.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().map_err(KvmError::during("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .map_err(KvmError::during("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(KvmError::during("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::during("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_bindings::kvm_pit_config {
        flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit)
        .map_err(KvmError::during("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// Maps `bytes` of this process's memory at `host_address` into the guest at `guest_address`.
///
/// The caller keeps the host mapping alive as long as the VM: [`crate::memory::GuestRam`] does.
pub fn map_memory(
    vm: &VmFd,
    slot: u32,
    guest_address: u64,
    host_address: u64,
    bytes: u64,
    logging: DirtyLogging,
) -> Result<(), KvmError> {
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot,
        flags: match logging {
            DirtyLogging::Off => 0,
            DirtyLogging::On => kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES,
        },
        guest_phys_addr: guest_address,
        memory_size: bytes,
        userspace_addr: host_address,
    };
    set_slot(vm, region)
}

/// Lets the guest read `bytes` of this process's memory at `host_address`; its writes leave the guest. The caller keeps
/// the mapping alive until [`unmap`] or as long as the VM.
pub fn map_read_only(
    vm: &VmFd,
    slot: u32,
    guest_address: u64,
    host_address: u64,
    bytes: u64,
) -> Result<(), KvmError> {
    if !vm.check_extension(kvm_ioctls::Cap::ReadonlyMem) {
        return Err(KvmError::Lacks("read-only memory"));
    }
    set_slot(
        vm,
        kvm_bindings::kvm_userspace_memory_region {
            slot,
            flags: kvm_bindings::KVM_MEM_READONLY,
            guest_phys_addr: guest_address,
            memory_size: bytes,
            userspace_addr: host_address,
        },
    )
}

/// Takes a slot of memory from the guest.
pub fn unmap(vm: &VmFd, slot: u32) -> Result<(), KvmError> {
    set_slot(
        vm,
        kvm_bindings::kvm_userspace_memory_region {
            slot,
            ..Default::default()
        },
    )
}

fn set_slot(vm: &VmFd, region: kvm_bindings::kvm_userspace_memory_region) -> Result<(), KvmError> {
    // SAFETY: the range is a live mapping that the caller keeps for as long as the slot is there, made for the guest
    // to use; nobody in this process holds references into it.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(KvmError::during("KVM_SET_USER_MEMORY_REGION"))
}

/// Whether KVM notes which pages the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLogging {
    /// Not noted.
    Off,
    /// Noted.
    On,
}
