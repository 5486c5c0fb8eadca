//! A simulated agent: it heartbeats, and obeys what the server answers.

use super::SimHost;
use crate::simulation::storage::SimPool;
use godwit_wire::host_api::{Heartbeat, HeartbeatReply, HostReport, Order};
use godwit_wire::id::VmId;
use godwit_wire::usage::HostUsage;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Sends a heartbeat after the other, sooner where there is news or a migration.
pub(super) async fn beat_for_ever(host: Arc<SimHost>) {
    loop {
        host.answering().await;
        let (beat, incarnation, sent, busy) = {
            let mut state = host.state();
            state.sequence += 1;
            let ids: Vec<VmId> = if state.hides {
                Vec::new()
            } else {
                state.vms.keys().copied().collect()
            };
            let beat = Heartbeat {
                obeyed: state.obeyed,
                host: host.id,
                incarnation: state.incarnation,
                sequence: state.sequence,
                report: HostReport {
                    pools: state.pools.iter().map(SimPool::report).collect(),
                    facts: state.facts.clone(),
                    usage: HostUsage::default(),
                    vms: ids.into_iter().filter_map(|id| state.report(id)).collect(),
                },
            };
            let busy = state
                .vms
                .values()
                .any(|vm| vm.migration.as_ref().is_some_and(|m| !m.phase.is_final()));
            (beat, state.incarnation, Instant::now(), busy)
        };
        let id = host.id;
        let reply = host
            .ask_server(|agents| async move { agents.heartbeat(id, beat).await })
            .await;
        host.answering().await;
        // What a former process was answered is lost with it.
        let same_process = host.state().incarnation == incarnation;
        if let Some(reply) = reply
            && same_process
        {
            obey(&host, sent, &reply);
        }
        let pause = Duration::from_millis(if busy { 250 } else { 1_000 });
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = host.poke.notified() => {}
        }
    }
}

/// Destructions, then the lease, then resumptions.
fn obey(host: &SimHost, sent: Instant, reply: &HeartbeatReply) {
    let mut state = host.state();
    for order in &reply.orders {
        if let Order::Destroy { vm, epoch } = order {
            state.destroy(*vm, *epoch);
        }
    }
    let until = sent + Duration::from_millis(reply.lease_ms);
    state.lease_until = Some(state.lease_until.map_or(until, |known| known.max(until)));
    let held = state.lease_held(Instant::now());
    for order in &reply.orders {
        if let Order::Resume { vm, epoch } = order
            && let Some(known) = state.vms.get_mut(vm).filter(|known| known.epoch == *epoch)
            && known.state
                == Some(VmmState::Paused {
                    reason: PauseReason::LeaseExpired,
                })
        {
            let _ = known.run(held);
        }
    }
    state.obeyed = reply.number;
}
