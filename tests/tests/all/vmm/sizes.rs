//! Machines at the edges of what a spec may ask for boot and move like any other.

use super::{boot_pilot, verify_guest, verifying};
use godwit_tests::linux::{AGENT_GREETING, LinuxGuest};
use godwit_tests::migration::migrate;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::unit::Mib;
use std::fs;

const HUGE_GUEST: Mib = Mib(32);
const HUGE_PAGE_MIB: u64 = 2;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

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

/// As many as the test kernel is built for.
#[tokio::test]
async fn a_linux_guest_with_8_vcpus_boots_with_all_of_them() {
    const VCPUS: u8 = 8;
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = new_vm(vmm::linux(&guest, VCPUS, Mib(256)));
    let vmm = Vmm::boot(&dir, "vmm", &request).await.expect("Linux boots");
    let mut serial = vmm.serial().await.expect("console");
    let greeting = serial
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up");
    // The agent tells how many CPUs are online.
    let online = format!("vcpus={VCPUS}");
    assert!(
        greeting.split_whitespace().any(|word| word == online),
        "{greeting}"
    );
    assert_eq!(
        vmm.info().await.expect("info").vcpus.len(),
        usize::from(VCPUS)
    );
}

/// Huge pages that were added to the host's pool for a test, and go again with it.
struct HugePages {
    added: u64,
}

fn pool_count(name: &str) -> Result<u64, String> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let count = text.trim().parse();
    count.map_err(|_| format!("{path} holds no number"))
}

fn set_pool_size(pages: u64) -> Result<(), String> {
    let path = format!("{POOL}/nr_hugepages");
    fs::write(&path, pages.to_string()).map_err(|error| format!("{path}: {error}"))
}

impl HugePages {
    /// Sees to it that the pool has room for the machine at both ends; root may add what is missing.
    fn reserve() -> Result<Self, String> {
        skip::kvm()?;
        let needed = 2 * HUGE_GUEST.0 / HUGE_PAGE_MIB;
        let free = pool_count("free_hugepages")?.saturating_sub(pool_count("resv_hugepages")?);
        let missing = needed.saturating_sub(free);
        let pages = Self { added: missing };
        if missing == 0 {
            return Ok(pages);
        }
        skip::root().map_err(|_| {
            format!("{free} huge pages are free and {needed} are needed; reserve them with sysctl vm.nr_hugepages")
        })?;
        let before = pool_count("nr_hugepages")?;
        set_pool_size(before + missing)?;
        let got = pool_count("nr_hugepages")?.saturating_sub(before);
        if got < missing {
            return Err(format!(
                "the host found {got} huge pages of {missing}: its memory is in too many pieces"
            ));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added > 0
            && let Ok(present) = pool_count("nr_hugepages")
            && let Err(error) = set_pool_size(present.saturating_sub(self.added))
        {
            eprintln!("{} huge pages stay reserved: {error}", self.added);
        }
    }
}

#[tokio::test]
async fn a_guest_on_huge_pages_boots_and_moves() {
    let _pages = require!(HugePages::reserve());
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
