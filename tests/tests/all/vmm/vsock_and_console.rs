//! Linux speaks through its virtio console and over vsock with its host, and goes on with both after a move.

use super::{verify, verifying};
use godwit_tests::linux::{AGENT_GREETING, HVC_AGENT_CMDLINE, LinuxGuest};
use godwit_tests::migration::migrate;
use godwit_tests::require;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::{ConsoleKind, Vsock};
use godwit_wire::machine::{Boot, MachineSpec};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, DriverState, VmmInfo};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// The guest's context id.
const CID: u32 = 3;
/// Where the guest listens.
const GUEST_PORT: u32 = 1234;
/// Where the host listens.
const HOST_PORT: u32 = 52;
/// A connection that does not stir for this long hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than a packet and the buffers of either side hold (64, 128 and 256 KiB): both must give room again.
const MUCH: usize = 1 << 20;

/// A machine with both devices, whose sockets are in a directory `name` of its own.
fn machine(dir: &TestDir, guest: &LinuxGuest, name: &str) -> CreateRequest {
    let boot = Boot::Linux {
        kernel: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: HVC_AGENT_CMDLINE.to_owned(),
    };
    let mut spec = MachineSpec {
        boot,
        ..vmm::linux(guest, 2, Mib(128))
    };
    spec.devices.console = ConsoleKind::Virtio;
    spec.devices.vsock = Some(Vsock { cid: CID });
    let mut request = new_vm(spec);
    attach_sockets(dir, &mut request, name);
    request
}

/// As another host would: the machine's sockets are elsewhere.
fn attach_sockets(dir: &TestDir, request: &mut CreateRequest, name: &str) {
    let directory = dir.join(name);
    fs::create_dir(&directory).expect("a directory for sockets");
    request.attachments.vsock = Some(directory);
}

/// A host process connects to the guest, as the layout of the sockets says.
async fn connect(sockets: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(sockets.join("vsock.sock"))
        .await
        .expect("the VMM listens");
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    let accepted = async {
        let wanted = format!("CONNECT {GUEST_PORT}\n");
        stream.write_all(wanted.as_bytes()).await?;
        stream.read_line(&mut answer).await
    };
    timeout(PATIENCE, accepted)
        .await
        .expect("an answer to CONNECT")
        .expect("the guest accepts");
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
}

/// Says something long and hears it again.
async fn exchange(stream: &mut BufReader<UnixStream>) {
    let said: Vec<u8> = (0..MUCH).map(|nth| (nth % 251) as u8).collect();
    let mut heard = vec![0; MUCH];
    let (mut from, mut to) = tokio::io::split(stream);
    let both = async { tokio::try_join!(to.write_all(&said), from.read_exact(&mut heard)) };
    timeout(PATIENCE, both)
        .await
        .expect("the guest echoes")
        .expect("the connection holds");
    assert!(said == heard, "other bytes came back than were sent");
}

/// The end of a connection, in whatever way it is told.
async fn wait_for_end(mut stream: BufReader<UnixStream>) {
    let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await;
    match end.expect("it ends") {
        Ok(0) | Err(_) => {}
        Ok(_) => panic!("bytes came out of nowhere"),
    }
}

/// Answers the line that each guest process says at [`HOST_PORT`] with the same line.
fn serve_echo(sockets: &Path) {
    let path = sockets.join(format!("vsock.sock_{HOST_PORT}"));
    let listener = UnixListener::bind(path).expect("a socket");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A guest that hears nothing says so.
            let _ = echo_line(BufReader::new(stream)).await;
        }
    });
}

async fn echo_line(mut stream: BufReader<UnixStream>) -> io::Result<()> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    stream.write_all(line.as_bytes()).await
}

/// The guest's agent speaks to the host process.
async fn call(vmm: &Vmm, word: &str) {
    let mut shell = vmm.shell().await.expect("the shell on hvc0 answers");
    let heard = shell
        .command(&format!("vsock call {HOST_PORT} {word}"))
        .await
        .expect("the guest reaches its host");
    assert_eq!(heard.text, format!("heard={word}"));
}

#[tokio::test]
async fn linux_speaks_over_vsock_and_on_hvc0_and_both_go_on_after_a_move() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let mut request = machine(&dir, &guest, "here");
    let here = Vmm::boot(&dir, "vmm-0", &request).await.expect("boot");
    let mut console = here.serial().await.expect("console");
    console
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up, and says so on hvc0");
    let info = here.info().await.expect("info");
    let working: Vec<_> = info
        .devices
        .iter()
        .filter(|device| device.driver == DriverState::Working)
        .map(|device| device.name.as_str())
        .collect();
    assert_eq!(working, ["rng", "balloon", "console", "vsock"]);
    let console = &info.devices[2].counters;
    assert!(console["output_bytes"] > 0, "{console:?}");

    let mut shell = here.shell().await.expect("the shell on hvc0 answers");
    shell.command("fill 32").await.expect("fill");
    shell
        .command(&format!("vsock serve {GUEST_PORT}"))
        .await
        .expect("the guest listens");
    serve_echo(&dir.join("here"));
    let mut before = connect(&dir.join("here")).await;
    exchange(&mut before).await;
    call(&here, "godwit").await;
    let counted = here.info().await.expect("info");

    let there = Vmm::start(&dir, "vmm-1").await.expect("a target");
    attach_sockets(&dir, &mut request, "there");
    serve_echo(&dir.join("there"));
    migrate(&here, &there, &mut request, verifying())
        .await
        .expect("it moves");
    // What devices had counted moved along.
    let arrived = there.info().await.expect("info");
    for (device, name) in [("console", "output_bytes"), ("vsock", "connections")] {
        let (then, now) = (
            counter(&counted, device, name),
            counter(&arrived, device, name),
        );
        assert!(then > 0 && now >= then, "{device}: {then}, then {now}");
    }
    verify(&mut there.shell().await.expect("the shell on hvc0 answers")).await;
    // The process that held it is gone, as its host would be for the guest.
    drop(here);
    wait_for_end(before).await;
    exchange(&mut connect(&dir.join("there")).await).await;
    call(&there, "moved").await;
}

/// What a device has counted.
fn counter(info: &VmmInfo, device: &str, name: &str) -> u64 {
    let device = info.devices.iter().find(|known| known.name == device);
    device.expect("the machine has it").counters[name]
}
