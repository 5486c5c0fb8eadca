//! `godwit vm …`.

mod migrate;
mod nic;
mod snapshot;

pub(super) use migrate::MigrateArgs;
pub use snapshot::SnapshotCommand;

use super::limits::LimitArgs;
use super::words::size;
use super::{ChangeOptions, Failure, Session, attach, render};
use crate::resource::{
    Boot, ChangeVm, CloudInit, ConsoleKind, CpuBaseline, CreateVm, CreateVmDisk, CreateVmNic,
    DeleteDisks, DryRun, LeasePolicy, MachineSpec, MachineType, MemoryBacking, PostCopyPermission,
    StartVm, StopMode, StopVm, Vm, VmAccepted, VmMaintenancePolicy, VmState, Vsock,
};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use migrate::migrate;
use nic::NicArg;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Commands about VMs.
// Parsed once per process: a box would only complicate the commands.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List VMs.
    #[command(visible_alias = "ls")]
    List {
        /// Only VMs on this host.
        #[arg(long)]
        host: Option<String>,
        /// Only VMs in this state.
        #[arg(long, value_enum)]
        state: Option<VmState>,
    },
    /// Show a VM.
    Show {
        /// Name or id.
        vm: String,
    },
    /// Create a VM and start it.
    Create(CreateArgs),
    /// Change a VM.
    Set(SetArgs),
    /// Start a VM.
    Start {
        /// Name or id.
        vm: String,
        /// Host to start it on; the best one when absent.
        #[arg(long)]
        host: Option<String>,
        #[command(flatten)]
        change: ChangeOptions,
    },
    /// Stop a VM: the guest is asked, then killed.
    Stop(StopArgs),
    /// Stop a VM and start it again on the same host.
    Reboot(StopArgs),
    /// Make a VM stand still.
    Pause(NamedArgs),
    /// Let a paused VM run.
    Resume(NamedArgs),
    /// Move a running VM to another host without stopping it.
    Migrate(MigrateArgs),
    /// Save a VM, and let it go on from there.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Kill a VM if it runs, and forget it.
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Attach this terminal to a VM's serial console; Ctrl-] leaves.
    Console {
        /// Name or id.
        vm: String,
    },
}

/// A VM to be.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Unique in the pool: a-z, 0-9, '.' and '-'.
    name: String,
    /// Number of vCPUs, 1 to 64.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Guest memory in MiB.
    #[arg(long, alias = "memory", default_value_t = 64)]
    memory_mib: u64,
    /// CPU features the guest sees.
    #[arg(long, value_enum, default_value_t)]
    cpu: CpuBaseline,
    /// Linux kernel on the host; the built-in pilot guest when absent.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk on the host.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, requires = "kernel", default_value = "console=ttyS0")]
    cmdline: String,
    /// First disk: a thin copy of this image.
    #[arg(long, help_heading = "Devices")]
    image: Option<String>,
    /// Size of the first disk, such as 20G; the image's when absent.
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = size,
        requires = "image",
        help_heading = "Devices"
    )]
    image_size: Option<u64>,
    /// A further, blank disk, such as 20G or 20G:data; may be repeated.
    #[arg(long, value_name = "SIZE[:NAME]", value_parser = new_disk, help_heading = "Devices")]
    disk: Vec<(u64, Option<String>)>,
    /// A disk that exists; may be repeated.
    #[arg(long, value_name = "DISK", help_heading = "Devices")]
    attach: Vec<String>,
    /// Storage pool of blank disks; the image's, or the only choice, when absent.
    #[arg(long, help_heading = "Devices")]
    pool: Option<String>,
    /// A network card on this network, with the lowest free address, or with the one given; may be repeated. Several
    /// queue pairs (up to 8) let as many vCPUs send and receive at once.
    #[arg(
        long,
        value_name = "NETWORK[=ADDRESS][,mac=ADDRESS][,queues=PAIRS]",
        value_parser = NicArg::parse,
        help_heading = "Devices"
    )]
    network: Vec<NicArg>,
    /// Public key for the image's default user: a file, or the key itself; may be repeated.
    #[arg(long, value_name = "FILE|KEY", help_heading = "cloud-init")]
    ssh_key: Vec<String>,
    /// cloud-init's user-data.
    #[arg(long, value_name = "FILE", help_heading = "cloud-init")]
    user_data: Option<PathBuf>,
    /// Host name of the guest; the VM's name when absent.
    #[arg(long, help_heading = "cloud-init")]
    hostname: Option<String>,
    /// Which console the serial stream talks to.
    #[arg(long, value_enum, default_value_t, help_heading = "Devices")]
    console: ConsoleKind,
    /// How its host backs its memory.
    #[arg(long, value_enum, default_value_t, help_heading = "Devices")]
    memory_backing: MemoryBacking,
    /// Sockets between guest and host.
    #[arg(long, help_heading = "Devices")]
    vsock: bool,
    #[command(flatten)]
    limits: LimitArgs,
    /// Host to place it on; the best one when absent.
    #[arg(long)]
    host: Option<String>,
    /// What it does when its host loses contact with the server.
    #[arg(long, value_enum, default_value_t)]
    lease: LeasePolicy,
    /// What a maintenance of its host does with it.
    #[arg(long, value_enum, default_value_t)]
    on_maintenance: VmMaintenancePolicy,
    /// Whether migrations may let the guest go ahead of its memory, whoever asks for them.
    #[arg(long, value_enum, default_value_t)]
    post_copy: PostCopyPermission,
    /// Only create it.
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    change: ChangeOptions,
}

/// Changes of a VM.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, id = "changes", args = ["name", "keep_memory_mib", "lease", "on_maintenance", "post_copy"])]
pub struct SetArgs {
    /// Name or id.
    vm: String,
    /// A new name.
    #[arg(long)]
    name: Option<String>,
    /// Memory in MiB that the guest shall live with until it is stopped: its balloon takes the rest. Only while it runs.
    #[arg(long, value_name = "MIB")]
    keep_memory_mib: Option<u64>,
    /// What it does when its host loses contact with the server; only while it is off.
    #[arg(long, value_enum)]
    lease: Option<LeasePolicy>,
    /// What a maintenance of its host does with it.
    #[arg(long, value_enum)]
    on_maintenance: Option<VmMaintenancePolicy>,
    /// Whether migrations may let the guest go ahead of its memory, whoever asks for them.
    #[arg(long, value_enum)]
    post_copy: Option<PostCopyPermission>,
    #[command(flatten)]
    change: ChangeOptions,
}

/// How a VM is stopped.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name or id.
    vm: String,
    /// Do not ask the guest.
    #[arg(long, conflicts_with = "timeout_s")]
    kill: bool,
    /// Seconds the guest is given before it is killed.
    #[arg(long, default_value_t = 30)]
    timeout_s: u64,
    #[command(flatten)]
    change: ChangeOptions,
}

/// A VM.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// Name or id.
    vm: String,
    #[command(flatten)]
    change: ChangeOptions,
}

/// A VM to delete.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Name or id.
    vm: String,
    /// Keep the disks that were created with it.
    #[arg(long)]
    keep_disks: bool,
    #[command(flatten)]
    change: ChangeOptions,
}

impl VmCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { host, state } => list(session, host.as_deref(), state).await,
            Self::Show { vm } => {
                let vm: Vm = session.client.get(&path(&vm)).await?;
                session.print(&vm, |vm| render::vm(vm, Timestamp::now()))
            }
            Self::Create(arguments) => create(session, arguments).await,
            Self::Set(arguments) => set(session, arguments).await,
            Self::Start { vm, host, change } => {
                act(session, &vm, "start", &StartVm { host }, change).await
            }
            Self::Stop(arguments) => {
                act(
                    session,
                    &arguments.vm,
                    "stop",
                    &stop_body(&arguments),
                    arguments.change,
                )
                .await
            }
            Self::Reboot(arguments) => {
                act(
                    session,
                    &arguments.vm,
                    "reboot",
                    &stop_body(&arguments),
                    arguments.change,
                )
                .await
            }
            Self::Pause(arguments) => {
                act(
                    session,
                    &arguments.vm,
                    "pause",
                    &serde_json::json!({}),
                    arguments.change,
                )
                .await
            }
            Self::Resume(arguments) => {
                act(
                    session,
                    &arguments.vm,
                    "resume",
                    &serde_json::json!({}),
                    arguments.change,
                )
                .await
            }
            Self::Migrate(arguments) => migrate(session, arguments).await,
            Self::Snapshot(command) => command.run(session).await,
            Self::Delete(arguments) => delete(session, arguments).await,
            Self::Console { vm } => attach::attach(session.client.serial(&vm).await?, &vm).await,
        }
    }
}

fn path(vm: &str) -> String {
    format!("/v1/vms/{vm}")
}

async fn list(
    session: &Session,
    host: Option<&str>,
    state: Option<VmState>,
) -> Result<(), Failure> {
    let mut vms = session.client.list::<Vm>("/v1/vms").await?;
    vms.items.retain(|vm| {
        let here = |name: &str| {
            vm.host_name.as_deref() == Some(name)
                || vm.host.is_some_and(|id| id.to_string() == name)
        };
        host.is_none_or(here) && state.is_none_or(|state| vm.state == state)
    });
    vms.items.sort_by(|a, b| a.name.cmp(&b.name));
    session.print(&vms, |vms| render::vms(&vms.items))
}

fn new_disk(text: &str) -> Result<(u64, Option<String>), String> {
    match text.split_once(':') {
        Some((bytes, name)) => Ok((size(bytes)?, Some(name.to_owned()))),
        None => Ok((size(text)?, None)),
    }
}

fn new_disks(arguments: &CreateArgs) -> Vec<CreateVmDisk> {
    let root = arguments.image.as_ref().map(|image| CreateVmDisk {
        name: Some("root".into()),
        image: Some(image.clone()),
        bytes: arguments.image_size,
        ..CreateVmDisk::default()
    });
    let blank = arguments.disk.iter().map(|(bytes, name)| CreateVmDisk {
        name: name.clone(),
        bytes: Some(*bytes),
        pool: arguments.pool.clone(),
        ..CreateVmDisk::default()
    });
    let existing = arguments.attach.iter().map(|disk| CreateVmDisk {
        disk: Some(disk.clone()),
        ..CreateVmDisk::default()
    });
    let disks = root.into_iter().chain(blank).chain(existing);
    disks.map(|disk| arguments.limits.bind_disk(disk)).collect()
}

fn new_nics(arguments: &CreateArgs) -> Vec<CreateVmNic> {
    let cards = arguments.network.iter().map(NicArg::card);
    cards.map(|card| arguments.limits.bind_nic(card)).collect()
}

fn read_file(path: &Path, action: &'static str) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|source| Failure::Io { action, source })
}

/// A guest that boots an image gets a seed even when nothing is said: its host name at least.
fn seed(arguments: &CreateArgs) -> Result<Option<CloudInit>, Failure> {
    let nothing = arguments.ssh_key.is_empty()
        && arguments.user_data.is_none()
        && arguments.hostname.is_none();
    if nothing && arguments.image.is_none() {
        return Ok(None);
    }
    let mut ssh_keys = Vec::new();
    for given in &arguments.ssh_key {
        // A key is two words; a path that is one has better not.
        let text = match given.contains(' ') {
            true => given.clone(),
            false => read_file(Path::new(given), "cannot read the SSH key")?,
        };
        let keys = text.lines().map(str::trim);
        let keys = keys.filter(|line| !line.is_empty() && !line.starts_with('#'));
        ssh_keys.extend(keys.map(str::to_owned));
    }
    let user_data = match &arguments.user_data {
        Some(path) => read_file(path, "cannot read the user-data")?,
        None => String::new(),
    };
    Ok(Some(CloudInit {
        hostname: arguments.hostname.clone().unwrap_or_default(),
        ssh_keys,
        user_data,
        ..CloudInit::default()
    }))
}

async fn create(session: &Session, arguments: CreateArgs) -> Result<(), Failure> {
    let (disks, nics) = (new_disks(&arguments), new_nics(&arguments));
    let cloud_init = seed(&arguments)?;
    let vsock = arguments.vsock.then_some(Vsock { cid: 3 });
    let CreateArgs {
        name,
        vcpus,
        memory_mib,
        cpu,
        kernel,
        initrd,
        cmdline,
        host,
        lease,
        on_maintenance,
        post_copy,
        ..
    } = arguments;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let boot = match kernel {
        None => Boot::Pilot,
        Some(kernel) => Boot::Linux {
            kernel: text(&kernel),
            initrd: initrd.as_deref().map(text),
            cmdline,
        },
    };
    let body = CreateVm {
        spec: Some(MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus,
            memory_mib,
            boot,
            cpu,
        }),
        template: None,
        disks,
        nics,
        cloud_init,
        vsock,
        console: arguments.console,
        memory_backing: arguments.memory_backing,
        start: !arguments.no_start,
        host,
        lease,
        maintenance_policy: on_maintenance,
        post_copy,
        name,
    };
    let change = arguments.change;
    let path = change.path("/v1/vms".to_owned());
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, &body).await?);
    }
    let accepted: VmAccepted = session.client.post(&path, &body).await?;
    session
        .conclude(change, accepted.operation, || {
            format!("{} created.\n", accepted.vm.name)
        })
        .await
}

async fn set(session: &Session, arguments: SetArgs) -> Result<(), Failure> {
    let change = arguments.change;
    let path = change.path(path(&arguments.vm));
    let body = ChangeVm {
        name: arguments.name,
        keep_memory_mib: arguments.keep_memory_mib,
        lease: arguments.lease,
        maintenance_policy: arguments.on_maintenance,
        post_copy: arguments.post_copy,
        ..ChangeVm::default()
    };
    if change.dry_run {
        return session.print_dry_run(&session.client.patch::<DryRun>(&path, &body).await?);
    }
    let accepted: VmAccepted = session.client.patch(&path, &body).await?;
    if accepted.operation.is_some() {
        return session
            .conclude(change, accepted.operation, String::new)
            .await;
    }
    session.print(&accepted.vm, |vm| render::vm(vm, Timestamp::now()))
}

async fn act(
    session: &Session,
    vm: &str,
    verb: &str,
    body: &impl Serialize,
    change: ChangeOptions,
) -> Result<(), Failure> {
    let path = change.path(format!("{}/{verb}", path(vm)));
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, body).await?);
    }
    let accepted: VmAccepted = session.client.post(&path, body).await?;
    session
        .conclude(change, accepted.operation, || {
            format!("{vm}: nothing to do.\n")
        })
        .await
}

fn stop_body(arguments: &StopArgs) -> StopVm {
    if arguments.kill {
        StopVm {
            mode: StopMode::Kill,
            timeout_ms: None,
        }
    } else {
        StopVm {
            mode: StopMode::Graceful,
            timeout_ms: Some(arguments.timeout_s.saturating_mul(1000)),
        }
    }
}

async fn delete(session: &Session, arguments: DeleteArgs) -> Result<(), Failure> {
    let DeleteArgs {
        vm,
        keep_disks,
        change,
    } = arguments;
    let disks = match keep_disks {
        true => DeleteDisks::Keep,
        false => DeleteDisks::Delete,
    };
    let dry_run = if change.dry_run { "&dry_run=true" } else { "" };
    let disks = super::words::name(disks);
    let path = format!("{}?delete_disks={disks}{dry_run}", path(&vm));
    if change.dry_run {
        return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
    }
    // Nothing comes back when it was off: it is gone already.
    let accepted: Option<VmAccepted> = session.client.delete(&path).await?;
    session
        .conclude(
            change,
            accepted.and_then(|accepted| accepted.operation),
            || format!("{vm} deleted.\n"),
        )
        .await
}
