//! Huge pages for shared memory, switched on as the manual advises for hosts. QEMU's guests here have theirs anyway:
//! its memory is anonymous, and kernels give that huge pages unless told otherwise.

use crate::report::Report;
use std::fs;

const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const ANONYMOUS: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Whoever asks for huge pages gets them, until this is dropped.
pub(crate) struct SharedHugePages {
    before: Option<String>,
}

impl SharedHugePages {
    /// Switches them on where this user may, and says in the report how they are.
    pub(crate) fn advise(report: &mut Report) -> Self {
        let before = chosen(SWITCH).filter(|before| before == "never");
        let switched = before.filter(|_| fs::write(SWITCH, "advise").is_ok());
        for (name, path) in [
            ("huge_pages_shared", SWITCH),
            ("huge_pages_anonymous", ANONYMOUS),
        ] {
            report.option(name, chosen(path).unwrap_or_else(|| "none".into()));
        }
        Self { before: switched }
    }
}

impl Drop for SharedHugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = fs::write(SWITCH, before)
        {
            eprintln!("{SWITCH} stays as it is: {error}");
        }
    }
}

/// The word in brackets.
fn chosen(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}
