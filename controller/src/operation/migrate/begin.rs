//! The beginning of a migration: a target is chosen and the migration recorded before any host hears of it.

use super::disks;
use crate::ledger::Draft;
use crate::model::rejection::{remedies, summary};
use crate::model::{
    HeldBack, HostRejection, Migration, MigrationState, MovingDisk, Operation, Vm, Work,
};
use crate::operation::Ended;
use crate::operation::context::{Conclusion, Context};
use crate::plan::admission::{Crowd, Wait, begins};
use crate::plan::fairness::share;
use crate::plan::picture;
use crate::plan::placement::{Among, choose};
use crate::view::View;
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::problem::Problem;

/// What came of a turn.
enum Begun {
    Migration(MigrationId),
    Wait(Wait),
    Ended,
}

/// Records the migration as soon as both hosts have a free place; `None` when the operation has ended.
pub(super) async fn begin(context: &Context<'_>) -> Result<Option<MigrationId>, Ended> {
    let crowd = Crowd::new(context.core.settings.migrations_per_host);
    let mut told = None;
    loop {
        let begun = context.change(|view, draft, operation| {
            let begun = begin_in_turn(view, draft, operation, crowd);
            if let Begun::Wait(wait) = &begun
                && told.as_ref() != Some(&wait.topic())
            {
                operation.waits(wait.to_string(), draft.now());
            }
            begun
        });
        let begun = begun.await?;
        match begun {
            Begun::Migration(id) => return Ok(Some(id)),
            Begun::Ended => return Ok(None),
            Begun::Wait(wait) => {
                told = Some(wait.topic());
                let version = context.view().version;
                context
                    .core
                    .until(|view| (view.version > version).then_some(()))
                    .await;
            }
        }
    }
}

fn begin_in_turn(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    crowd: Crowd,
) -> Begun {
    let Work::Migrate {
        vm: id, migration, ..
    } = &operation.work
    else {
        return Begun::Ended;
    };
    if let Some(migration) = migration {
        return Begun::Migration(*migration);
    }
    let Some(vm) = Context::vm(view, *id) else {
        let problem = Problem::not_found("VM", *id);
        Context::conclude(draft, operation, None, Conclusion::Failed(problem));
        return Begun::Ended;
    };
    match way(view, operation, &vm) {
        Err(conclusion) => {
            Context::conclude(draft, operation, Some(vm), conclusion);
            Begun::Ended
        }
        Ok(way) => match way.open(view, crowd) {
            Err(wait) => Begun::Wait(wait),
            Ok(target) => {
                let way = (way.source, target);
                Begun::Migration(record(view, draft, operation, vm, way))
            }
        },
    }
}

/// From where to where.
struct Way {
    source: HostId,
    /// What is waited for while a disk of the VM is being changed: then nothing is chosen yet.
    target: Result<HostId, Wait>,
}

/// The way of the VM, or how the operation ends without one.
fn way(view: &View, operation: &Operation, vm: &Vm) -> Result<Way, Conclusion> {
    if let Some(actor) = &operation.cancel {
        let detail = format!("called off by {actor} before it began");
        return Err(Conclusion::Cancelled(detail));
    }
    let Some(source) = vm.owner else {
        let problem = Problem::conflict("not-running", format!("{} is off", vm.name));
        return Err(Conclusion::Failed(problem));
    };
    if view.liveness(source).is_silent() {
        let detail = format!(
            "{} is silent, so {} cannot move live",
            view.host_name(source),
            vm.name
        );
        return Err(Conclusion::Failed(Problem::conflict("host-silent", detail)));
    }
    let way = |target| Ok(Way { source, target });
    if let Some(disk) = view.busy_disk(vm) {
        let name = disk.name.clone();
        return way(Err(Wait::Disk { name }));
    }
    target(view, operation, vm).and_then(way)
}

/// The best host for the VM. A disk must not come to where an earlier copy of it is about to be erased: that is waited
/// for only where no other host takes the VM.
fn target(view: &View, operation: &Operation, vm: &Vm) -> Result<Result<HostId, Wait>, Conclusion> {
    let Work::Migrate { wanted, disks, .. } = &operation.work else {
        unreachable!("only a migration looks for its way");
    };
    let hosts = picture::hosts(view);
    let demand = picture::moving_with(view, vm, disks);
    let erased = |disk: &MovingDisk| view.is_erased_from(disk.disk, disk.to);
    let (mut passed, mut wait) = (Vec::new(), None);
    loop {
        let among = Among {
            only: *wanted,
            failed: &passed,
        };
        let choice = choose(&hosts, &demand, among);
        let Some((best, _)) = choice.best else {
            return match wait {
                Some(wait) => Ok(Err(wait)),
                None => Err(no_room(vm, &choice.rejections)),
            };
        };
        let moving = disks::chosen(view, vm, best, disks);
        let Some(disk) = moving.into_iter().find(erased) else {
            return Ok(Ok(best));
        };
        wait.get_or_insert(Wait::Disk { name: disk.name });
        passed.push(best);
    }
}

fn no_room(vm: &Vm, rejections: &[HostRejection]) -> Conclusion {
    let detail = format!("no host takes {}: {}", vm.name, summary(rejections));
    let problem = Problem::conflict("no-room", detail).with_remedy(remedies(rejections));
    Conclusion::Failed(problem)
}

impl Way {
    /// Where it goes, as soon as both hosts have a free place.
    fn open(&self, view: &View, crowd: Crowd) -> Result<HostId, Wait> {
        let target = self.target.clone()?;
        begins(view, self.source, target, crowd)?;
        Ok(target)
    }
}

fn record(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    mut vm: Vm,
    (source, target): (HostId, HostId),
) -> MigrationId {
    let id = MigrationId::fresh();
    let Work::Migrate {
        policy,
        disks,
        migration,
        ..
    } = &mut operation.work
    else {
        unreachable!("only a migration has a way");
    };
    *migration = Some(id);
    // Whoever began the operation: what the VM forbids is not done.
    *policy = MigrationPolicy {
        post_copy: vm.post_copy.grant(policy.post_copy),
        ..policy.clone()
    };
    let moving = disks::chosen(view, &vm, target, disks);
    let mut migration = Migration {
        id,
        vm: vm.id,
        vm_name: vm.name.clone(),
        source,
        source_name: view.host_name(source),
        target,
        target_name: view.host_name(target),
        epoch: vm.epoch,
        prepare_generation: vm.next_generation(),
        send_generation: vm.next_generation(),
        policy: policy.clone(),
        disks: moving,
        operation: operation.id,
        state: MigrationState::Open,
        phase: None,
        progress: None,
        held_back: HeldBack::No,
        foreseen: None,
        started_at: draft.now(),
        ended_at: None,
    };
    note_company(view, draft, &mut migration);
    match migration.disks.is_empty() {
        true => operation.begin_step("prepare the target", way_in_words(&migration), draft.now()),
        false => disks::hold(view, draft, operation, &migration),
    }
    vm.migration = Some(id);
    draft.put_migration(migration);
    draft.put_vm(vm);
    id
}

/// Those that run beside each other or under a limit do not show what their link carries.
fn note_company(view: &View, draft: &mut Draft<'_>, migration: &mut Migration) {
    let touches = |other: &Migration| {
        [migration.source, migration.target]
            .iter()
            .any(|host| other.source == *host || other.target == *host)
    };
    let company: Vec<_> = view.moving().filter(|other| touches(other)).collect();
    let limited = share(view, migration) != migration.policy.max_bandwidth_bytes_per_s;
    if limited || !company.is_empty() {
        migration.held_back = HeldBack::Yes;
    }
    for other in company {
        if other.is_open() && other.held_back == HeldBack::No {
            let mut other = other.as_ref().clone();
            other.held_back = HeldBack::Yes;
            draft.put_migration(other);
        }
    }
}

pub(super) fn way_in_words(migration: &Migration) -> String {
    format!(
        "from {} to {}",
        migration.source_name, migration.target_name
    )
}
