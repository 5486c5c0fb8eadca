//! Whether a further migration begins, from what those that run leave of hosts and links.
//!
//! Too few leave a link idle while machines are built and state is handed over; too many share it, so that all of them
//! take longer and more is dirtied meanwhile. So a further one begins where those that run use clearly less than what is
//! known to fit. Before anything has been measured, a few begin.

use crate::model::limits::MAX_MIGRATIONS_PER_HOST;
use crate::plan::estimate::link_capacity;
use crate::plan::traffic::{Flow, flows};
use crate::view::View;
use godwit_wire::id::HostId;
use std::fmt;

/// A link that is used to this share of what it carries has no room for a further migration.
const FULL_PERCENT: u128 = 90;

/// How many may run at a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// As long as it is not known what they leave of the link.
    pub unmeasured: usize,
    /// At most.
    pub most: usize,
}

impl Crowd {
    /// `unmeasured` of them, at least one, before anything is known.
    pub fn new(unmeasured: usize) -> Self {
        let unmeasured = unmeasured.max(1);
        Self {
            unmeasured,
            most: unmeasured.max(MAX_MIGRATIONS_PER_HOST),
        }
    }
}

/// Where migrations get in each other's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// What a host sends.
    Sends(String),
    /// What a host receives.
    Receives(String),
    /// What goes from a host to a host.
    Link(String, String),
}

/// How a place is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Where.
    pub place: Place,
    /// Migrations there.
    pub running: usize,
    /// How many of them have told their rate.
    pub measured: usize,
    /// What these send, in bytes per second.
    pub bytes_per_s: u64,
    /// What is known to fit, in bytes per second.
    pub capacity: Option<u64>,
}

/// Why a migration does not begin yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// As many run there as may at all.
    Crowded {
        /// Where.
        place: Place,
        /// How many.
        running: usize,
    },
    /// Those that run use it up.
    Full {
        /// Where.
        place: Place,
        /// What they send, in bytes per second.
        bytes_per_s: u64,
        /// What fits, in bytes per second.
        capacity: u64,
    },
    /// It is not known yet what those that run leave.
    Unmeasured {
        /// Where.
        place: Place,
        /// How many run.
        running: usize,
    },
    /// Something that the VM needs is busy.
    Disk {
        /// Its name.
        name: String,
    },
}

/// Whether one more may begin at a place.
pub fn admit(here: &Use, crowd: Crowd) -> Result<(), Wait> {
    let place = || here.place.clone();
    let running = here.running;
    if running == 0 {
        return Ok(());
    }
    if running >= crowd.most {
        return Err(Wait::Crowded {
            place: place(),
            running,
        });
    }
    if let Some(capacity) = here.capacity
        && u128::from(here.bytes_per_s) * 100 >= u128::from(capacity) * FULL_PERCENT
    {
        return Err(Wait::Full {
            place: place(),
            bytes_per_s: here.bytes_per_s,
            capacity,
        });
    }
    if running < crowd.unmeasured || here.capacity.is_some() && here.measured == running {
        return Ok(());
    }
    Err(Wait::Unmeasured {
        place: place(),
        running,
    })
}

/// Whether a migration between two hosts may begin.
pub fn begins(view: &View, source: HostId, target: HostId, crowd: Crowd) -> Result<(), Wait> {
    let all = flows(view);
    admit(&sending(view, &all, source), crowd)?;
    admit(&receiving(view, &all, target), crowd)?;
    admit(&between(view, &all, source, target), crowd)
}

/// How a host is used by what it sends.
pub fn sends(view: &View, host: HostId) -> Use {
    sending(view, &flows(view), host)
}

/// How a host is used by what it receives.
pub fn receives(view: &View, host: HostId) -> Use {
    receiving(view, &flows(view), host)
}

/// Whether one more move may begin at a place, when `begun` of them have begun already: one that is not a migration yet
/// will be one.
pub fn another(here: &Use, begun: usize, crowd: Crowd) -> bool {
    let here = Use {
        running: here.running.max(begun),
        ..here.clone()
    };
    admit(&here, crowd).is_ok()
}

fn sending(view: &View, all: &[Flow], host: HostId) -> Use {
    let place = Place::Sends(view.host_name(host));
    let limit = view.hosts.get(&host).and_then(|h| h.migration_bandwidth);
    let learned = link_capacity(view, |m| m.source == host);
    let counted = |flow: &Flow| flow.source == host;
    used(
        place,
        all,
        |flow| flow.touches(host),
        counted,
        (limit, learned),
    )
}

fn receiving(view: &View, all: &[Flow], host: HostId) -> Use {
    let place = Place::Receives(view.host_name(host));
    let limit = view.hosts.get(&host).and_then(|h| h.migration_bandwidth);
    let learned = link_capacity(view, |m| m.target == host);
    let counted = |flow: &Flow| flow.target == host;
    used(
        place,
        all,
        |flow| flow.touches(host),
        counted,
        (limit, learned),
    )
}

fn between(view: &View, all: &[Flow], source: HostId, target: HostId) -> Use {
    let place = Place::Link(view.host_name(source), view.host_name(target));
    let limit = view.link_bandwidth(source, target);
    let learned = link_capacity(view, |m| m.source == source && m.target == target);
    let counted = |flow: &Flow| flow.source == source && flow.target == target;
    used(place, all, counted, counted, (limit, learned))
}

/// Who `runs` at a place takes part of its hosts; who is `counted` sends over it.
fn used(
    place: Place,
    all: &[Flow],
    runs: impl Fn(&Flow) -> bool,
    counted: impl Fn(&Flow) -> bool,
    (limit, learned): (Option<u64>, Option<u64>),
) -> Use {
    let here = || all.iter().filter(|flow| runs(flow));
    let rates = all.iter().filter(|flow| counted(flow));
    Use {
        place,
        running: here().count(),
        measured: here().filter(|flow| flow.bytes_per_s.is_some()).count(),
        bytes_per_s: rates
            .filter_map(|flow| flow.bytes_per_s)
            .fold(0, u64::saturating_add),
        capacity: match (limit, learned) {
            (Some(limit), Some(learned)) => Some(limit.min(learned)),
            (limit, learned) => limit.or(learned),
        },
    }
}

impl Wait {
    /// What it has to do with: the same reason with other numbers is no news.
    pub fn topic(&self) -> (&'static str, String) {
        match self {
            Self::Crowded { place, .. } => ("crowded", place.to_string()),
            Self::Full { place, .. } => ("full", place.to_string()),
            Self::Unmeasured { place, .. } => ("unmeasured", place.to_string()),
            Self::Disk { name } => ("disk", name.clone()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sends(host) => write!(f, "{host} already sends"),
            Self::Receives(host) => write!(f, "{host} already receives"),
            Self::Link(from, to) => write!(f, "the link from {from} to {to} already carries"),
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crowded { place, running } => {
                write!(f, "{place} {running} VMs, the most at the same time")
            }
            Self::Full {
                place,
                bytes_per_s,
                capacity,
            } => write!(f, "{place} at {}", of_rates(*bytes_per_s, *capacity)),
            Self::Unmeasured { place, running } => write!(
                f,
                "{place} {running} VMs, and it is not known yet what they leave of the link"
            ),
            Self::Disk { name } => write!(f, "the disk {name} is busy"),
        }
    }
}

/// "9.1 of 9.4 Gbit/s": links are known by their bits, and both numbers in the same unit.
fn of_rates(used: u64, capacity: u64) -> String {
    let bits = |bytes: u64| bytes as f64 * 8.0;
    let (unit, name) = match bits(capacity) {
        bits if bits >= 1e9 => (1e9, "Gbit/s"),
        _ => (1e6, "Mbit/s"),
    };
    format!(
        "{:.1} of {:.1} {name}",
        bits(used) / unit,
        bits(capacity) / unit
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CROWD: Crowd = Crowd {
        unmeasured: 2,
        most: 8,
    };

    fn with(running: usize, measured: usize, used: u64, capacity: Option<u64>) -> Use {
        Use {
            place: Place::Sends("host-1".into()),
            running,
            measured,
            bytes_per_s: used,
            capacity,
        }
    }

    fn says(here: &Use) -> String {
        admit(here, CROWD).map_or_else(|wait| wait.to_string(), |()| "begins".into())
    }

    #[test]
    fn a_further_one_begins_as_long_as_the_link_is_under_used() {
        for running in 1..8 {
            assert_eq!(says(&with(running, running, 89, Some(100))), "begins");
        }
        assert_eq!(
            says(&with(8, 8, 10, Some(100))),
            "host-1 already sends 8 VMs, the most at the same time"
        );
    }

    #[test]
    fn a_link_that_is_used_up_is_named_with_what_it_carries() {
        let used = with(1, 1, 1_137_500_000, Some(1_175_000_000));
        assert_eq!(says(&used), "host-1 already sends at 9.1 of 9.4 Gbit/s");
        let slow = with(1, 1, 12_000_000, Some(12_500_000));
        assert_eq!(says(&slow), "host-1 already sends at 96.0 of 100.0 Mbit/s");
    }

    #[test]
    fn before_anything_is_measured_a_few_begin() {
        assert_eq!(says(&with(1, 0, 0, None)), "begins");
        assert_eq!(says(&with(1, 0, 0, Some(100))), "begins");
        let unknown =
            "host-1 already sends 2 VMs, and it is not known yet what they leave of the link";
        assert_eq!(says(&with(2, 0, 0, None)), unknown);
        assert_eq!(says(&with(2, 1, 40, Some(100))), unknown);
        // Measured, but nobody knows what would fit.
        assert_eq!(says(&with(2, 2, 40, None)), unknown);
    }

    proptest! {
        #[test]
        fn an_idle_place_always_takes_one_and_none_takes_more_than_the_most(
            running in 0usize..20, measured in 0usize..20, used in any::<u64>(), capacity in prop::option::of(any::<u64>()),
        ) {
            let admitted = admit(&with(running, measured.min(running), used, capacity), CROWD).is_ok();
            if running == 0 {
                prop_assert!(admitted);
            }
            if running >= CROWD.most {
                prop_assert!(!admitted);
            }
        }
    }
}
