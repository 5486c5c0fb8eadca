//! `godwit event …`.

use super::{Failure, Format, Session, render, write_out};
use crate::client::StreamItem;
use crate::resource::{Event, List, Severity};
use clap::Subcommand;

/// Commands about events.
#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// List the latest events.
    #[command(visible_alias = "ls")]
    List {
        /// Only what came after this revision.
        #[arg(long, value_name = "REVISION")]
        after: Option<u64>,
        /// Most events to list.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Only events at least this grave.
        #[arg(long, value_enum, default_value_t = Severity::Info)]
        severity: Severity,
    },
    /// Print events as they come, until interrupted.
    Follow {
        /// Begin with what came after this revision; now when absent.
        #[arg(long, value_name = "REVISION")]
        after: Option<u64>,
        /// Only events at least this grave.
        #[arg(long, value_enum, default_value_t = Severity::Info)]
        severity: Severity,
    },
}

impl EventCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List {
                after,
                limit,
                severity,
            } => {
                let after = after
                    .map(|after| format!("&after={after}"))
                    .unwrap_or_default();
                let mut list: List<Event> = session
                    .client
                    .get(&format!("/v1/events?limit={limit}{after}"))
                    .await?;
                list.items.retain(|event| event.severity >= severity);
                session.print(&list, |list| render::events(&list.items))
            }
            Self::Follow { after, severity } => {
                let after = match after {
                    Some(after) => after,
                    None => {
                        session
                            .client
                            .get::<List<Event>>("/v1/events?limit=1")
                            .await?
                            .revision
                    }
                };
                let mut follow = session.client.follow(after);
                loop {
                    if let StreamItem::Event(event) = follow.next().await?
                        && event.severity >= severity
                    {
                        write_out(&line(session.format, &event))?;
                    }
                }
            }
        }
    }
}

/// One event in one line, whatever the format.
fn line(format: Format, event: &Event) -> String {
    match format {
        Format::Table => format!("{}\n", render::event(event)),
        Format::Json => format!(
            "{}\n",
            serde_json::to_string(event).expect("events have string keys only")
        ),
    }
}
