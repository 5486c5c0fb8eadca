//! The schedule of faults that real processes go through as well (`godwit_faults`), on a simulated pool.

use super::host::Way;
use super::seeds::{Dice, for_each_seed};
use super::*;
use crate::model::MigrationState;
use godwit_faults::{Case, Fault, Link, Outcome, Process, SILENCE, Stage, Step};
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, PostCopy};

const SOURCE: u128 = 1;
const TARGET: u128 = 2;
/// How often it is looked where a migration stands: no step is shorter.
const LOOK_AGAIN: Duration = Duration::from_micros(500);
/// Longest time from one step to the next.
const STEP_PATIENCE: Duration = Duration::from_secs(30);

/// A pool with a VM on its way from the first host to the second, and a third to go to.
struct SimStage {
    pool: Pool,
    vm: VmId,
    /// The migration that was begun, once it is known.
    migration: Option<MigrationId>,
}

impl SimStage {
    async fn new() -> Self {
        let pool = Pool::of(3).await;
        let vm = pool.vm("wader", SOURCE).await;
        Self {
            pool,
            vm,
            migration: None,
        }
    }

    fn source(&self) -> &Arc<SimHost> {
        self.pool.host(SOURCE)
    }

    fn target(&self) -> &Arc<SimHost> {
        self.pool.host(TARGET)
    }

    /// Whether the migration stands at `step`, by what both ends and the store say.
    fn stands_at(&self, step: Step, id: MigrationId) -> bool {
        let source = self.source().phase(self.vm, id);
        let target = self.target().phase(self.vm, id);
        let view = self.pool.view();
        let state = view.migrations.get(&id).map(|record| &record.state);
        let open = matches!(state, Some(MigrationState::Open));
        match step {
            Step::Connecting => open && target == Some(MigrationPhase::Connecting),
            Step::PreCopy => target == Some(MigrationPhase::PreCopy),
            Step::Blackout => source == Some(MigrationPhase::Blackout),
            Step::Whole => open && target == Some(MigrationPhase::AwaitingCommit),
            Step::Committed => {
                matches!(state, Some(MigrationState::Committed { .. }))
                    && target == Some(MigrationPhase::AwaitingCommit)
            }
            Step::Running => target == Some(MigrationPhase::Completed),
            Step::PostCopy => source == Some(MigrationPhase::PostCopy),
            Step::CleanUp => source == Some(MigrationPhase::Completed),
        }
    }

    /// Who sends into which way.
    fn way(&self, link: Link) -> (&Arc<SimHost>, Way) {
        match link {
            Link::SourceToTarget => (self.source(), Way::ToHosts),
            Link::TargetToSource => (self.target(), Way::ToHosts),
            Link::SourceToServer => (self.source(), Way::ToServer),
            Link::ServerToSource => (self.source(), Way::FromServer),
            Link::TargetToServer => (self.target(), Way::ToServer),
            Link::ServerToTarget => (self.target(), Way::FromServer),
        }
    }

    /// Everything was repaired: one copy runs where the store says, and it can move.
    async fn judge(&self, case: Case, outcome: Outcome) {
        // Hosts that were silent for long are heard again.
        tokio::time::sleep(godwit_wire::lease::LEASE_DURATION * 2).await;
        self.pool.settled().await;
        let anew = self.pool.events("vm.restarted") > 0;
        let whole = self
            .pool
            .hosts
            .values()
            .all(|host| host.has_lost_no_memory());
        match outcome {
            Outcome::GoesOn => assert!(whole && !anew, "{case}: the guest's memory is gone"),
            Outcome::StartsAnew => {
                let epoch = self.pool.view().vms[&self.vm].epoch;
                assert!(anew, "{case}: it was not started anew");
                assert!(epoch.0 > 1, "{case}: it still has epoch {epoch}");
            }
            Outcome::Either => {}
        }
        let from = self.pool.owner(self.vm);
        let to = if from == Some(TARGET) { SOURCE } else { TARGET };
        let again = self
            .pool
            .submit(self.migrate(to, PostCopy::Forbidden))
            .await;
        self.pool.succeeds(again.expect("accepted")).await;
        self.pool.settled().await;
        assert_eq!(self.pool.runs_on(self.vm), [to], "{case}");
    }

    fn migrate(&self, to: u128, post_copy: PostCopy) -> Intent {
        Intent::MigrateVm {
            vm: self.vm,
            disks: Default::default(),
            target: Some(Pool::id(to)),
            policy: MigrationPolicy {
                post_copy,
                ..MigrationPolicy::default()
            },
        }
    }
}

impl Stage for SimStage {
    async fn begin(&mut self, step: Step) {
        let post_copy = match step {
            Step::PostCopy => PostCopy::Allowed,
            _ => PostCopy::Forbidden,
        };
        let accepted = self.pool.submit(self.migrate(TARGET, post_copy)).await;
        accepted.expect("the migration is accepted");
    }

    async fn reach(&mut self, step: Step) {
        let begun = Instant::now();
        loop {
            self.migration = self.migration.or(self.pool.view().vms[&self.vm].migration);
            if self.migration.is_some_and(|id| self.stands_at(step, id)) {
                return;
            }
            assert!(
                begun.elapsed() < STEP_PATIENCE,
                "{step:?} is not reached: {:#?}",
                self.pool.view().migrations
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn inflict(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(Process::SourceVmm) => self.source().kill_vmm(self.vm),
            Fault::Killed(Process::TargetVmm) => self.target().kill_vmm(self.vm),
            Fault::Killed(Process::SourceAgent) => self.source().kill_agent(),
            Fault::Killed(Process::TargetAgent) => self.target().kill_agent(),
            Fault::Killed(Process::Server) => self.pool.stop_server().await,
            Fault::Frozen(Process::SourceVmm) => self.source().freeze_vmms(),
            Fault::Frozen(Process::TargetVmm) => self.target().freeze_vmms(),
            Fault::Frozen(Process::SourceAgent) => self.source().freeze(),
            Fault::Frozen(Process::TargetAgent) => self.target().freeze(),
            Fault::Frozen(Process::Server) => self.pool.server.freeze(),
            Fault::Cut(link) => {
                let (host, way) = self.way(link);
                host.cut_way(way);
            }
        }
    }

    async fn lift(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(Process::SourceVmm | Process::TargetVmm) => {}
            Fault::Killed(Process::SourceAgent) => self.source().revive_agent(),
            Fault::Killed(Process::TargetAgent) => self.target().revive_agent(),
            Fault::Killed(Process::Server) => self.pool.start_server(None),
            Fault::Frozen(Process::SourceVmm) => self.source().thaw_vmms(),
            Fault::Frozen(Process::TargetVmm) => self.target().thaw_vmms(),
            Fault::Frozen(Process::SourceAgent) => self.source().thaw(),
            Fault::Frozen(Process::TargetAgent) => self.target().thaw(),
            Fault::Frozen(Process::Server) => self.pool.server.thaw(),
            Fault::Cut(link) => {
                let (host, way) = self.way(link);
                host.mend_way(way);
            }
        }
    }

    async fn endure(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
        self.pool.check();
    }
}

async fn every_fault_at(step: Step) {
    for case in godwit_faults::cases_at(step) {
        let mut stage = SimStage::new().await;
        godwit_faults::play(&mut stage, case).await;
        stage.judge(case, case.outcome()).await;
    }
}

macro_rules! every_fault {
    ($($name:ident: $step:ident;)*) => {
        $(#[tokio::test(start_paused = true)]
        async fn $name() {
            every_fault_at(Step::$step).await;
        })*
    };
}

every_fault! {
    any_fault_while_connecting_leaves_one_copy: Connecting;
    any_fault_during_pre_copy_leaves_one_copy: PreCopy;
    any_fault_in_the_blackout_leaves_one_copy: Blackout;
    any_fault_before_the_commit_is_asked_for_leaves_one_copy: Whole;
    any_fault_before_the_target_hears_of_the_commit_leaves_one_copy: Committed;
    any_fault_before_the_source_hears_of_the_commit_leaves_one_copy: Running;
    any_fault_while_memory_is_missing_leaves_one_copy: PostCopy;
    any_fault_before_the_source_is_cleaned_up_leaves_one_copy: CleanUp;
}

/// The same at any moment from the step on, and for up to twice as long as it takes to give a host up.
#[test]
fn any_fault_at_any_moment_for_any_time_leaves_one_copy() {
    for_each_seed("the schedule of faults", 25, a_fault_at_random);
}

async fn a_fault_at_random(seed: u64) {
    const LATEST_MS: u64 = 60;
    const LONGEST_SILENCE_MS: u64 = 20_000;
    let mut dice = Dice::new(seed);
    let cases: Vec<Case> = godwit_faults::cases().collect();
    let case = cases[dice.roll(cases.len() as u64) as usize];
    let late = Duration::from_millis(dice.roll(LATEST_MS));
    let silence = Duration::from_millis(dice.roll(LONGEST_SILENCE_MS));
    let mut stage = SimStage::new().await;
    godwit_faults::play_for(&mut stage, case, late, silence).await;
    // Who is silent for long is given up, and a late blow may strike the next step. Nobody is silent after a death.
    let short = !case.fault.is_silence() || silence <= SILENCE;
    let outcome = match case.outcome() {
        Outcome::GoesOn if short && !strikes_a_vmm(case.fault) => Outcome::GoesOn,
        _ => Outcome::Either,
    };
    stage.judge(case, outcome).await;
}

const fn strikes_a_vmm(fault: Fault) -> bool {
    matches!(
        fault,
        Fault::Killed(Process::SourceVmm | Process::TargetVmm)
    )
}
