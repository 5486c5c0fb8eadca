//! Heartbeats: what is observed, the lease, and orders to put right what the host cannot know.

use crate::agents::{not_the_caller, removed};
use crate::core::Core;
use crate::drive::pulses::{Heard, Sender};
use crate::ha::orders::{Judgement, Standing, judge};
use crate::ledger::Draft;
use crate::model::{Actor, Host, Liveness, MaintenanceState, Subject, Vm, Work};
use crate::plan::reconcile::MISSING_HEARTBEATS;
use crate::view::{Observed, View};
use godwit_wire::host_api::{
    Heartbeat, HeartbeatReply, HostReport, MAX_COUNTED, MAX_VMS_PER_HOST, Order, VmReport,
};
use godwit_wire::id::{Epoch, HostId, VmId};
use godwit_wire::lease::LEASE_DURATION;
use godwit_wire::network::Peers;
use godwit_wire::problem::Problem;
use godwit_wire::storage::MAX_POOLS;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tokio::time::Instant;
use uuid::Uuid;

pub(super) async fn answer(
    core: &Core,
    id: HostId,
    beat: Heartbeat,
) -> Result<HeartbeatReply, Problem> {
    let now = Instant::now();
    if beat.host != id {
        return Err(not_the_caller(beat.host, id));
    }
    if beat.report.vms.len() > MAX_VMS_PER_HOST {
        return Err(Problem::new(
            413,
            "too-many-vms",
            "The report is too long",
            "a host has at most 1024 VMs",
        ));
    }
    let view = core.view();
    let Some(host) = view.hosts.get(&id) else {
        return Err(removed(id));
    };
    let sender = Sender {
        incarnation: beat.incarnation,
        sequence: beat.sequence,
        boot: beat.report.facts.boot_id,
    };
    let stored = host.first_heard_at.map(|_| host.facts.boot_id);
    let heard = core.pulses.hear(id, now, sender, stored);
    if heard == Heard::AnotherBoot {
        return Err(another_boot(host, sender.boot));
    }
    if heard == Heard::OutOfOrder {
        return Err(Problem::conflict(
            "stale-heartbeat",
            "a later heartbeat of this agent has come already",
        ));
    }
    let returning = heard == Heard::GivenUp;
    let news = returning
        || host.first_heard_at.is_none()
        || differs(host, &beat.report)
        || view.liveness(id).is_silent();
    settle(core, id, beat.obeyed).await?;
    let stalls = stalls(&view, id, &beat.report);
    let (number, judgement, standing) = if news {
        // During a turn nobody takes VMs from this host; after it, the host is heard again.
        let mut turn = core.ledger.turn().await;
        turn.change(|view, draft| {
            note_news(view, draft, id, &beat.report);
            Ok(())
        })
        .await?;
        core.pulses.revive(&turn, id, now);
        observe(core, id, &beat);
        let standing = if returning {
            Standing::Returning
        } else {
            Standing::Steady
        };
        let (number, judgement) = look(core, id, &beat.report, standing);
        (number, judgement, standing)
    } else {
        observe(core, id, &beat);
        let (number, judgement) = look(core, id, &beat.report, Standing::Steady);
        (number, judgement, Standing::Steady)
    };
    tell_stalls(core, id, stalls).await;
    if !judgement.orders.is_empty() || standing == Standing::Returning {
        tracing::info!(host = host.name(), orders = ?judgement.orders, ?standing, "orders for a host");
    }
    for vm in &judgement.foreign {
        tracing::error!(
            host = host.name(), %vm,
            "the host has a VM that the store does not know or knows an older epoch of; it is left alone"
        );
    }
    Ok(HeartbeatReply {
        peers: peers(&core.view()),
        number,
        lease_ms: LEASE_DURATION.as_millis() as u64,
        orders: judgement.orders,
    })
}

/// Addresses of all hosts, for networks that flood to each of them.
fn peers(view: &View) -> Peers {
    let addresses: BTreeSet<IpAddr> = view
        .hosts
        .values()
        .map(|host| host.facts.address.ip())
        .filter(|address| !address.is_unspecified())
        .collect();
    addresses.into_iter().collect()
}

/// A VM that began or ceased to stand still because of its storage.
#[derive(Debug)]
enum Stall {
    Began {
        vm: VmId,
        disk: String,
        detail: String,
    },
    Ended {
        vm: VmId,
    },
}

/// What differs from the report before.
fn stalls(before: &View, host: HostId, report: &HostReport) -> Vec<Stall> {
    let stall = |report: &VmReport| match &report.state {
        Some(VmmState::Paused {
            reason: PauseReason::Storage { disk, detail },
        }) => Some((disk.clone(), detail.clone())),
        _ => None,
    };
    let told = |vm: &VmReport| before.report_at(host, vm.vm).and_then(stall);
    let changes = report
        .vms
        .iter()
        .filter_map(|vm| match (told(vm), stall(vm)) {
            (None, Some((disk, detail))) => Some(Stall::Began {
                vm: vm.vm,
                disk,
                detail,
            }),
            (Some(_), None) if vm.state == Some(VmmState::Running) => {
                Some(Stall::Ended { vm: vm.vm })
            }
            _ => None,
        });
    changes.collect()
}

/// Tells the operator; the lease does not depend on it.
async fn tell_stalls(core: &Core, host: HostId, stalls: Vec<Stall>) {
    if stalls.is_empty() {
        return;
    }
    let tell = |view: &View, draft: &mut Draft<'_>| {
        let actor = Actor::controller();
        for stall in &stalls {
            let (Stall::Began { vm, .. } | Stall::Ended { vm }) = stall;
            let Some(vm) = view.vms.get(vm).filter(|vm| vm.owner == Some(host)) else {
                continue;
            };
            let subject = Subject::vm(vm.id, &vm.name);
            match stall {
                Stall::Began { disk, detail, .. } => {
                    let message = format!("{} stands still: its disk {disk}: {detail}", vm.name);
                    draft.error("vm.storage_full", subject, &actor, message);
                }
                Stall::Ended { .. } => {
                    let message = format!("{} goes on: its disks can be written again", vm.name);
                    draft.info("vm.storage_resumed", subject, &actor, message);
                }
            }
        }
        Ok(())
    };
    if let Err(problem) = core.ledger.change(tell).await {
        tracing::error!(%problem, "the events of stalled VMs could not be written");
    }
}

fn another_boot(host: &Host, boot: Uuid) -> Problem {
    let name = host.name();
    let detail = format!(
        "{name} was heard under boot {} a moment ago, this is boot {boot}",
        host.facts.boot_id
    );
    tracing::warn!(host = name, %detail, "a heartbeat of another boot is refused");
    Problem::conflict("duplicate-identity", detail).with_remedy(format!(
        "after a reboot of {name} just wait; if another machine has a copy of its state directory, join one of \
         the two anew with a state directory of its own"
    ))
}

/// What the host is told: the orders that follow from its report, and all that it still has to destroy.
fn look(core: &Core, id: HostId, report: &HostReport, standing: Standing) -> (u64, Judgement) {
    let (number, left_behind) = core.debts.reply(id, || core.ledger.left_behind(id));
    let mut judgement = judge(&core.view(), id, &report.vms, standing, |vm| {
        core.ledger.deleted(vm).map(|deleted| deleted.epoch)
    });
    let debts = left_behind
        .into_iter()
        .map(|(vm, epoch)| Order::Destroy { vm, epoch })
        .filter(|order| !judgement.orders.contains(order));
    let debts: Vec<Order> = debts.collect();
    judgement.orders.splice(0..0, debts);
    (number, judgement)
}

/// Writes off what the host has confirmed to have destroyed.
async fn settle(core: &Core, id: HostId, obeyed: u64) -> Result<(), Problem> {
    let paid = core.debts.paid(id, obeyed);
    if paid.is_empty() {
        return Ok(());
    }
    let settle = |view: &View, draft: &mut Draft<'_>| {
        for (vm, epoch) in &paid {
            let owed = |debts: &BTreeMap<HostId, Epoch>| debts.get(&id) == Some(epoch);
            if let Some(vm) = view.vms.get(vm).filter(|vm| owed(&vm.left_behind)) {
                let mut vm = vm.as_ref().clone();
                vm.left_behind.remove(&id);
                draft.put_vm(vm);
            }
            let deleted = core.ledger.deleted(*vm);
            if let Some(mut deleted) = deleted.filter(|deleted| owed(&deleted.left_behind)) {
                deleted.left_behind.remove(&id);
                draft.put_deleted(deleted);
            }
        }
        Ok(())
    };
    core.ledger.change(settle).await
}

fn differs(host: &Host, report: &HostReport) -> bool {
    let mut facts = report.facts.clone();
    facts.name.clone_from(&host.facts.name);
    facts != host.facts
}

/// What a heartbeat changes in the records: facts, the first word, a return, the end of everything by a reboot.
fn note_news(view: &View, draft: &mut Draft<'_>, id: HostId, report: &HostReport) {
    let Some(before) = view.hosts.get(&id) else {
        return;
    };
    let mut host = before.as_ref().clone();
    let (actor, subject) = (Actor::controller(), Subject::host(id, host.name()));
    let name = host.name().to_owned();
    let rebooted = host.facts.boot_id != report.facts.boot_id && host.first_heard_at.is_some();
    host.facts = report.facts.clone();
    // The name is the pool's: it was checked when the host joined.
    host.facts.name.clone_from(&name);
    if host.first_heard_at.is_none() {
        host.first_heard_at = Some(draft.now());
        draft.info(
            "host.up",
            subject.clone(),
            &actor,
            format!("{name} is part of the pool"),
        );
    } else if view.liveness(id).is_silent() {
        draft.info(
            "host.returned",
            subject.clone(),
            &actor,
            format!("{name} is back"),
        );
    }
    if rebooted {
        draft.warning(
            "host.rebooted",
            subject,
            &actor,
            format!("{name} has booted anew"),
        );
        for vm in view.vms_of(id).filter(|vm| vm.operation.is_none()) {
            // Whatever it reports was started after the boot and is no proof of an end.
            if report.vms.iter().all(|reported| reported.vm != vm.id) {
                let mut vm = vm.as_ref().clone();
                vm.owner = None;
                let message = format!("{} ended with the reboot of {name}", vm.name);
                draft.warning(
                    "vm.lost_host",
                    Subject::vm(vm.id, &vm.name),
                    &actor,
                    message,
                );
                draft.put_vm(vm);
            }
        }
        if let Some(record) = host.maintenance.and_then(|id| view.maintenances.get(&id))
            && record.state == MaintenanceState::Drained
        {
            let mut record = record.as_ref().clone();
            record.state = MaintenanceState::Working;
            draft.put_maintenance(record);
        }
    }
    if host != **before {
        draft.put_host(host);
    }
}

fn observe(core: &Core, id: HostId, beat: &Heartbeat) {
    let view = core.view();
    let mut vms: BTreeMap<VmId, VmReport> = beat
        .report
        .vms
        .iter()
        .map(|vm| (vm.vm, vm.clone()))
        .collect();
    core.ledger.observe(id, |observed| {
        for (id, vm) in &mut vms {
            keep_counters(observed.vms.get(id), vm);
        }
        let missing = missing(&view, id, observed, &vms);
        *observed = Observed {
            liveness: Liveness::Up,
            heard_at: Some(Timestamp::now()),
            incarnation: Some(beat.incarnation),
            usage: beat.report.usage,
            missing,
            vms,
            pools: beat.report.pools.iter().take(MAX_POOLS).cloned().collect(),
        };
        true
    });
}

/// Counters of devices do not come with every heartbeat: those from before stay. Never more than there can be.
fn keep_counters(before: Option<&VmReport>, vm: &mut VmReport) {
    match &mut vm.devices {
        Some(devices) => {
            devices.truncate(MAX_COUNTED);
            for device in devices {
                while device.counters.len() > MAX_COUNTED {
                    device.counters.pop_last();
                }
            }
        }
        None => {
            let same = before.filter(|before| before.epoch == vm.epoch && vm.state.is_some());
            vm.devices = same.and_then(|before| before.devices.clone());
        }
    }
}

/// Counts heartbeats in a row that lack a VM the host owns. While a command that creates or ends the VM is under
/// way nothing is counted: it may not have reached the host.
fn missing(
    view: &View,
    id: HostId,
    before: &Observed,
    vms: &BTreeMap<VmId, VmReport>,
) -> BTreeMap<VmId, u32> {
    let count = |vm: VmId| {
        before
            .missing
            .get(&vm)
            .copied()
            .unwrap_or(0)
            .saturating_add(1)
            .min(MISSING_HEARTBEATS)
    };
    let settled = |vm: &Vm| match vm
        .operation
        .and_then(|id| view.operations.get(&id))
        .map(|op| &op.work)
    {
        None | Some(Work::Migrate { .. } | Work::Start { placed: None, .. }) => true,
        Some(_) => false,
    };
    view.vms_of(id)
        .filter(|vm| settled(vm))
        .filter(|vm| vms.get(&vm.id).is_none_or(|report| report.epoch < vm.epoch))
        .map(|vm| (vm.id, count(vm.id)))
        .collect()
}
