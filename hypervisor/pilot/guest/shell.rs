//! The line shell: one line in, one line out.

use core::sync::atomic::Ordering;

use crate::clock;
use crate::console;
use crate::dirtier::{self, Dirtier, Orders, PAGES_PER_S_MAX};
use crate::memory::Memory;
use crate::power;
use crate::pure::command::{self, Command};
use crate::pure::constants::{COMMAND_BYTES_MAX, PAGES_PER_MIB, POWER_OFF_BYTE, VCPUS_MAX};
use crate::pure::text::Text;
use crate::serial;
use crate::smp::BOOT_VCPU;
use crate::tick;
use crate::user_mode;
use crate::vcpu;

/// Answers commands for ever, on the boot vCPU. The only vCPU also rewrites pages in between.
pub fn run(memory: &'static Memory, vcpus: usize) -> ! {
    let mut shell = Shell {
        memory,
        vcpus,
        start_ns: clock::read(BOOT_VCPU).ns,
    };
    let mut line = Line::new();
    let mut dirtier = (vcpus == 1).then(|| Dirtier::new(memory, BOOT_VCPU));
    loop {
        while let Some(byte) = serial::read() {
            match line.push(byte) {
                Input::Incomplete => {}
                Input::PowerOff => shell.halt(),
                Input::TooLong => refuse_long_line(),
                Input::Complete => {
                    shell.answer(line.bytes());
                    line.clear();
                }
            }
        }
        if !dirtier.as_mut().is_some_and(Dirtier::work) {
            vcpu::idle();
        }
    }
}

/// The line being received.
struct Line {
    bytes: [u8; COMMAND_BYTES_MAX],
    len: usize,
    /// The line has grown past its room; its bytes are dropped up to the line end.
    too_long: bool,
}

enum Input {
    Incomplete,
    Complete,
    TooLong,
    PowerOff,
}

impl Line {
    const fn new() -> Self {
        Self {
            bytes: [0; COMMAND_BYTES_MAX],
            len: 0,
            too_long: false,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn clear(&mut self) {
        self.len = 0;
        self.too_long = false;
    }

    fn push(&mut self, byte: u8) -> Input {
        match byte {
            b'\n' | b'\r' if self.too_long => {
                self.clear();
                Input::TooLong
            }
            b'\n' | b'\r' => Input::Complete,
            POWER_OFF_BYTE if self.len == 0 && !self.too_long => Input::PowerOff,
            _ => {
                match self.bytes.get_mut(self.len) {
                    Some(slot) => {
                        *slot = byte;
                        self.len += 1;
                    }
                    None => self.too_long = true,
                }
                Input::Incomplete
            }
        }
    }
}

struct Shell {
    memory: &'static Memory,
    vcpus: usize,
    start_ns: u64,
}

impl Shell {
    fn answer(&mut self, line: &[u8]) {
        let mut reply = Text::new();
        match command::parse(line) {
            Ok(None) => return,
            Ok(Some(command)) => self.execute(command, &mut reply),
            Err(rejection) => {
                reply.push("error ");
                rejection.write_to(&mut reply);
            }
        }
        console::print_line(&reply);
    }

    fn execute(&mut self, command: Command, reply: &mut Text) {
        match command {
            Command::Ticks => self.ticks(reply),
            Command::TicksReset => {
                tick::reset(vcpu::all(self.vcpus));
                reply.push("ok blackouts=0");
            }
            Command::Fill { mib } => self.fill(mib, reply),
            Command::Dirty {
                mib_per_s,
                working_set_mib,
            } => {
                self.dirty(mib_per_s, working_set_mib, reply);
            }
            Command::Verify => self.verify(reply),
            Command::Stop => {
                dirtier::hold(self.vcpus).set(Orders {
                    pages_per_s: 0,
                    working_set_pages: 0,
                });
                reply.push("ok stopped");
            }
            Command::SpinOn => {
                vcpu::SPINNING.store(true, Ordering::Relaxed);
                reply.push("ok spin=on");
            }
            Command::SpinOff => {
                vcpu::SPINNING.store(false, Ordering::Relaxed);
                reply.push("ok spin=off");
            }
            Command::Halt => self.halt(),
            Command::Reset => {
                console::print_line(reply.push("ok resetting"));
                power::reset()
            }
            Command::Help => {
                reply.push("ok ").push(command::HELP);
            }
        }
    }

    fn ticks(&self, reply: &mut Text) {
        let vcpus = vcpu::all(self.vcpus);
        let totals = tick::totals(vcpus);
        let uptime_ns = clock::read(BOOT_VCPU).ns.saturating_sub(self.start_ns);
        // Counted once, so that the sum is the sum of what is shown.
        let mut ticks = [0; VCPUS_MAX];
        for (count, vcpu) in ticks.iter_mut().zip(vcpus) {
            *count = vcpu.ticks.load(Ordering::Relaxed);
        }
        reply.push("ok").push_pair("ticks", ticks.iter().sum());
        reply.push_key("per_vcpu");
        for (index, count) in ticks[..vcpus.len()].iter().enumerate() {
            if index > 0 {
                reply.push(",");
            }
            reply.push_decimal(*count);
        }
        reply.push_pair("uptime_ms", uptime_ns / 1_000_000);
        reply.push_pair("blackouts", totals.blackouts);
        reply.push_pair("last_blackout_us", totals.last_blackout_us);
        reply.push_pair("max_blackout_us", totals.max_blackout_us);
        reply.push_pair("backwards", totals.backwards);
        reply.push_pair("tsc_backwards", totals.tsc_backwards);
        reply.push_key("clock").push(if clock::uses_kvmclock() {
            "kvmclock"
        } else {
            "tsc"
        });
        reply.push_pair("period_us", tick::period_ns() / 1_000);
    }

    fn fill(&self, mib: u64, reply: &mut Text) {
        let Some(pages) = self.pages_within_capacity("MiB", mib, reply) else {
            return;
        };
        let _hold = dirtier::hold(self.vcpus);
        let start_ns = clock::read(BOOT_VCPU).ns;
        user_mode::run(|| self.memory.fill(0, pages));
        let ms = clock::read(BOOT_VCPU).ns.saturating_sub(start_ns) / 1_000_000;
        reply
            .push("ok")
            .push_pair("filled_mib", mib)
            .push_pair("pages", pages);
        reply.push_pair("ms", ms);
    }

    fn dirty(&self, mib_per_s: u64, working_set_mib: u64, reply: &mut Text) {
        const MIB_PER_S_MAX: u64 = PAGES_PER_S_MAX / PAGES_PER_MIB;
        if mib_per_s > MIB_PER_S_MAX {
            reply.push("error argument <MiB/s> is too large; the most is");
            reply.push(" ").push_decimal(MIB_PER_S_MAX);
            return;
        }
        if mib_per_s > 0 && working_set_mib == 0 {
            reply.push("error argument <working set MiB> is zero; the least is 1");
            return;
        }
        let Some(pages) = self.pages_within_capacity("working set MiB", working_set_mib, reply)
        else {
            return;
        };
        let hold = dirtier::hold(self.vcpus);
        if mib_per_s > 0 {
            user_mode::run(|| self.memory.fill(self.memory.filled_pages(), pages));
        }
        hold.set(Orders {
            pages_per_s: mib_per_s * PAGES_PER_MIB,
            working_set_pages: pages,
        });
        reply.push("ok").push_pair("dirty_mib_per_s", mib_per_s);
        reply.push_pair("working_set_mib", working_set_mib);
    }

    fn verify(&self, reply: &mut Text) {
        let _hold = dirtier::hold(self.vcpus);
        let findings = user_mode::run(|| self.memory.verify());
        if findings.is_clean() {
            reply.push("ok").push_pair("verified_pages", findings.pages);
        } else {
            reply.push("error corrupt");
        }
        reply
            .push_pair("torn", findings.torn)
            .push_pair("stale", findings.stale);
        reply.push_pair("misplaced", findings.misplaced);
        match findings.first_bad_page {
            Some(page) => reply.push_pair("first_page", page),
            None => reply.push_pair("writes", self.memory.writes()),
        };
    }

    fn pages_within_capacity(&self, argument: &str, mib: u64, reply: &mut Text) -> Option<u64> {
        let capacity = self.memory.capacity_pages();
        let pages = mib
            .checked_mul(PAGES_PER_MIB)
            .filter(|&pages| pages <= capacity);
        if pages.is_none() {
            reply
                .push("error argument <")
                .push(argument)
                .push("> exceeds the memory there is; ");
            reply
                .push("the most is ")
                .push_decimal(capacity / PAGES_PER_MIB);
        }
        pages
    }

    fn halt(&self) -> ! {
        console::print_line(Text::new().push("ok halting"));
        power::power_off()
    }
}

fn refuse_long_line() {
    let mut reply = Text::new();
    reply.push("error line is too long; the most is").push(" ");
    reply.push_decimal(COMMAND_BYTES_MAX as u64).push(" bytes");
    console::print_line(&reply);
}
