//! The operator's commands: a thin client of the REST API.
//!
//! What a command prints goes to stdout, as a table or as the API's JSON; progress and errors go to stderr.

mod table;

mod words;

mod render;

mod wait;

mod attach;

mod limits;

mod vm;

mod host;

mod image;

mod disk;

mod network;

mod maintenance;

mod operation;

mod migration;

mod event;

#[cfg(test)]
mod golden;

pub use disk::DiskCommand;
pub use event::EventCommand;
pub use host::HostCommand;
pub use image::{ImageCommand, PoolCommand};
pub use maintenance::MaintenanceCommand;
pub use migration::MigrationCommand;
pub use network::NetworkCommand;
pub use operation::OperationCommand;
pub(crate) use table::Table;
pub use vm::{SnapshotCommand, VmCommand};

use crate::client::{Client, ClientError, ConnectOptions};
use crate::resource::{DryRun, Operation, OperationState, Problem};
use serde::Serialize;
use std::io::{self, Write};
use std::process::ExitCode;

// Options of every command that asks the server. Not a doc comment: clap would show it as each command's own help.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientOptions {
    #[command(flatten)]
    connect: ConnectOptions,
    /// Print a table or the API's JSON.
    #[arg(short, long, value_enum, default_value_t = Format::Table, help_heading = "Output")]
    output: Format,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Whether a command only says what it would do, and whether it waits for the end.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct ChangeOptions {
    /// Only print what would happen.
    #[arg(long)]
    dry_run: bool,
    /// Wait until it is done, with a progress bar.
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
}

impl ChangeOptions {
    /// The path for this kind of change.
    fn path(&self, path: String) -> String {
        if self.dry_run {
            format!("{path}?dry_run=true")
        } else {
            path
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server could not be asked, or said no.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What the server had accepted did not work out.
    #[error("{kind} of {subject} {}", ended(*state, error.as_ref()))]
    Operation {
        /// What was done.
        kind: String,
        /// To what.
        subject: String,
        /// How it ended.
        state: OperationState,
        /// Why.
        error: Option<Problem>,
    },
    /// A maintenance did not get where it was to go.
    #[error("the maintenance of {host} is {state}{detail}\n  remedy: {remedy}")]
    Maintenance {
        /// The host.
        host: String,
        /// Where the maintenance stands.
        state: String,
        /// Why.
        detail: String,
        /// What to do.
        remedy: String,
    },
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Terminal, file or pipe.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

fn ended(state: OperationState, error: Option<&Problem>) -> String {
    match (state, error) {
        (OperationState::Cancelled, _) => "was called off".to_owned(),
        (_, Some(problem)) => format!("failed: {problem}"),
        (_, None) => "failed".to_owned(),
    }
}

impl Failure {
    /// 1 failed; 2 usage or a request that cannot be accepted; 3 not found; 4 refused by the present state;
    /// 5 the server cannot be reached or wants another token.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) | Self::Client(ClientError::BadAddress { .. }) => 2,
            Self::Client(ClientError::Problem(problem)) => match problem.status {
                404 => 3,
                409 => 4,
                400 | 422 => 2,
                401 | 403 => 5,
                _ => 1,
            },
            Self::Maintenance { .. } => 4,
            Self::Client(
                ClientError::Unreachable { .. }
                | ClientError::Untrusted { .. }
                | ClientError::BadCa { .. },
            ) => 5,
            _ => 1,
        })
    }
}

/// A command's way to the server and to the operator.
#[derive(Debug)]
pub struct Session {
    client: Client,
    format: Format,
}

impl Session {
    /// Prepares to ask the server the options name.
    pub fn new(options: &ClientOptions) -> Result<Self, Failure> {
        Ok(Self {
            client: Client::new(&options.connect)?,
            format: options.output,
        })
    }

    /// Prints a result: JSON as the API has it, or the table that `table` makes.
    fn print<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let text = match self.format {
            Format::Table => table(value),
            Format::Json => json(value),
        };
        write_out(&text)
    }

    /// Prints what a dry run said.
    fn print_dry_run(&self, dry_run: &DryRun) -> Result<(), Failure> {
        self.print(dry_run, render::dry_run)
    }

    /// Waits for the operation if asked to, then prints what became of it.
    async fn conclude(
        &self,
        options: ChangeOptions,
        operation: Option<Operation>,
        nothing: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let Some(operation) = operation else {
            return self.print(&serde_json::json!({ "operation": null }), |_| nothing());
        };
        if !options.wait {
            return self.print(&operation, |operation| {
                format!(
                    "{} of {} accepted; `godwit operation wait {}` waits for it.\n",
                    operation.kind, operation.subject.name, operation.id
                )
            });
        }
        let ended = wait::for_operation(&self.client, operation).await?;
        self.print(&ended, |operation| {
            format!(
                "{} of {}: {}.\n",
                operation.kind,
                operation.subject.name,
                words::name(operation.state)
            )
        })?;
        judge(ended)
    }
}

/// An operation that did not succeed is a failure.
fn judge(operation: Operation) -> Result<(), Failure> {
    let Operation {
        kind,
        subject,
        state,
        error,
        ..
    } = operation;
    match state {
        OperationState::Failed | OperationState::Cancelled => Err(Failure::Operation {
            kind,
            subject: subject.name,
            state,
            error,
        }),
        _ => Ok(()),
    }
}

fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("resources have string keys only");
    text.push('\n');
    text
}

fn write_out(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(Failure::Io {
            action: "cannot write to stdout",
            source,
        }),
        Ok(()) => Ok(()),
    }
}
