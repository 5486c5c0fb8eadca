//! The command tree and the exit status.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Runs virtual machines on a pool of hosts and moves them without stopping them.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, max_term_width = 100)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one VM in this process; started by the host agent, usable alone.
    Vmm(godwit_vmm::VmmArgs),
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let program = Program::parse();
    let outcome = match program.command {
        Command::Vmm(arguments) => godwit_vmm::run(arguments, pilot::ELF).map_err(|error| error.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("godwit: {error}");
            ExitCode::FAILURE
        }
    }
}
