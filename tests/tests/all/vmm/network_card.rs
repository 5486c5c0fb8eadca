//! A Linux guest keeps its connections when it moves to another tap.

use super::verifying;
use godwit_tests::linux::{LinuxGuest, SHELL_CMDLINE, SHELL_GREETING};
use godwit_tests::migration::{migrate, status_after};
use godwit_tests::require;
use godwit_tests::serial::Serial;
use godwit_tests::succession::Succession;
use godwit_tests::tap::{self, Bridge, Tap};
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::{Attachments, MacAddress, Nic, NicAttach, NicAttachment, NicLimits};
use godwit_wire::machine::{Boot, MachineSpec};
use godwit_wire::migration::MigrationProgress;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::CreateRequest;
use std::cell::Cell;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const ECHO_PORT: u16 = 7;
/// TCP repeats what was lost in a blackout after fractions of a second.
const ECHO_PATIENCE: Duration = Duration::from_secs(20);
const MTU: u16 = 1500;
/// Time between two words of a conversation: shorter than any blackout.
const WORDS_EVERY: Duration = Duration::from_millis(10);
/// How much longer than the blackout the silence on the card may be: what was said into it is repeated by then.
const LONGEST_AFTERMATH: Duration = Duration::from_secs(10);

/// A subnet of its own for each test process, so that two of them do not meet.
fn address(last: u8) -> String {
    let pid = std::process::id();
    format!("10.{}.{}.{last}", 220 + (pid >> 8 & 0x7), pid & 0xff)
}

fn on_tap(tap: &Tap) -> Attachments {
    Attachments {
        nics: vec![NicAttachment {
            tap: tap.name.clone(),
            mtu: MTU,
        }],
        ..Attachments::default()
    }
}

/// A machine of two vCPUs with one card.
fn with_card(guest: &LinuxGuest, tap: &Tap, queue_pairs: u8) -> CreateRequest {
    let boot = Boot::Linux {
        kernel: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: SHELL_CMDLINE.to_owned(),
    };
    let mut spec = MachineSpec {
        boot,
        ..vmm::linux(guest, 2, Mib(128))
    };
    spec.devices.nics.push(Nic {
        name: "lan".into(),
        mac: MacAddress::local(u64::from(std::process::id())),
        attach: NicAttach::Tap {
            tap: tap.name.clone(),
        },
        address: None,
        queue_pairs,
        limits: NicLimits::default(),
    });
    CreateRequest {
        attachments: on_tap(tap),
        ..new_vm(spec)
    }
}

/// Has the guest answer everything that comes to its echo port.
async fn serve_echo(serial: &mut Serial) {
    for line in [
        &format!("ip addr add {}/24 dev eth0", address(2)),
        "ip link set eth0 up",
        &format!("nc -ll -p {ECHO_PORT} -e cat &"),
        "until netstat -ltn | grep -q :7; do usleep 10000; done; echo listeners=$((0 + 1))",
    ] {
        serial.send_line(line).await.expect("type");
    }
    serial
        .wait_for("listeners=1", BOOT_PATIENCE)
        .await
        .expect("the guest listens");
}

/// The guest's driver sends and receives through both queue pairs of its card.
async fn uses_both_queue_pairs(vmm: &Vmm) {
    /// VIRTIO_NET_F_MQ is bit 22, and `cut` counts from 1.
    const MULTI_QUEUE: &str = "echo multi-queue=$(cut -c23 /sys/class/net/eth0/device/features)";
    const QUEUES: &str = "echo queues=$(ls -d /sys/class/net/eth0/queues/tx-* | wc -l)";
    let mut serial = vmm.serial().await.expect("console");
    for (question, answer) in [(MULTI_QUEUE, "multi-queue=1"), (QUEUES, "queues=2")] {
        serial.send_line(question).await.expect("type");
        serial
            .wait_for(answer, BOOT_PATIENCE)
            .await
            .expect("both queue pairs are in use");
    }
}

/// Says something new and hears it again.
async fn exchange(connection: &mut TcpStream, number: u32) {
    let said = number.to_be_bytes();
    let mut heard = [0; 4];
    let answered = timeout(ECHO_PATIENCE, async {
        connection.write_all(&said).await?;
        connection.read_exact(&mut heard).await
    });
    answered
        .await
        .unwrap_or_else(|_| panic!("no answer to {number}"))
        .unwrap_or_else(|error| panic!("{number}: {error}"));
    assert_eq!(heard, said);
}

/// Boots a guest that answers, and connects to it.
async fn boot_and_connect(dir: &TestDir, request: &CreateRequest) -> (Vmm, TcpStream) {
    let here = Vmm::boot(dir, "vmm-0", request).await.expect("boot");
    let mut serial = here.serial().await.expect("console");
    serial
        .wait_for(SHELL_GREETING, BOOT_PATIENCE)
        .await
        .expect("the shell is up");
    serve_echo(&mut serial).await;
    let to = format!("{}:{ECHO_PORT}", address(2));
    let mut connection = timeout(ECHO_PATIENCE, TcpStream::connect(&to))
        .await
        .expect("in time")
        .expect("connect");
    exchange(&mut connection, 0).await;
    (here, connection)
}

#[tokio::test]
async fn a_connection_to_a_linux_guest_survives_a_change_of_vmms_on_the_same_tap() {
    let guest = require!(LinuxGuest::prepare());
    require!(tap::available());
    let dir = TestDir::new();
    let bridge = Bridge::new("bs", &format!("{}/24", address(1))).expect("a bridge");
    let tap = Tap::new("ts").expect("a tap");
    bridge.plug(&tap).expect("plug in");
    let request = with_card(&guest, &tap, 1);
    let (mut here, mut connection) = boot_and_connect(&dir, &request).await;

    for change in 1..=4u32 {
        let there = Vmm::start(&dir, &format!("vmm-{change}"))
            .await
            .expect("a successor");
        let talk = async {
            for number in 1..=20 {
                exchange(&mut connection, change << 16 | number).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let succession = Succession::of(&dir, &here, &there, &request);
        let (done, ()) = tokio::join!(succession.complete(), talk);
        let status = done.unwrap_or_else(|error| panic!("{change}: {error:#}"));
        println!("{:?}", status.blackout);
        here = there;
        exchange(&mut connection, change << 16).await;
    }
}

#[tokio::test]
async fn a_connection_to_a_linux_guest_with_two_queue_pairs_survives_live_migration_to_another_tap()
{
    let guest = require!(LinuxGuest::prepare());
    require!(tap::available());
    let dir = TestDir::new();
    let bridge = Bridge::new("br", &format!("{}/24", address(1))).expect("a bridge");
    let taps = ["ta", "tb"].map(|label| Tap::multi_queue(label).expect("a tap"));
    for tap in &taps {
        bridge.plug(tap).expect("plug in");
    }
    let mut request = with_card(&guest, &taps[0], 2);
    let (mut here, mut connection) = boot_and_connect(&dir, &request).await;
    uses_both_queue_pairs(&here).await;

    for flight in 1..=4u32 {
        // There and back: each VMM has the tap that the one before it does not have.
        request.attachments = on_tap(&taps[flight as usize % 2]);
        let there = Vmm::start(&dir, &format!("vmm-{flight}"))
            .await
            .expect("a target");
        let over = Cell::new(false);
        let fly = async {
            let landed = migrate(&here, &there, &mut request, verifying()).await;
            over.set(true);
            landed
        };
        // Until the guest has moved, so that frames pass up to the blackout.
        let talk = async {
            let mut number = 0;
            while !over.get() {
                number += 1;
                exchange(&mut connection, flight << 16 | number).await;
                tokio::time::sleep(WORDS_EVERY).await;
            }
        };
        let (landed, ()) = tokio::join!(fly, talk);
        let landed = landed.unwrap_or_else(|error| panic!("{flight}: {error:#}"));
        here = there;
        exchange(&mut connection, flight << 16).await;
        expect_packet_gap(&landed.progress, &here).await;
    }
}

/// The guest's card was silent at least for as long as the guest surely stood still, and not for much longer.
async fn expect_packet_gap(at_source: &MigrationProgress, target: &Vmm) {
    let told = status_after(target, 0).await.expect("a status").progress;
    let gap_us = told.packet_gap_us.expect("frames have passed at both ends");
    assert_eq!(
        at_source.packet_gap_us, None,
        "only the target can know the gap"
    );
    let blackout = at_source.blackout.expect("the blackout is known");
    let downtime_us = at_source.downtime_us.expect("the downtime is known");
    println!("packet gap {gap_us} us, downtime {downtime_us} us, {blackout:?}");
    // By the source's own clock, between the moment when its devices stood still and when it said `Done`: whatever
    // else the gap consists of was measured across the link.
    let hashing_us = at_source.hashing_us.expect("its memory was hashed");
    let least_us = blackout.save_us + hashing_us;
    let most_us = downtime_us + LONGEST_AFTERMATH.as_micros() as u64;
    assert!(
        (least_us..=most_us).contains(&gap_us),
        "{gap_us} us are not within {least_us} to {most_us} us"
    );
}
