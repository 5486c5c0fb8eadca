//! What the agent writes down about a VM before it acts, and where.
//!
//! ```text
//! DIR/identity.pem          key, certificate, CA
//! DIR/agent.lock            held while an agent runs
//! DIR/lease                 the lease page
//! DIR/fences/<vm>.json      Fence, kept after the VM is gone
//! DIR/vms/<vm>/vm.json      VmRecord
//! DIR/vms/<vm>/vmm.sock     the VMM's API;  serial.sock: its serial console;  vmm.log: its log
//! DIR/vms/<vm>/vmm-2.sock   the same, and tty-2.sock, of a VMM in the second seat;  take.sock: between two VMMs
//! DIR/vms/<vm>/seed.img     its cloud-init seed disk;  vsock.sock: the guest's sockets
//! DIR/pool/                 the storage pool, if the command line names no other
//! ```

use crate::admission::Fence;
use godwit_channel::file::{self, Access, FileError};
use godwit_wire::host_api::LeasePolicy;
use godwit_wire::id::{Epoch, Generation, MigrationId, SuccessionId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::network::Network;
use godwit_wire::vmm_api::StopReason;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use uuid::Uuid;

/// Layout of [`VmRecord`].
const RECORD_VERSION: u32 = 1;
/// Longest state file read.
const MAX_STATE_FILE_BYTES: u64 = 256 * 1024;
/// How long a fence without its VM is kept; no command can be under way for that long.
const FENCE_KEPT: Duration = Duration::from_secs(90 * 24 * 3600);
/// Longest name in a VM's directory, for the limit on socket paths.
const LONGEST_SOCKET_NAME: &str = "serial.sock";

/// Why this host has the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Purpose {
    /// It is this host's.
    Owned,
    /// It is being received; the record's epoch is the source's.
    Receiving {
        /// By which migration.
        migration: MigrationId,
    },
    /// The store has granted the commit under the record's epoch; the VMM may not know yet.
    Granted {
        /// Of which migration.
        migration: MigrationId,
    },
}

/// A process, told apart from a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Process id.
    pub(crate) pid: i32,
    /// When it started, in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub(crate) start_ticks: u64,
}

/// Which socket names a VMM has. There are two of each, because a VMM that takes a machine over from another one is there
/// beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Seat {
    /// Where every machine is started.
    #[default]
    First,
    /// Where a successor of the first sits; its own successor has the first again.
    Second,
}

impl Seat {
    pub(crate) const ALL: [Self; 2] = [Self::First, Self::Second];

    /// The seat of a successor.
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// How the VM's machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum End {
    /// As asked, or by the guest itself.
    Stopped {
        /// How.
        reason: StopReason,
    },
    /// Its process is gone, and nobody had told it to go.
    Lost,
}

/// Everything about one VM that must survive the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) version: u32,
    pub(crate) vm: VmId,
    pub(crate) name: String,
    /// Epoch it has here.
    pub(crate) epoch: Epoch,
    /// Latest generation carried out, whatever the epoch.
    pub(crate) generation: Generation,
    pub(crate) fence: Fence,
    pub(crate) spec: MachineSpec,
    /// The networks its cards are plugged into.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) networks: Vec<Network>,
    pub(crate) lease: LeasePolicy,
    pub(crate) purpose: Purpose,
    /// Boot of the host on which the process was started.
    pub(crate) boot_id: Uuid,
    /// Its VMM, once started. While a succession is under way this decides: a process that is not named here must
    /// never run the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<ProcessId>,
    /// The seat of that VMM.
    #[serde(default)]
    pub(crate) seat: Seat,
    /// Written before a second VMM is started for this machine, and removed when there is only one again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) succession: Option<SuccessionId>,
    /// Whether the machine was told to start; a start that an agent did not survive is not believed.
    #[serde(default)]
    pub(crate) started: Started,
    /// Set when the machine is no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) end: Option<End>,
}

/// How far a start has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Started {
    /// Under way.
    #[default]
    NotYet,
    /// The VMM has confirmed it.
    Yes,
}

/// What a new record needs.
#[derive(Clone, Debug)]
pub(crate) struct NewRecord {
    pub(crate) vm: VmId,
    pub(crate) name: String,
    pub(crate) epoch: Epoch,
    pub(crate) generation: Generation,
    pub(crate) fence: Fence,
    pub(crate) spec: MachineSpec,
    pub(crate) networks: Vec<Network>,
    pub(crate) lease: LeasePolicy,
    pub(crate) purpose: Purpose,
    pub(crate) boot_id: Uuid,
}

impl VmRecord {
    pub(crate) fn new(new: NewRecord) -> Self {
        let NewRecord {
            vm,
            name,
            epoch,
            generation,
            fence,
            spec,
            networks,
            lease,
            purpose,
            boot_id,
        } = new;
        Self {
            version: RECORD_VERSION,
            vm,
            name,
            epoch,
            generation,
            fence,
            spec,
            networks,
            lease,
            purpose,
            boot_id,
            process: None,
            seat: Seat::First,
            succession: None,
            started: Started::NotYet,
            end: None,
        }
    }
}

/// The agent's state directory.
#[derive(Clone, Debug)]
pub(crate) struct StateDirectory {
    root: PathBuf,
}

impl StateDirectory {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("agent.lock")
    }

    pub(crate) fn lease(&self) -> PathBuf {
        self.root.join("lease")
    }

    /// Where the default storage pool is.
    pub(crate) fn pool(&self) -> PathBuf {
        self.root.join("pool")
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    pub(crate) fn fences(&self) -> PathBuf {
        self.root.join("fences")
    }

    /// Where the short-lived VMM that tells about the CPU listens.
    pub(crate) fn probe(&self) -> VmDirectory {
        VmDirectory {
            path: self.root.join("probe"),
        }
    }

    pub(crate) fn vm(&self, vm: VmId) -> VmDirectory {
        VmDirectory {
            path: self.vms().join(vm.to_string()),
        }
    }

    /// Length of the longest socket path in here.
    pub(crate) fn longest_socket_path_bytes(&self) -> usize {
        self.vm(VmId(Uuid::nil()))
            .path
            .join(LONGEST_SOCKET_NAME)
            .as_os_str()
            .len()
    }

    /// Makes the directories, readable by the owner only.
    pub(crate) fn create(&self) -> Result<(), FileError> {
        for path in [self.root.clone(), self.vms(), self.fences()] {
            create_private(&path)?;
        }
        Ok(())
    }

    /// VMs that have a directory. Names that are no VM are left alone.
    pub(crate) fn known_vms(&self) -> Result<Vec<VmId>, FileError> {
        let path = self.vms();
        let failed = |source| FileError::new("read", &path, source);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            if let Some(vm) = entry
                .map_err(failed)?
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                found.push(vm);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    pub(crate) fn read_fence(&self, vm: VmId) -> Result<Option<Fence>, FileError> {
        read(&self.fence_path(vm))
    }

    pub(crate) fn write_fence(&self, vm: VmId, fence: &Fence) -> Result<(), FileError> {
        write(&self.fence_path(vm), fence)
    }

    /// Forgets fences so old that no command from their time can still arrive.
    pub(crate) fn prune_fences(&self, now: SystemTime) -> Result<(), FileError> {
        let path = self.fences();
        let failed = |source| FileError::new("read", &path, source);
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let age = entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .map(|time| now.duration_since(time));
            if matches!(age, Ok(Ok(age)) if age > FENCE_KEPT) {
                std::fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn fence_path(&self, vm: VmId) -> PathBuf {
        self.fences().join(format!("{vm}.json"))
    }
}

/// One VM's directory.
#[derive(Clone, Debug)]
pub(crate) struct VmDirectory {
    path: PathBuf,
}

impl VmDirectory {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn api_socket(&self, seat: Seat) -> PathBuf {
        self.path.join(match seat {
            Seat::First => "vmm.sock",
            Seat::Second => "vmm-2.sock",
        })
    }

    pub(crate) fn serial_socket(&self, seat: Seat) -> PathBuf {
        self.path.join(match seat {
            Seat::First => "serial.sock",
            Seat::Second => "tty-2.sock",
        })
    }

    /// Where a VMM waits for its successor.
    pub(crate) fn succession_socket(&self) -> PathBuf {
        self.path.join("take.sock")
    }

    /// The cloud-init seed disk.
    pub(crate) fn seed(&self) -> PathBuf {
        self.path.join("seed.img")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    pub(crate) fn create(&self) -> Result<(), FileError> {
        create_private(&self.path)
    }

    pub(crate) fn read_record(&self) -> Result<Option<VmRecord>, FileError> {
        let Some(record) = read::<VmRecord>(&self.record())? else {
            return Ok(None);
        };
        if record.version != RECORD_VERSION {
            let detail = format!("version {} is not {RECORD_VERSION}", record.version);
            return Err(FileError::new(
                "read",
                &self.record(),
                io::Error::new(io::ErrorKind::InvalidData, detail),
            ));
        }
        Ok(Some(record))
    }

    pub(crate) fn write_record(&self, record: &VmRecord) -> Result<(), FileError> {
        write(&self.record(), record)
    }

    /// Writes the record for a successor of this agent, without waiting for the disk: for the moment in which a guest
    /// stands still. What a crash of the host could lose then, the crash has made meaningless.
    pub(crate) fn write_record_swiftly(&self, record: &VmRecord) -> Result<(), FileError> {
        let path = self.record();
        file::replace_atomically(&path, &to_text(&path, record)?, Access::Private)
    }

    pub(crate) fn remove(&self) -> Result<(), FileError> {
        ignore_missing(std::fs::remove_dir_all(&self.path))
            .map_err(|e| FileError::new("remove", &self.path, e))
    }

    /// Removes what a killed VMM cannot remove itself.
    pub(crate) fn remove_sockets(&self) -> Result<(), FileError> {
        Seat::ALL
            .into_iter()
            .try_for_each(|seat| self.clear_seat(seat))?;
        remove_file(&self.path.join("vsock.sock"))
    }

    /// Removes the sockets of one seat, and the one between two.
    pub(crate) fn clear_seat(&self, seat: Seat) -> Result<(), FileError> {
        [
            self.api_socket(seat),
            self.serial_socket(seat),
            self.succession_socket(),
        ]
        .iter()
        .try_for_each(|path| remove_file(path))
    }

    fn record(&self) -> PathBuf {
        self.path.join("vm.json")
    }
}

fn remove_file(path: &Path) -> Result<(), FileError> {
    ignore_missing(std::fs::remove_file(path)).map_err(|e| FileError::new("remove", path, e))
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn create_private(path: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt;
    let created = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    created.map_err(|source| FileError::new("create", path, source))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let text = match file::read_text(path, MAX_STATE_FILE_BYTES) {
        Ok(text) => text,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error),
    };
    let value =
        serde_json::from_str(&text).map_err(|error| FileError::new("read", path, error.into()))?;
    Ok(Some(value))
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), FileError> {
    file::write_atomically(path, &to_text(path, value)?, Access::Private)
}

fn to_text(path: &Path, value: &impl Serialize) -> Result<Vec<u8>, FileError> {
    serde_json::to_vec_pretty(value).map_err(|error| FileError::new("write", path, error.into()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use godwit_wire::machine::{Boot, CpuBaseline, MachineType};
    use godwit_wire::unit::Mib;

    pub(crate) fn spec() -> MachineSpec {
        MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: 1,
            memory_mib: Mib(64),
            boot: Boot::Pilot,
            cpu: CpuBaseline::V2,
            devices: Default::default(),
        }
    }

    pub(crate) fn record(purpose: Purpose, epoch: u64) -> VmRecord {
        VmRecord::new(NewRecord {
            vm: VmId::fresh(),
            name: "guest".into(),
            epoch: Epoch(epoch),
            generation: Generation(1),
            fence: Fence {
                epoch: Epoch(epoch),
                generation: Some(Generation(1)),
                ..Fence::default()
            },
            spec: spec(),
            networks: Vec::new(),
            lease: LeasePolicy::Watched,
            purpose,
            boot_id: Uuid::nil(),
        })
    }

    #[test]
    fn a_record_and_a_fence_read_back_as_written() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDirectory::new(root.path().join("state"));
        state.create().unwrap();
        let mut record = record(
            Purpose::Granted {
                migration: MigrationId::fresh(),
            },
            3,
        );
        record.process = Some(ProcessId {
            pid: 7,
            start_ticks: 9,
        });
        record.end = Some(End::Stopped {
            reason: StopReason::GuestHalted,
        });
        let directory = state.vm(record.vm);
        assert_eq!(directory.read_record().unwrap(), None);
        directory.create().unwrap();
        directory.write_record(&record).unwrap();
        assert_eq!(directory.read_record().unwrap(), Some(record.clone()));
        assert_eq!(state.known_vms().unwrap(), [record.vm]);
        directory.remove().unwrap();
        assert_eq!(state.known_vms().unwrap(), []);

        assert_eq!(state.read_fence(record.vm).unwrap(), None);
        state.write_fence(record.vm, &record.fence).unwrap();
        assert_eq!(state.read_fence(record.vm).unwrap(), Some(record.fence));
        state.prune_fences(SystemTime::now()).unwrap();
        assert!(state.read_fence(record.vm).unwrap().is_some());
        state
            .prune_fences(SystemTime::now() + 2 * FENCE_KEPT)
            .unwrap();
        assert_eq!(state.read_fence(record.vm).unwrap(), None);
    }

    #[test]
    fn a_record_of_another_version_is_not_guessed_at() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDirectory::new(root.path().to_owned());
        let mut record = record(Purpose::Owned, 1);
        record.version = 2;
        let directory = state.vm(record.vm);
        directory.create().unwrap();
        directory.write_record(&record).unwrap();
        assert!(directory.read_record().is_err());
    }
}
