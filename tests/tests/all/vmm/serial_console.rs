//! The console can come and go; the guest does not notice and the last 64 KiB are kept.

use super::boot_pilot;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_wire::unit::Mib;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// What the VMM keeps of the guest's output.
const RING_BYTES: usize = 64 * 1024;

#[tokio::test]
async fn a_console_is_detached_and_attached_again() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    for _ in 0..5 {
        let mut shell = vmm.shell().await.expect("attach");
        shell.command("ticks").await.expect("the guest answers");
    }
}

#[tokio::test]
async fn output_that_nobody_read_is_there_for_the_next_console() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    let mut shell = vmm.shell().await.expect("attach");
    // One line after the other, so that the guest's receive buffer never overflows.
    while (vmm.info().await.expect("info").counters.serial_tx_bytes as usize) < RING_BYTES + 4096 {
        shell.command("help").await.expect("help");
    }
    shell.command("fill 3").await.expect("fill");
    drop(shell);

    let mut console = UnixStream::connect(vmm.serial_socket())
        .await
        .expect("attach");
    let mut kept = vec![0; RING_BYTES];
    console
        .read_exact(&mut kept)
        .await
        .expect("the ring is full");
    let kept = String::from_utf8_lossy(&kept);
    let last = kept.trim_end().lines().last().expect("a last line");
    assert!(
        last.starts_with("ok filled_mib=3"),
        "the ring ends with the last line, not with {last:?}"
    );
    assert!(!kept.contains("pilot "), "the oldest bytes made room");
}
