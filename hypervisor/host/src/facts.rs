//! What this host is and how much of it is in use.

use crate::error::HostError;
use crate::process::{self, VmmProcess};
use crate::procfs::{self, CpuTimes};
use crate::record::{Seat, StateDirectory};
use crate::sys::AfterAgent;
use godwit_channel::CallError;
use godwit_channel::uds::UdsClient;
use godwit_wire::host_api::HostFacts;
use godwit_wire::machine::CpuFacts;
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::usage::HostUsage;
use godwit_wire::vmm_api::VmmInfo;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// The host keeps at least this for itself.
const LEAST_HOST_MEMORY: Mib = Mib(512);
/// How long the probing VMM may take to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two attempts to reach it.
const PROBE_PAUSE: Duration = Duration::from_millis(5);
/// Time between two samples of the host's use.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// Whether VMs can run here at all.
pub(crate) fn check_kvm() -> Result<(), HostError> {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(HostError::NoKvm),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(HostError::KvmForbidden(error))
        }
        Err(error) => Err(HostError::KvmUnusable(error)),
    }
}

/// Asks an empty VMM about the CPU: the program that will run the guests knows what it can give them.
pub(crate) async fn probe_cpu(
    program: &Path,
    state: &StateDirectory,
) -> Result<CpuFacts, HostError> {
    let directory = state.probe();
    directory.remove()?;
    directory.create()?;
    let unusable = |detail: String| HostError::VmmUnusable {
        program: program.to_owned(),
        detail,
    };
    let process = VmmProcess::spawn(program, &directory, Seat::First, AfterAgent::Dies)
        .map_err(|e| unusable(e.to_string()))?;
    let vmm = UdsClient::new(directory.api_socket(Seat::First));
    let answer = async {
        loop {
            match vmm.get::<VmmInfo>("/v1/info").await {
                Err(CallError::Unreachable { .. }) => tokio::time::sleep(PROBE_PAUSE).await,
                other => return other,
            }
        }
    };
    let asked = tokio::select! {
        asked = tokio::time::timeout(PROBE_TIMEOUT, answer) => match asked {
            Ok(Ok(info)) => Ok(info.cpu),
            Ok(Err(error)) => Err(unusable(error.to_string())),
            Err(_) => Err(unusable(format!("it did not answer within {PROBE_TIMEOUT:?}"))),
        },
        exit = process.exited() => {
            let words = process::last_words(&directory);
            Err(unusable(format!("it ended ({exit}) and said: {words}")))
        }
    };
    process.kill().await.map_err(|source| HostError::System {
        what: "to end a probing VMM",
        source,
    })?;
    directory.remove()?;
    asked
}

/// Everything about the host that does not change while the agent runs.
pub(crate) fn facts(
    name: String,
    address: SocketAddr,
    cpu: CpuFacts,
    guest_memory: Option<Mib>,
    boot_id: Uuid,
) -> HostFacts {
    let memory = procfs::memory_total();
    let cores = std::thread::available_parallelism()
        .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
    HostFacts {
        name,
        address,
        cpu,
        cores,
        memory_mib: memory,
        guest_memory_mib: guest_memory.unwrap_or_else(|| guest_share(memory)),
        kernel: procfs::kernel_release(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id,
    }
}

fn guest_share(memory: Mib) -> Mib {
    let kept = LEAST_HOST_MEMORY.max(Mib(memory.0 / 10));
    Mib(memory.0.saturating_sub(kept.0))
}

/// The system's host name.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "host".to_owned()
    } else {
        name.to_owned()
    }
}

/// Samples the host's use, at most every [`SAMPLE_EVERY`].
#[derive(Debug)]
pub(crate) struct HostSampler {
    latest: Mutex<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    cpu: CpuTimes,
    usage: HostUsage,
}

impl HostSampler {
    pub(crate) fn new() -> Self {
        let cpu = procfs::cpu_times();
        Self {
            latest: Mutex::new(Sample {
                at: Instant::now(),
                cpu,
                usage: measured(0.0),
            }),
        }
    }

    pub(crate) fn usage(&self) -> HostUsage {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.at.elapsed() >= SAMPLE_EVERY {
            let cpu = procfs::cpu_times();
            *latest = Sample {
                at: Instant::now(),
                cpu,
                usage: measured(cpu.busy_percent_since(latest.cpu)),
            };
        }
        latest.usage
    }
}

fn measured(cpu_percent: f64) -> HostUsage {
    let memory = procfs::memory();
    let memory_used_bytes = Bytes(memory.total.0.saturating_sub(memory.available.0));
    HostUsage {
        cpu_percent,
        memory_used_bytes,
        kept_memory_bytes: Bytes(0),
        pressure: procfs::pressure(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_a_tenth_of_its_memory_but_at_least_the_least() {
        assert_eq!(guest_share(Mib(100 * 1024)), Mib(90 * 1024));
        assert_eq!(guest_share(Mib(2048)), Mib(1536));
        assert_eq!(guest_share(Mib(100)), Mib(0));
    }

    #[test]
    fn the_host_uses_some_memory() {
        assert!(HostSampler::new().usage().memory_used_bytes > Bytes(0));
    }
}
