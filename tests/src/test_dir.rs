//! The one place a test keeps its state in, and the certainty that nothing outlives the test.
//!
//! Every process under test has a path below the directory on its command line. A `reaper` process holds the other
//! end of a pipe: when the test drops the directory, or dies in whatever way, the reaper kills those processes and
//! removes the directory. That also reaches VMMs which are meant to outlive the agent that started them.

use crate::program;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Lines of each log shown when a test fails.
const LOG_TAIL_LINES: usize = 60;

/// A directory of its own for one test.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
    reaper: Child,
}

impl TestDir {
    /// A fresh directory, watched by a reaper.
    ///
    /// # Panics
    /// When it cannot be created.
    pub fn new() -> Self {
        // Socket paths are limited to 107 bytes, so the directory's name is short.
        let path = tempfile::Builder::new()
            .prefix("gw-")
            .tempdir()
            .expect("a temporary directory")
            .keep();
        let mut reaper = Command::new(program::reaper());
        reaper.arg(&path).stdin(Stdio::piped());
        // A group of its own: whoever kills the test's group must not kill its reaper.
        std::os::unix::process::CommandExt::process_group(&mut reaper, 0);
        let reaper = reaper.spawn().expect("the reaper can be started");
        Self { path, reaper }
    }

    /// Path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of `name` in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Processes that have a path below the directory on their command line.
    pub fn processes(&self) -> Vec<u32> {
        processes_mentioning(&self.path)
    }

    fn show_logs(&self) {
        for log in logs_below(&self.path) {
            let mut bytes = Vec::new();
            let read = fs::File::open(&log).and_then(|mut file| file.read_to_end(&mut bytes));
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<_> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            eprintln!(
                "--- {} ({read:?} bytes)\n{}",
                log.display(),
                tail.join("\n")
            );
        }
    }
}

impl Default for TestDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

/// Processes (not threads) with `path` in their command line, except the caller's own.
pub fn processes_mentioning(path: &Path) -> Vec<u32> {
    let needle = path.as_os_str().as_encoded_bytes();
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            // The reaper names the directory too; it ends by itself.
            let program = cmdline.split(|byte| *byte == 0).next().unwrap_or_default();
            !program.ends_with(b"/reaper")
                && cmdline.windows(needle.len()).any(|window| window == needle)
        })
        .collect()
}

fn logs_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            found.extend(logs_below(&path));
        } else if path.extension().is_some_and(|extension| extension == "log") {
            found.push(path);
        }
    }
    found.sort();
    found
}
