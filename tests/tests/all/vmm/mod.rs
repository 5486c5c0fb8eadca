//! One or two `godwit vmm` processes, the test in the place of agents and store.

mod devices;
mod dirty_rate;
mod disk_load;
mod disks_along;
mod hand_over;
mod hostile_peers;
mod lanes;
mod lease;
mod lifecycle;
mod linux_guest;
mod migration;
mod network_card;
mod post_copy;
mod refusals;
mod returning;
mod serial_console;
mod sizes;
mod snapshots;
mod soak;
mod succession;
mod vsock_and_console;

use godwit_tests::serial::Serial;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::migration::{MigrationPolicy, Verify};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::CreateRequest;

/// A pilot that has said hello.
async fn boot_pilot(dir: &TestDir, name: &str, vcpus: u8, memory: Mib) -> (Vmm, CreateRequest) {
    let request = new_vm(vmm::pilot(vcpus, memory));
    let vmm = Vmm::boot(dir, name, &request)
        .await
        .expect("the pilot boots");
    let mut serial = vmm.serial().await.expect("the console is there");
    serial
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("the pilot says hello");
    (vmm, request)
}

/// A pilot with data in its memory that goes on changing.
async fn boot_dirtying_pilot(dir: &TestDir, name: &str, vcpus: u8) -> (Vmm, CreateRequest) {
    let (vmm, request) = boot_pilot(dir, name, vcpus, Mib(128)).await;
    let mut shell = vmm.shell().await.expect("the shell answers");
    shell.command("fill 64").await.expect("fill");
    shell.command("dirty 20 16").await.expect("dirty");
    (vmm, request)
}

/// Memory is whole and the clock never went back.
async fn verify_guest(vmm: &Vmm) {
    let mut shell = vmm.shell().await.expect("the shell answers");
    verify(&mut shell).await;
}

async fn verify(shell: &mut Serial) {
    let verified = shell
        .command("verify")
        .await
        .expect("no page was lost, torn or stale");
    assert!(verified.number("verified_pages") > 0, "{verified}");
    let ticks = shell.command("ticks").await.expect("ticks");
    assert_eq!(ticks.number("backwards"), 0, "{ticks}");
}

/// Hashes all memory at both ends.
fn verifying() -> MigrationPolicy {
    MigrationPolicy {
        verify: Verify::WholeMemory,
        ..MigrationPolicy::default()
    }
}

/// Never satisfied with the blackout it predicts for a busy guest, so pre-copy goes on until someone ends it.
fn endless() -> MigrationPolicy {
    MigrationPolicy {
        downtime_limit_ms: 1,
        max_throttle_percent: 0,
        max_rounds: u32::MAX,
        ..MigrationPolicy::default()
    }
}
