//! Settings of this machine that a bench changes while it measures.

use std::fs;
use std::path::Path;

/// A setting below `/sys` that is as it was when this is dropped.
pub(crate) struct HostSetting {
    path: &'static str,
    before: Option<String>,
}

impl HostSetting {
    /// Sets it to the first of `values` that the kernel takes. Where this user may not, or there is no such setting, it
    /// stays as it is.
    pub(crate) fn change(path: &'static str, values: &[&str]) -> Self {
        let before = current(path).filter(|before| !values.contains(&before.as_str()));
        let changed = before.filter(|_| values.iter().any(|value| fs::write(path, value).is_ok()));
        Self {
            path,
            before: changed,
        }
    }
}

impl Drop for HostSetting {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = fs::write(self.path, before)
        {
            eprintln!("{} stays as it is: {error}", self.path);
        }
    }
}

/// A setting's value; of those that list what may be chosen, what is, which is in brackets.
pub(crate) fn current(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    Some(chosen.map_or(text.trim(), |(chosen, _)| chosen).to_owned())
}
