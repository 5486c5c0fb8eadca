//! Linux boots, and lives through live migration under load.

use super::{verify, verifying};
use godwit_tests::linux::{
    AGENT_CMDLINE, AGENT_GREETING, LinuxGuest, SHELL_CMDLINE, SHELL_GREETING,
};
use godwit_tests::migration::migrate;
use godwit_tests::require;
use godwit_tests::serial::Serial;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::machine::{Boot, MachineSpec};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::CreateRequest;
use std::path::Path;

/// What a guest may tell the time by; both go with it when it moves. Linux takes the TSC before kvm-clock where the CPU
/// says that it never stops, as the machine's own CPU does to the test kernel.
const CLOCKS: [&str; 2] = ["clock=tsc", "clock=kvm-clock"];

async fn boot_agent(
    dir: &TestDir,
    guest: &LinuxGuest,
    vcpus: u8,
    memory: Mib,
) -> (Vmm, CreateRequest) {
    let request = new_vm(vmm::linux(guest, vcpus, memory));
    (boot_agent_of(dir, &request).await, request)
}

async fn boot_agent_of(dir: &TestDir, request: &CreateRequest) -> Vmm {
    let vmm = Vmm::boot(dir, "vmm-0", request).await.expect("Linux boots");
    let greeting = vmm
        .serial()
        .await
        .expect("console")
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up");
    assert!(
        CLOCKS.iter().any(|clock| greeting.ends_with(clock)),
        "{greeting}"
    );
    vmm
}

/// Boots `kernel` to a shell, which is what answers on the serial console; `word` goes to the kernel as well.
async fn boot_shell(
    (dir, name): (&TestDir, &str),
    guest: &LinuxGuest,
    (kernel, word): (&Path, &str),
    vcpus: u8,
) -> (Vmm, Serial) {
    let boot = Boot::Linux {
        kernel: kernel.to_owned(),
        initrd: Some(guest.initrd.clone()),
        cmdline: format!("{SHELL_CMDLINE} {word}").trim_end().to_owned(),
    };
    let request = new_vm(MachineSpec {
        boot,
        ..vmm::linux(guest, vcpus, Mib(128))
    });
    let vmm = Vmm::boot(dir, name, &request).await.expect("Linux boots");
    let mut serial = vmm.serial().await.expect("console");
    serial
        .wait_for(SHELL_GREETING, BOOT_PATIENCE)
        .await
        .expect("the shell is up");
    (vmm, serial)
}

#[tokio::test]
async fn linux_boots_to_a_shell_on_the_serial_console() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (vmm, mut serial) = boot_shell((&dir, "vmm"), &guest, (&guest.kernel, ""), 1).await;
    serial
        .send_line("echo product=$((6 * 7))")
        .await
        .expect("type");
    serial
        .wait_for("product=42", BOOT_PATIENCE)
        .await
        .expect("the shell answers");
    serial.send_line("poweroff -f").await.expect("type");
    vmm.wait_until_halted(BOOT_PATIENCE)
        .await
        .expect("Linux powers off through ACPI");
}

/// The kernel `elf` without its notes: nothing says any more that it has a PVH entry.
fn without_notes(elf: &[u8]) -> Vec<u8> {
    const PT_NULL: u32 = 0;
    const PT_NOTE: u32 = 4;
    let number = |offset: usize, bytes: usize| {
        let bytes = elf[offset..offset + bytes].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    let (table, entry_bytes, entries) = (number(32, 8), number(54, 2), number(56, 2));
    let notes: Vec<usize> = (0..entries)
        .map(|entry| table + entry * entry_bytes)
        .filter(|header| number(*header, 4) == PT_NOTE as usize)
        .collect();
    assert!(!notes.is_empty(), "the kernel has no notes to lose");
    let mut blanked = elf.to_vec();
    for header in notes {
        blanked[header..header + 4].copy_from_slice(&PT_NULL.to_le_bytes());
    }
    blanked
}

#[tokio::test]
async fn a_linux_kernel_without_a_pvh_note_boots_by_the_64_bit_protocol() {
    // Our zero page names no loader that is known (0xff); a kernel that was entered through its PVH note finds 0xb0.
    const QUESTION: &str = "echo loader=$(cat /proc/sys/kernel/bootloader_type)";
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let kernel = dir.join("vmlinux-without-notes");
    let elf = std::fs::read(&guest.kernel).expect("the kernel can be read");
    std::fs::write(&kernel, without_notes(&elf)).expect("a kernel");
    for (kernel, loader) in [(&kernel, "loader=255"), (&guest.kernel, "loader=176")] {
        let (_vmm, mut serial) = boot_shell((&dir, loader), &guest, (kernel, ""), 2).await;
        serial.send_line(QUESTION).await.expect("type");
        serial
            .wait_for(loader, BOOT_PATIENCE)
            .await
            .expect("the kernel says how it was entered");
    }
}

/// Local APICs are registers of the CPU (x2APIC), or memory where the kernel would rather have it so (xAPIC).
#[tokio::test]
async fn linux_guests_run_with_either_kind_of_local_apic() {
    const QUESTION: &str = "echo online=$(nproc) x2apic=$(grep -c x2apic /proc/cpuinfo)";
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    for (name, word, answer) in [
        ("x2apic", "", "online=2 x2apic=2"),
        ("xapic", "nox2apic", "online=2 x2apic=0"),
    ] {
        let (_vmm, mut serial) = boot_shell((&dir, name), &guest, (&guest.kernel, word), 2).await;
        serial.send_line(QUESTION).await.expect("type");
        serial
            .wait_for(answer, BOOT_PATIENCE)
            .await
            .expect("both CPUs are there, with the APICs that were asked for");
    }
}

/// `how` is the kernel's own choice of how to restart the machine.
async fn a_linux_guest_that_restarts_boots_again(how: &str) {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let boot = Boot::Linux {
        kernel: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: format!("{AGENT_CMDLINE} {how}"),
    };
    let request = new_vm(MachineSpec {
        boot,
        ..vmm::linux(&guest, 1, Mib(128))
    });
    let vmm = boot_agent_of(&dir, &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell.command("reset").await.expect("reset");
    shell
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up again");
    assert_eq!(vmm.info().await.expect("info").counters.resets, 1);
}

#[tokio::test]
async fn a_linux_guest_restarts_through_acpi() {
    a_linux_guest_that_restarts_boots_again("reboot=acpi").await;
}

/// As kernels with EFI support do on hardware-reduced platforms without EFI.
#[tokio::test]
async fn a_linux_guest_restarts_through_the_firmware_entry() {
    a_linux_guest_that_restarts_boots_again("reboot=bios").await;
}

#[tokio::test]
async fn a_linux_guest_powers_off_when_it_is_asked_to_stop() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (vmm, request) = boot_agent(&dir, &guest, 1, Mib(128)).await;
    // Its shell answers, so everything else it does at its start is done too.
    vmm.shell().await.expect("shell");
    vmm.command("stop", request.epoch).await.expect("stop");
    vmm.wait_until_halted(BOOT_PATIENCE)
        .await
        .expect("the guest hears the power button");
}

/// Sends a Linux guest that dirties memory through several VMMs.
async fn a_linux_guest_under_load_survives_live_migration(vcpus: u8, flights: usize) {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (mut here, mut request) = boot_agent(&dir, &guest, vcpus, Mib(256)).await;
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 128").await.expect("fill");
    shell.command("dirty 20 16").await.expect("dirty");
    for flight in 1..=flights {
        let there = Vmm::start(&dir, &format!("vmm-{flight}"))
            .await
            .expect("a target");
        migrate(&here, &there, &mut request, verifying())
            .await
            .unwrap_or_else(|error| panic!("{flight}: {error:#}"));
        here = there;
        verify(&mut here.shell().await.expect("shell")).await;
    }
}

#[tokio::test]
async fn a_linux_guest_with_1_vcpu_under_load_survives_live_migration() {
    a_linux_guest_under_load_survives_live_migration(1, 5).await;
}

#[tokio::test]
async fn a_linux_guest_with_2_vcpus_under_load_survives_live_migration() {
    a_linux_guest_under_load_survives_live_migration(2, 5).await;
}
