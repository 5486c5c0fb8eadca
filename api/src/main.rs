//! The `godwit` program: every role of the pool in one binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    godwit_api::program::main()
}
