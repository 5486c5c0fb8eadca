//! The init program of the Linux test guest: a line shell on the serial console that fills, dirties and verifies
//! memory and measures blackouts from inside.
//!
//! It speaks the pilot's language (`ok key=value …` or `error …`, one line per command), so that a test can drive
//! either guest. It depends on nothing but `std` and is linked statically, because it is alone in its initramfs.

mod button;
mod dirtier;
mod disk;
mod memory;
mod sys;
mod ticks;
mod vsock;

use dirtier::Dirtier;
use memory::{Memory, PAGES_PER_MIB};
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex, PoisonError};
use ticks::Ticks;

/// Left to the kernel and to this program when memory is filled.
const RESERVE_MIB: u64 = 24;
/// Received alone on a line, this byte (Ctrl-D, EOT) powers the guest off.
const POWER_OFF_BYTE: u8 = 0x04;
const HELP: &str = "ok commands=ticks,fill,dirty,stop,verify,disk,vsock,uptime,halt,reset,help \
usage=\"ticks [reset] | fill <MiB> | dirty <MiB/s> <working set MiB> | stop | verify | disk … | vsock … | uptime | \
halt | reset\"";

fn main() {
    sys::mount_kernel_filesystems();
    sys::make_console_raw();
    let agent = Agent::start();
    button::watch(power_button);
    print_line(&format!(
        "guest-agent ready vcpus={} memory_mib={} clock={}",
        sys::online_cpus(),
        sys::meminfo_mib("MemTotal"),
        sys::clock_source()
    ));
    let mut line = Vec::new();
    let mut console = std::io::stdin().lock();
    loop {
        line.clear();
        match console.read_until(b'\n', &mut line) {
            Ok(read) if read > 0 => agent.answer(&line),
            // The console went away: nobody can ask any more.
            _ => sys::power_off(),
        }
    }
}

struct Agent {
    memory: Arc<Mutex<Memory>>,
    dirtier: Dirtier,
    ticks: Arc<Ticks>,
    disk: disk::Current,
}

impl Agent {
    fn start() -> Self {
        let memory = Arc::new(Mutex::new(Memory::default()));
        Self {
            dirtier: Dirtier::start(Arc::clone(&memory)),
            memory,
            ticks: Ticks::start(),
            disk: disk::Current::default(),
        }
    }

    fn answer(&self, line: &[u8]) {
        if line.contains(&POWER_OFF_BYTE) {
            halt();
        }
        let line = String::from_utf8_lossy(line);
        let words: Vec<&str> = line.split_whitespace().collect();
        if !words.is_empty() {
            print_line(
                &self
                    .execute(&words)
                    .unwrap_or_else(|refusal| format!("error {refusal}")),
            );
        }
    }

    fn execute(&self, words: &[&str]) -> Result<String, String> {
        match words {
            ["ticks"] => Ok(self.ticks.report()),
            ["ticks", "reset"] => {
                self.ticks.reset();
                Ok("ok blackouts=0".into())
            }
            ["fill", mib] => self.fill(number("MiB", mib)?),
            ["dirty", rate, working_set] => self.dirty(
                number("MiB/s", rate)?,
                number("working set MiB", working_set)?,
            ),
            ["stop"] => {
                self.dirtier.set(0, 0);
                Ok("ok stopped".into())
            }
            ["verify"] => self.verify(),
            ["disk", words @ ..] => disk::execute(&self.disk, words),
            ["vsock", words @ ..] => vsock::execute(words),
            ["uptime"] => Ok(format!("ok uptime_ms={}", sys::uptime_ms())),
            ["halt"] => halt(),
            ["reset"] => {
                print_line("ok resetting");
                sys::restart()
            }
            ["help"] => Ok(HELP.into()),
            _ => Err(format!("unknown command '{}'; send: help", words.join(" "))),
        }
    }

    fn fill(&self, mib: u64) -> Result<String, String> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        check_capacity("MiB", mib, memory.len_mib())?;
        memory.fill(mib);
        Ok(format!("ok filled_mib={mib} pages={}", mib * PAGES_PER_MIB))
    }

    fn dirty(&self, mib_per_s: u64, working_set_mib: u64) -> Result<String, String> {
        if mib_per_s > 0 && working_set_mib == 0 {
            return Err("argument <working set MiB> is zero; the least is 1".into());
        }
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.len_mib() < working_set_mib {
            check_capacity("working set MiB", working_set_mib, memory.len_mib())?;
            memory.fill(working_set_mib);
        }
        self.dirtier.set(mib_per_s, working_set_mib);
        Ok(format!(
            "ok dirty_mib_per_s={mib_per_s} working_set_mib={working_set_mib}"
        ))
    }

    fn verify(&self) -> Result<String, String> {
        let findings = self
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .verify();
        if findings.is_clean() {
            Ok(format!("ok {findings}"))
        } else {
            Err(format!("corrupt {findings}"))
        }
    }
}

/// Refuses a size that would make the kernel kill this program.
fn check_capacity(argument: &str, mib: u64, held_mib: u64) -> Result<(), String> {
    let most = (sys::meminfo_mib("MemAvailable") + held_mib).saturating_sub(RESERVE_MIB);
    if mib <= most {
        return Ok(());
    }
    Err(format!(
        "argument <{argument}> exceeds the memory there is; the most is {most}"
    ))
}

fn number(argument: &str, text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("argument <{argument}> is not a whole number: '{text}'; send: help"))
}

fn power_button() -> ! {
    print_line("ok power button");
    halt()
}

fn halt() -> ! {
    print_line("ok halting");
    sys::power_off()
}

fn print_line(line: &str) {
    let mut console = std::io::stdout().lock();
    // A console that takes no more output has nobody to tell about it either.
    let _ = console
        .write_all(format!("{line}\n").as_bytes())
        .and_then(|()| console.flush());
}
