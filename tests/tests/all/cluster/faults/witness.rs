//! Watches every copy of a VM and remembers which of them ran, in what order.

use godwit_tests::cluster::{Cluster, VMM_SOCKETS};
use godwit_tests::http::Client;
use godwit_wire::id::Epoch;
use godwit_wire::vmm_api::{VmmInfo, VmmState};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// A VMM that does not answer within this time is frozen, and asked again in the next round.
const ANSWER_PATIENCE: Duration = Duration::from_millis(150);
/// Time between two rounds.
const PAUSE: Duration = Duration::from_millis(4);

/// One copy: a process that runs the VM under an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Copy {
    socket: PathBuf,
    pid: u32,
    epoch: Epoch,
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Seen {
    /// Copies that ran, in the order in which each was first seen.
    ran: Vec<Copy>,
    /// A copy that ran after another one had taken over.
    twice: Option<String>,
}

impl Seen {
    /// A copy says that it runs. All copies are asked one after the other, so one that is seen after another one, and
    /// had run before, has run beside it: a VM never returns to a process under the same epoch.
    fn runs(&mut self, copy: Copy) {
        if self.ran.last() == Some(&copy) {
            return;
        }
        if self.ran.contains(&copy) {
            let beside = self.ran.last().cloned();
            self.twice
                .get_or_insert_with(|| format!("{copy:?} ran beside {beside:?}"));
            return;
        }
        self.ran.push(copy);
    }
}

/// Watches from its start until it is asked.
#[derive(Debug)]
pub(super) struct Witness {
    seen: Arc<Mutex<Seen>>,
    _watching: AbortOnDropHandle<()>,
}

impl Witness {
    /// Starts to watch the VMMs of VM `id` on all hosts.
    pub(super) fn start(cluster: &Cluster, id: &str) -> Self {
        let directories = cluster
            .hosts
            .iter()
            .map(|host| cluster.vm_dir(&host.name, id));
        let sockets: Vec<PathBuf> = directories
            .flat_map(|directory| VMM_SOCKETS.map(|name| directory.join(name)))
            .collect();
        let seen = Arc::<Mutex<Seen>>::default();
        let watching = AbortOnDropHandle::new(tokio::spawn(watch(sockets, seen.clone())));
        Self {
            seen,
            _watching: watching,
        }
    }

    /// What it has to say about two copies that ran at the same time.
    pub(super) fn twice(&self) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.twice.clone()
    }
}

async fn watch(sockets: Vec<PathBuf>, seen: Arc<Mutex<Seen>>) {
    loop {
        for socket in &sockets {
            let client = Client::unix(socket);
            let asked = tokio::time::timeout(ANSWER_PATIENCE, client.get::<VmmInfo>("/v1/info"));
            if let Ok(Ok(info)) = asked.await
                && info.state == VmmState::Running
            {
                let copy = Copy {
                    socket: socket.clone(),
                    pid: info.pid,
                    epoch: info.epoch,
                };
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .runs(copy);
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(pid: u32, epoch: u64) -> Copy {
        Copy {
            socket: "vmm.sock".into(),
            pid,
            epoch: Epoch(epoch),
        }
    }

    #[test]
    fn copies_that_follow_each_other_are_in_order() {
        let mut seen = Seen::default();
        for (pid, epoch) in [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (1, 4)] {
            seen.runs(copy(pid, epoch));
        }
        assert_eq!(seen.twice, None);
    }

    #[test]
    fn a_copy_that_runs_after_the_next_one_has_run_is_noticed() {
        let mut seen = Seen::default();
        for (pid, epoch) in [(1, 1), (2, 2), (1, 1)] {
            seen.runs(copy(pid, epoch));
        }
        assert!(seen.twice.is_some());
    }
}
