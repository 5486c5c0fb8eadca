//! How the bandwidth that operators give to migrations is divided among those that run: max-min fair, so that nobody gets
//! less than another for whom the same limit is the narrowest, and what one cannot use goes to the others
//! (Bertsekas and Gallager, Data Networks, section 6.5.2).

use crate::model::Migration;
use crate::model::limits::LEAST_MIGRATION_BANDWIDTH;
use crate::plan::traffic::{Flow, flows};
use crate::view::View;
use godwit_wire::id::{HostId, MigrationId};
use std::collections::BTreeMap;

/// What several migrations may have to share. Both ways of a host and of a link count for themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Resource {
    /// What a host sends.
    Out(HostId),
    /// What a host receives.
    In(HostId),
    /// What goes from a host to a host.
    Link(HostId, HostId),
    /// What a migration's own policy allows.
    Own(MigrationId),
}

/// Limits that operators have set, in bytes per second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of hosts: for what they send, and as much for what they receive.
    pub hosts: BTreeMap<HostId, u64>,
    /// Of links, from a host to a host.
    pub links: BTreeMap<(HostId, HostId), u64>,
}

impl Limits {
    /// Those that matter to these migrations.
    fn of(view: &View, flows: &[Flow]) -> Self {
        let mut limits = Self::default();
        for flow in flows {
            for host in [flow.source, flow.target] {
                let limit = view.hosts.get(&host).and_then(|h| h.migration_bandwidth);
                limits.hosts.extend(limit.map(|limit| (host, limit)));
            }
            let limit = view.link_bandwidth(flow.source, flow.target);
            let link = (flow.source, flow.target);
            limits.links.extend(limit.map(|limit| (link, limit)));
        }
        limits
    }

    fn of_resource(&self, resource: Resource, flow: &Flow) -> Option<u64> {
        match resource {
            Resource::Out(host) | Resource::In(host) => self.hosts.get(&host).copied(),
            Resource::Link(from, to) => self.links.get(&(from, to)).copied(),
            Resource::Own(_) => flow.limit,
        }
    }
}

const fn resources(flow: &Flow) -> [Resource; 4] {
    [
        Resource::Out(flow.source),
        Resource::In(flow.target),
        Resource::Link(flow.source, flow.target),
        Resource::Own(flow.migration),
    ]
}

/// What each migration may send, in bytes per second; `None` where nothing limits it. However many there are, each gets
/// [`LEAST_MIGRATION_BANDWIDTH`].
pub fn shares(flows: &[Flow], limits: &Limits) -> BTreeMap<MigrationId, Option<u64>> {
    let mut left: BTreeMap<Resource, u64> = BTreeMap::new();
    for flow in flows {
        let limited = resources(flow)
            .into_iter()
            .filter_map(|resource| Some((resource, limits.of_resource(resource, flow)?)));
        left.extend(limited);
    }
    let mut shares = BTreeMap::new();
    let mut waiting: Vec<&Flow> = flows.iter().collect();
    // Each turn settles those that use the resource which is full first, when all that wait get more alike.
    while let Some((each, narrowest)) = first_full(&left, &waiting) {
        let (bound, free): (Vec<&Flow>, Vec<&Flow>) = waiting
            .into_iter()
            .partition(|flow| resources(flow).contains(&narrowest));
        for flow in bound {
            let share = each.max(LEAST_MIGRATION_BANDWIDTH);
            shares.insert(flow.migration, Some(share));
            for resource in resources(flow) {
                if let Some(left) = left.get_mut(&resource) {
                    *left = left.saturating_sub(each);
                }
            }
        }
        waiting = free;
    }
    shares.extend(waiting.into_iter().map(|flow| (flow.migration, None)));
    shares
}

fn first_full(left: &BTreeMap<Resource, u64>, waiting: &[&Flow]) -> Option<(u64, Resource)> {
    let divided = left.iter().filter_map(|(resource, left)| {
        let users = waiting
            .iter()
            .filter(|flow| resources(flow).contains(resource))
            .count();
        let each = left.checked_div(users as u64)?;
        Some((each, *resource))
    });
    divided.min()
}

/// What a migration that runs may send, beside those that run with it.
pub fn share(view: &View, migration: &Migration) -> Option<u64> {
    let flow = Flow {
        migration: migration.id,
        source: migration.source,
        target: migration.target,
        limit: migration.policy.max_bandwidth_bytes_per_s,
        bytes_per_s: None,
    };
    share_of(view, flow, None)
}

/// What one that began now would be allowed to send. `instead_of` is what it would replace: itself, if it runs already.
pub fn share_of(view: &View, flow: Flow, instead_of: Option<MigrationId>) -> Option<u64> {
    // Without a limit where it runs, it does not matter who else does.
    if Limits::of(view, &[flow]) == Limits::default() {
        return flow.limit;
    }
    let mut all = flows(view);
    all.retain(|other| {
        let itself = other.migration == flow.migration || Some(other.migration) == instead_of;
        !itself && !other.has_sent()
    });
    all.push(flow);
    let limits = Limits::of(view, &all);
    shares(&all, &limits)
        .get(&flow.migration)
        .copied()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    const MIB: u64 = 1 << 20;

    fn host(number: u8) -> HostId {
        HostId(Uuid::from_u128(number.into()))
    }

    fn id(number: u8) -> MigrationId {
        MigrationId(Uuid::from_u128(number.into()))
    }

    fn flow(number: u8, source: u8, target: u8, limit: Option<u64>) -> Flow {
        Flow {
            migration: id(number),
            source: host(source),
            target: host(target),
            limit,
            bytes_per_s: None,
        }
    }

    fn limits(hosts: &[(u8, u64)], links: &[(u8, u8, u64)]) -> Limits {
        Limits {
            hosts: hosts.iter().map(|(h, limit)| (host(*h), *limit)).collect(),
            links: links
                .iter()
                .map(|(from, to, limit)| ((host(*from), host(*to)), *limit))
                .collect(),
        }
    }

    #[test]
    fn without_limits_nobody_is_held_back_but_by_its_own() {
        let flows = [flow(1, 1, 2, None), flow(2, 1, 2, Some(5 * MIB))];
        let shares = shares(&flows, &Limits::default());
        assert_eq!((shares[&id(1)], shares[&id(2)]), (None, Some(5 * MIB)));
    }

    #[test]
    fn migrations_from_the_same_host_share_its_limit() {
        let flows = [flow(1, 1, 2, None), flow(2, 1, 3, None)];
        let shares = shares(&flows, &limits(&[(1, 100 * MIB)], &[]));
        assert_eq!(shares[&id(1)], Some(50 * MIB));
        assert_eq!(shares[&id(2)], Some(50 * MIB));
    }

    #[test]
    fn what_one_cannot_use_goes_to_the_other() {
        let flows = [flow(1, 1, 2, None), flow(2, 1, 3, None)];
        let shares = shares(&flows, &limits(&[(1, 100 * MIB)], &[(1, 2, 20 * MIB)]));
        assert_eq!(shares[&id(1)], Some(20 * MIB));
        assert_eq!(shares[&id(2)], Some(80 * MIB));
    }

    #[test]
    fn what_a_host_sends_does_not_count_against_what_it_receives() {
        let flows = [flow(1, 1, 2, None), flow(2, 2, 1, None)];
        let shares = shares(&flows, &limits(&[(1, 100 * MIB)], &[]));
        assert_eq!(shares[&id(1)], Some(100 * MIB));
        assert_eq!(shares[&id(2)], Some(100 * MIB));
    }

    fn any_flows() -> impl Strategy<Value = Vec<Flow>> {
        let one = (1u8..5, 1u8..5, prop::option::of(1u64..200));
        prop::collection::vec(one, 1..10).prop_map(|flows| {
            let numbered = flows.into_iter().enumerate();
            numbered
                .filter(|(_, (source, target, _))| source != target)
                .map(|(n, (source, target, limit))| {
                    flow(n as u8, source, target, limit.map(|limit| limit * MIB))
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn no_limit_is_exceeded_and_no_migration_is_left_out(
            flows in any_flows(),
            per_host in prop::collection::btree_map(1u8..5, 20u64..1000, 0..5),
        ) {
            let per_host: Vec<_> = per_host.into_iter().map(|(h, limit)| (h, limit * MIB)).collect();
            let limits = limits(&per_host, &[]);
            let shares = shares(&flows, &limits);
            prop_assert_eq!(shares.len(), flows.len());
            for (host, limit) in &limits.hosts {
                for end in [|flow: &Flow| flow.source, |flow: &Flow| flow.target] {
                    let users: Vec<_> = flows.iter().filter(|flow| end(flow) == *host).collect();
                    let sum: u64 = users.iter().filter_map(|flow| shares[&flow.migration]).sum();
                    prop_assert!(sum <= *limit, "{} of {}", sum, limit);
                    prop_assert!(users.iter().all(|flow| shares[&flow.migration].is_some()));
                }
            }
            for flow in &flows {
                if let (Some(own), Some(share)) = (flow.limit, shares[&flow.migration]) {
                    prop_assert!(share <= own);
                }
            }
        }
    }
}
