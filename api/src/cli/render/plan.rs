//! Maintenances, their plans and dry runs as text.

use super::short;
use crate::cli::table::{Sheet, Table};
use crate::cli::words::{age, mib, name, or_dash, seconds};
use crate::resource::{DryRun, Maintenance, MaintenancePlan};
use jiff::Timestamp;
use std::fmt::Write;

pub(in crate::cli) fn maintenances(maintenances: &[Maintenance], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "ID",
        "HOST",
        "STATE",
        ">VMS",
        ">BLOCKERS",
        ">AGE",
        "BY",
        "REASON",
    ]);
    for maintenance in maintenances {
        table.row([
            maintenance.id.to_string(),
            maintenance.host_name.clone(),
            name(maintenance.state),
            maintenance.plan.moves.len().to_string(),
            maintenance.plan.blockers.len().to_string(),
            age(maintenance.created_at, now),
            maintenance.actor.clone(),
            short(&maintenance.reason),
        ]);
    }
    table.to_string()
}

pub(in crate::cli) fn maintenance(maintenance: &Maintenance, now: Timestamp) -> String {
    let mut text = Sheet::default()
        .line("Id", maintenance.id.to_string())
        .line("Host", &maintenance.host_name)
        .line("State", name(maintenance.state))
        .maybe("Detail", maintenance.detail.as_ref())
        .line("Reason", &maintenance.reason)
        .line("Return", name(maintenance.policy.returning))
        .line(
            "Created",
            format!(
                "{} ago by {}",
                age(maintenance.created_at, now),
                maintenance.actor
            ),
        )
        .to_string();
    if maintenance.moved.is_empty() {
        let _ = write!(text, "\n{}", plan(&maintenance.plan));
    } else {
        let mut table = Table::new(&["VM", "ACTION", "STATE", "NOTE"]);
        for moved in &maintenance.moved {
            table.row([
                moved.vm_name.clone(),
                name(moved.action),
                name(moved.state),
                moved.reason.clone().unwrap_or_default(),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    text
}

/// What a maintenance would do.
pub(in crate::cli) fn plan(plan: &MaintenancePlan) -> String {
    let mut text = String::new();
    if plan.moves.is_empty() && plan.blockers.is_empty() {
        text.push_str("Nothing runs on this host: it is drained at once.\n");
    }
    if !plan.moves.is_empty() {
        let mut table = Table::new(&[
            "VM",
            "ACTION",
            "TO",
            ">TIME",
            ">MIB",
            ">BLACKOUT",
            ">RESERVE AFTER",
        ]);
        for step in &plan.moves {
            table.row([
                step.vm_name.clone(),
                name(step.action),
                or_dash(step.to_name.as_ref()),
                seconds(step.predicted_s),
                step.predicted_mib.to_string(),
                format!("{} ms", step.predicted_blackout_ms),
                reserve(step.reserve_after_mib),
            ]);
        }
        let _ = write!(text, "{table}");
        let _ = writeln!(text, "{} in all.", seconds(plan.total_s));
    }
    if !plan.blockers.is_empty() {
        let _ = writeln!(text, "\nBlocked by:");
        for blocker in &plan.blockers {
            let about = blocker
                .vm_name
                .as_ref()
                .map(|vm| format!("{vm}: "))
                .unwrap_or_default();
            let _ = writeln!(
                text,
                "  {about}{} ({})\n    remedy: {}",
                blocker.detail, blocker.kind, blocker.remedy
            );
        }
    }
    text
}

fn reserve(mib_left: i64) -> String {
    if mib_left < 0 {
        format!("{} short", mib(mib_left.unsigned_abs()))
    } else {
        mib(mib_left.unsigned_abs())
    }
}

/// What a change would do.
pub(in crate::cli) fn dry_run(dry_run: &DryRun) -> String {
    let mut text = String::from("Dry run, nothing was changed. It would:\n");
    let forecast = dry_run.forecast.as_ref();
    for change in &dry_run.changes {
        // It is told in full below.
        if !forecast.is_some_and(|forecast| change.ends_with(&forecast.summary)) {
            let _ = writeln!(text, "  - {change}");
        }
    }
    if let Some(forecast) = forecast {
        let _ = write!(text, "\n{}", super::forecast::forecast(forecast));
    }
    if let Some(placement) = &dry_run.placement
        && !placement.rejections.is_empty()
    {
        let mut table = Table::new(&["HOST TURNED DOWN", "FILTER", "WHY"]);
        for rejection in &placement.rejections {
            table.row([
                rejection.host_name.clone(),
                rejection.kind.clone(),
                rejection.detail.clone(),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    if let Some(plan) = &dry_run.plan {
        let _ = write!(text, "\n{}", self::plan(plan));
    }
    text
}
