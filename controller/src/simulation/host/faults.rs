//! What can fail at a host short of all of it: its agent, its VMMs, one direction of a link.

use super::{Server, SimHost};
use crate::agents::Agents;
use crate::simulation::driver::LATENCY;
use godwit_wire::id::{Epoch, MigrationId, VmId};
use godwit_wire::migration::{MigrationPhase, MigrationRole};
use godwit_wire::problem::Problem;
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// How long an agent waits for the server's answer before it asks again.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// One direction of what passes between a host and others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::simulation) enum Way {
    /// From the agent to the server.
    ToServer,
    /// From the server to the agent.
    FromServer,
    /// From its VMMs to those of other hosts.
    ToHosts,
}

/// What has failed at a host.
#[derive(Debug)]
pub(super) struct Failures {
    cut: Mutex<BTreeSet<Way>>,
    /// Whether the agent's process exists.
    pub(super) agent_up: watch::Sender<bool>,
    /// Whether its VMMs are scheduled (SIGSTOP clears it).
    vmms_awake: watch::Sender<bool>,
}

impl Failures {
    pub(super) fn none() -> Self {
        Self {
            cut: Mutex::default(),
            agent_up: watch::Sender::new(true),
            vmms_awake: watch::Sender::new(true),
        }
    }
}

impl SimHost {
    pub(in crate::simulation) fn cut_way(&self, way: Way) {
        self.failures.ways().insert(way);
    }

    pub(in crate::simulation) fn mend_way(&self, way: Way) {
        self.failures.ways().remove(&way);
    }

    pub(in crate::simulation) fn is_cut(&self, way: Way) -> bool {
        self.failures.ways().contains(&way)
    }

    /// Whether what this host's VMMs send arrives at the other's.
    pub(super) fn sends_to(&self, other: &Self) -> bool {
        self.is_linked() && other.is_linked() && !self.is_cut(Way::ToHosts)
    }

    /// Its VMMs stand still, and so do their guests.
    pub(in crate::simulation) fn freeze_vmms(&self) {
        self.failures.vmms_awake.send_replace(false);
    }

    pub(in crate::simulation) fn thaw_vmms(&self) {
        self.failures.vmms_awake.send_replace(true);
    }

    pub(super) fn vmms_are_awake(&self) -> bool {
        *self.failures.vmms_awake.borrow()
    }

    /// Waits until its VMMs do what they are told.
    pub(super) async fn vmms_answering(&self) {
        let mut awake = self.failures.vmms_awake.subscribe();
        let _ = awake.wait_for(|awake| *awake).await;
    }

    /// The agent dies; VMMs go on.
    pub(in crate::simulation) fn kill_agent(&self) {
        self.failures.agent_up.send_replace(false);
    }

    /// Another agent is started, which finds what the former one wrote down.
    pub(in crate::simulation) fn revive_agent(&self) {
        {
            let mut state = self.state();
            state.incarnation = Uuid::new_v4();
            state.sequence = 0;
            state.obeyed = 0;
        }
        self.thaw();
        self.failures.agent_up.send_replace(true);
        self.poke.notify_one();
    }

    /// One question to the server; `None` when no answer comes.
    pub(super) async fn ask_server<T, F>(&self, ask: impl FnOnce(Agents) -> F) -> Option<T>
    where
        F: Future<Output = Result<T, Problem>>,
    {
        let exchange = async {
            tokio::time::sleep(LATENCY).await;
            self.passes(Way::ToServer).await;
            self.server.thawed().await;
            let (agents, life) = self.server.get()?;
            let answer = tokio::select! {
                answer = ask(agents) => answer.ok(),
                () = life.died() => None,
            }?;
            tokio::time::sleep(LATENCY).await;
            self.passes(Way::FromServer).await;
            Some(answer)
        };
        let answered = tokio::time::timeout(ANSWER_PATIENCE, exchange).await;
        answered.ok().flatten()
    }

    /// What is sent into a cut is lost: whoever waits for it waits in vain.
    async fn passes(&self, way: Way) {
        if self.is_cut(way) {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the server that commands come from is scheduled.
    pub(in crate::simulation) async fn server_thawed(&self) {
        self.server.thawed().await;
    }

    /// Whether the VMM of this migration is dead and the agent still has the VM.
    pub(super) fn is_dead(&self, vm: VmId, migration: MigrationId) -> bool {
        let state = self.state();
        state.vms.get(&vm).is_some_and(|known| {
            known.state.is_none()
                && known.migration.as_ref().map(|m| m.migration) == Some(migration)
        })
    }

    /// The store has given the host the VM, which is written down before its VMM is told, and also if that is dead.
    pub(super) fn own(&self, vm: VmId, migration: MigrationId, epoch: Epoch) {
        {
            let mut state = self.state();
            let known = state.vms.get_mut(&vm);
            let known = known
                .filter(|known| known.migration.as_ref().map(|m| m.migration) == Some(migration));
            if let Some(known) = known {
                known.epoch = epoch;
            }
            state.fence.insert(vm, epoch);
        }
        self.poke.notify_one();
    }
}

impl super::SimVm {
    /// Whether it is arriving and cannot be whole: nothing of it is missed when its VMM dies.
    pub(super) fn is_arriving(&self) -> bool {
        self.migration.as_ref().is_some_and(|migration| {
            migration.role == MigrationRole::Target
                && matches!(
                    migration.phase,
                    MigrationPhase::Connecting | MigrationPhase::PreCopy
                )
        })
    }
}

impl Failures {
    fn ways(&self) -> std::sync::MutexGuard<'_, BTreeSet<Way>> {
        self.cut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// It stands still: what is asked of it waits, and it asks nothing of hosts. Its own clocks go on, which makes no
    /// difference for as long as it has nothing to decide without hearing from a host.
    pub(in crate::simulation) fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    pub(in crate::simulation) fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    async fn thawed(&self) {
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
    }
}
