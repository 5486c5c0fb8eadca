//! A pool of real processes on which the schedule of faults is played.

use super::super::{HOST_MIB, text, verify, wait_until_one_copy_runs};
use super::witness::Witness;
use godwit_faults::{Case, Fault, Link, Outcome, Process, Stage, Step};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::http::Client;
use godwit_tests::links::{Links, Way};
use godwit_tests::process::Process as Child;
use godwit_tests::test_dir::TestDir;
use godwit_wire::migration::{MigrationPhase, MigrationStatus};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const VM: &str = "wader";
/// The hosts that the VM moves between, on islands, and one that it can be started on.
const HOSTS: [&str; 2] = ["host-1", "host-2"];
const THIRD_HOST: &str = "host-3";
/// The guest verifies this much of its memory,
const FILL_MIB: u64 = 24;
/// and writes so fast to so much of it. At [`LINK_BYTES_PER_S`] that makes seconds of pre-copy and half a second or more
/// of blackout, which are seen without luck.
const DIRTY: &str = "dirty 16 8";
/// With this it goes ahead of memory that takes a second or two to follow.
const DIRTY_MOST: &str = "dirty 16 24";
const GUEST_MIB: u64 = 96;
const LINK_BYTES_PER_S: u64 = 12 << 20;
/// From one step to the next.
const STEP_PATIENCE: Duration = Duration::from_secs(30);
/// A VM that was lost comes back within a fail-over and a boot.
const REPAIR_PATIENCE: Duration = Duration::from_secs(60);
/// How often a VMM is asked where it stands.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// A VMM that does not say within this time where it stands is frozen.
const VMM_PATIENCE: Duration = Duration::from_millis(500);

/// The pool, and a VM in it.
pub(super) struct RealStage {
    cluster: Cluster,
    links: Links,
    /// The VM.
    id: String,
    /// Which of [`HOSTS`] the VM leaves next.
    source: usize,
    /// The migration that was begun last.
    migration: String,
    /// VMMs that are frozen.
    frozen: BTreeMap<Process, OwnedFd>,
}

/// Where both ends of a migration stand, as far as they say so.
#[derive(Debug)]
struct Ends {
    source: Option<MigrationStatus>,
    target: Option<MigrationStatus>,
}

impl RealStage {
    /// Three hosts, and a guest on the first that fills and changes its memory.
    pub(super) async fn new() -> Self {
        let dir = TestDir::new();
        let links = Links::new(&dir).expect("links that can be cut");
        let mainland = links.mainland_ip();
        let mut cluster = Cluster::start_server_in(dir, mainland)
            .await
            .expect("a server");
        for (island, host) in HOSTS.into_iter().enumerate() {
            let wrapper = links.wrapper(island);
            let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
            cluster
                .join_host_in(host, HOST_MIB, links.ip(island), &wrapper)
                .await
                .expect("an island joins");
        }
        cluster
            .join_host_in(THIRD_HOST, HOST_MIB, mainland, &[])
            .await
            .expect("the mainland joins");
        let vm = cluster
            .create_pilot(VM, HOSTS[0], 1, GUEST_MIB)
            .await
            .expect("a VM");
        let stage = Self {
            cluster,
            links,
            id: text(&vm, "id").to_owned(),
            source: 0,
            migration: String::new(),
            frozen: BTreeMap::new(),
        };
        stage.say(&format!("fill {FILL_MIB}")).await;
        stage
    }

    /// Plays one case, and looks at everything afterwards.
    pub(super) async fn run(&mut self, case: Case) {
        let begun = Instant::now();
        println!("{case} …");
        let witness = Witness::start(&self.cluster, &self.id);
        godwit_faults::play(self, case).await;
        let owner = wait_until_one_copy_runs(&self.cluster, VM, REPAIR_PATIENCE).await;
        self.wait_until_one_copy_is_left(&owner).await;
        self.judge(case).await;
        self.move_on(&owner).await;
        assert_eq!(witness.twice(), None, "{case}");
        println!("{case}: one copy was left, {:?}", begun.elapsed());
    }

    async fn judge(&self, case: Case) {
        let verified_mib = verify(&self.cluster, VM).await;
        match case.outcome() {
            Outcome::GoesOn => assert!(
                verified_mib >= FILL_MIB,
                "{case}: the memory is gone, only {verified_mib} MiB are left"
            ),
            Outcome::StartsAnew => assert_eq!(verified_mib, 0, "{case}"),
            Outcome::Either => {}
        }
        if verified_mib < FILL_MIB {
            self.say(&format!("fill {FILL_MIB}")).await;
        }
    }

    /// The VM can still move, and does: from where it arrives the next case begins.
    async fn move_on(&mut self, owner: &str) {
        let to = usize::from(owner == HOSTS[0]);
        self.cluster
            .migrate(VM, HOSTS[to])
            .await
            .expect("another migration is accepted");
        let arrived = |vm: &Value| vm["host_name"] == HOSTS[to] && is_quiet(vm);
        self.cluster
            .wait_for_vm(VM, REPAIR_PATIENCE, arrived)
            .await
            .expect("it moves again");
        self.wait_until_one_copy_is_left(HOSTS[to]).await;
        let verified_mib = verify(&self.cluster, VM).await;
        assert!(verified_mib >= FILL_MIB, "only {verified_mib} MiB are left");
        self.source = to;
    }

    /// Only the owner has a VMM of the VM, under the epoch that the store names, and nothing is under way.
    async fn wait_until_one_copy_is_left(&self, owner: &str) {
        self.cluster
            .wait_for_vm(VM, REPAIR_PATIENCE, is_quiet)
            .await
            .expect("it comes to rest");
        let deadline = Instant::now() + REPAIR_PATIENCE;
        loop {
            let mut copies = Vec::new();
            for host in &self.cluster.hosts {
                let found = self.cluster.vmms(&host.name, &self.id).await;
                copies.extend(found.into_iter().map(|vmm| (host.name.clone(), vmm.epoch)));
            }
            let vm = self.cluster.vm(VM).await.expect("the VM");
            let epoch = vm["epoch"].as_u64().expect("an epoch");
            if let [(host, held)] = copies.as_slice()
                && (host.as_str(), held.0) == (owner, epoch)
            {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{owner} has it under epoch {epoch}, but there are {copies:?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn say(&self, line: &str) {
        let mut shell = self.cluster.shell(VM).await.expect("its console");
        shell.command(line).await.expect("the guest obeys");
    }

    fn target(&self) -> usize {
        1 - self.source
    }

    async fn ends(&self) -> Ends {
        Ends {
            source: self.status(HOSTS[self.source]).await,
            target: self.status(HOSTS[self.target()]).await,
        }
    }

    /// What a host's VMM says about this migration; it may have taken part in earlier ones.
    async fn status(&self, host: &str) -> Option<MigrationStatus> {
        let socket = self.cluster.vm_dir(host, &self.id).join("vmm.sock");
        let vmm = Client::unix(&socket);
        let asked = vmm.get::<MigrationStatus>("/v1/migration?after=0&wait_ms=0");
        let answer = tokio::time::timeout(VMM_PATIENCE, asked).await;
        let status = answer.ok()?.ok()?;
        (status.migration.to_string() == self.migration).then_some(status)
    }

    /// Whether the migration stands at `step`, by what both ends and the server say.
    async fn stands_at(&self, step: Step, ends: &Ends) -> bool {
        let phase = |end: &Option<MigrationStatus>| end.as_ref().map(|status| status.phase);
        let (source, target) = (phase(&ends.source), phase(&ends.target));
        match step {
            Step::Connecting => [source, target] == [Some(MigrationPhase::Connecting); 2],
            Step::PreCopy => source == Some(MigrationPhase::PreCopy),
            Step::Blackout => source == Some(MigrationPhase::Blackout),
            Step::Whole => target == Some(MigrationPhase::AwaitingCommit),
            Step::Committed => {
                let target_name = HOSTS[self.target()];
                target == Some(MigrationPhase::AwaitingCommit)
                    && self.rest_says(|vm| vm["host_name"] == target_name).await
            }
            Step::Running => target == Some(MigrationPhase::Completed),
            // Also the source's agent has heard of it, and will not end its VMM.
            Step::PostCopy => {
                source == Some(MigrationPhase::PostCopy)
                    && self
                        .rest_says(|vm| vm["migration"]["phase"] == "post_copy")
                        .await
            }
            Step::CleanUp => source == Some(MigrationPhase::Completed),
        }
    }

    async fn rest_says(&self, accept: impl Fn(&Value) -> bool) -> bool {
        self.cluster.vm(VM).await.is_ok_and(|vm| accept(&vm))
    }

    /// Which host, of those that the VM moves between, a process belongs to.
    fn host_of(&self, process: Process) -> &'static str {
        match process {
            Process::SourceVmm | Process::SourceAgent => HOSTS[self.source],
            Process::TargetVmm | Process::TargetAgent => HOSTS[self.target()],
            Process::Server => unreachable!("the server is on no host"),
        }
    }

    /// An agent or the server; `None` while it is dead.
    fn child(&self, process: Process) -> Option<&Child> {
        if process == Process::Server {
            return self.cluster.server.as_ref();
        }
        let name = self.host_of(process);
        let mut hosts = self.cluster.hosts.iter();
        hosts.find(|host| host.name == name)?.agent.as_ref()
    }

    /// A handle to a VMM; `None` when it has ended by itself.
    async fn vmm(&self, process: Process) -> Option<OwnedFd> {
        let vmm = self.cluster.vmm(self.host_of(process), &self.id).await?;
        let pid = Pid::from_raw(vmm.pid as i32).expect("a process id");
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }

    fn way(&self, link: Link) -> (usize, Way) {
        match link {
            Link::SourceToTarget => (self.source, Way::ToPeer),
            Link::TargetToSource => (self.target(), Way::ToPeer),
            Link::SourceToServer => (self.source, Way::ToMainland),
            Link::ServerToSource => (self.source, Way::FromMainland),
            Link::TargetToServer => (self.target(), Way::ToMainland),
            Link::ServerToTarget => (self.target(), Way::FromMainland),
        }
    }
}

impl Stage for RealStage {
    async fn begin(&mut self, step: Step) {
        let ahead = step == Step::PostCopy;
        self.say(if ahead { DIRTY_MOST } else { DIRTY }).await;
        let target = HOSTS[self.target()];
        let policy = json!({
            "lanes": 2,
            "compression": "off",
            "max_throttle_percent": 0,
            "max_bandwidth_bytes_per_s": LINK_BYTES_PER_S,
            "downtime_limit_ms": if ahead { 100 } else { 3_000 },
            "allow_postcopy": ahead,
        });
        let _: Value = self
            .cluster
            .api
            .post(
                &format!("/v1/vms/{VM}/migrate"),
                &json!({ "target": target, "policy": policy }),
            )
            .await
            .expect("the migration is accepted");
        let vm = self
            .cluster
            .wait_for_vm(VM, OPERATION_PATIENCE, |vm| !vm["migration"].is_null())
            .await
            .expect("the migration begins");
        self.migration = text(&vm["migration"], "id").to_owned();
    }

    async fn reach(&mut self, step: Step) {
        let deadline = Instant::now() + STEP_PATIENCE;
        loop {
            let ends = self.ends().await;
            if self.stands_at(step, &ends).await {
                return;
            }
            let over = |end: &Option<MigrationStatus>| {
                end.as_ref().is_some_and(|end| {
                    matches!(
                        end.phase,
                        MigrationPhase::Failed | MigrationPhase::Cancelled
                    )
                })
            };
            assert!(
                !over(&ends.source) && !over(&ends.target) && Instant::now() < deadline,
                "{step:?} is not reached: {ends:#?}"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn inflict(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(Process::Server) => self.cluster.kill_server(),
            Fault::Killed(agent @ (Process::SourceAgent | Process::TargetAgent)) => {
                let host = self.host_of(agent);
                self.cluster.kill_agent(host);
            }
            Fault::Killed(vmm @ (Process::SourceVmm | Process::TargetVmm)) => {
                if let Some(vmm) = self.vmm(vmm).await {
                    let _ = pidfd_send_signal(&vmm, Signal::KILL);
                }
            }
            Fault::Frozen(process @ (Process::SourceVmm | Process::TargetVmm)) => {
                if let Some(vmm) = self.vmm(process).await {
                    let _ = pidfd_send_signal(&vmm, Signal::STOP);
                    self.frozen.insert(process, vmm);
                }
            }
            Fault::Frozen(process) => {
                if let Some(child) = self.child(process) {
                    child.freeze();
                }
            }
            Fault::Cut(link) => {
                let (island, way) = self.way(link);
                self.links.cut(island, way).expect("the link is cut");
            }
        }
    }

    async fn lift(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(Process::SourceVmm | Process::TargetVmm) => {}
            Fault::Killed(Process::Server) => self
                .cluster
                .revive_server()
                .await
                .expect("the server starts again"),
            Fault::Killed(agent) => {
                let host = self.host_of(agent);
                self.cluster
                    .revive_agent(host)
                    .expect("the agent starts again");
            }
            Fault::Frozen(process @ (Process::SourceVmm | Process::TargetVmm)) => {
                if let Some(vmm) = self.frozen.remove(&process) {
                    // One that was killed meanwhile stays dead.
                    let _ = pidfd_send_signal(&vmm, Signal::CONT);
                }
            }
            Fault::Frozen(process) => {
                if let Some(child) = self.child(process) {
                    child.thaw();
                }
            }
            Fault::Cut(link) => {
                let (island, way) = self.way(link);
                self.links.mend(island, way).expect("the link heals");
            }
        }
    }

    /// What is waited for is that nothing happens for so long.
    async fn endure(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

/// The VM runs and nothing is done to it.
fn is_quiet(vm: &Value) -> bool {
    vm["state"] == "running" && vm["migration"].is_null() && vm["operation"].is_null()
}
