//! Tests that cannot run here say so loudly and are counted: the crates' own function for it, and what these tests need.

use std::fs::OpenOptions;

pub use godwit_devices::skip::{SKIP_LOG_ENV, skip, skip_named};

/// Returns from the test, reported as skipped, unless the expression is `Ok`; then it is the value.
///
/// ```no_run
/// # fn missing() -> Result<u32, String> { Err("no such thing here".into()) }
/// fn test() {
///     let thing = godwit_tests::require!(missing());
///     unreachable!("{thing} is missing");
/// }
/// # test();
/// ```
#[macro_export]
macro_rules! require {
    ($needed:expr) => {
        match $needed {
            Ok(value) => value,
            Err(reason) => return $crate::skip::skip(reason),
        }
    };
}

/// Whether guests can run here; the error is the reason to skip.
pub fn kvm() -> Result<(), String> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened
        .map(|_| ())
        .map_err(|error| format!("no usable /dev/kvm: {error}"))
}

/// Whether this process may mount and reserve memory; the error is the reason to skip.
pub fn root() -> Result<(), String> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err("this needs root".into())
    }
}
