//! `reaper DIR`: waits until its standard input closes, then kills every process that has a path below DIR on its
//! command line and removes DIR. See `godwit_tests::test_dir`.

use godwit_tests::test_dir::processes_mentioning;
use rustix::process::{Pid, Signal, kill_process};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Killed processes disappear within this time, or the kernel is holding on to them.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    let dir = PathBuf::from(std::env::args_os().nth(1).expect("usage: reaper DIR"));
    // Ends when the last writer is gone; what it reads does not matter.
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Again and again: a process may be starting another one just now.
        let left = processes_mentioning(&dir);
        if left.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid as i32)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = std::fs::remove_dir_all(dir);
}
