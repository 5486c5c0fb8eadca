//! How a maintenance goes from one state to the next.

use crate::model::{Actor, Maintenance, MaintenanceState, Operation, Subject, Work};
use crate::operation::fresh;
use crate::view::View;
use jiff::Timestamp;

/// Begins to bring VMs back: at the end of a maintenance or after it was called off.
pub(crate) fn begin_restore(
    _view: &View,
    record: &mut Maintenance,
    actor: &Actor,
    now: Timestamp,
) -> Operation {
    if record.on_cancel.is_none() {
        record.state = MaintenanceState::Verifying;
    } else {
        record.state = MaintenanceState::Cancelling;
    }
    let work = Work::Restore {
        maintenance: record.id,
        host: record.host,
        moves: Vec::new(),
    };
    let operation = fresh(
        work,
        Subject::maintenance(record.id, &record.host_name),
        actor,
        None,
        now,
    );
    record.operation = Some(operation.id);
    operation
}
