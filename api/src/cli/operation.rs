//! `godwit operation …`.

use super::{Failure, Session, judge, render, wait};
use crate::resource::Operation;
use clap::Subcommand;
use jiff::Timestamp;

/// Commands about operations.
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List operations, newest last.
    #[command(visible_alias = "ls")]
    List {
        /// Also those that have ended.
        #[arg(long)]
        all: bool,
    },
    /// Show an operation and its steps.
    Show {
        /// Id.
        operation: String,
    },
    /// Wait until an operation has ended.
    Wait {
        /// Id.
        operation: String,
    },
    /// Call an operation off.
    Cancel {
        /// Id.
        operation: String,
    },
}

impl OperationCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let show = |operation: &Operation| render::operation(operation, Timestamp::now());
        match self {
            Self::List { all } => {
                let mut list = session.client.list::<Operation>("/v1/operations").await?;
                list.items
                    .retain(|operation| all || !operation.state.is_final());
                session.print(&list, |list| {
                    render::operations(&list.items, Timestamp::now())
                })
            }
            Self::Show { operation } => session.print(&get(session, &operation).await?, show),
            Self::Wait { operation } => {
                let ended =
                    wait::for_operation(&session.client, get(session, &operation).await?).await?;
                session.print(&ended, show)?;
                judge(ended)
            }
            Self::Cancel { operation } => {
                let cancelled: Operation = session
                    .client
                    .post(
                        &format!("/v1/operations/{operation}/cancel"),
                        &serde_json::json!({}),
                    )
                    .await?;
                session.print(&cancelled, show)
            }
        }
    }
}

async fn get(session: &Session, id: &str) -> Result<Operation, Failure> {
    Ok(session.client.get(&format!("/v1/operations/{id}")).await?)
}
