//! Where the programs under test are.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names a ready-built `godwit`; `tests/run` sets it so that no test has to ask Cargo.
pub const GODWIT_ENV: &str = "GODWIT_BIN";

/// The `godwit` program, built with the profile of the running test.
///
/// # Panics
/// When it cannot be built.
pub fn godwit() -> &'static Path {
    static GODWIT: OnceLock<PathBuf> = OnceLock::new();
    GODWIT.get_or_init(|| match std::env::var_os(GODWIT_ENV) {
        Some(path) => PathBuf::from(path),
        None => build("godwit-api", "godwit").expect("the godwit program can be built"),
    })
}

/// The helper that ends what a test leaves behind; it is of this package, so Cargo has built it already.
pub fn reaper() -> PathBuf {
    profile_dir().join("reaper")
}

/// Root of the checkout.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests lie one level below the checkout's root")
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    profile_dir()
        .parent()
        .expect("a profile directory lies in the target directory")
        .to_owned()
}

/// `target/debug` or `target/release`, whichever the running program was built into.
fn profile_dir() -> PathBuf {
    let program = std::env::current_exe().expect("a running program has a path");
    let folder = program.parent().expect("a program lies in a folder");
    match folder.file_name() {
        Some(name) if name == "deps" => folder
            .parent()
            .expect("deps lies in a profile directory")
            .to_owned(),
        _ => folder.to_owned(),
    }
}

fn build(package: &str, program: &str) -> anyhow::Result<PathBuf> {
    let folder = profile_dir();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(checkout()).args([
        "build",
        "--quiet",
        "--package",
        package,
        "--bin",
        program,
    ]);
    if folder.file_name().is_some_and(|name| name == "release") {
        cargo.arg("--release");
    }
    let status = cargo.status().context("cargo cannot be started")?;
    if !status.success() {
        bail!("cargo build of {program} failed with {status}");
    }
    Ok(folder.join(program))
}
