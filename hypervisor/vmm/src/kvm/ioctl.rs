//! The few ioctls that kvm-ioctls does not offer.

use super::KvmError;
use kvm_bindings::{kvm_clear_dirty_log, kvm_device_attr, kvm_sregs2};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;

// _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log), Documentation/virt/kvm/api.rst 4.117
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
// _IOW(KVMIO, 0xe1, struct kvm_device_attr) and its neighbours, api.rst 4.79
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
const KVM_HAS_DEVICE_ATTR: libc::c_ulong = 0x4018_aee3;
// _IOR/_IOW(KVMIO, 0xcc/0xcd, struct kvm_sregs2), api.rst 4.131
const KVM_GET_SREGS2: libc::c_ulong = 0x8140_aecc;
const KVM_SET_SREGS2: libc::c_ulong = 0x4140_aecd;

const _: () = assert!(
    size_of::<kvm_sregs2>() == 0x140,
    "the ioctl number encodes the size"
);
const _: () = assert!(
    size_of::<kvm_clear_dirty_log>() == 0x18,
    "the ioctl number encodes the size"
);
const _: () = assert!(
    size_of::<kvm_device_attr>() == 0x18,
    "the ioctl number encodes the size"
);

fn check(call: &'static str, result: libc::c_int) -> Result<(), KvmError> {
    if result < 0 {
        Err(KvmError::Call {
            call,
            source: io::Error::last_os_error(),
        })
    } else {
        Ok(())
    }
}

/// Clears and write-protects again `pages` pages from `first_page` on (both multiples of 64, except at the
/// end of the slot) where `bitmap` has ones.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> Result<(), KvmError> {
    assert!(
        bitmap.len() * 64 >= pages as usize,
        "the bitmap covers every page named"
    );
    let mut request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        ..Default::default()
    };
    request.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
    // SAFETY: the fd is a VM's, the struct has the layout the ioctl number names, and the bitmap is readable
    // for `pages` bits, which was asserted above; the kernel only reads it.
    check("KVM_CLEAR_DIRTY_LOG", unsafe {
        libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG as _, &request)
    })
}

pub(super) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, KvmError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the fd is a vCPU's and the kernel writes exactly one kvm_sregs2, which the struct is.
    check("KVM_GET_SREGS2", unsafe {
        libc::ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS2 as _, &mut sregs)
    })?;
    Ok(sregs)
}

pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), KvmError> {
    // SAFETY: the fd is a vCPU's and the kernel reads exactly one kvm_sregs2, which the struct is.
    check("KVM_SET_SREGS2", unsafe {
        libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS2 as _, sregs)
    })
}

/// The bytes of a `kvm_sregs2`, for saving.
pub(super) fn sregs2_bytes(sregs: &kvm_sregs2) -> Vec<u8> {
    // SAFETY: kvm_sregs2 is a C struct of integers; padding was zeroed by Default and is only ever copied.
    unsafe {
        std::slice::from_raw_parts(
            std::ptr::from_ref(sregs).cast::<u8>(),
            size_of::<kvm_sregs2>(),
        )
    }
    .to_vec()
}

/// The `kvm_sregs2` that [`sregs2_bytes`] saved, or `None` if the length is not right.
pub(super) fn sregs2_from_bytes(bytes: &[u8]) -> Option<kvm_sregs2> {
    if bytes.len() != size_of::<kvm_sregs2>() {
        return None;
    }
    // SAFETY: the length was checked, every bit pattern is a valid kvm_sregs2 (a C struct of integers), and
    // read_unaligned asks for no alignment. KVM itself judges the values.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<kvm_sregs2>()) })
}

fn tsc_offset_attr(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr: address,
        flags: 0,
    }
}

/// Whether the vCPU's TSC offset can be read and written (Linux 5.16, `Documentation/virt/kvm/devices/vcpu.rst`).
pub(super) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attr = tsc_offset_attr(0);
    // SAFETY: the fd is a vCPU's; HAS_DEVICE_ATTR only reads the struct.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR as _, &attr) == 0 }
}

pub(super) fn get_tsc_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset) as u64);
    // SAFETY: the fd is a vCPU's; the kernel writes one u64 at `addr`, which is `offset`, alive until return.
    check("KVM_GET_DEVICE_ATTR", unsafe {
        libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR as _, &attr)
    })?;
    Ok(offset)
}

pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attr = tsc_offset_attr(std::ptr::from_ref(&offset) as u64);
    // SAFETY: the fd is a vCPU's; the kernel reads one u64 at `addr`, which is `offset`, alive until return.
    check("KVM_SET_DEVICE_ATTR", unsafe {
        libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR as _, &attr)
    })
}

/// The host's time-stamp counter.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user mode execute it unless a process asks otherwise
    // (PR_SET_TSC), which this one does not.
    unsafe { std::arch::x86_64::_rdtsc() }
}
