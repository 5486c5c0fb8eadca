//! Executors of durable operations.
//!
//! An executor is a task that reads its operation's stage from the record, writes the next stage *before* it
//! acts, acts, and writes the result. Every command it sends carries counters that were written first, so a
//! resumed executor repeats the same command and the agent answers as it did the first time. There is at most
//! one executor per operation, and at most one operation per VM.

mod context;

mod halt;

mod migrate;

mod moves;

mod power;

mod provision;

mod snapshot;

mod start;

mod storage;

mod upgrade;

use crate::core::Core;
use crate::model::{Actor, Operation, OperationState, Subject, Work};
use context::Context;
use godwit_wire::id::OperationId;
use jiff::Timestamp;
use std::sync::Arc;
pub(crate) use storage::begin_deletion;

/// How an executor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The operation's record says how.
    Concluded,
    /// The record could not be written or has vanished; another executor tries again.
    GaveUp,
}

/// A new operation.
pub(crate) fn fresh(
    work: Work,
    subject: Subject,
    actor: &Actor,
    parent: Option<OperationId>,
    now: Timestamp,
) -> Operation {
    Operation {
        id: OperationId::fresh(),
        work,
        subject,
        state: OperationState::Pending,
        steps: Vec::new(),
        error: None,
        cancel: None,
        parent,
        actor: actor.clone(),
        created_at: now,
        ended_at: None,
    }
}

/// Gives every operation that has not ended an executor.
pub(crate) fn spawn_all(core: &Arc<Core>) {
    let view = core.view();
    for operation in view.active_operations() {
        if core.stopping.is_cancelled() || !core.claim(operation.id) {
            continue;
        }
        let (core, id) = (core.clone(), operation.id);
        let tasks = core.tasks.clone();
        tasks.spawn(async move {
            let stopping = core.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => {}
                () = execute(&core, id) => {}
            }
            core.unclaim(id);
        });
    }
}

async fn execute(core: &Arc<Core>, id: OperationId) {
    let context = Context::new(core, id);
    let Some(operation) = core.view().operations.get(&id).cloned() else {
        return;
    };
    tracing::debug!(operation = %id, kind = operation.work.kind(), subject = %operation.subject, "executing");
    let ended = match &operation.work {
        Work::Start { .. } => start::run(&context).await,
        Work::Stop { .. } | Work::Delete { .. } | Work::Restart { .. } => halt::run(&context).await,
        Work::Pause { .. } | Work::Resume { .. } | Work::Balloon { .. } => {
            power::run(&context).await
        }
        Work::Migrate { .. } => migrate::run(&context).await,
        Work::Provision { .. } => provision::run(&context).await,
        Work::CreateSnapshot { .. } | Work::DeleteSnapshot { .. } => snapshot::run(&context).await,
        Work::CreateImage { .. }
        | Work::DeleteImage { .. }
        | Work::CreateDisk { .. }
        | Work::GrowDisk { .. }
        | Work::DeleteDisk { .. }
        | Work::EraseCopy { .. } => storage::run(&context).await,
        Work::Upgrade { .. } => upgrade::run(&context).await,
        Work::Evacuate { .. } | Work::Drain { .. } | Work::Restore { .. } => {
            moves::run(&context).await
        }
    };
    if ended == Ended::GaveUp {
        // Only a store that fails leads here. The reconciler looks again after its pause.
        tracing::warn!(operation = %id, "the executor gave up for now");
        tokio::time::sleep(context::STORE_PAUSE).await;
    }
}
