//! `godwit vm snapshot …`.

use super::super::{ChangeOptions, Failure, Session, render};
use crate::resource::{
    CreateSnapshot, DryRun, RestoreSnapshot, Snapshot, SnapshotAccepted, VmAccepted,
};
use clap::Subcommand;
use jiff::Timestamp;

/// Commands about the snapshots of a VM: memory, vCPUs and devices, and no disks.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save a running or paused VM.
    Create {
        /// Name or id of the VM.
        vm: String,
        /// Unique among the VM's snapshots: a-z, 0-9, '.' and '-'.
        name: String,
        /// Storage pool; that of the VM's first disk, or the only choice, when absent.
        #[arg(long)]
        pool: Option<String>,
        /// Stop the VM with it: a VM with writable disks must, because a snapshot does not hold them.
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        change: ChangeOptions,
    },
    /// List the snapshots of a VM.
    #[command(visible_alias = "ls")]
    List {
        /// Name or id of the VM.
        vm: String,
    },
    /// Let a VM that is off go on from where it was saved.
    Restore {
        /// Name or id of the VM.
        vm: String,
        /// Name or id of the snapshot.
        snapshot: String,
        /// Host to start it on; the best one when absent.
        #[arg(long)]
        host: Option<String>,
        #[command(flatten)]
        change: ChangeOptions,
    },
    /// Delete a snapshot.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id of the VM.
        vm: String,
        /// Name or id of the snapshot.
        snapshot: String,
        #[command(flatten)]
        change: ChangeOptions,
    },
}

impl SnapshotCommand {
    /// Asks the server and prints what it says.
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { vm } => {
                let mut snapshots = session.client.list::<Snapshot>(&path(&vm)).await?;
                snapshots.items.sort_by_key(|snapshot| snapshot.created_at);
                session.print(&snapshots, |snapshots| {
                    render::snapshots(&snapshots.items, Timestamp::now())
                })
            }
            Self::Create {
                vm,
                name,
                pool,
                stop,
                change,
            } => {
                let body = CreateSnapshot { name, pool, stop };
                let path = change.path(path(&vm));
                if change.dry_run {
                    let said = session.client.post::<DryRun>(&path, &body).await?;
                    return session.print_dry_run(&said);
                }
                let accepted: SnapshotAccepted = session.client.post(&path, &body).await?;
                conclude(session, change, accepted.operation, &vm).await
            }
            Self::Restore {
                vm,
                snapshot,
                host,
                change,
            } => {
                let path = change.path(format!("{}/{snapshot}/restore", path(&vm)));
                let body = RestoreSnapshot { host };
                if change.dry_run {
                    let said = session.client.post::<DryRun>(&path, &body).await?;
                    return session.print_dry_run(&said);
                }
                let accepted: VmAccepted = session.client.post(&path, &body).await?;
                conclude(session, change, accepted.operation, &vm).await
            }
            Self::Delete {
                vm,
                snapshot,
                change,
            } => {
                let path = change.path(format!("{}/{snapshot}", path(&vm)));
                if change.dry_run {
                    return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
                }
                let accepted: Option<SnapshotAccepted> = session.client.delete(&path).await?;
                let operation = accepted.and_then(|accepted| accepted.operation);
                conclude(session, change, operation, &snapshot).await
            }
        }
    }
}

fn path(vm: &str) -> String {
    format!("/v1/vms/{vm}/snapshots")
}

async fn conclude(
    session: &Session,
    change: ChangeOptions,
    operation: Option<crate::resource::Operation>,
    subject: &str,
) -> Result<(), Failure> {
    session
        .conclude(change, operation, || format!("{subject}: nothing to do.\n"))
        .await
}
