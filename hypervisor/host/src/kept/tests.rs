//! Memory of this very process in the place of a VMM's.

use super::*;
use crate::record::ProcessId;
use crate::record::tests::spec;
use godwit_wire::vmm_api::GUEST_MEMORY_NAME;
use std::fs::File;
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

/// A policy under which tests keep memory.
pub(crate) fn policy() -> KeepPolicy {
    KeepPolicy {
        keep: Duration::from_secs(3600),
        most: None,
        guest_memory: Bytes(1 << 40),
    }
}

/// This process.
pub(crate) fn this_process() -> VmmProcess {
    let pid = std::process::id().try_into().unwrap();
    let stat = procfs::process_stat(pid).unwrap();
    let start_ticks = stat.start_ticks;
    VmmProcess::find(ProcessId { pid, start_ticks })
        .unwrap()
        .unwrap()
}

/// Memory as a VMM has it, `resident` MiB of it in use.
pub(crate) fn memory(size: Mib, resident: u64) -> File {
    let file: File = rustix::fs::memfd_create(GUEST_MEMORY_NAME, rustix::fs::MemfdFlags::CLOEXEC)
        .unwrap()
        .into();
    file.set_len(size.bytes().0).unwrap();
    file.write_all_at(&vec![1; (resident * MIB) as usize], 0)
        .unwrap();
    file
}

/// Memory of a VM of [`spec`] that was here under this epoch; its VMM has been `former`.
pub(crate) fn kept(resident: u64, epoch: u64, former: VmmProcess) -> Kept {
    let memory = HeldMemory(Some(memory(spec().memory_mib, resident)));
    Kept::new(memory, Epoch(epoch), &spec(), former)
}

#[tokio::test]
async fn a_vm_that_comes_home_finds_its_memory_once() {
    let memories = KeptMemories::new(policy());
    let vm = VmId::fresh();
    memories.keep(vm, kept(3, 4, this_process()));
    assert_eq!(memories.bytes(), Bytes(3 * MIB));
    let found = memories.take(vm, Epoch(5), &spec()).unwrap();
    assert_eq!(found.bytes(), Bytes(3 * MIB));
    let place = found.place().unwrap();
    let mut byte = [0];
    let file = File::open(&place.path).unwrap();
    file.read_exact_at(&mut byte, MIB).unwrap();
    assert_eq!(byte, [1]);
    assert_eq!(memories.bytes(), Bytes(0));
    assert!(memories.take(vm, Epoch(6), &spec()).is_none());
}

#[tokio::test]
async fn memory_of_no_earlier_stay_or_of_another_machine_is_given_up() {
    let memories = KeptMemories::new(policy());
    let vm = VmId::fresh();
    let mut larger = spec();
    larger.memory_mib = Mib(larger.memory_mib.0 * 2);
    let mut huge = spec();
    huge.devices.memory_backing = MemoryBacking::Huge2M;
    for (epoch, spec) in [(4, spec()), (3, spec()), (5, larger), (5, huge)] {
        memories.keep(vm, kept(1, 4, this_process()));
        assert!(memories.take(vm, Epoch(epoch), &spec).is_none());
        assert_eq!(memories.bytes(), Bytes(0));
    }
}

#[tokio::test]
async fn what_is_kept_makes_way_for_a_vm_that_starts() {
    let guest_memory = Bytes(100 * MIB);
    let memories = KeptMemories::new(KeepPolicy {
        guest_memory,
        ..policy()
    });
    let (old, young) = (VmId::fresh(), VmId::fresh());
    memories.keep(old, kept(30, 1, this_process()));
    memories.keep(young, kept(20, 1, this_process()));
    let starting = VmId::fresh();
    memories.make_room(starting, Mib(50), Bytes(0)).await;
    assert_eq!(memories.bytes(), Bytes(50 * MIB));
    memories.make_room(starting, Mib(60), Bytes(0)).await;
    assert_eq!(memories.bytes(), Bytes(20 * MIB));
    memories.make_room(VmId::fresh(), Mib(40), Bytes(0)).await;
    assert_eq!(memories.bytes(), Bytes(0));
    // What a VM was promised is free again when it is gone.
    memories.promise(starting, None);
    memories.keep(young, kept(20, 1, this_process()));
    memories.shrink(Bytes(0)).await;
    assert_eq!(memories.bytes(), Bytes(20 * MIB));
}

#[tokio::test]
async fn what_is_kept_is_given_up_when_its_time_is_over() {
    let memories = Arc::new(KeptMemories::new(KeepPolicy {
        keep: Duration::from_nanos(1),
        ..policy()
    }));
    let _watching = memories.watch();
    memories.keep(VmId::fresh(), kept(1, 1, this_process()));
    while memories.bytes() != Bytes(0) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_order_about_the_stay_that_is_over_leaves_what_is_kept_of_it() {
    let memories = KeptMemories::new(policy());
    let vm = VmId::fresh();
    memories.keep(vm, kept(1, 4, this_process()));
    memories.forget_before(vm, Epoch(4));
    assert_eq!(memories.bytes(), Bytes(MIB));
    memories.forget_before(vm, Epoch(5));
    assert_eq!(memories.bytes(), Bytes(0));
}
