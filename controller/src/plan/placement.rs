//! Where a VM goes: filters that turn hosts down by name, then a score on room left and measured CPU.

use crate::model::{HostRejection, HostState, Rejection};
use crate::plan::along::destinations;
use crate::plan::picture::{Demand, HostPicture, Hosts};
use godwit_wire::id::HostId;
use std::collections::BTreeSet;

/// The outcome for one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The best host and its score, 0 to 1; `None` when every host was turned down.
    pub best: Option<(HostId, f64)>,
    /// Hosts that were turned down.
    pub rejections: Vec<HostRejection>,
}

/// Which hosts are considered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Among<'a> {
    /// Only this one.
    pub only: Option<HostId>,
    /// Not these: they have just failed with this VM.
    pub failed: &'a [HostId],
}

/// Chooses among `hosts`; ties go to the smaller id, so that the same picture gives the same answer.
pub fn choose(hosts: &Hosts, demand: &Demand, among: Among<'_>) -> Choice {
    let failed: BTreeSet<HostId> = among.failed.iter().copied().collect();
    let mut choice = Choice {
        best: None,
        rejections: Vec::new(),
    };
    for host in hosts
        .values()
        .filter(|host| among.only.is_none_or(|only| only == host.id))
    {
        let verdict = if failed.contains(&host.id) {
            Err(Rejection::JustFailed)
        } else {
            admit(host, demand)
        };
        match verdict {
            Err(rejection) => choice.rejections.push(HostRejection {
                host: host.id,
                host_name: host.name.clone(),
                rejection,
            }),
            Ok(()) => {
                let score = score(host, demand);
                if choice.best.is_none_or(|(_, best)| score > best) {
                    choice.best = Some((host.id, score));
                }
            }
        }
    }
    choice
}

/// Whether `host` takes the VM; the first reason against it otherwise.
pub fn admit(host: &HostPicture, demand: &Demand) -> Result<(), Rejection> {
    if demand.here == Some(host.id) {
        return Err(Rejection::AlreadyHere);
    }
    if host.state != HostState::Up {
        return Err(Rejection::NotUp { state: host.state });
    }
    if !host.heard {
        return Err(Rejection::Silent);
    }
    host.cpu
        .admits(demand.baseline, demand.running_on.as_deref())
        .map_err(|mismatch| Rejection::Cpu { mismatch })?;
    storage(host, demand)?;
    room(host, demand)
}

/// Whether `host` can use every storage pool that the VM's disks are in, or takes the disks along.
pub fn storage(host: &HostPicture, demand: &Demand) -> Result<(), Rejection> {
    for (pool, name) in &demand.pools {
        let (pool, name) = (*pool, name.clone());
        let Some(seen) = host.pools.get(&pool) else {
            match (&demand.along, demand.here) {
                (Some(_), _) => continue,
                (None, Some(_)) => return Err(Rejection::DisksStay { pool, name }),
                (None, None) => return Err(Rejection::NoPool { pool, name }),
            }
        };
        if let Some(trouble) = seen.trouble.clone() {
            return Err(Rejection::PoolInTrouble {
                pool,
                name,
                trouble,
            });
        }
    }
    match &demand.along {
        Some(along) => destinations(&host.pools, along).map(|_| ()),
        None => Ok(()),
    }
}

/// Whether `host` has room for the VM, whatever else may speak against it.
pub fn room(host: &HostPicture, demand: &Demand) -> Result<(), Rejection> {
    if host.memory_free() < demand.memory {
        return Err(Rejection::Memory {
            needed: demand.memory,
            free: host.memory_free(),
            capacity: host.memory,
        });
    }
    if host.vcpus_committed.saturating_add(demand.vcpus) > host.vcpu_limit() {
        return Err(Rejection::Vcpus {
            needed: demand.vcpus,
            committed: host.vcpus_committed,
            limit: host.vcpu_limit(),
        });
    }
    if host.vms >= host.vm_limit() {
        return Err(Rejection::TooManyVms {
            count: host.vms,
            limit: host.vm_limit(),
        });
    }
    Ok(())
}

/// 0 to 1: half for the share of memory that stays free, half for the share of CPU that stays idle.
pub fn score(host: &HostPicture, demand: &Demand) -> f64 {
    let capacity = host.memory.0.max(1) as f64;
    let memory_left = host.memory_free().0.saturating_sub(demand.memory.0) as f64 / capacity;
    let busy = host.cpu_percent + demand.cpu_percent / f64::from(host.cores.max(1));
    let idle = (1.0 - busy / 100.0).clamp(0.0, 1.0);
    (memory_left + idle) / 2.0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::along::PoolPicture;
    use godwit_wire::id::{PoolId, VmId};
    use godwit_wire::machine::{CpuBaseline, CpuFacts};
    use godwit_wire::unit::Mib;
    use proptest::prelude::*;
    use uuid::Uuid;

    pub(crate) fn host(number: u128, memory: u64, cores: u32) -> HostPicture {
        HostPicture {
            id: HostId(Uuid::from_u128(number)),
            name: format!("host-{number}"),
            state: HostState::Up,
            heard: true,
            cpu: CpuFacts {
                level: CpuBaseline::V3,
                signature: "s".into(),
                model: "m".into(),
            },
            cores,
            memory: Mib(memory),
            memory_committed: Mib(0),
            vcpus_committed: 0,
            vms: 0,
            cpu_percent: 0.0,
            pools: Default::default(),
        }
    }

    pub(crate) fn demand(number: u128, memory: u64, vcpus: u32) -> Demand {
        Demand {
            vm: VmId(Uuid::from_u128(number)),
            name: format!("vm-{number}"),
            memory: Mib(memory),
            vcpus,
            baseline: CpuBaseline::V2,
            running_on: None,
            here: None,
            cpu_percent: 0.0,
            pools: Default::default(),
            along: None,
        }
    }

    fn pool(hosts: impl IntoIterator<Item = HostPicture>) -> Hosts {
        hosts.into_iter().map(|host| (host.id, host)).collect()
    }

    #[test]
    fn the_emptier_host_wins_and_the_busier_loses() {
        let mut busy = host(1, 4096, 4);
        busy.cpu_percent = 90.0;
        let mut full = host(2, 4096, 4);
        full.memory_committed = Mib(3000);
        let free = host(3, 4096, 4);
        let chosen = choose(
            &pool([busy, full, free.clone()]),
            &demand(1, 512, 1),
            Among::default(),
        );
        assert_eq!(chosen.best.map(|(id, _)| id), Some(free.id));
    }

    #[test]
    fn every_rejection_names_its_operands() {
        let mut cordoned = host(1, 4096, 4);
        cordoned.state = HostState::Cordoned;
        let small = host(2, 100, 4);
        let mut crowded = host(3, 4096, 1);
        crowded.vcpus_committed = 8;
        let mut silent = host(4, 4096, 4);
        silent.heard = false;
        let mut old = host(5, 4096, 4);
        old.cpu.level = CpuBaseline::V2;
        let mut wanted = demand(1, 512, 1);
        wanted.baseline = CpuBaseline::V3;
        let chosen = choose(
            &pool([cordoned, small, crowded, silent, old]),
            &wanted,
            Among::default(),
        );
        assert_eq!(chosen.best, None);
        expect_test::expect![[r#"
            host-1: the host is cordoned; host-2: 512 MiB needed, 100 MiB of 100 MiB free; host-3: 1 vCPUs needed, 8 of 8 promised already; host-4: heartbeats of the host are missing; host-5: the guest needs x86-64-v3 and the host offers x86-64-v2"#]]
        .assert_eq(&crate::model::rejection::summary(&chosen.rejections));
        assert!(
            chosen
                .rejections
                .iter()
                .all(|r| !r.rejection.remedy().is_empty())
        );
    }

    #[test]
    fn a_host_without_the_pool_of_a_disk_is_turned_down_by_its_name() {
        let pool_id = PoolId(Uuid::from_u128(7));
        let mut sees = host(1, 4096, 4);
        sees.pools.insert(pool_id, Default::default());
        let mut troubled = host(2, 8192, 4);
        let trouble = PoolPicture {
            trouble: Some("the file system is read-only".into()),
            ..Default::default()
        };
        troubled.pools.insert(pool_id, trouble);
        let blind = host(3, 8192, 4);
        let mut wanted = demand(1, 512, 1);
        wanted.pools.insert(pool_id, "fast".into());
        let chosen = choose(
            &pool([sees.clone(), troubled, blind]),
            &wanted,
            Among::default(),
        );
        assert_eq!(chosen.best.map(|(id, _)| id), Some(sees.id));
        expect_test::expect!["host-2: the host cannot use the storage pool fast: the file system is read-only; host-3: the host does not have the storage pool fast"]
            .assert_eq(&crate::model::rejection::summary(&chosen.rejections));
    }

    fn any_host() -> impl Strategy<Value = HostPicture> {
        let state = prop::sample::select(vec![
            HostState::Up,
            HostState::Up,
            HostState::Up,
            HostState::Cordoned,
            HostState::Maintenance,
            HostState::Unreachable,
            HostState::Joining,
        ]);
        (
            1u128..1_000,
            64u64..16_384,
            1u32..16,
            state,
            any::<bool>(),
            0.0f64..100.0,
        )
            .prop_map(
                |(number, memory, cores, state, heard, cpu_percent)| HostPicture {
                    state,
                    heard,
                    cpu_percent,
                    ..host(number, memory, cores)
                },
            )
    }

    pub(crate) fn any_pool() -> impl Strategy<Value = Hosts> {
        prop::collection::vec(any_host(), 0..8).prop_map(pool)
    }

    pub(crate) fn any_demands() -> impl Strategy<Value = Vec<Demand>> {
        prop::collection::vec((16u64..4_096, 1u32..=8), 0..30).prop_map(|sizes| {
            sizes
                .into_iter()
                .enumerate()
                .map(|(n, (memory, vcpus))| demand(n as u128, memory, vcpus))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn no_sequence_of_placements_overcommits_or_uses_a_host_that_is_not_up(
            hosts in any_pool(), demands in any_demands()
        ) {
            let mut hosts = hosts;
            for demand in &demands {
                let chosen = choose(&hosts, demand, Among::default());
                prop_assert_eq!(&chosen, &choose(&hosts, demand, Among::default()), "deterministic");
                let Some((id, score)) = chosen.best else {
                    prop_assert_eq!(chosen.rejections.len(), hosts.len(), "each host has a named rejection");
                    continue;
                };
                prop_assert!((0.0..=1.0).contains(&score));
                let host = hosts.get_mut(&id).unwrap();
                prop_assert!(host.state == HostState::Up && host.heard);
                host.add(demand);
                prop_assert!(host.memory_committed <= host.memory);
                prop_assert!(host.vcpus_committed <= host.vcpu_limit());
            }
        }
    }
}
