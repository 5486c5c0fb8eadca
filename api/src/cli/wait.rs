//! Waiting for the end of something, with a progress bar on the terminal.

use super::Failure;
use super::words::{bytes, name, rate};
use crate::client::{Client, Follow, StreamItem};
use crate::resource::{Event, List, Maintenance, Migration, MigrationState, Operation};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

const BAR_STEPS: u64 = 1_000;
const REDRAW: Duration = Duration::from_millis(100);

/// Waits until an operation has ended.
pub(super) async fn for_operation(
    client: &Client,
    operation: Operation,
) -> Result<Operation, Failure> {
    let mut watch = Watch::begin(
        client,
        format!("{} {}", operation.kind, operation.subject.name),
    )
    .await?;
    let mut latest: Operation = client
        .get(&format!("/v1/operations/{}", operation.id))
        .await?;
    while !latest.state.is_final() {
        watch.show(latest.progress);
        if let StreamItem::Operation(operation) = watch.next().await?
            && operation.id == latest.id
        {
            latest = operation;
        }
    }
    watch.end();
    Ok(latest)
}

/// Waits until `arrived` says that a maintenance is where it was to go.
pub(super) async fn for_maintenance(
    client: &Client,
    maintenance: Uuid,
    arrived: impl Fn(&Maintenance) -> bool,
) -> Result<Maintenance, Failure> {
    let path = format!("/v1/maintenances/{maintenance}");
    let mut watch = Watch::begin(client, "maintenance".to_owned()).await?;
    let mut latest: Maintenance = client.get(&path).await?;
    let mut progress = 0.0;
    while !arrived(&latest) {
        watch.title(format!("{} {}", name(latest.state), latest.host_name));
        watch.show(progress);
        match watch.next().await? {
            StreamItem::Maintenance(maintenance) if maintenance.id == latest.id => {
                latest = maintenance
            }
            StreamItem::Operation(operation) if Some(operation.id) == latest.operation => {
                progress = operation.progress
            }
            _ => {}
        }
    }
    watch.end();
    Ok(latest)
}

/// A bar for an upload.
pub(super) fn upload_bar(name: &str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:30}] {percent:>3}% {bytes} of {total_bytes}, {bytes_per_sec}",
    );
    bar.set_style(
        style
            .expect("the template is well-formed")
            .progress_chars("=> "),
    );
    bar.set_prefix(format!("upload {name}"));
    bar
}

/// The event stream and the bar.
struct Watch {
    follow: Follow,
    bar: ProgressBar,
    moving: BTreeMap<Uuid, Migration>,
}

impl Watch {
    /// Takes the place in the stream first, so that whatever is read afterwards cannot miss a change.
    async fn begin(client: &Client, title: String) -> Result<Self, Failure> {
        let now: List<Event> = client.get("/v1/events?limit=1").await?;
        let bar = ProgressBar::new(BAR_STEPS);
        let style = ProgressStyle::with_template(
            "{prefix} [{bar:30}] {percent:>3}% {elapsed:>4} {wide_msg}",
        );
        bar.set_style(
            style
                .expect("the template is well-formed")
                .progress_chars("=> "),
        );
        bar.set_prefix(title);
        bar.enable_steady_tick(REDRAW);
        Ok(Self {
            follow: client.follow(now.revision),
            bar,
            moving: BTreeMap::new(),
        })
    }

    async fn next(&mut self) -> Result<StreamItem, Failure> {
        let item = self.follow.next().await?;
        if let StreamItem::Migration(migration) = &item {
            if migration.state == MigrationState::Open {
                self.moving.insert(migration.id, migration.clone());
            } else {
                self.moving.remove(&migration.id);
            }
        }
        Ok(item)
    }

    fn title(&self, title: String) {
        self.bar.set_prefix(title);
    }

    fn show(&self, progress: f64) {
        self.bar
            .set_position((progress.clamp(0.0, 1.0) * BAR_STEPS as f64) as u64);
        self.bar.set_message(
            self.moving
                .values()
                .next()
                .map(describe)
                .unwrap_or_default(),
        );
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn describe(migration: &Migration) -> String {
    let progress = &migration.progress;
    format!(
        "{} to {}: round {}, {} left at {}",
        migration.vm_name,
        migration.target_name,
        progress.round,
        bytes(progress.remaining_bytes),
        rate(progress.rate_bytes_per_s)
    )
}
