//! Tests that cannot run here say so loudly and are counted.
//!
//! The test harness knows no "skipped" at run time: such a test returns early and counts as passed. So [`skip`]
//! also appends a line to the file named by `GODWIT_SKIP_LOG`, from which `tests/run` lists the reasons and
//! corrects the count. All crates' tests use this one.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;

/// Names the file that collects `test name<TAB>reason` lines.
pub const SKIP_LOG_ENV: &str = "GODWIT_SKIP_LOG";

/// Reports the running test as skipped. The caller returns right after.
///
/// # Panics
/// When the skip log cannot be written.
pub fn skip(reason: impl Display) {
    let test = match (
        std::env::var("NEXTEST_BINARY_ID"),
        std::env::var("NEXTEST_TEST_NAME"),
    ) {
        (Ok(binary), Ok(test)) => format!("{binary} {test}"),
        _ => std::thread::current().name().unwrap_or("a test").to_owned(),
    };
    skip_named(&test, reason);
}

/// Reports `test` as skipped, for harnesses that know the names of their tests.
///
/// # Panics
/// When the skip log cannot be written.
pub fn skip_named(test: &str, reason: impl Display) {
    eprintln!("SKIPPED {test}: {reason}");
    if let Some(path) = std::env::var_os(SKIP_LOG_ENV) {
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .expect("the skip log can be opened");
        log.write_all(format!("{test}\t{reason}\n").as_bytes())
            .expect("the skip log can be written");
    }
}
