//! What migrations send at an instant, and between whom.

use crate::model::Migration;
use crate::view::View;
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::MigrationPhase;

/// A migration under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Which.
    pub migration: MigrationId,
    /// From where.
    pub source: HostId,
    /// To where.
    pub target: HostId,
    /// Most bytes per second that its own policy allows.
    pub limit: Option<u64>,
    /// Bytes per second that its source has measured; `None` while it has not or is silent, 0 when everything is sent.
    pub bytes_per_s: Option<u64>,
}

impl Flow {
    /// Whether its source said that it has sent everything, or will not. One that is silent, or whose link broke, says no
    /// such thing: it may still send, or go on.
    pub fn has_sent(&self) -> bool {
        self.bytes_per_s == Some(0)
    }

    /// Whether a host is one of its ends.
    pub fn touches(&self, host: HostId) -> bool {
        self.source == host || self.target == host
    }
}

/// All of them.
pub fn flows(view: &View) -> Vec<Flow> {
    view.moving().map(|record| flow(view, record)).collect()
}

fn flow(view: &View, record: &Migration) -> Flow {
    let figures = view.migration_figures(record);
    let measured = match figures.phase {
        None | Some(MigrationPhase::Connecting) => None,
        Some(MigrationPhase::PreCopy | MigrationPhase::Blackout | MigrationPhase::PostCopy) => {
            // What a source measured before it fell silent, or before its link broke, is not what it sends now.
            let measured = Some(figures.progress.rate_bytes_per_s);
            measured.filter(|rate| *rate > 0 && sends(view, record))
        }
        // Everything has been sent, or will not be.
        Some(_) => Some(0),
    };
    Flow {
        migration: record.id,
        source: record.source,
        target: record.target,
        limit: record.policy.max_bandwidth_bytes_per_s,
        bytes_per_s: measured,
    }
}

/// Whether the source is heard and has a connection to send over.
fn sends(view: &View, record: &Migration) -> bool {
    let status = view
        .report_at(record.source, record.vm)
        .and_then(|report| report.migration.as_ref())
        .filter(|status| status.migration == record.id);
    let connected = status.is_none_or(|status| status.connected);
    connected && !view.liveness(record.source).is_silent()
}
