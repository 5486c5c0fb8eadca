//! The schedule of faults (`godwit_faults`, which the simulated pool goes through too) on real processes: whatever
//! fails at whatever step of a migration, at no time two copies run, and after the repair exactly one does.
//!
//! Each step has a test with the one fault that stands for it; all faults at all steps take half an hour:
//! `tests/run faults`.

mod stage;
mod witness;

use godwit_faults::{Case, Step, cases_at};
use godwit_tests::{links, require, skip};
use stage::RealStage;

async fn one_fault_at(step: Step) {
    require!(skip::kvm());
    require!(links::available());
    let fault = step.sample();
    RealStage::new().await.run(Case { step, fault }).await;
}

async fn every_fault_at(step: Step) {
    require!(skip::kvm());
    require!(links::available());
    let mut stage = RealStage::new().await;
    for case in cases_at(step) {
        stage.run(case).await;
    }
}

macro_rules! steps {
    ($($name:ident: $step:ident;)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            one_fault_at(Step::$step).await;
        })*

        /// Long: `tests/run faults`.
        mod whole {
            use super::*;

            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "takes minutes: tests/run faults"]
            async fn $name() {
                every_fault_at(Step::$step).await;
            })*
        }
    };
}

steps! {
    a_fault_while_connecting_leaves_one_copy: Connecting;
    a_fault_during_pre_copy_leaves_one_copy: PreCopy;
    a_fault_in_the_blackout_leaves_one_copy: Blackout;
    a_fault_before_the_commit_is_asked_for_leaves_one_copy: Whole;
    a_fault_before_the_target_hears_of_the_commit_leaves_one_copy: Committed;
    a_fault_before_the_source_hears_of_the_commit_leaves_one_copy: Running;
    a_fault_while_memory_is_missing_leaves_one_copy: PostCopy;
    a_fault_before_the_source_is_cleaned_up_leaves_one_copy: CleanUp;
}
