//! Networks of this host: bridges, taps, VLANs, VXLANs, packet filters and addresses for the guests here.
//!
//! ```text
//! attach, adopt, detach, set_peers ──▶ what is wanted ──plan──▶ steps ──▶ the kernel
//!                                           ▲                               │
//!                                           └── seen anew each time ◀───────┘
//! ```
//!
//! Nothing is remembered about the kernel: every change starts from what is there, so a restarted agent, a half-made
//! change and an operator's hand come out the same. A lock keeps the agents of one machine from planning at once.

mod dhcp;
mod names;
mod plan;
mod rules;
mod system;

#[cfg(test)]
mod tests;

use dhcp::responder::Responder;
use dhcp::{Lease, Leases};
use godwit_wire::devices::{Nic, NicAttach, NicAttachment};
use godwit_wire::id::{HostId, VmId};
use godwit_wire::network::{Network, Peers, Transport};
use godwit_wire::problem::{FieldProblem, Problem};
use plan::{Observed, Plan, Plug, Wanted, Wish, plan};
use rustix::fs::FlockOperation;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use system::{System, SystemError};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often everything is looked at although nothing has changed: others may have changed it (a restarted nftables
/// service forgets all rules).
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Pause after a change that failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Held by the agent that plans and carries out; one machine may have several.
const LOCK_FILE: &str = "/run/godwit-network.lock";
/// How long another agent may hold it, and the pause between two attempts.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Frame payload of a tap that the operator made.
const DEFAULT_MTU: u16 = 1500;

/// The networks of this host.
#[derive(Debug)]
pub(crate) struct Networks {
    system: System,
    wanted: Mutex<Wanted>,
    /// Held while planning and carrying out.
    applied: tokio::sync::Mutex<Applied>,
    changed: Notify,
}

/// What this agent has set up that the kernel does not show.
#[derive(Debug, Default)]
struct Applied {
    responders: BTreeMap<String, Responder>,
    /// Taps with rules; those of a former agent are found by their links.
    filtered: BTreeSet<String>,
}

/// How things are after a change.
#[derive(Debug)]
struct Outcome {
    observed: Observed,
    plan: Plan,
    /// The last words of what failed.
    failure: Option<SystemError>,
}

impl Networks {
    pub(crate) fn new(host: HostId, address: IpAddr) -> Arc<Self> {
        Self::through(System::default(), host, address)
    }

    fn through(system: System, host: HostId, address: IpAddr) -> Arc<Self> {
        Arc::new(Self {
            system,
            wanted: Mutex::new(Wanted {
                host,
                address,
                peers: BTreeSet::new(),
                vms: BTreeMap::new(),
                spared: BTreeSet::new(),
            }),
            applied: tokio::sync::Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Makes taps for a VM's cards and plugs them in; answers when they work.
    ///
    /// # Errors
    /// A problem that names the card; nothing of the VM is left then.
    pub(crate) async fn attach(
        &self,
        vm: VmId,
        nics: &[Nic],
        networks: &[Network],
    ) -> Result<Vec<NicAttachment>, Problem> {
        if nics.is_empty() {
            self.detach(vm);
            return Ok(Vec::new());
        }
        let missing = unknown_networks(nics, networks);
        if !missing.is_empty() {
            return Err(Problem::invalid(missing));
        }
        self.adopt(vm, nics, networks);
        let outcome = self.reconcile().await;
        let attached = self.attachments(vm, (nics, networks), outcome);
        if attached.is_err() {
            self.detach(vm);
        }
        attached
    }

    /// A VM that is here already needs these; they are not touched if they are as they should be.
    pub(crate) fn adopt(&self, vm: VmId, nics: &[Nic], networks: &[Network]) {
        let wish = Wish {
            nics: nics.to_vec(),
            networks: networks.to_vec(),
        };
        self.wanted().vms.insert(vm, wish);
    }

    /// A VM that nothing is known about keeps what it has.
    pub(crate) fn spare(&self, vm: VmId) {
        self.wanted().spared.insert(vm);
    }

    /// The VM's machine is no more: what it had goes soon.
    pub(crate) fn detach(&self, vm: VmId) {
        let gone = {
            let mut wanted = self.wanted();
            wanted.spared.remove(&vm);
            wanted.vms.remove(&vm)
        };
        if gone.is_some_and(|wish| !wish.nics.is_empty()) {
            self.changed.notify_one();
        }
    }

    /// Takes note of the pool's hosts.
    pub(crate) fn set_peers(&self, peers: Peers) {
        // This host is always among them: none at all is a server that does not tell.
        if peers.is_empty() {
            return;
        }
        let peers: BTreeSet<IpAddr> = peers.into_iter().collect();
        let mut wanted = self.wanted();
        if wanted.peers != peers {
            wanted.peers = peers;
            self.changed.notify_one();
        }
    }

    /// Removes what a former agent has left, and keeps things as they should be until the handle is dropped.
    pub(crate) fn keep(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        let networks = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut complained = false;
            loop {
                let pause = match networks.reconcile().await.map(|outcome| outcome.failure) {
                    Ok(None) => {
                        complained = false;
                        LOOK_EVERY
                    }
                    Ok(Some(error)) | Err(error) => {
                        let needed = networks.wanted().vms.values().any(|w| !w.nics.is_empty());
                        if needed && !std::mem::replace(&mut complained, true) {
                            tracing::warn!(%error, "networks are not as they should be; trying on");
                        }
                        RETRY_AFTER
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = networks.changed.notified() => {}
                }
            }
        }))
    }

    /// No VM is left: everything goes at once.
    pub(crate) async fn clear(&self) {
        let nothing_was_made = {
            let mut wanted = self.wanted();
            wanted.spared.clear();
            std::mem::take(&mut wanted.vms)
                .values()
                .all(|wish| wish.nics.is_empty())
        };
        if nothing_was_made && self.applied.lock().await.filtered.is_empty() {
            return;
        }
        match self.reconcile().await.map(|outcome| outcome.failure) {
            Ok(None) => {}
            Ok(Some(error)) | Err(error) => {
                tracing::warn!(%error, "taps and bridges are left; the next agent removes them");
            }
        }
    }

    /// One turn: look, plan, carry out, look again.
    async fn reconcile(&self) -> Result<Outcome, SystemError> {
        let mut applied = self.applied.lock().await;
        let _lock = machine_lock().await;
        // Whoever wants something else from here on has it done by the next turn.
        let wanted = self.wanted().clone();
        let observed = self.system.observe().await?;
        let plan = plan(&wanted, &observed);
        let plugs: Vec<Plug> = wanted
            .plugs()
            .into_iter()
            .filter(|plug| !plan.trouble.contains_key(&plug.network))
            .collect();
        // Rules come before the taps they are for and go after them.
        let mut failure = None;
        if !plugs.is_empty() {
            self.system.filter(&rules::adding(&plugs)).await?;
            applied
                .filtered
                .extend(plugs.iter().map(|plug| plug.tap.clone()));
        }
        let observed = if plan.steps.is_empty() {
            observed
        } else {
            failure = self.system.apply(&plan.steps).await.err();
            self.system.observe().await?
        };
        let stale = applied.filtered.iter().chain(&plan.leaving);
        let stale: BTreeSet<String> = stale
            .filter(|tap| plugs.iter().all(|plug| plug.tap != **tap))
            .cloned()
            .collect();
        if !stale.is_empty() {
            self.system.filter(&rules::removing(&stale)).await?;
            applied.filtered.retain(|tap| !stale.contains(tap));
        }
        applied.give_addresses(&wanted, &plugs, &observed);
        Ok(Outcome {
            observed,
            plan,
            failure,
        })
    }

    /// What the VMM needs to know, once the taps are as they should be.
    fn attachments(
        &self,
        vm: VmId,
        (nics, networks): (&[Nic], &[Network]),
        outcome: Result<Outcome, SystemError>,
    ) -> Result<Vec<NicAttachment>, Problem> {
        let outcome = outcome.map_err(|error| unavailable(&error.to_string()))?;
        let plugs = self.wanted().plugs();
        let mut found = Vec::new();
        let mut problems = Vec::new();
        for (index, nic) in nics.iter().enumerate() {
            let field = |name: &str| format!("spec.nics[{index}].attach.{name}");
            match &nic.attach {
                NicAttach::Tap { tap } => match outcome.observed.links.get(tap) {
                    Some(link) if link.kind.as_deref() == Some("tun") => {
                        found.push(NicAttachment {
                            tap: tap.clone(),
                            mtu: u16::try_from(link.mtu).unwrap_or(DEFAULT_MTU),
                        });
                    }
                    _ => problems.push(FieldProblem::new(
                        field("tap"),
                        format!("this host has no tap device {tap}"),
                        "make it (`ip tuntap add`), or name a network instead",
                    )),
                },
                NicAttach::Network { network } => {
                    if let Some(trouble) = outcome.plan.trouble.get(network) {
                        problems.push(FieldProblem::new(
                            field("network"),
                            trouble.to_string(),
                            "make it on this host, or change the network",
                        ));
                        continue;
                    }
                    let names = |plug: &&Plug| plug.vm == vm && plug.mac == nic.mac;
                    let plug = plugs.iter().find(names);
                    match plug {
                        Some(plug) if outcome.works(plug, networks) => found.push(NicAttachment {
                            tap: plug.tap.clone(),
                            mtu: plug.mtu,
                        }),
                        _ => {
                            let words = outcome.failure.as_ref().map(ToString::to_string);
                            return Err(unavailable(
                                &words.unwrap_or_else(|| "its tap has disappeared".to_owned()),
                            ));
                        }
                    }
                }
            }
        }
        if problems.is_empty() {
            Ok(found)
        } else {
            Err(Problem::invalid(problems))
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        // Every critical section leaves it whole.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outcome {
    /// Whether the tap, and what carries its network's frames to other hosts, are plugged in.
    fn works(&self, plug: &Plug, networks: &[Network]) -> bool {
        let mut needed = vec![plug.tap.clone()];
        let network = networks.iter().find(|known| known.network == plug.network);
        match network.map(|known| &known.transport) {
            Some(Transport::Vlan { .. } | Transport::Vxlan { .. }) => {
                needed.push(names::uplink(plug.network));
            }
            Some(Transport::Local | Transport::Bridge { .. }) | None => {}
        }
        needed.iter().all(|name| {
            let link = self.observed.links.get(name);
            link.is_some_and(|link| link.up && link.master.as_ref() == Some(&plug.bridge))
        })
    }
}

impl Applied {
    /// One responder on each bridge with addresses to give.
    fn give_addresses(&mut self, wanted: &Wanted, plugs: &[Plug], observed: &Observed) {
        let networks = wanted.networks();
        let mut leases: BTreeMap<&str, Leases> = BTreeMap::new();
        for plug in plugs {
            let Some(network) = networks.get(&plug.network) else {
                continue;
            };
            if let (Some(subnet), Some(address)) = (&network.subnet, plug.address) {
                let lease = Lease {
                    address,
                    subnet: subnet.clone(),
                    mtu: plug.mtu,
                };
                leases
                    .entry(&plug.bridge)
                    .or_default()
                    .insert(plug.mac, lease);
            }
        }
        self.responders.retain(|bridge, responder| {
            let link = observed.links.get(bridge);
            leases.contains_key(bridge.as_str())
                && !responder.is_over()
                && link.is_some_and(|link| link.index == responder.interface)
        });
        for (bridge, leases) in leases {
            if let Some(responder) = self.responders.get(bridge) {
                responder.give(leases);
                continue;
            }
            let Some((index, own)) = observed
                .links
                .get(bridge)
                .and_then(|link| Some((link.index, link.address?)))
            else {
                continue;
            };
            match Responder::start(bridge, index, own, leases) {
                Ok(responder) => {
                    self.responders.insert(bridge.to_owned(), responder);
                }
                Err(error) => {
                    tracing::error!(bridge, %error, "guests cannot be given their addresses")
                }
            }
        }
    }
}

fn unknown_networks(nics: &[Nic], networks: &[Network]) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    for (index, nic) in nics.iter().enumerate() {
        if let NicAttach::Network { network } = nic.attach
            && networks.iter().all(|known| known.network != network)
        {
            problems.push(FieldProblem::new(
                format!("spec.nics[{index}].attach.network"),
                format!("network {network} is not among those given"),
                "send the network along with the command",
            ));
        }
    }
    problems
}

fn unavailable(detail: &str) -> Problem {
    let detail = format!("the network cannot be set up on this host: {detail}");
    Problem::new(
        503,
        "network-unavailable",
        "The network cannot be set up",
        detail,
    )
    .with_remedy("run the agent as root with iproute2 and nftables installed")
}

/// Keeps other agents of this machine from planning meanwhile. Without it they only undo and redo each other's work.
async fn machine_lock() -> Option<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(LOCK_FILE);
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            tracing::debug!(%error, "no lock among the agents of this machine");
            return None;
        }
    };
    let deadline = Instant::now() + LOCK_TIMEOUT;
    while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            tracing::warn!("another agent has held {LOCK_FILE} for {LOCK_TIMEOUT:?}");
            return None;
        }
        // A lock that becomes free announces itself only to those who block.
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Some(file)
}
