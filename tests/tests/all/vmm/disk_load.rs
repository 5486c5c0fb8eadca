//! Linux guests that write a disk all the time and read back what they wrote.

use godwit_tests::linux::AGENT_GREETING;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{BOOT_PATIENCE, Vmm};
use godwit_wire::vmm_api::CreateRequest;

/// Linux whose init is up.
pub(super) async fn boot(dir: &TestDir, name: &str, request: &CreateRequest) -> Vmm {
    let vmm = Vmm::boot(dir, name, request).await.expect("Linux boots");
    vmm.serial()
        .await
        .expect("console")
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up");
    vmm
}

/// Waits until the guest's disk load has done another whole round, in which it read back what it wrote.
pub(super) async fn another_round(vmm: &Vmm) {
    let mut shell = vmm.shell().await.expect("shell");
    let rounds = shell.command("disk rounds").await.expect("the load runs");
    let before = rounds.number("rounds");
    loop {
        let now = shell.command("disk rounds").await.expect("the load runs");
        if now.number("rounds") > before + 1 {
            return;
        }
    }
}

/// Ends the load on the first `mib` MiB, which must be what its last round wrote; the number of that round.
pub(super) async fn stop_load_and_verify(vmm: &Vmm, mib: u64) -> u64 {
    let mut shell = vmm.shell().await.expect("shell");
    let seed = shell
        .command("disk stop")
        .await
        .expect("no block was wrong")
        .number("seed");
    shell
        .command(&format!("disk verify /dev/vda {seed} {mib}"))
        .await
        .expect("the last round is on the disk");
    seed
}
