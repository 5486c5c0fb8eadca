//! The command tree, logging and the exit status.
//!
//! `godwit host` is two things: `godwit host run` is the agent on a host, every other `godwit host …` asks the
//! server about hosts.

use crate::cli::{
    ClientOptions, DiskCommand, EventCommand, Failure, HostCommand, ImageCommand,
    MaintenanceCommand, MigrationCommand, NetworkCommand, OperationCommand, PoolCommand, Session,
    VmCommand,
};
use crate::demo::{self, DemoArgs};
use crate::server::{self, ServerArgs};
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use std::error::Error;
use std::future::Future;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use tokio::runtime::Builder;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

const AFTER_HELP: &str = "\
Try it:       godwit demo
Exit status:  0 done · 1 failed · 2 not a proper request · 3 no such thing · 4 refused by the present state
              5 the server cannot be reached or wants a token";

/// Runs virtual machines on a pool of hosts and moves them without stopping them.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Program {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Run the control plane: controller, REST API and web console.
    Server {
        #[command(flatten)]
        arguments: ServerArgs,
        #[command(flatten)]
        log: LogOptions,
        /// End when the process that started the server ends.
        #[arg(long, hide = true)]
        die_with_parent: bool,
    },
    /// Run the agent on a host, or ask about hosts.
    #[command(subcommand)]
    Host(Host),
    /// Run one VM in this process; started by the host agent, usable alone.
    Vmm {
        #[command(flatten)]
        arguments: godwit_vmm::VmmArgs,
        #[command(flatten)]
        log: LogOptions,
    },
    /// Run a whole pool on this machine, guests running, console open.
    Demo(DemoArgs),
    /// Work with VMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Work with images that disks are made from.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Work with disks.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Work with networks.
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Look at storage pools.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Take every VM off a host, and back.
    #[command(subcommand)]
    Maintenance(MaintenanceCommand),
    /// Look at what takes time.
    #[command(subcommand)]
    Operation(OperationCommand),
    /// Look at live migrations.
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// Read what happened.
    #[command(subcommand)]
    Event(EventCommand),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum Host {
    /// Run the agent on this host: it joins the pool and runs VMs.
    Run {
        #[command(flatten)]
        arguments: godwit_host::HostArgs,
        #[command(flatten)]
        log: LogOptions,
    },
    #[command(flatten)]
    Ask(HostCommand),
}

/// Options of processes that keep running.
#[derive(Clone, Debug, Args)]
struct LogOptions {
    /// How log lines look on stderr.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, help_heading = "Logging")]
    log_format: LogFormat,
    /// What is logged, such as `info` or `godwit_api=debug,info`.
    #[arg(
        long,
        env = "GODWIT_LOG",
        default_value = "info",
        value_name = "FILTER",
        help_heading = "Logging"
    )]
    log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let matches = command().get_matches();
    let program = match Program::from_arg_matches(&matches) {
        Ok(program) => program,
        Err(error) => error.exit(),
    };
    match program.role {
        Role::Server {
            arguments,
            log,
            die_with_parent,
        } => logged(&log, || serve(arguments, die_with_parent)),
        Role::Host(Host::Run { arguments, log }) => {
            logged(&log, || report(godwit_host::run(arguments)))
        }
        Role::Vmm { arguments, log } => {
            logged(&log, || report(godwit_vmm::run(arguments, pilot::ELF)))
        }
        Role::Host(Host::Ask(command)) => {
            ask(
                &matches,
                |session| async move { command.run(&session).await },
            )
        }
        Role::Vm(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Image(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Disk(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Network(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Pool(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Maintenance(command) => {
            ask(
                &matches,
                |session| async move { command.run(&session).await },
            )
        }
        Role::Operation(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Migration(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Event(command) => ask(
            &matches,
            |session| async move { command.run(&session).await },
        ),
        Role::Demo(arguments) => match Builder::new_current_thread().enable_all().build() {
            // One thread: the children end with the thread that started them.
            Ok(runtime) => report(runtime.block_on(demo::run(arguments))),
            Err(error) => report(Err(error)),
        },
        Role::Completions { shell } => {
            clap_complete::generate(shell, &mut command(), "godwit", &mut io::stdout());
            ExitCode::SUCCESS
        }
    }
}

/// Nouns whose commands ask the server.
const ASKING: [&str; 10] = [
    "disk",
    "event",
    "host",
    "image",
    "maintenance",
    "migration",
    "network",
    "operation",
    "pool",
    "vm",
];
/// The command beneath an asking noun that does not.
const AGENT: &str = "run";

/// The whole command tree. Commands that ask the server get the options for that here, because they cannot be
/// global: `godwit host run` has a `--server` of its own.
fn command() -> Command {
    ASKING.iter().fold(Program::command(), |command, noun| {
        command.mut_subcommand(noun, let_leaves_ask)
    })
}

/// Gives the options to every command that has none beneath it.
fn let_leaves_ask(command: Command) -> Command {
    let beneath: Vec<String> = command
        .get_subcommands()
        .map(|beneath| beneath.get_name().to_owned())
        .collect();
    if beneath.is_empty() {
        return ClientOptions::augment_args(command);
    }
    beneath
        .iter()
        .filter(|beneath| *beneath != AGENT)
        .fold(command, |command, beneath| {
            command.mut_subcommand(beneath, let_leaves_ask)
        })
}

/// Runs a command that asks the server.
fn ask<F: Future<Output = Result<(), Failure>>>(
    matches: &ArgMatches,
    run: impl FnOnce(Session) -> F,
) -> ExitCode {
    let mut leaf = matches;
    while let Some((_, beneath)) = leaf.subcommand() {
        leaf = beneath;
    }
    let options = match ClientOptions::from_arg_matches(leaf) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let outcome = match (
        Session::new(&options),
        Builder::new_current_thread().enable_all().build(),
    ) {
        (Ok(session), Ok(runtime)) => runtime.block_on(run(session)),
        (Err(failure), _) => Err(failure),
        (_, Err(source)) => Err(Failure::Io {
            action: "cannot start",
            source,
        }),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("godwit: {failure}");
            failure.exit_code()
        }
    }
}

/// Runs the server.
fn serve(arguments: ServerArgs, die_with_parent: bool) -> ExitCode {
    if die_with_parent {
        let signal = Some(rustix::process::Signal::TERM);
        if let Err(error) = rustix::process::set_parent_process_death_signal(signal) {
            return report(Err(io::Error::from(error)));
        }
    }
    match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let outcome = runtime.block_on(server::run(arguments));
            // What still runs has been told to end and must not keep the process.
            runtime.shutdown_background();
            report(outcome)
        }
        Err(error) => report(Err(error)),
    }
}

/// Runs a process that logs.
fn logged(options: &LogOptions, run: impl FnOnce() -> ExitCode) -> ExitCode {
    let log = options
        .log
        .parse()
        .map_err(|error: ParseError| error.into())
        .and_then(|filter: EnvFilter| {
            let subscriber = tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(io::stderr);
            match options.log_format {
                LogFormat::Text => subscriber.with_ansi(io::stderr().is_terminal()).try_init(),
                LogFormat::Json => subscriber.json().try_init(),
            }
        });
    match log {
        Ok(()) => run(),
        Err(error) => {
            eprintln!(
                "godwit: --log {:?} cannot be used: {error}\n  remedy: write it as `info` or `godwit_api=debug,info`",
                options.log
            );
            ExitCode::from(2)
        }
    }
}

/// Prints an error with its causes.
fn report<E: Error>(outcome: Result<(), E>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str("\n  because: ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    eprintln!("godwit: {text}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_asking_command_takes_a_server_and_an_output_format() {
        let command = command();
        let mut left: Vec<(String, &Command)> = ASKING
            .iter()
            .map(|noun| (*noun).to_owned())
            .map(|noun| {
                (
                    noun.clone(),
                    command.find_subcommand(&noun).expect("a noun"),
                )
            })
            .collect();
        let mut leaves = Vec::new();
        while let Some((name, found)) = left.pop() {
            if !found.has_subcommands() {
                leaves.push((name, found));
                continue;
            }
            let beneath = found.get_subcommands();
            let asking = beneath.filter(|beneath| beneath.get_name() != AGENT);
            left.extend(asking.map(|beneath| (format!("{name} {}", beneath.get_name()), beneath)));
        }
        assert!(leaves.iter().any(|(name, _)| name == "vm snapshot create"));
        for (name, leaf) in leaves {
            let long: Vec<_> = leaf
                .get_arguments()
                .filter_map(|argument| argument.get_long())
                .collect();
            assert!(
                long.contains(&"server") && long.contains(&"output"),
                "{name}"
            );
        }
    }
}
