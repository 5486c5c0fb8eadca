//! An open migration: both ends are told, then watched until the migration is decided.

use super::disks::{Blanks, make_blanks};
use super::fair_share::keep_to_share;
use crate::model::{Liveness, Migration};
use crate::operation::context::{Context, Sent};
use crate::plan::contract::foresee_move;
use crate::plan::dirtying::Dirtying;
use crate::plan::estimate::figures;
use crate::plan::fairness::share;
use crate::plan::reconcile::MISSING_HEARTBEATS;
use crate::view::View;
use godwit_wire::host_api::{PrepareIncoming, StartOutgoing, VmReport};
use godwit_wire::id::HostId;
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, MigrationStatus};
use godwit_wire::vmm_api::{DirtyRateRequest, VmmState};
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

/// How long the source may not mention a migration it has accepted.
const MENTION_TIME: Duration = Duration::from_secs(10);

/// How the guest is watched while the target is made ready: short enough to be done by then, most of the time.
const AT_THE_START: DirtyRateRequest = DirtyRateRequest {
    window_ms: 100,
    readings: 3,
};

/// Why an open migration cannot go on.
#[derive(Clone, Debug)]
pub(super) struct Why {
    pub(super) reason: String,
    /// The operator's wish rather than a failure.
    pub(super) cancelled: bool,
}

impl Why {
    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            cancelled: false,
        }
    }
}

/// Brings the migration about and watches it until it is decided. An error asks for it to be voided.
pub(super) async fn drive(context: &Context<'_>, migration: &Migration) -> Result<(), Why> {
    let view = context.view();
    let Some(vm) = view.vms.get(&migration.vm) else {
        return Err(Why::failed("the VM is gone"));
    };
    let prepare = PrepareIncoming {
        networks: view.networks_of(&vm.spec),
        name: vm.name.clone(),
        epoch: migration.epoch,
        generation: migration.prepare_generation,
        spec: migration.spec_at_target(&vm.spec),
        lease: vm.lease,
        migration: migration.id,
        arriving_disks: migration.disk_names(),
        // The driver that speaks to hosts adds it; here, nobody sees a key.
        identity: None,
    };
    let driver = &context.core.driver;
    let own = context.id;
    let over = |view: &View| {
        !view
            .migrations
            .get(&migration.id)
            .is_some_and(|m| m.is_open())
            || view
                .operations
                .get(&own)
                .is_some_and(|op| op.cancel.is_some())
            || view.liveness(migration.source) == Liveness::RestartAllowed
            || view.liveness(migration.target) == Liveness::RestartAllowed
    };
    if make_blanks(context, migration, over).await? == Blanks::Interrupted {
        return watch(context, migration, None).await;
    }
    let prepared = context.send(
        migration.target,
        |to| driver.prepare_incoming(to, vm.id, &prepare),
        over,
    );
    let (prepared, watched) =
        with_what_is_known_by_then(prepared, watch_guest(context, migration)).await;
    let Some(ready) = answer(prepared, &migration.target_name)? else {
        return watch(context, migration, None).await;
    };
    let figures = figures(&view, migration.source, migration.target, &migration.policy);
    let outgoing = StartOutgoing {
        epoch: migration.epoch,
        generation: migration.send_generation,
        migration: migration.id,
        target: ready.address,
        // Not kept: after a restart the target is prepared again and repeats it.
        token: ready.token,
        policy: MigrationPolicy {
            max_bandwidth_bytes_per_s: share(&context.view(), migration),
            ..migration.policy.clone()
        },
        fixed_cost_us: figures.learned_fixed_us(),
        leaving_disks: migration.disk_names(),
        identity: None,
    };
    let detail = format!("to {} at {}", migration.target_name, ready.address);
    note_copying(context, migration, watched.flatten(), detail).await?;
    let told = context
        .send(
            migration.source,
            |to| driver.start_outgoing(to, vm.id, &outgoing),
            over,
        )
        .await;
    answer(told, &migration.source_name)?;
    let mention_by = tokio::time::Instant::now() + MENTION_TIME;
    watch(context, migration, Some(mention_by)).await
}

/// How the guest dirties memory, watched while the target is made ready. `None` is no reason to wait.
async fn watch_guest(context: &Context<'_>, migration: &Migration) -> Option<Dirtying> {
    let source = context.core.address(migration.source)?;
    let asked = context
        .core
        .driver
        .dirty_rate(source, migration.vm, &AT_THE_START);
    match asked.await {
        Ok(rate) => Some(Dirtying::sampled(rate)),
        Err(error) => {
            tracing::debug!(migration = %migration.id, %error, "the guest was not watched");
            None
        }
    }
}

/// What `main` comes to, and what was found `aside` if that was sooner.
async fn with_what_is_known_by_then<T, A>(
    main: impl Future<Output = T>,
    aside: impl Future<Output = A>,
) -> (T, Option<A>) {
    let (mut main, aside) = (pin!(main), pin!(aside));
    tokio::select! {
        biased;
        found = aside => (main.await, Some(found)),
        done = &mut main => (done, None),
    }
}

/// Records that the source is told to copy, and what is foreseen of it: once, as it was at the start.
async fn note_copying(
    context: &Context<'_>,
    migration: &Migration,
    watched: Option<Dirtying>,
    detail: String,
) -> Result<(), Why> {
    let noted = context
        .change(|view, draft, operation| {
            operation.begin_step("copy", detail.clone(), draft.now());
            let record = view.migrations.get(&migration.id).filter(|record| {
                // Decided meanwhile, it is not touched any more.
                record.is_open() && record.foreseen.is_none()
            });
            if let (Some(record), Some(vm)) = (record, view.vms.get(&migration.vm)) {
                let policy = &migration.policy;
                let (target, disks) = (migration.target, migration.disk_bytes());
                let forecast = foresee_move(view, vm, target, policy, disks, watched.clone());
                let mut record = record.as_ref().clone();
                record.foreseen = Some(forecast.foreseen());
                draft.put_migration(record);
            }
        })
        .await;
    noted.map_err(|_| Why::failed("the store failed"))
}

/// `None` when a condition that [`watch`] will name came up first.
fn answer<T>(sent: Sent<T>, name: &str) -> Result<Option<T>, Why> {
    match sent {
        Sent::Answer(answer) => Ok(Some(answer)),
        Sent::Refused(problem) => Err(Why::failed(format!("{name} refused: {}", problem.detail))),
        Sent::HostLost => Err(Why::failed(format!("{name} is silent"))),
        Sent::Interrupted => Ok(None),
    }
}

/// Waits for the decision, and keeps the source to its share meanwhile. `mention_by` is until when the source must have
/// spoken of the migration.
async fn watch(
    context: &Context<'_>,
    migration: &Migration,
    mention_by: Option<tokio::time::Instant>,
) -> Result<(), Why> {
    let judged = context.core.until(|view| judge(view, migration, context));
    let unmentioned = async {
        match mention_by {
            Some(deadline) => {
                tokio::time::sleep_until(deadline).await;
                // It has been mentioned: wait for the decision only.
                if status(&context.view(), migration.source, migration).is_some() {
                    std::future::pending::<()>().await;
                }
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        never = keep_to_share(context, migration) => match never {},
        judged = judged => judged,
        () = unmentioned => Err(Why::failed(format!(
            "{} accepted the migration and does not mention it", migration.source_name
        ))),
    }
}

pub(super) fn status<'v>(
    view: &'v View,
    host: HostId,
    migration: &Migration,
) -> Option<&'v MigrationStatus> {
    view.report_at(host, migration.vm)?
        .migration
        .as_ref()
        .filter(|status| status.migration == migration.id)
}

/// Whether the host says of a VM that it has no machine any more.
pub(super) const fn has_ended(report: &VmReport) -> bool {
    matches!(report.state, None | Some(VmmState::Stopped { .. }))
}

/// Whether the source's host says that its machine is no more; `None` when it says nothing.
pub(super) fn source_is_gone(view: &View, migration: &Migration) -> Option<bool> {
    let source = view.observed.get(&migration.source)?;
    Some(match source.vms.get(&migration.vm) {
        Some(report) => has_ended(report),
        None => source
            .missing
            .get(&migration.vm)
            .is_some_and(|missing| *missing >= MISSING_HEARTBEATS),
    })
}

/// `None` while the migration goes its way.
fn judge(view: &View, migration: &Migration, context: &Context<'_>) -> Option<Result<(), Why>> {
    if !view
        .migrations
        .get(&migration.id)
        .is_some_and(|m| m.is_open())
    {
        return Some(Ok(()));
    }
    if let Some(actor) = view
        .operations
        .get(&context.id)
        .and_then(|operation| operation.cancel.clone())
    {
        return Some(Err(Why {
            reason: format!("called off by {actor}"),
            cancelled: true,
        }));
    }
    for (host, name) in [
        (migration.source, &migration.source_name),
        (migration.target, &migration.target_name),
    ] {
        if view.liveness(host) == Liveness::RestartAllowed || !view.hosts.contains_key(&host) {
            return Some(Err(Why::failed(format!("{name} is silent"))));
        }
    }
    let said = |host, name: &str| {
        let status = status(view, host, migration)?;
        let failed = matches!(
            status.phase,
            MigrationPhase::Failed | MigrationPhase::Cancelled
        );
        let reason = status
            .reason
            .clone()
            .unwrap_or_else(|| "no reason given".into());
        failed.then(|| Err(Why::failed(format!("{name}: {reason}"))))
    };
    if let Some(failed) = said(migration.source, &migration.source_name) {
        return Some(failed);
    }
    if source_is_gone(view, migration)? {
        return Some(Err(Why::failed(format!(
            "{} does not have the VM any more",
            migration.source_name
        ))));
    }
    said(migration.target, &migration.target_name)
}
