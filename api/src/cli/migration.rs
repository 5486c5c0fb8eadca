//! `godwit migration …`.

use super::{Failure, Session, render};
use crate::resource::{Migration, MigrationPhase, MigrationState};
use clap::Subcommand;
use jiff::Timestamp;

/// Commands about migrations.
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// List migrations, newest last.
    #[command(visible_alias = "ls")]
    List {
        /// Also those that have ended.
        #[arg(long)]
        all: bool,
    },
    /// Show a migration with its figures.
    Show {
        /// Id.
        migration: String,
    },
}

impl MigrationCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { all } => {
                let mut list = session.client.list::<Migration>("/v1/migrations").await?;
                list.items
                    .retain(|migration| all || is_under_way(migration));
                session.print(&list, |list| {
                    render::migrations(&list.items, Timestamp::now())
                })
            }
            Self::Show { migration } => {
                let migration: Migration = session
                    .client
                    .get(&format!("/v1/migrations/{migration}"))
                    .await?;
                session.print(&migration, render::migration)
            }
        }
    }
}

/// Also one whose guest runs at the target and waits for its memory.
fn is_under_way(migration: &Migration) -> bool {
    migration.state == MigrationState::Open || migration.phase == Some(MigrationPhase::PostCopy)
}
