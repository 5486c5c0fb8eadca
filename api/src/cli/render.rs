//! Resources as text: pure functions, so that their output can be held against golden files.

mod forecast;
mod plan;
mod storage;

pub(super) use plan::{dry_run, maintenance, maintenances};
pub(super) use storage::{disk, disks, image, images, network, networks, pools, snapshots};

use super::table::{Sheet, Table};
use super::words::{age, bytes, mib, milliseconds_of_us, name, or_dash, percent, rate, seconds};
use crate::resource::{
    Blackout, Boot, Event, Host, Migration, MigrationPhase, MigrationState, Operation, PostCopy, Vm,
};
use jiff::Timestamp;
use std::fmt::Write;

/// Longest reason in a list; `show` gives all of it.
const REASON_CHARACTERS: usize = 60;

pub(super) fn vms(vms: &[Vm]) -> String {
    let mut table = Table::new(&[
        "NAME", "STATE", "HOST", ">VCPUS", ">MEMORY", ">CPU", ">DIRTY", "NOTE",
    ]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            name(vm.state),
            or_dash(vm.host_name.as_ref()),
            vm.spec.vcpus.to_string(),
            mib(vm.spec.memory_mib),
            percent(vm.usage.cpu_percent),
            rate(vm.usage.dirty_bytes_per_s),
            vm_note(vm),
        ]);
    }
    table.to_string()
}

fn vm_note(vm: &Vm) -> String {
    match (&vm.migration, &vm.reason) {
        (Some(migration), _) if migration.state == MigrationState::Open => {
            format!(
                "to {}, round {}",
                migration.target_name, migration.progress.round
            )
        }
        (_, Some(reason)) => short(reason),
        _ => String::new(),
    }
}

pub(super) fn vm(vm: &Vm, now: Timestamp) -> String {
    let boot = match &vm.spec.boot {
        Boot::Pilot => "the pilot".to_owned(),
        Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } => {
            let initrd = initrd
                .as_ref()
                .map(|path| format!(", initrd {path}"))
                .unwrap_or_default();
            format!("{kernel}{initrd}, {cmdline:?}")
        }
    };
    let host = vm
        .host_name
        .as_ref()
        .map(|host| format!("{host} (epoch {})", vm.epoch));
    let mut text = Sheet::default()
        .line("Name", &vm.name)
        .line("Id", vm.id.to_string())
        .line("State", name(vm.state))
        .maybe("Reason", vm.reason.as_ref())
        .line("Wanted", name(vm.intent))
        .line("Host", or_dash(host))
        .line(
            "vCPUs",
            format!("{} ({})", vm.spec.vcpus, name(vm.spec.cpu)),
        )
        .line("Memory", mib(vm.spec.memory_mib))
        .line("Boots", boot)
        .line("Lease", name(vm.lease))
        .line("Maintenance", name(vm.maintenance_policy))
        .line("Post-copy", name(vm.post_copy))
        .line(
            "Uses",
            format!(
                "{} CPU, {} resident, {:.0} exits/s, dirties {}",
                percent(vm.usage.cpu_percent),
                bytes(vm.usage.rss_bytes),
                vm.usage.exits_per_s,
                rate(vm.usage.dirty_bytes_per_s)
            ),
        )
        .maybe("Operation", vm.operation.map(|id| id.to_string()))
        .line("Created", format!("{} ago", age(vm.created_at, now)))
        .line("Changed", format!("{} ago", age(vm.changed_at, now)))
        .to_string();
    if !vm.disks.is_empty() {
        let mut table = Table::new(&["DISK", ">SIZE", "POOL", "IMAGE", "ACCESS", "NAME"]);
        for disk in &vm.disks {
            table.row([
                disk.name.clone(),
                or_dash(disk.bytes.map(bytes)),
                or_dash(disk.pool_name.as_ref()),
                or_dash(disk.image_name.as_ref()),
                name(disk.access),
                disk.disk_name.clone(),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    if !vm.nics.is_empty() {
        let mut table = Table::new(&["NIC", "NETWORK", "MAC", "ADDRESS", ">QUEUES"]);
        for nic in &vm.nics {
            table.row([
                nic.name.clone(),
                nic.network_name.clone(),
                nic.mac.clone(),
                or_dash(nic.address.as_ref()),
                nic.queue_pairs.to_string(),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    if let Some(migration) = &vm.migration {
        let _ = write!(text, "\nMigration\n{}", self::migration(migration));
    }
    text
}

pub(super) fn hosts(hosts: &[Host]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        ">VMS",
        ">CPU",
        ">MEMORY PROMISED",
        ">OF",
        ">USED",
        "ADDRESS",
        "NOTE",
    ]);
    for host in hosts {
        table.row([
            host.name.clone(),
            name(host.state),
            host.committed.vms.to_string(),
            percent(host.usage.cpu_percent),
            mib(host.committed.memory_mib),
            mib(host.capacity.guest_memory_mib),
            bytes(host.usage.memory_used_bytes),
            host.address.clone(),
            short(host.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table.to_string()
}

pub(super) fn host(host: &Host, now: Timestamp) -> String {
    let pressure = &host.usage.pressure;
    Sheet::default()
        .line("Name", &host.name)
        .line("Id", host.id.to_string())
        .line("State", name(host.state))
        .maybe("Reason", host.reason.as_ref())
        .maybe("Maintenance", host.maintenance.map(|id| id.to_string()))
        .line("Address", &host.address)
        .line(
            "CPU",
            format!(
                "{} ({}, {} cores)",
                host.facts.cpu.model,
                name(host.facts.cpu.level),
                host.facts.cores
            ),
        )
        .line(
            "Memory",
            format!(
                "{}, {} for guests",
                mib(host.facts.memory_mib),
                mib(host.capacity.guest_memory_mib)
            ),
        )
        .line(
            "Promised",
            format!(
                "{} to {} VMs with {} vCPUs",
                mib(host.committed.memory_mib),
                host.committed.vms,
                host.committed.vcpus
            ),
        )
        .line(
            "Uses",
            format!(
                "{} CPU, {} memory",
                percent(host.usage.cpu_percent),
                bytes(host.usage.memory_used_bytes)
            ),
        )
        .maybe("Migrations", bandwidth(host))
        .maybe(
            "Kept",
            nonzero(host.usage.kept_memory_bytes)
                .map(|kept| format!("{} memory of VMs that may come home", bytes(kept))),
        )
        .line(
            "Pressure",
            format!(
                "cpu {:.1}%, memory {:.1}%, io {:.1}%",
                pressure.cpu_percent, pressure.memory_percent, pressure.io_percent
            ),
        )
        .line("Kernel", &host.facts.kernel)
        .line("Version", &host.version)
        .line(
            "Last seen",
            host.last_seen.map_or_else(
                || "never".to_owned(),
                |seen| format!("{} ago", age(seen, now)),
            ),
        )
        .to_string()
}

pub(super) fn operations(operations: &[Operation], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "ID", "KIND", "SUBJECT", "STATE", ">DONE", ">AGE", "BY", "NOTE",
    ]);
    for operation in operations {
        let note = match &operation.error {
            Some(problem) => problem.detail.clone(),
            None => operation
                .steps
                .last()
                .map(|step| format!("{} {}", step.name, step.detail))
                .unwrap_or_default(),
        };
        table.row([
            operation.id.to_string(),
            operation.kind.clone(),
            operation.subject.name.clone(),
            name(operation.state),
            percent(operation.progress * 100.0),
            age(operation.created_at, now),
            operation.actor.clone(),
            short(note.trim()),
        ]);
    }
    table.to_string()
}

pub(super) fn operation(operation: &Operation, now: Timestamp) -> String {
    let mut text = Sheet::default()
        .line("Id", operation.id.to_string())
        .line("Kind", &operation.kind)
        .line(
            "Subject",
            format!(
                "{} {}",
                name(operation.subject.kind),
                operation.subject.name
            ),
        )
        .line(
            "State",
            format!(
                "{}, {} done",
                name(operation.state),
                percent(operation.progress * 100.0)
            ),
        )
        .line(
            "Asked for",
            format!(
                "{} ago by {}",
                age(operation.created_at, now),
                operation.actor
            ),
        )
        .maybe(
            "Ended",
            operation
                .ended_at
                .map(|end| format!("{} ago", age(end, now))),
        )
        .maybe("Error", operation.error.as_ref().map(ToString::to_string))
        .to_string();
    if !operation.steps.is_empty() {
        let mut table = Table::new(&["STEP", "STATE", ">TOOK", "DETAIL"]);
        for step in &operation.steps {
            let took = step
                .ended_at
                .map(|end| seconds(end.duration_since(step.started_at).as_secs_f64()));
            table.row([
                step.name.clone(),
                name(step.state),
                or_dash(took),
                step.detail.clone(),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    text
}

pub(super) fn migrations(migrations: &[Migration], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "VM",
        "FROM",
        "TO",
        "STATE",
        "PHASE",
        ">ROUND",
        ">SENT",
        ">REMAINING",
        ">RATE",
        ">DOWNTIME",
        ">AGE",
        "ID",
    ]);
    for migration in migrations {
        let progress = &migration.progress;
        table.row([
            migration.vm_name.clone(),
            migration.source_name.clone(),
            migration.target_name.clone(),
            name(migration.state),
            or_dash(migration.phase.map(name)),
            progress.round.to_string(),
            bytes(progress.transferred_bytes),
            bytes(progress.remaining_bytes),
            rate(progress.rate_bytes_per_s),
            or_dash(progress.downtime_us.map(milliseconds_of_us)),
            age(migration.started_at, now),
            migration.id.to_string(),
        ]);
    }
    table.to_string()
}

pub(super) fn migration(migration: &Migration) -> String {
    let progress = &migration.progress;
    let blackout = match (progress.downtime_us, migration.phase) {
        (Some(us), _) => Some(format!("{} (measured)", milliseconds_of_us(us))),
        (None, Some(MigrationPhase::PreCopy)) => {
            Some(format!("{} ms (predicted)", progress.predicted_blackout_ms))
        }
        _ => None,
    };
    Sheet::default()
        .line("Id", migration.id.to_string())
        .line("VM", &migration.vm_name)
        .line(
            "Way",
            format!("{} to {}", migration.source_name, migration.target_name),
        )
        .line(
            "State",
            format!(
                "{} ({})",
                name(migration.state),
                or_dash(migration.phase.map(name))
            ),
        )
        .maybe("Reason", migration.reason.as_ref())
        .line("Round", progress.round.to_string())
        .line(
            "Sent",
            format!(
                "{} of {} memory ({} pages, {} zero pages)",
                bytes(progress.transferred_bytes),
                bytes(progress.memory_bytes),
                progress.content_pages,
                progress.zero_pages
            ),
        )
        .maybe(
            "Kept",
            nonzero(progress.kept_pages)
                .map(|pages| format!("{pages} pages that the target still had")),
        )
        .maybe(
            "Saved",
            nonzero(progress.saved_bytes).map(|saved| format!("{} by compression", bytes(saved))),
        )
        .line("Remaining", bytes(progress.remaining_bytes))
        .maybe("Disks", disks_along(migration))
        .line(
            "Rate",
            format!(
                "{}, the guest dirties {}",
                rate(progress.rate_bytes_per_s),
                rate(progress.dirty_bytes_per_s)
            ),
        )
        .maybe(
            "Lanes",
            nonzero(progress.lanes.into()).map(|lanes| match progress.opened_lanes {
                opened if u64::from(opened) > lanes => format!("{lanes} of {opened}"),
                _ => lanes.to_string(),
            }),
        )
        .maybe(
            "Slowed",
            nonzero(progress.throttle_percent.into()).map(|percent| {
                format!("the guest is kept from running for {percent}% of its time")
            }),
        )
        .maybe("Stalled", stalls(&progress.stalled_us))
        .maybe(
            "Prefault",
            nonzero(progress.prefault_ms).map(|ms| format!("{ms} ms")),
        )
        .line("Time", seconds(progress.elapsed_ms as f64 / 1000.0))
        .maybe("Downtime", blackout)
        .maybe("Packet gap", progress.packet_gap_us.map(milliseconds_of_us))
        .maybe(
            "Foreseen",
            migration.foreseen.as_ref().map(forecast::foreseen),
        )
        .maybe("Blackout", progress.blackout.as_ref().map(blackout_parts))
        .maybe("Post-copy", progress.post_copy.as_ref().map(post_copy))
        .to_string()
}

/// What migrations may use of a host and its links, if that is limited.
fn bandwidth(host: &Host) -> Option<String> {
    let whole = host
        .migration_bandwidth_bytes_per_s
        .map(|limit| format!("{} each way", rate(limit)));
    let links = host
        .links
        .iter()
        .map(|link| format!("{} to and from {}", rate(link.bytes_per_s), link.host_name));
    let told: Vec<String> = whole.into_iter().chain(links).collect();
    (!told.is_empty()).then(|| format!("at most {}", told.join(", ")))
}

/// The disks that move along, and how far they are.
fn disks_along(migration: &Migration) -> Option<String> {
    let progress = &migration.progress;
    let ways = migration.disks.iter().map(|disk| {
        format!(
            "{} from {} to {}",
            disk.name, disk.from_pool_name, disk.to_pool_name
        )
    });
    let ways: Vec<String> = ways.collect();
    if ways.is_empty() && progress.disk_bytes == 0 {
        return None;
    }
    let far = format!(
        "{} sent, {} of {} remain",
        bytes(progress.disk_transferred_bytes),
        bytes(progress.disk_remaining_bytes),
        bytes(progress.disk_bytes)
    );
    let far = (progress.disk_bytes > 0).then_some(far);
    let parts: Vec<String> = ways.into_iter().chain(far).collect();
    Some(parts.join("; "))
}

/// What a source that does not know or has nothing to tell leaves at 0.
fn nonzero(value: u64) -> Option<u64> {
    (value > 0).then_some(value)
}

fn post_copy(memory: &PostCopy) -> String {
    let owed = bytes(memory.owed_bytes);
    let so_far = match memory.missing_bytes {
        0 => format!(
            "{owed} followed the guest in {}",
            seconds(memory.took_ms as f64 / 1000.0)
        ),
        missing => format!(
            "{} of {owed} still at the source, lost with either host",
            bytes(missing)
        ),
    };
    let waits = nonzero(memory.waited_us).map(|waited_us| {
        format!(
            " for {} in all, at most {}",
            milliseconds_of_us(waited_us),
            milliseconds_of_us(memory.longest_wait_us)
        )
    });
    format!(
        "{so_far}; the guest waited for {} pages{}, connections broke {} times",
        memory.wanted_pages,
        waits.unwrap_or_default(),
        memory.interruptions
    )
}

/// For how long each vCPU stood still while memory was copied; those that did not are left out.
fn stalls(stalled_us: &[u64]) -> Option<String> {
    let told: Vec<String> = stalled_us
        .iter()
        .enumerate()
        .filter(|(_, us)| **us > 0)
        .map(|(vcpu, us)| format!("vCPU {vcpu} for {}", milliseconds_of_us(*us)))
        .collect();
    (!told.is_empty()).then(|| told.join(", "))
}

fn blackout_parts(blackout: &Blackout) -> String {
    let part = |name: &str, us: u64| format!("{name} {}", milliseconds_of_us(us));
    [
        part("pause", blackout.pause_us),
        part("save", blackout.save_us),
        part("pages", blackout.pages_us),
        part("restore", blackout.restore_us),
        part("commit", blackout.commit_us),
        part("predicted", blackout.predicted_us),
    ]
    .join(", ")
}

pub(super) fn events(events: &[Event]) -> String {
    let mut table = Table::new(&[
        ">REVISION",
        "TIME",
        "SEVERITY",
        "KIND",
        "SUBJECT",
        "BY",
        "MESSAGE",
    ]);
    for event in events {
        table.row([
            event.revision.to_string(),
            format!("{:.0}", event.time),
            name(event.severity),
            event.kind.clone(),
            event.subject.name.clone(),
            event.actor.clone(),
            event.message.clone(),
        ]);
    }
    table.to_string()
}

/// One event in one line, for following.
pub(super) fn event(event: &Event) -> String {
    format!(
        "{:.0}  {:<7}  {:<20}  {}",
        event.time,
        name(event.severity),
        event.kind,
        event.message
    )
}

fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= REASON_CHARACTERS {
        return line.to_owned();
    }
    let mut cut: String = line.chars().take(REASON_CHARACTERS - 1).collect();
    cut.push('…');
    cut
}
