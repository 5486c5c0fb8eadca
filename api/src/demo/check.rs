//! `godwit demo --check`: the main job, and proof of every part of it.
//!
//! ```text
//! reset the guests' blackout records ─▶ maintenance of host-1 ─▶ drained: host-1 is empty, every guest verifies
//!   ─▶ reset again ─▶ finish ─▶ every VM that left is home, every guest verifies
//! ```

use super::DemoError;
use super::guests::Guest;
use super::table::{Moved, Row, text};
use crate::client::{Client, StreamItem};
use crate::resource::{
    CreateMaintenance, Event, Host, List, Maintenance, MaintenanceAccepted, MaintenanceState,
    Migration, MigrationState, ReturnPolicy, Vm,
};
use pilot::{Reply, Ticks, Verified};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The host that is maintained.
const HOST: &str = "host-1";

/// What one guest said of itself.
#[derive(Clone, Copy, Debug, Default)]
struct Proof {
    ticks: u64,
    uptime_ms: u64,
    blackout_us: u64,
    intact: bool,
}

/// Where a VM is and how often it has changed hands.
#[derive(Clone, Debug)]
struct Place {
    host: String,
    epoch: u64,
}

/// Does the main job; fails with everything that did not hold.
pub(super) async fn run(client: &Client, guests: &mut [Guest]) -> Result<(), DemoError> {
    let mut check = Check {
        client,
        rows: Vec::new(),
        failures: Vec::new(),
    };
    let before = check.places().await?;
    let start = check.prove(guests, &BTreeMap::new()).await?;
    check.rows.clear();

    println!("\nTaking {HOST} into maintenance…");
    check.forget_blackouts(guests).await?;
    let maintenance = check.drain().await?;
    let drained = check.places().await?;
    check.host_is_empty().await?;
    let away = check.prove(guests, &start).await?;
    check.report(guests, &before, &drained, &away).await?;

    println!("Finishing the maintenance…");
    check.forget_blackouts(guests).await?;
    check.finish(&maintenance).await?;
    let home = check.places().await?;
    check.everyone_is_home(guests, &before, &home);
    let back = check.prove(guests, &away).await?;
    check.report(guests, &drained, &home, &back).await?;

    println!("\n{}", text(&check.rows));
    if check.failures.is_empty() {
        Ok(())
    } else {
        Err(DemoError::CheckFailed {
            failures: check.failures,
        })
    }
}

struct Check<'a> {
    client: &'a Client,
    rows: Vec<Row>,
    failures: Vec<String>,
}

impl Check<'_> {
    async fn places(&self) -> Result<BTreeMap<Uuid, Place>, DemoError> {
        let vms: List<Vm> = self
            .client
            .list("/v1/vms")
            .await
            .map_err(DemoError::api("listing the VMs"))?;
        let place = |vm: Vm| {
            (
                vm.id,
                Place {
                    host: vm.host_name.unwrap_or_default(),
                    epoch: vm.epoch,
                },
            )
        };
        Ok(vms.items.into_iter().map(place).collect())
    }

    async fn forget_blackouts(&self, guests: &mut [Guest]) -> Result<(), DemoError> {
        for guest in guests {
            guest.ask::<Reply>("ticks reset").await?;
        }
        Ok(())
    }

    /// Asks every guest for its ticks and whether its memory is what it wrote.
    async fn prove(
        &mut self,
        guests: &mut [Guest],
        earlier: &BTreeMap<Uuid, Proof>,
    ) -> Result<BTreeMap<Uuid, Proof>, DemoError> {
        let mut proofs = BTreeMap::new();
        for guest in guests {
            // Read before verifying, which keeps the guest busy.
            let ticks: Ticks = guest.ask("ticks").await?;
            let verified: Verified = guest.ask("verify").await?;
            let name = guest.name;
            if let Verified::Corrupt {
                torn,
                stale,
                misplaced,
                first_page,
            } = verified
            {
                self.failures.push(format!(
                    "{name}: memory is corrupt: {torn} torn, {stale} stale, {misplaced} misplaced pages, first {first_page}"
                ));
            }
            if ticks.backwards > 0 {
                self.failures.push(format!(
                    "{name}: its clock went backwards {} times",
                    ticks.backwards
                ));
            }
            let before = earlier.get(&guest.id).copied().unwrap_or_default();
            if ticks.ticks <= before.ticks || ticks.uptime_ms <= before.uptime_ms {
                self.failures.push(format!(
                    "{name}: it does not go on: {} ticks after {}, up {} ms after {}",
                    ticks.ticks, before.ticks, ticks.uptime_ms, before.uptime_ms
                ));
            }
            let proof = Proof {
                ticks: ticks.ticks,
                uptime_ms: ticks.uptime_ms,
                blackout_us: ticks.max_blackout_us,
                intact: matches!(verified, Verified::Intact { .. }),
            };
            proofs.insert(guest.id, proof);
        }
        Ok(proofs)
    }

    /// Plans the maintenance, starts it and waits until the host is drained.
    async fn drain(&mut self) -> Result<Maintenance, DemoError> {
        let body = CreateMaintenance {
            host: HOST.to_owned(),
            reason: "demo".to_owned(),
            returning: ReturnPolicy::Exact,
            overrides: Vec::new(),
        };
        let created: MaintenanceAccepted = self
            .client
            .post("/v1/maintenances", &body)
            .await
            .map_err(DemoError::api(format!(
                "planning the maintenance of {HOST}"
            )))?;
        let planned = created.maintenance;
        if planned.plan.moves.is_empty() {
            self.failures
                .push(format!("the plan moves nothing off {HOST}"));
        }
        self.act(&planned, "start", |state| {
            matches!(state, MaintenanceState::Drained | MaintenanceState::Working)
        })
        .await
    }

    async fn finish(&mut self, maintenance: &Maintenance) -> Result<Maintenance, DemoError> {
        self.act(maintenance, "finish", |state| {
            state == MaintenanceState::Done
        })
        .await
    }

    /// Tells a maintenance to go on and waits until it is there or cannot get there any more.
    async fn act(
        &mut self,
        maintenance: &Maintenance,
        verb: &str,
        arrived: impl Fn(MaintenanceState) -> bool,
    ) -> Result<Maintenance, DemoError> {
        let action = || DemoError::api(format!("maintenance of {HOST}: {verb}"));
        let now: List<Event> = self
            .client
            .get("/v1/events?limit=1")
            .await
            .map_err(action())?;
        let path = format!("/v1/maintenances/{}", maintenance.id);
        let accepted: MaintenanceAccepted = self
            .client
            .post(&format!("{path}/{verb}"), &serde_json::json!({}))
            .await
            .map_err(action())?;
        let mut latest = accepted.maintenance;
        let mut follow = self.client.follow(now.revision);
        while !arrived(latest.state) {
            if matches!(
                latest.state,
                MaintenanceState::Failed | MaintenanceState::Blocked | MaintenanceState::Cancelled
            ) {
                self.failures.push(format!(
                    "the maintenance is {:?}: {}",
                    latest.state,
                    latest.detail.clone().unwrap_or_default()
                ));
                break;
            }
            match follow.next().await.map_err(action())? {
                // The stream starts with what was before the answer.
                StreamItem::Maintenance(told)
                    if told.id == latest.id && told.changed_at >= latest.changed_at =>
                {
                    latest = told;
                }
                _ => {}
            }
        }
        Ok(latest)
    }

    async fn host_is_empty(&mut self) -> Result<(), DemoError> {
        let host: Host = self
            .client
            .get(&format!("/v1/hosts/{HOST}"))
            .await
            .map_err(DemoError::api("looking at the host"))?;
        if host.committed.vms > 0 {
            self.failures.push(format!(
                "{HOST} still has {} VMs after the drain",
                host.committed.vms
            ));
        }
        Ok(())
    }

    fn everyone_is_home(
        &mut self,
        guests: &[Guest],
        before: &BTreeMap<Uuid, Place>,
        home: &BTreeMap<Uuid, Place>,
    ) {
        for guest in guests {
            let (was, is) = (before.get(&guest.id), home.get(&guest.id));
            if was.map(|place| &place.host) != is.map(|place| &place.host) {
                let name = |place: Option<&Place>| {
                    place.map_or_else(|| "nowhere".to_owned(), |place| place.host.clone())
                };
                self.failures.push(format!(
                    "{} was on {} and is on {} now",
                    guest.name,
                    name(was),
                    name(is)
                ));
            }
        }
    }

    /// Adds a row for each guest and judges the migrations behind them.
    async fn report(
        &mut self,
        guests: &[Guest],
        from: &BTreeMap<Uuid, Place>,
        to: &BTreeMap<Uuid, Place>,
        proofs: &BTreeMap<Uuid, Proof>,
    ) -> Result<(), DemoError> {
        let migrations: List<Migration> = self
            .client
            .list("/v1/migrations")
            .await
            .map_err(DemoError::api("listing the migrations"))?;
        for guest in guests {
            let (Some(from), Some(to)) = (from.get(&guest.id), to.get(&guest.id)) else {
                self.failures.push(format!("{} is gone", guest.name));
                continue;
            };
            let proof = proofs.get(&guest.id).copied().unwrap_or_default();
            let moved = if from.host == to.host {
                None
            } else {
                self.moved(guest, from, to, &migrations.items)
            };
            if from.host == to.host && from.epoch != to.epoch {
                self.failures.push(format!(
                    "{}: stayed on {} and yet changed its epoch",
                    guest.name, to.host
                ));
            }
            self.rows.push(Row {
                vm: guest.name.to_owned(),
                from: from.host.clone(),
                to: to.host.clone(),
                moved,
                blackout_us: proof.blackout_us,
                verified: proof.intact,
            });
        }
        Ok(())
    }

    /// The figures of the one migration that brought a guest from one place to the other.
    fn moved(
        &mut self,
        guest: &Guest,
        from: &Place,
        to: &Place,
        migrations: &[Migration],
    ) -> Option<Moved> {
        if to.epoch != from.epoch + 1 {
            self.failures.push(format!(
                "{}: one move took its epoch from {} to {}",
                guest.name, from.epoch, to.epoch
            ));
        }
        let latest = migrations.iter().rev().find(|migration| {
            migration.vm == guest.id
                && migration.source_name == from.host
                && migration.target_name == to.host
        });
        let Some(migration) =
            latest.filter(|migration| migration.state == MigrationState::Committed)
        else {
            self.failures.push(format!(
                "{}: no migration from {} to {} was committed",
                guest.name, from.host, to.host
            ));
            return None;
        };
        let progress = &migration.progress;
        if progress.downtime_us.is_none() {
            self.failures.push(format!(
                "{}: the source did not measure the downtime",
                guest.name
            ));
        }
        Some(Moved {
            rounds: progress.round,
            sent_bytes: progress.transferred_bytes,
            total_ms: progress.elapsed_ms,
            downtime_us: progress.downtime_us,
        })
    }
}
