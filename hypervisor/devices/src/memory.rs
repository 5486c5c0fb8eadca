//! Guest memory as devices see it.

use vm_memory::bitmap::AtomicBitmap;

/// Guest memory that notes which pages were written through it.
///
/// KVM's dirty log knows only what the guest's vCPUs write. Every write by a device goes through `vm-memory`'s
/// accessors, which mark the page after it was written; a device that lets the kernel write (`readv`, io_uring)
/// marks the pages itself once the kernel is done. Live migration sends what either side marked.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;
