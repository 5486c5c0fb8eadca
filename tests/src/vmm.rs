//! One `godwit vmm` process under test.

use crate::http::Client;
use crate::linux::{AGENT_CMDLINE, AGENT_GREETING, LinuxGuest};
use crate::process::Process;
use crate::program;
use crate::serial::Serial;
use crate::test_dir::TestDir;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::{Boot, CpuBaseline, MachineSpec, MachineType};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{
    Command as EpochCommand, CreateRequest, StopReason, VMM_ENVIRONMENT, VmmInfo, VmmState,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A VMM listens within this time of its start.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// A guest says its first line within this time.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(60);

/// A VMM process with its API and console.
#[derive(Debug)]
pub struct Vmm {
    /// The process.
    pub process: Process,
    /// Its API.
    pub api: Client,
    serial_socket: PathBuf,
}

impl Vmm {
    /// Starts an empty VMM called `name` below `dir`; returns when its API answers.
    pub async fn start(dir: &TestDir, name: &str) -> anyhow::Result<Self> {
        let (api_socket, serial_socket) = (
            dir.join(format!("{name}.sock")),
            dir.join(format!("{name}.serial")),
        );
        let mut command = Command::new(program::godwit());
        let (name, value) = VMM_ENVIRONMENT;
        command
            .env(name, value)
            .arg("vmm")
            .arg("--api-socket")
            .arg(&api_socket)
            .arg("--serial-socket")
            .arg(&serial_socket);
        let mut process = Process::start(&mut command, &dir.join(format!("{name}.log")))?;
        let api = Client::unix(&api_socket);
        let deadline = Instant::now() + START_PATIENCE;
        // The socket's file appears when the process listens; there is nothing else to wait for.
        while let Err(error) = api.get::<VmmInfo>("/v1/info").await {
            anyhow::ensure!(
                process.exit_status().is_none() && Instant::now() < deadline,
                "{name}: {error:#}"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(Self {
            process,
            api,
            serial_socket,
        })
    }

    /// Starts a VMM and boots a machine in it.
    pub async fn boot(dir: &TestDir, name: &str, request: &CreateRequest) -> anyhow::Result<Self> {
        let vmm = Self::start(dir, name).await?;
        vmm.create(request).await?;
        vmm.command("boot", request.epoch).await?;
        Ok(vmm)
    }

    /// Builds a machine.
    pub async fn create(&self, request: &CreateRequest) -> anyhow::Result<VmmInfo> {
        self.api.put("/v1/machine", request).await
    }

    /// `boot`, `pause`, `resume`, `stop` or `kill`.
    pub async fn command(&self, verb: &str, epoch: Epoch) -> anyhow::Result<VmmInfo> {
        self.api
            .post(&format!("/v1/{verb}"), &EpochCommand { epoch })
            .await
    }

    /// What it tells about itself.
    pub async fn info(&self) -> anyhow::Result<VmmInfo> {
        self.api.get("/v1/info").await
    }

    /// Waits until its state satisfies `accept`.
    pub async fn wait_for_state(
        &self,
        patience: Duration,
        accept: impl Fn(&VmmState) -> bool,
    ) -> anyhow::Result<VmmInfo> {
        let deadline = Instant::now() + patience;
        loop {
            let info = self.info().await?;
            if accept(&info.state) {
                return Ok(info);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the machine is still {:?} after {patience:?}",
                info.state
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the guest has powered off by itself.
    pub async fn wait_until_halted(&self, patience: Duration) -> anyhow::Result<VmmInfo> {
        let halted = VmmState::Stopped {
            reason: StopReason::GuestHalted,
        };
        self.wait_for_state(patience, |state| *state == halted)
            .await
    }

    /// Attaches to the guest's console.
    pub async fn serial(&self) -> anyhow::Result<Serial> {
        Serial::attach(&self.serial_socket).await
    }

    /// Attaches to the console of a guest that speaks commands, past everything it said before.
    pub async fn shell(&self) -> anyhow::Result<Serial> {
        let mut serial = self.serial().await?;
        serial.sync().await?;
        Ok(serial)
    }

    /// Path of the serial socket.
    pub fn serial_socket(&self) -> &Path {
        &self.serial_socket
    }
}

/// A machine that boots the pilot.
pub fn pilot(vcpus: u8, memory: Mib) -> MachineSpec {
    MachineSpec {
        machine_type: MachineType::Godwit2,
        vcpus,
        memory_mib: memory,
        boot: Boot::Pilot,
        cpu: CpuBaseline::default(),
        devices: Default::default(),
    }
}

/// A machine that boots Linux with `guest-agent` as its init.
pub fn linux(guest: &LinuxGuest, vcpus: u8, memory: Mib) -> MachineSpec {
    let boot = Boot::Linux {
        kernel: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: AGENT_CMDLINE.to_owned(),
    };
    // The test kernel shows raw CPUID to user code, so only the host's own features are true there.
    MachineSpec {
        boot,
        cpu: CpuBaseline::Host,
        ..pilot(vcpus, memory)
    }
}

/// What the guest of such a machine says when it is up.
pub fn greeting(spec: &MachineSpec) -> &'static str {
    match spec.boot {
        Boot::Pilot => "pilot ",
        Boot::Linux { .. } => AGENT_GREETING,
    }
}

/// A request for a new VM of this spec under epoch 1, without a lease.
pub fn new_vm(spec: MachineSpec) -> CreateRequest {
    CreateRequest {
        attachments: Default::default(),
        vm: VmId::fresh(),
        epoch: Epoch(1),
        spec,
        lease: None,
    }
}
