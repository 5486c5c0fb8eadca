//! What migrations may use of hosts and links.

use super::Decision;
use super::host::find_host;
use crate::intent::{BandwidthLimit, HostChange, Resource};
use crate::ledger::Draft;
use crate::model::limits::LEAST_MIGRATION_BANDWIDTH;
use crate::model::{Actor, Host, Subject};
use crate::view::View;
use godwit_wire::id::HostId;
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::unit::Bytes;
use std::collections::BTreeMap;

pub(super) fn change(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    change: &HostChange,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let host = find_host(view, id)?;
    let problems = problems(view, &host, change);
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    let mut touched = BTreeMap::from([(id, host.clone())]);
    let mut changed = Vec::new();
    if let Some(limit) = change.migration_bandwidth {
        let new = bytes_per_s(limit);
        if new != host.migration_bandwidth {
            changed.push(format!("migrations may send {} each way", words(new)));
            touched.insert(
                id,
                Host {
                    migration_bandwidth: new,
                    ..host.clone()
                },
            );
        }
    }
    for (other, limit) in &change.link_bandwidth {
        let new = bytes_per_s(*limit);
        if new == view.link_bandwidth(id, *other) {
            continue;
        }
        changed.push(format!(
            "the link to {} may carry {} of migrations each way",
            view.host_name(*other),
            words(new)
        ));
        let (keeper, end) = (id.min(*other), id.max(*other));
        let record = match touched.remove(&keeper) {
            Some(record) => record,
            None => find_host(view, keeper)?,
        };
        touched.insert(keeper, with_link(record, end, new));
    }
    if changed.is_empty() {
        return Ok(Decision::new(Resource::Host(id), None, "nothing changes"));
    }
    let effect = format!("{}: {}", host.name(), changed.join(", "));
    draft.info(
        "host.changed",
        Subject::host(id, host.name()),
        actor,
        &effect,
    );
    for host in touched.into_values() {
        draft.put_host(host);
    }
    Ok(Decision::new(Resource::Host(id), None, effect))
}

fn with_link(mut host: Host, end: HostId, limit: Option<u64>) -> Host {
    match limit {
        Some(limit) => host.link_bandwidth.insert(end, limit),
        None => host.link_bandwidth.remove(&end),
    };
    host
}

const fn bytes_per_s(limit: BandwidthLimit) -> Option<u64> {
    match limit {
        BandwidthLimit::None => None,
        BandwidthLimit::BytesPerS(limit) => Some(limit),
    }
}

fn words(limit: Option<u64>) -> String {
    limit.map_or_else(
        || "as much as there is".into(),
        |limit| format!("{}/s", Bytes(limit)),
    )
}

fn problems(view: &View, host: &Host, change: &HostChange) -> Vec<FieldProblem> {
    let own = change.migration_bandwidth.into_iter();
    let own = own.filter_map(|limit| too_little("migration_bandwidth_bytes_per_s", limit));
    let links = change.link_bandwidth.iter().filter_map(|(other, limit)| {
        if *other == host.id {
            return Some(FieldProblem::new(
                "link_bandwidth",
                format!("{} is both ends of this link", host.name()),
                "name another host, or limit the host itself",
            ));
        }
        if !view.hosts.contains_key(other) {
            return Some(FieldProblem::new(
                "link_bandwidth",
                format!("there is no host {other}"),
                "name a host of the pool",
            ));
        }
        too_little("link_bandwidth", *limit)
    });
    own.chain(links).collect()
}

fn too_little(field: &str, limit: BandwidthLimit) -> Option<FieldProblem> {
    let limit = bytes_per_s(limit).filter(|limit| *limit < LEAST_MIGRATION_BANDWIDTH)?;
    Some(FieldProblem::new(
        field,
        format!("{limit} is less than {LEAST_MIGRATION_BANDWIDTH}"),
        "allow at least 1 MiB per second, or 0 for no limit",
    ))
}

/// What is left of a host's links when it leaves the pool.
pub(super) fn forget_links(view: &View, draft: &mut Draft<'_>, gone: HostId) {
    let keepers = view
        .hosts
        .values()
        .filter(|host| host.link_bandwidth.contains_key(&gone));
    for keeper in keepers {
        draft.put_host(with_link(keeper.as_ref().clone(), gone, None));
    }
}
