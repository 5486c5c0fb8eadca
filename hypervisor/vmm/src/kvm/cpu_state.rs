//! State of one vCPU, saved and restored in the order KVM demands.
//!
//! Save: MP_STATE first (reading it settles pending INIT and SIPI, which changes the LAPIC), VCPU_EVENTS last.
//! Restore: CPUID, MP_STATE, REGS, SREGS, XSAVE, XCRS, DEBUGREGS, LAPIC (behind SREGS, which hold the APIC base;
//! before MSRs, because TSC_DEADLINE needs the timer's mode), TSC rate, TSC, MSRs, VCPU_EVENTS.

use super::{KvmError, ioctl, msr};
use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// Everything a vCPU is.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// `kvm_sregs2`, which adds the PDPTRs, where the source's KVM has it.
    sregs2: Option<Vec<u8>>,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    /// The guest's TSC at the moment of saving.
    tsc: u64,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("rip", &self.regs.rip)
            .field("msrs", &self.msrs.len())
            .finish_non_exhaustive()
    }
}

/// How far guest time has moved since the state was saved, sampled once for all vCPUs so that their TSCs keep
/// their distances.
#[derive(Clone, Copy, Debug)]
pub struct ClockAdvance {
    elapsed_ns: u64,
    host_tsc: u64,
}

impl ClockAdvance {
    /// `elapsed_ns` have passed since the save, now.
    pub fn now(elapsed_ns: u64) -> Self {
        Self {
            elapsed_ns,
            host_tsc: ioctl::host_tsc(),
        }
    }

    /// Time since the save.
    pub const fn elapsed_ns(self) -> u64 {
        self.elapsed_ns
    }

    fn guest_tsc(self, saved: u64, khz: u32) -> u64 {
        let ticks = u128::from(self.elapsed_ns) * u128::from(khz) / 1_000_000;
        saved.wrapping_add(ticks as u64)
    }
}

/// Whether the state of a vCPU that is out of `KVM_RUN` can be read now.
///
/// A backend may let the guest go from user mode into its kernel without KVM's knowledge; interrupted there, KVM
/// reports the registers of now with the code segment of before. A guest that is restored from that takes its next
/// interrupt on the wrong stack. It shows as user mode at an address of the kernel's half, where on other CPUs only
/// the vsyscall page may be executed, so nothing is lost by letting such a vCPU run on for a moment.
pub fn is_settled(vcpu: &VcpuFd) -> Result<bool, KvmError> {
    let regs = vcpu.get_regs().map_err(KvmError::during("KVM_GET_REGS"))?;
    let sregs = vcpu
        .get_sregs()
        .map_err(KvmError::during("KVM_GET_SREGS"))?;
    Ok(!is_user_in_kernel(&regs, &sregs))
}

const fn is_user_in_kernel(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    const USER: u8 = 3;
    const KERNEL_HALF: u64 = 1 << 63;
    sregs.cs.l == 1 && sregs.ss.dpl == USER && regs.rip & KERNEL_HALF != 0
}

impl VcpuState {
    /// Reads the state of a vCPU that is out of `KVM_RUN` with no I/O half done and [settled](is_settled). `msrs` as
    /// from [`super::readable_msrs`]. `host_tsc` is sampled once for all vCPUs of a machine.
    pub fn save(
        kvm: &Kvm,
        vcpu: &VcpuFd,
        msrs: &[u32],
        at: &ClockAdvance,
    ) -> Result<Self, KvmError> {
        let mp_state = vcpu
            .get_mp_state()
            .map_err(KvmError::during("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(KvmError::during("KVM_GET_REGS"))?;
        let sregs = vcpu
            .get_sregs()
            .map_err(KvmError::during("KVM_GET_SREGS"))?;
        if is_user_in_kernel(&regs, &sregs) {
            return Err(KvmError::Unsettled);
        }
        let tsc = if ioctl::has_tsc_offset(vcpu) {
            at.host_tsc.wrapping_add(ioctl::get_tsc_offset(vcpu)?)
        } else {
            msr::read(vcpu, msr::MSR_IA32_TSC).unwrap_or_default()
        };
        Ok(Self {
            mp_state,
            regs,
            sregs,
            sregs2: if has_sregs2(kvm) {
                Some(ioctl::sregs2_bytes(&ioctl::get_sregs2(vcpu)?))
            } else {
                None
            },
            xsave: Box::new(
                vcpu.get_xsave()
                    .map_err(KvmError::during("KVM_GET_XSAVE"))?,
            ),
            xcrs: vcpu.get_xcrs().map_err(KvmError::during("KVM_GET_XCRS"))?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(KvmError::during("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu
                .get_lapic()
                .map_err(KvmError::during("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu
                .get_tsc_khz()
                .map_err(KvmError::during("KVM_GET_TSC_KHZ"))?,
            tsc,
            cpuid: vcpu
                .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
                .map_err(KvmError::during("KVM_GET_CPUID2"))?
                .as_slice()
                .to_vec(),
            msrs: msr::save(vcpu, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(KvmError::during("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes the state to a vCPU that has never run.
    pub fn restore(
        &self,
        kvm: &Kvm,
        vcpu: &VcpuFd,
        advance: &ClockAdvance,
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| KvmError::Lacks("room for the guest's CPUID"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::during("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(KvmError::during("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)
            .map_err(KvmError::during("KVM_SET_REGS"))?;
        match &self.sregs2 {
            Some(bytes) if has_sregs2(kvm) => {
                let sregs2 = ioctl::sregs2_from_bytes(bytes)
                    .ok_or(KvmError::Lacks("this layout of kvm_sregs2"))?;
                ioctl::set_sregs2(vcpu, &sregs2)?;
            }
            _ => vcpu
                .set_sregs(&self.sregs)
                .map_err(KvmError::during("KVM_SET_SREGS"))?,
        }
        // SAFETY: kvm_xsave is the fixed 4 KiB area; no dynamic XSAVE feature (AMX) is ever enabled for guests,
        // because this process does not ask for the permission, so KVM reads no more than that.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(KvmError::during("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(KvmError::during("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(KvmError::during("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(KvmError::during("KVM_SET_LAPIC"))?;
        self.restore_tsc(kvm, vcpu, advance)?;
        msr::restore(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::during("KVM_SET_VCPU_EVENTS"))
    }

    fn restore_tsc(
        &self,
        kvm: &Kvm,
        vcpu: &VcpuFd,
        advance: &ClockAdvance,
    ) -> Result<(), KvmError> {
        let host_khz = vcpu
            .get_tsc_khz()
            .map_err(KvmError::during("KVM_GET_TSC_KHZ"))?;
        if host_khz != self.tsc_khz {
            // Guests tolerate 250 ppm (what NTP corrects); beyond that the rate must be scaled.
            let apart = u64::from(host_khz.abs_diff(self.tsc_khz));
            if apart * 4_000 > u64::from(self.tsc_khz) {
                if !kvm.check_extension(Cap::TscControl) {
                    return Err(KvmError::TscRate {
                        guest_khz: self.tsc_khz,
                        host_khz,
                    });
                }
                vcpu.set_tsc_khz(self.tsc_khz)
                    .map_err(KvmError::during("KVM_SET_TSC_KHZ"))?;
            }
        }
        let tsc = advance.guest_tsc(self.tsc, self.tsc_khz);
        if ioctl::has_tsc_offset(vcpu) {
            ioctl::set_tsc_offset(vcpu, tsc.wrapping_sub(advance.host_tsc))
        } else {
            msr::restore(vcpu, &[(msr::MSR_IA32_TSC, tsc)])
        }
    }
}

fn has_sregs2(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_SREGS2)) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_mode_in_the_kernels_half_is_a_contradiction() {
        let at = |rip, privilege| {
            let mut sregs = kvm_sregs::default();
            (sregs.cs.l, sregs.ss.dpl) = (1, privilege);
            is_user_in_kernel(
                &kvm_regs {
                    rip,
                    ..Default::default()
                },
                &sregs,
            )
        };
        assert!(at(0xffff_ffff_8128_d63c, 3));
        assert!(!at(0xffff_ffff_8128_d63c, 0));
        assert!(!at(0x7f36_08c7_3ff8, 3));
    }

    #[test]
    fn guest_tsc_advances_with_real_time() {
        let advance = ClockAdvance {
            elapsed_ns: 2_000_000,
            host_tsc: 0,
        };
        assert_eq!(advance.guest_tsc(1_000, 3_000_000), 1_000 + 6_000_000);
    }

    #[test]
    fn a_long_absence_does_not_overflow() {
        let advance = ClockAdvance {
            elapsed_ns: u64::MAX,
            host_tsc: 0,
        };
        advance.guest_tsc(u64::MAX, u32::MAX);
    }
}
