//! Machines at the edges of what a spec may ask for boot and move like any other.

use super::{boot_pilot, verify_guest, verifying};
use godwit_tests::migration::migrate;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::unit::Mib;

const HUGE_GUEST: Mib = Mib(32);
const HUGE_PAGE_MIB: u64 = 2;
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

#[tokio::test]
async fn a_pilot_with_64_vcpus_boots_and_moves() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_pilot(&dir, "source", 64, Mib(64)).await;
    let mut shell = source.shell().await.expect("the shell answers");
    shell.command("fill 16").await.expect("fill");
    shell.command("dirty 5 4").await.expect("dirty");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    migrate(&source, &target, &mut request, verifying())
        .await
        .expect("the migration lands");
    assert_eq!(target.info().await.expect("info").vcpus.len(), 64);
    verify_guest(&target).await;
}

/// The pool must have room for the machine at both ends.
fn huge_pages() -> Result<(), String> {
    skip::kvm()?;
    let needed = 2 * HUGE_GUEST.0 / HUGE_PAGE_MIB;
    let free = std::fs::read_to_string(FREE_HUGE_PAGES).unwrap_or_default();
    match free.trim().parse::<u64>() {
        Ok(free) if free >= needed => Ok(()),
        Ok(free) => Err(format!(
            "{free} huge pages are free and {needed} are needed; reserve them with sysctl vm.nr_hugepages"
        )),
        Err(_) => Err(format!("{FREE_HUGE_PAGES} cannot be read")),
    }
}

#[tokio::test]
async fn a_guest_on_huge_pages_boots_and_moves() {
    require!(huge_pages());
    let dir = TestDir::new();
    let mut spec = vmm::pilot(2, HUGE_GUEST);
    spec.devices.memory_backing = MemoryBacking::Huge2M;
    let mut request = new_vm(spec);
    let source = Vmm::boot(&dir, "source", &request).await.expect("boot");
    let mut serial = source.serial().await.expect("console");
    serial
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("the pilot says hello");
    let mut shell = source.shell().await.expect("the shell answers");
    shell.command("fill 16").await.expect("fill");
    shell.command("dirty 20 8").await.expect("dirty");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    migrate(&source, &target, &mut request, verifying())
        .await
        .expect("the migration lands");
    verify_guest(&target).await;
}
