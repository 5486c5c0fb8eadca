//! Reading `/proc`: what the host and each VMM really use. Parsers are pure; what cannot be read counts as zero,
//! because a missing figure must never stop an agent.

use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::usage::Pressure;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// Clock ticks per second in `/proc` (`USER_HZ`, 100 on every Linux for x86-64).
const TICKS_PER_SECOND: u64 = 100;

/// CPU time of all cores since boot, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuTimes {
    pub(crate) busy: u64,
    pub(crate) total: u64,
}

impl CpuTimes {
    /// Busy share since `earlier`, 0 to 100.
    pub(crate) fn busy_percent_since(self, earlier: Self) -> f64 {
        let total = self.total.saturating_sub(earlier.total);
        let busy = self.busy.saturating_sub(earlier.busy);
        if total == 0 {
            0.0
        } else {
            (100.0 * busy as f64 / total as f64).min(100.0)
        }
    }
}

/// `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal (guest time is part of user).
pub(crate) fn parse_cpu_times(stat: &str) -> Option<CpuTimes> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line
        .split_ascii_whitespace()
        .take(8)
        .map_while(|field| field.parse().ok())
        .collect();
    if fields.len() < 4 {
        return None;
    }
    let total = fields
        .iter()
        .fold(0, |sum: u64, field| sum.saturating_add(*field));
    let idle = fields[3].saturating_add(fields.get(4).copied().unwrap_or(0));
    Some(CpuTimes {
        busy: total.saturating_sub(idle),
        total,
    })
}

/// Memory of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) total: Bytes,
    pub(crate) available: Bytes,
}

/// `/proc/meminfo`.
pub(crate) fn parse_memory(meminfo: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(Bytes(kib.saturating_mul(1024)))
    };
    Some(Memory {
        total: field("MemTotal:")?,
        available: field("MemAvailable:")?,
    })
}

/// `/proc/pressure/*`, the line `some`, `avg10`.
pub(crate) fn parse_pressure(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split_ascii_whitespace()
        .find_map(|field| field.strip_prefix("avg10="))?
        .parse()
        .ok()
}

/// What `/proc/<pid>/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessStat {
    pub(crate) alive: Alive,
    pub(crate) cpu_time: Duration,
    pub(crate) start_ticks: u64,
}

/// Whether a process still runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alive {
    Yes,
    /// It has ended, and its parent has not taken note yet.
    Zombie,
}

/// `/proc/<pid>/stat`. The command name may contain anything, so fields are counted from its closing bracket.
pub(crate) fn parse_process_stat(stat: &str) -> Option<ProcessStat> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Numbered in proc(5) from 1; `state`, number 3, is the first after the name.
    let field = |number: usize| fields.get(number - 3).copied();
    let alive = match field(3)? {
        "Z" | "X" | "x" => Alive::Zombie,
        _ => Alive::Yes,
    };
    let ticks = field(14)?
        .parse::<u64>()
        .ok()?
        .saturating_add(field(15)?.parse().ok()?);
    let cpu_time = Duration::from_millis(ticks.saturating_mul(1000 / TICKS_PER_SECOND));
    Some(ProcessStat {
        alive,
        cpu_time,
        start_ticks: field(22)?.parse().ok()?,
    })
}

/// `/proc/<pid>/statm`: resident pages are the second field.
pub(crate) fn parse_resident(statm: &str) -> Option<Bytes> {
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Bytes(pages.saturating_mul(godwit_wire::unit::PAGE_BYTES)))
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

pub(crate) fn cpu_times() -> CpuTimes {
    read("/proc/stat")
        .and_then(|text| parse_cpu_times(&text))
        .unwrap_or_default()
}

pub(crate) fn memory() -> Memory {
    read("/proc/meminfo")
        .and_then(|text| parse_memory(&text))
        .unwrap_or_default()
}

/// Zero where the kernel does not measure it.
pub(crate) fn pressure() -> Pressure {
    let some =
        |name: &str| read(format!("/proc/pressure/{name}")).and_then(|text| parse_pressure(&text));
    Pressure {
        cpu_percent: some("cpu").unwrap_or(0.0),
        memory_percent: some("memory").unwrap_or(0.0),
        io_percent: some("io").unwrap_or(0.0),
    }
}

pub(crate) fn process_stat(pid: i32) -> Option<ProcessStat> {
    parse_process_stat(&read(format!("/proc/{pid}/stat"))?)
}

pub(crate) fn resident(pid: i32) -> Bytes {
    read(format!("/proc/{pid}/statm"))
        .and_then(|text| parse_resident(&text))
        .unwrap_or_default()
}

/// Processes one of whose arguments is `argument`. One that cannot be looked at is an error, unless it has ended:
/// "nothing found" must mean that there is nothing.
pub(crate) fn processes_with_argument(any_of: &[PathBuf]) -> io::Result<Vec<i32>> {
    use std::os::unix::ffi::OsStrExt;
    let wanted = |argument: &[u8]| {
        any_of
            .iter()
            .any(|path| path.as_os_str().as_bytes() == argument)
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let arguments = match std::fs::read(format!("/proc/{pid}/cmdline")) {
            Err(error) if has_ended(&error) => continue,
            read => read?,
        };
        if arguments.split(|byte| *byte == 0).any(wanted) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// A program's file: device and inode. A running program's file cannot be changed, only replaced, so this tells one
/// build from another, whatever they say of themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProgramFile(u64, u64);

/// The program that process `pid` runs; `None` when that cannot be seen.
pub(crate) fn program_of(pid: i32) -> Option<ProgramFile> {
    program_at(Path::new(&format!("/proc/{pid}/exe")))
}

/// The program at `path`.
pub(crate) fn program_at(path: &Path) -> Option<ProgramFile> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path).ok()?;
    Some(ProgramFile(file.dev(), file.ino()))
}

/// Name of a thread that runs guest code, without its number.
const VCPU_THREAD: &str = "vcpu";
/// `PF_EXITING` (`include/linux/sched.h`): the thread is past the point from which it could return to user mode.
const EXITING: u64 = 0x4;

/// Whether a thread, by its `/proc/<pid>/task/<tid>/stat`, may still run guest code. Text that is not understood
/// says that it may.
pub(crate) fn parse_runs_guest(stat: &str) -> bool {
    let Some((head, tail)) = stat.rsplit_once(')') else {
        return true;
    };
    let is_vcpu = head
        .split_once('(')
        .is_none_or(|(_, name)| name.starts_with(VCPU_THREAD));
    // Numbered in proc(5) from 1: `state` is 3, the first after the name, and `flags` 9.
    let mut fields = tail.split_ascii_whitespace();
    let dead = matches!(fields.next(), Some("Z" | "X" | "x"));
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    is_vcpu && !dead && flags.is_none_or(|flags| flags & EXITING == 0)
}

/// Whether any thread of a process may still run guest code; `false` if there is no such process.
pub(crate) fn runs_guest(pid: i32) -> io::Result<bool> {
    let threads = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if has_ended(&error) => return Ok(false),
        threads => threads?,
    };
    for thread in threads {
        let thread = match thread {
            Err(error) if has_ended(&error) => continue,
            thread => thread?,
        };
        let stat = match std::fs::read_to_string(thread.path().join("stat")) {
            Err(error) if has_ended(&error) => continue,
            stat => stat?,
        };
        if parse_runs_guest(&stat) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How `/proc` says that a process or thread is no more.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// The id of this boot of the host.
pub(crate) fn boot_id() -> Option<Uuid> {
    read("/proc/sys/kernel/random/boot_id")?.trim().parse().ok()
}

pub(crate) fn kernel_release() -> String {
    read("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// All memory of the host.
pub(crate) fn memory_total() -> Mib {
    memory().total.mib()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn busy_time_is_what_is_neither_idle_nor_waiting() {
        let first = parse_cpu_times("cpu  10 0 10 70 10 0 0 0 0 0\ncpu0 1 1 1 1\n").unwrap();
        assert_eq!(
            first,
            CpuTimes {
                busy: 20,
                total: 100
            }
        );
        let second = parse_cpu_times("cpu  60 0 60 70 10 0 0 0 0 0\n").unwrap();
        assert_eq!(second.busy_percent_since(first), 100.0);
        assert_eq!(second.busy_percent_since(second), 0.0);
    }

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let tail = "S 1 1 1 0 -1 4194560 0 0 0 0 150 50 0 0 20 0 3 0 777 0 0";
        let stat = parse_process_stat(&format!("42 (a) Z (b) {tail}")).unwrap();
        let expected = ProcessStat {
            alive: Alive::Yes,
            cpu_time: Duration::from_secs(2),
            start_ticks: 777,
        };
        assert_eq!(stat, expected);
    }

    #[test]
    fn memory_and_pressure_are_read_from_their_lines() {
        let memory =
            parse_memory("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n").unwrap();
        assert_eq!(
            memory,
            Memory {
                total: Bytes(2 << 20),
                available: Bytes(1 << 20)
            }
        );
        let some = "some avg10=1.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=9.00 avg60=0 avg300=0 total=0\n";
        assert_eq!(parse_pressure(some), Some(1.25));
        assert_eq!(parse_resident("100 3 2 1 0 9 0"), Some(Bytes(3 * 4096)));
    }

    #[test]
    fn this_process_finds_itself() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert_eq!(process_stat(me).unwrap().alive, Alive::Yes);
        assert!(resident(me) > Bytes(0));
        let program = std::env::args_os().next().unwrap();
        assert!(
            processes_with_argument(&[PathBuf::from(&program)])
                .unwrap()
                .contains(&me)
        );
        assert!(boot_id().is_some());
        assert!(memory_total() > Mib(0));
    }

    #[test]
    fn only_a_vcpu_thread_that_is_not_exiting_can_run_guest_code() {
        assert!(parse_runs_guest("7 (vcpu0) R 1 1 1 0 -1 4194368 0 0"));
        assert!(!parse_runs_guest("7 (vcpu0) R 1 1 1 0 -1 4194372 0 0"));
        assert!(!parse_runs_guest("7 (vcpu0) Z 1 1 1 0 -1 4194368 0 0"));
        assert!(!parse_runs_guest("7 (godwit) D 1 1 1 0 -1 4194368 0 0"));
        assert!(parse_runs_guest("7 (vcpu0) R"));
    }

    #[test]
    fn a_process_runs_guest_code_as_long_as_it_has_a_vcpu_thread() {
        let me = i32::try_from(std::process::id()).unwrap();
        let (named, is_named) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let vcpu = std::thread::Builder::new().name("vcpu0".into());
        let vcpu = vcpu
            .spawn(move || {
                named.send(()).unwrap();
                let _ = ended.recv();
            })
            .unwrap();
        is_named.recv().unwrap();
        assert!(runs_guest(me).unwrap());
        drop(end);
        vcpu.join().unwrap();
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in any::<String>()) {
            let _ = (parse_cpu_times(&text), parse_memory(&text), parse_pressure(&text));
            let _ = (parse_process_stat(&text), parse_resident(&text));
        }

        #[test]
        fn no_numbers_make_a_parser_panic(numbers in proptest::collection::vec(any::<u64>(), 0..30)) {
            let text: String = numbers.iter().map(|number| format!(" {number}")).collect();
            let _ = parse_cpu_times(&format!("cpu {text}"));
            let _ = parse_process_stat(&format!("1 (x) S{text}"));
            let _ = parse_resident(&text);
        }
    }
}
