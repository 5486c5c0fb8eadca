//! Making a vCPU thread leave `KVM_RUN`.
//!
//! A kick sets `immediate_exit` in the vCPU's shared page and then sends its thread a signal: the first makes a
//! `KVM_RUN` that is about to start return at once, the second ends one that is under way. So no kick is lost.

use super::KvmError;
use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Lets the kick signal interrupt system calls instead of ending the process. Called once, before any vCPU runs.
pub fn install_kick_handler() -> Result<(), KvmError> {
    extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), handle).map_err(|error| KvmError::Call {
        call: "sigaction",
        source: std::io::Error::from_raw_os_error(error.errno()),
    })
}

#[derive(Clone, Copy, Debug)]
struct Target {
    immediate_exit: *const AtomicU8,
    thread: libc::pid_t,
}

// SAFETY: the pointer is only used for atomic stores, and only while the vCPU thread is registered (see `Kick`).
unsafe impl Send for Target {}

/// Makes one vCPU leave `KVM_RUN`; usable from any thread, also after the vCPU is gone.
#[derive(Clone, Debug)]
pub struct Kick {
    target: Arc<Mutex<Option<Target>>>,
}

impl Kick {
    /// A kick whose vCPU is not there yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            target: Arc::new(Mutex::new(None)),
        }
    }

    /// The vCPU leaves `KVM_RUN`, or does not enter it, once.
    pub fn kick(&self) {
        // The lock is held over the signal, so the thread cannot end (and its id be reused) in between.
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Target {
            immediate_exit,
            thread,
        }) = *target
        {
            // SAFETY: the pointer was taken from the VcpuFd's live mapping, which `Kickable` keeps until it has
            // cleared `target` under this lock; the byte is only accessed atomically or by the kernel.
            unsafe { &*immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: tgkill takes plain numbers; the thread is alive, see above.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

/// A vCPU on its own thread, open to kicks while this value lives.
#[derive(Debug)]
pub struct Kickable {
    vcpu: VcpuFd,
    kick: Kick,
    immediate_exit: *const AtomicU8,
}

impl Kickable {
    /// Registers the calling thread as the one that runs `vcpu`.
    pub fn register(mut vcpu: VcpuFd, kick: Kick) -> Self {
        let immediate_exit = std::ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit)
            .cast_const()
            .cast();
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        *kick.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(Target {
            immediate_exit,
            thread,
        });
        Self {
            vcpu,
            kick,
            immediate_exit,
        }
    }

    /// The vCPU.
    pub const fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Forgets kicks that came so far. Whatever they were meant to announce must be looked at *after* this.
    pub fn accept_kicks(&self) {
        // SAFETY: `vcpu` owns the mapping the pointer points into and lives as long as `self`.
        unsafe { &*self.immediate_exit }.store(0, Ordering::SeqCst);
    }

    /// From here on `KVM_RUN` only completes what the latest exit left to do and returns EINTR, until kicks are
    /// accepted again.
    pub fn bar_entry(&self) {
        // SAFETY: as in `accept_kicks`.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        *self
            .kick
            .target
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}
