//! `godwit disk …`.

use super::words::size;
use super::{ChangeOptions, Failure, Session, render};
use crate::resource::{CreateDisk, Disk, DiskAccepted, DiskFormat, DryRun, GrowDisk};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

/// Commands about disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List disks.
    #[command(visible_alias = "ls")]
    List {
        /// Only disks that no VM has.
        #[arg(long)]
        unattached: bool,
    },
    /// Show a disk.
    Show {
        /// Name or id.
        disk: String,
    },
    /// Make a disk: blank, or a thin copy of an image.
    Create(CreateArgs),
    /// Make a disk larger, also while a VM runs with it.
    Grow {
        /// Name or id.
        disk: String,
        /// New size, such as 20G.
        #[arg(value_parser = size)]
        size: u64,
        #[command(flatten)]
        change: ChangeOptions,
    },
    /// Make a full copy of a disk that no running VM has.
    Clone {
        /// Name or id.
        disk: String,
        /// Name of the copy.
        name: String,
        #[command(flatten)]
        change: ChangeOptions,
    },
    /// Delete a disk that no VM has, with all that is on it.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        disk: String,
        #[command(flatten)]
        change: ChangeOptions,
    },
}

/// A disk to be.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, id = "content", args = ["size", "image"])]
pub struct CreateArgs {
    /// Unique among disks: a-z, 0-9, '.' and '-'.
    name: String,
    /// Size, such as 20G; the image's when absent.
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Image it is a thin copy of.
    #[arg(long)]
    image: Option<String>,
    /// Storage pool; the image's, or the only choice, when absent.
    #[arg(long)]
    pool: Option<String>,
    /// Format; what suits it when absent.
    #[arg(long, value_enum)]
    format: Option<DiskFormat>,
    #[command(flatten)]
    change: ChangeOptions,
}

impl DiskCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { unattached } => {
                let mut disks = session.client.list::<Disk>("/v1/disks").await?;
                disks
                    .items
                    .retain(|disk| !unattached || disk.attached_to.is_none());
                disks.items.sort_by(|a, b| a.name.cmp(&b.name));
                session.print(&disks, |disks| render::disks(&disks.items))
            }
            Self::Show { disk } => {
                let disk: Disk = session.client.get(&path(&disk)).await?;
                session.print(&disk, |disk| render::disk(disk, Timestamp::now()))
            }
            Self::Create(arguments) => {
                let body = CreateDisk {
                    name: arguments.name,
                    pool: arguments.pool,
                    bytes: arguments.size,
                    format: arguments.format,
                    image: arguments.image,
                    clone_of: None,
                };
                post(session, "/v1/disks".into(), &body, arguments.change).await
            }
            Self::Clone { disk, name, change } => {
                let body = CreateDisk {
                    name,
                    clone_of: Some(disk),
                    ..CreateDisk::default()
                };
                post(session, "/v1/disks".into(), &body, change).await
            }
            Self::Grow { disk, size, change } => {
                let path = format!("{}/grow", path(&disk));
                post(session, path, &GrowDisk { bytes: size }, change).await
            }
            Self::Delete { disk, change } => {
                let path = change.path(path(&disk));
                if change.dry_run {
                    return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
                }
                let accepted: Option<DiskAccepted> = session.client.delete(&path).await?;
                session
                    .conclude(
                        change,
                        accepted.and_then(|accepted| accepted.operation),
                        || format!("{disk} deleted.\n"),
                    )
                    .await
            }
        }
    }
}

fn path(disk: &str) -> String {
    format!("/v1/disks/{disk}")
}

async fn post(
    session: &Session,
    path: String,
    body: &impl Serialize,
    change: ChangeOptions,
) -> Result<(), Failure> {
    let path = change.path(path);
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, body).await?);
    }
    let accepted: DiskAccepted = session.client.post(&path, body).await?;
    session
        .conclude(change, accepted.operation, || {
            format!("{}: nothing to do.\n", accepted.disk.name)
        })
        .await
}
