//! `godwit image …` and `godwit pool …`.

use super::{ChangeOptions, Failure, Session, render, wait};
use crate::client::Content;
use crate::resource::{CreateImage, DiskFormat, DryRun, Image, ImageAccepted, ImageSource, Pool};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use std::path::PathBuf;

/// Commands about images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List images.
    #[command(visible_alias = "ls")]
    List,
    /// Show an image.
    Show {
        /// Name or id.
        image: String,
    },
    /// Import an image from a file here, which is uploaded, or from a file on a host.
    Import(ImportArgs),
    /// Delete an image that no disk is based on.
    #[command(visible_alias = "rm")]
    Delete(NamedArgs),
}

/// Commands about storage pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// List storage pools.
    #[command(visible_alias = "ls")]
    List,
}

/// An image to be.
#[derive(Debug, Args)]
#[group(required = true, multiple = false, id = "from", args = ["file", "host_path"])]
pub struct ImportArgs {
    /// Unique among images: a-z, 0-9, '.' and '-'.
    name: String,
    /// File on this machine; it is uploaded.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// File on a host.
    #[arg(long, value_name = "PATH")]
    host_path: Option<String>,
    /// The host that has the file; any that has the pool when absent.
    #[arg(long, requires = "host_path")]
    host: Option<String>,
    /// Storage pool to keep it in; the only choice when absent.
    #[arg(long)]
    pool: Option<String>,
    /// Format of the file; looked at when absent.
    #[arg(long, value_enum)]
    format: Option<DiskFormat>,
    /// SHA-256 the file must have.
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    #[command(flatten)]
    change: ChangeOptions,
}

/// An image.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// Name or id.
    image: String,
    #[command(flatten)]
    change: ChangeOptions,
}

impl PoolCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let Self::List = self;
        let mut pools = session.client.list::<Pool>("/v1/pools").await?;
        pools
            .items
            .sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        session.print(&pools, |pools| render::pools(&pools.items))
    }
}

impl ImageCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List => {
                let mut images = session.client.list::<Image>("/v1/images").await?;
                images.items.sort_by(|a, b| a.name.cmp(&b.name));
                session.print(&images, |images| render::images(&images.items))
            }
            Self::Show { image } => {
                let image: Image = session.client.get(&path(&image)).await?;
                session.print(&image, |image| render::image(image, Timestamp::now()))
            }
            Self::Import(arguments) => import(session, arguments).await,
            Self::Delete(NamedArgs { image, change }) => {
                let path = change.path(path(&image));
                if change.dry_run {
                    return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
                }
                let accepted: Option<ImageAccepted> = session.client.delete(&path).await?;
                session
                    .conclude(
                        change,
                        accepted.and_then(|accepted| accepted.operation),
                        || format!("{image} deleted.\n"),
                    )
                    .await
            }
        }
    }
}

fn path(image: &str) -> String {
    format!("/v1/images/{image}")
}

async fn import(session: &Session, arguments: ImportArgs) -> Result<(), Failure> {
    let ImportArgs {
        name,
        file,
        host_path,
        host,
        pool,
        format,
        sha256,
        change,
    } = arguments;
    let content = match &file {
        Some(file) => Some(Content::open(file).await.map_err(|source| Failure::Io {
            action: "cannot read the image",
            source,
        })?),
        None => None,
    };
    let source = match (&content, host_path) {
        (Some(content), _) => ImageSource::Upload {
            bytes: content.length(),
        },
        (None, path) => ImageSource::Path {
            path: path.unwrap_or_default(),
            host,
        },
    };
    let body = CreateImage {
        name,
        pool,
        source,
        format,
        sha256,
    };
    let path = change.path("/v1/images".to_owned());
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, &body).await?);
    }
    let accepted: ImageAccepted = session.client.post(&path, &body).await?;
    if let Some(content) = content {
        let bar = wait::upload_bar(&body.name, content.length());
        let path = format!("{}/content", self::path(&accepted.image.id.to_string()));
        let sent = session
            .client
            .upload::<Image>(&path, content, {
                let bar = bar.clone();
                move |bytes| bar.inc(bytes)
            })
            .await;
        bar.finish_and_clear();
        sent?;
    }
    session
        .conclude(change, accepted.operation, || {
            format!("{} imported.\n", accepted.image.name)
        })
        .await
}
