//! The heartbeat loop: keeps the lease, tells the server how things are, carries out its orders.
//!
//! ```text
//! waiting ──HEARTBEAT_MS, a change, HEARTBEAT_BUSY_MS in a migration──▶ sending
//!    ▲                                                                    │
//!    ├──orders to destroy carried out, lease renewed, orders to resume ◀──┤ answered
//!    └──backoff, at most LONGEST_PAUSE; the lease runs on ◀───────────────┘ not answered
//! ```
//!
//! The lease is renewed only after everything that must not run here is gone.
//!
//! The loop has a thread and a runtime of its own: whatever the agent's other tasks wait for (disks, `/proc`), the
//! lease of this host's VMs is not lost over it.

use crate::api::Agent;
use crate::backoff::{Backoff, random};
use crate::clock::boottime_ns;
use crate::control::ControlPlane;
use crate::lease::LeasePage;
use crate::vm::Command;
use godwit_channel::CallError;
use godwit_wire::host_api::{
    COUNTERS_EVERY, HEARTBEAT_BUSY_MS, HEARTBEAT_MS, Heartbeat, HeartbeatReply, Order, VmReport,
};
use godwit_wire::id::{Epoch, HostId, VmId};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Shortest time between two heartbeats: changes that come together go together.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// First and longest pause after a heartbeat without an answer.
const FIRST_FAILURE_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long orders to destroy may take; without them the lease is not renewed.
const ORDERS_TIMEOUT: Duration = Duration::from_secs(5);

/// The loop's own state.
pub(crate) struct Heartbeats {
    pub(crate) host: HostId,
    pub(crate) agent: Arc<Agent>,
    /// Its own, because connections belong to the runtime on which they were made.
    pub(crate) control: ControlPlane,
    pub(crate) lease: LeasePage,
    /// See [`Heartbeat::obeyed`].
    obeyed: u64,
    /// Orders of this and earlier replies that are not carried out yet: the highest epoch that must go. A reply is
    /// obeyed only when those before it are.
    to_destroy: BTreeMap<VmId, Epoch>,
}

/// Whether the server is heard, for one line in the log per change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contact {
    NeverHad,
    Held,
    Lost { since: Instant },
}

impl Heartbeats {
    pub(crate) fn new(
        host: HostId,
        agent: Arc<Agent>,
        control: ControlPlane,
        lease: LeasePage,
    ) -> Self {
        Self {
            host,
            agent,
            control,
            lease,
            obeyed: 0,
            to_destroy: BTreeMap::new(),
        }
    }

    /// Starts the thread on which the loop runs until `stopping` is cancelled.
    pub(crate) fn spawn(self, stopping: CancellationToken) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("heartbeats".to_owned())
            .spawn(move || {
                runtime.block_on(stopping.run_until_cancelled(self.run()));
            })
    }

    async fn run(mut self) {
        let incarnation = Uuid::new_v4();
        let mut contact = Contact::NeverHad;
        let mut pauses = Backoff::new(FIRST_FAILURE_PAUSE, LONGEST_PAUSE);
        for sequence in 0.. {
            let mut report = self.agent.report();
            if sequence % COUNTERS_EVERY != 0 {
                // Figures that are only looked at now and then need not travel every second.
                for vm in &mut report.vms {
                    vm.devices = None;
                }
            }
            let heartbeat = Heartbeat {
                obeyed: self.obeyed,
                host: self.host,
                incarnation,
                sequence,
                report,
            };
            let sent_ns = boottime_ns();
            match self.control.heartbeat(&heartbeat).await {
                Ok(reply) => {
                    contact = answered(contact);
                    pauses.reset();
                    self.obey(sent_ns, reply, &heartbeat.report.vms).await;
                    self.wait().await;
                }
                Err(error) => {
                    contact = not_answered(contact, &error);
                    tokio::time::sleep(pauses.next(random())).await;
                }
            }
        }
    }

    async fn obey(&mut self, sent_ns: u64, reply: HeartbeatReply, told: &[VmReport]) {
        let context = self.agent.registry.context();
        context.board.heard(told);
        context.networks.set_peers(reply.peers);
        for order in &reply.orders {
            if let Order::Destroy { vm, epoch } = *order {
                let outstanding = self.to_destroy.entry(vm).or_insert(epoch);
                *outstanding = epoch.max(*outstanding);
            }
        }
        if !self.destroy().await {
            return;
        }
        self.to_destroy.clear();
        self.lease
            .renew(sent_ns, Duration::from_millis(reply.lease_ms));
        for order in reply.orders {
            if let Order::Resume { vm, epoch } = order
                && let Err(problem) = self
                    .agent
                    .registry
                    .tell(vm, Command::ResumeAfterLease(epoch))
            {
                // The VM goes on being reported as paused, and the order is given again.
                tracing::warn!(%vm, %problem, "an order to resume could not be passed on");
            }
        }
        if reply.number != 0 {
            // Not the highest: a new server process counts anew.
            self.obeyed = reply.number;
        }
    }

    /// Whether everything that must not run here is gone.
    async fn destroy(&self) -> bool {
        let mut destructions = JoinSet::new();
        for (&vm, &epoch) in &self.to_destroy {
            let registry = self.agent.registry.clone();
            destructions.spawn(async move {
                match registry
                    .ask(vm, |reply| Command::Destroy(epoch, reply))
                    .await
                {
                    // What is here is later than what must go.
                    Err(problem) if problem.kind == "stale-epoch" => Ok(()),
                    other => other.map_err(|problem| (vm, problem)),
                }
            });
        }
        let outcome = tokio::time::timeout(ORDERS_TIMEOUT, destructions.join_all()).await;
        let failed = match outcome {
            Ok(results) => results.into_iter().find_map(Result::err),
            Err(_) => {
                tracing::error!("orders to destroy take too long; the lease is not renewed");
                return false;
            }
        };
        if let Some((vm, problem)) = failed {
            tracing::error!(%vm, %problem, "a VM that must not run here could not be destroyed; the lease is not renewed");
            return false;
        }
        true
    }

    async fn wait(&self) {
        let board = &self.agent.registry.context().board;
        let pause = Duration::from_millis(if board.is_busy() {
            HEARTBEAT_BUSY_MS
        } else {
            HEARTBEAT_MS
        });
        tokio::time::sleep(SHORTEST_PAUSE).await;
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(SHORTEST_PAUSE)) => {}
            () = board.changed() => {}
        }
    }
}

fn answered(contact: Contact) -> Contact {
    match contact {
        Contact::Held => {}
        Contact::NeverHad => tracing::info!("the server is heard"),
        Contact::Lost { since } => {
            tracing::info!(silent_for = ?since.elapsed(), "the server is heard again")
        }
    }
    Contact::Held
}

fn not_answered(contact: Contact, error: &CallError) -> Contact {
    let source = std::error::Error::source(error).map(ToString::to_string);
    match contact {
        Contact::Lost { .. } => contact,
        Contact::Held | Contact::NeverHad => {
            tracing::warn!(
                %error, source,
                "heartbeats are not answered; VMs go on until the lease ends, and the server is asked on"
            );
            Contact::Lost {
                since: Instant::now(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{self, HostSampler};
    use crate::vm::tests::fake::Host;
    use godwit_wire::lease::LeaseState;
    use godwit_wire::machine::{CpuBaseline, CpuFacts};
    use godwit_wire::vmm_api::{PauseReason, VmmState};

    fn heartbeats(host: &Host) -> Heartbeats {
        let cpu = CpuFacts {
            level: CpuBaseline::V2,
            signature: "s".into(),
            model: "m".into(),
        };
        let address = ([127, 0, 0, 1], 1).into();
        let facts = facts::facts("host".into(), address, cpu, None, Uuid::nil());
        let registry = host.registry.clone();
        let lease = LeasePage::open(&host.root.path().join("lease"), Uuid::nil()).unwrap();
        let agent = Arc::new(Agent {
            facts,
            sampler: HostSampler::new(),
            registry,
        });
        Heartbeats::new(host.server.host, agent, host.server.control.clone(), lease)
    }

    fn reply(orders: Vec<Order>) -> HeartbeatReply {
        HeartbeatReply {
            peers: Vec::new(),
            number: 7,
            lease_ms: 6_000,
            orders,
        }
    }

    #[tokio::test]
    async fn what_must_not_run_here_is_gone_before_the_lease_is_renewed() {
        let mut host = Host::new().await;
        let (elsewhere, later) = (VmId::fresh(), VmId::fresh());
        host.start(elsewhere, 1, 1).await.unwrap();
        host.start(later, 5, 1).await.unwrap();
        let process = host.fakes.process(elsewhere);
        let mut heartbeats = heartbeats(&host);
        let destroy = |vm| Order::Destroy {
            vm,
            epoch: Epoch(4),
        };
        let obeying = heartbeats.obey(1, reply(vec![destroy(elsewhere), destroy(later)]), &[]);
        obeying.await;
        process.exited().await;
        assert!(host.report(elsewhere).is_none());
        assert_eq!(host.report(later).unwrap().state, Some(VmmState::Running));
        assert!(matches!(heartbeats.lease.state(1), LeaseState::Held { .. }));
        assert_eq!(heartbeats.obeyed, 7);
        // The order also keeps late starts away.
        assert_eq!(
            host.start(elsewhere, 4, 9).await.unwrap_err().kind,
            "stale-epoch"
        );
    }

    #[tokio::test]
    async fn a_lease_is_not_renewed_while_something_cannot_be_destroyed() {
        let mut host = Host::new().await;
        let vm = VmId::fresh();
        host.start(vm, 1, 1).await.unwrap();
        let mut heartbeats = heartbeats(&host);
        // Nobody is left to carry the order out.
        host.registry.abort_drivers().await;
        let order = Order::Destroy {
            vm,
            epoch: Epoch(4),
        };
        heartbeats.obey(1, reply(vec![order]), &[]).await;
        assert_eq!(heartbeats.lease.state(1), LeaseState::Expired);
        assert_eq!(heartbeats.obeyed, 0);
        // A later reply without that order does not make up for it.
        heartbeats.obey(2, reply(Vec::new()), &[]).await;
        assert_eq!(heartbeats.lease.state(2), LeaseState::Expired);
        assert_eq!(heartbeats.obeyed, 0);
    }

    #[tokio::test]
    async fn a_vm_that_stopped_itself_is_resumed_after_the_lease_was_renewed() {
        let mut host = Host::new().await;
        let vm = VmId::fresh();
        host.start(vm, 2, 1).await.unwrap();
        let expired = VmmState::Paused {
            reason: PauseReason::LeaseExpired,
        };
        host.fakes.set_state(vm, expired.clone());
        host.until(vm, |report| report.state == Some(expired.clone()))
            .await;
        let mut heartbeats = heartbeats(&host);
        heartbeats
            .obey(
                1,
                reply(vec![Order::Resume {
                    vm,
                    epoch: Epoch(2),
                }]),
                &[],
            )
            .await;
        assert!(matches!(heartbeats.lease.state(1), LeaseState::Held { .. }));
        host.until(vm, |report| report.state == Some(VmmState::Running))
            .await;
    }

    #[tokio::test]
    async fn an_order_to_destroy_an_unknown_vm_keeps_late_starts_away_even_from_the_next_agent() {
        let mut host = Host::new().await;
        let vm = VmId::fresh();
        let order = Order::Destroy {
            vm,
            epoch: Epoch(1),
        };
        let mut heartbeats = heartbeats(&host);
        heartbeats.obey(1, reply(vec![order]), &[]).await;
        assert_eq!(heartbeats.obeyed, 7);
        assert_eq!(host.start(vm, 1, 1).await.unwrap_err().kind, "stale-epoch");
        let mut next = host.restart().await;
        assert_eq!(next.start(vm, 1, 1).await.unwrap_err().kind, "stale-epoch");
        assert_eq!(next.fakes.spawned(), 0);
        next.start(vm, 2, 1).await.unwrap();
    }

    #[tokio::test]
    async fn an_order_whose_fence_cannot_be_written_down_is_not_acknowledged() {
        let mut host = Host::new().await;
        let vm = VmId::fresh();
        host.start(vm, 1, 1).await.unwrap();
        let process = host.fakes.process(vm);
        let fences = host.registry.context().state.fences();
        std::fs::remove_dir_all(&fences).unwrap();
        let order = Order::Destroy {
            vm,
            epoch: Epoch(1),
        };
        let mut heartbeats = heartbeats(&host);
        heartbeats.obey(1, reply(vec![order]), &[]).await;
        process.exited().await;
        assert_eq!(heartbeats.lease.state(1), LeaseState::Expired);
        assert_eq!(heartbeats.obeyed, 0);
        assert_eq!(host.start(vm, 1, 2).await.unwrap_err().kind, "stale-epoch");
        std::fs::create_dir(&fences).unwrap();
        heartbeats.obey(2, reply(Vec::new()), &[]).await;
        assert!(matches!(heartbeats.lease.state(2), LeaseState::Held { .. }));
        assert_eq!(heartbeats.obeyed, 7);
    }

    #[tokio::test]
    async fn a_start_that_waits_before_an_order_to_destroy_it_is_refused_before_the_lease_is_renewed()
     {
        let host = Host::new().await;
        host.fakes.hang_next_machine();
        let vm = VmId::fresh();
        let start = |generation| {
            let registry = host.registry.clone();
            tokio::spawn(async move {
                let ask = crate::vm::tests::fake::start(1, generation);
                registry.ask(vm, |reply| Command::Start(ask, reply)).await
            })
        };
        let building = start(1);
        host.fakes.until_asked_for_a_machine().await;
        let waiting = start(2);
        // On this runtime of one thread the second start is in the queue after this.
        tokio::task::yield_now().await;
        let order = Order::Destroy {
            vm,
            epoch: Epoch(1),
        };
        let mut heartbeats = heartbeats(&host);
        heartbeats.obey(1, reply(vec![order]), &[]).await;
        assert_eq!(heartbeats.obeyed, 7);
        assert_eq!(building.await.unwrap().unwrap_err().kind, "destroyed");
        assert_eq!(waiting.await.unwrap().unwrap_err().kind, "destroyed");
        assert_eq!(host.fakes.spawned(), 1);
        assert!(host.report(vm).is_none());
    }
}
