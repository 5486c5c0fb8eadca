//! The shell's commands.

use super::text::{Text, parse_decimal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Ticks,
    TicksReset,
    Fill {
        mib: u64,
    },
    Dirty {
        mib_per_s: u64,
        working_set_mib: u64,
    },
    Verify,
    Stop,
    SpinOn,
    SpinOff,
    Halt,
    Reset,
    Help,
}

/// Why a line is not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection<'line> {
    Unknown {
        word: &'line [u8],
    },
    Missing {
        argument: &'static str,
        usage: &'static str,
    },
    NotANumber {
        argument: &'static str,
        value: &'line [u8],
        usage: &'static str,
    },
    NotAChoice {
        argument: &'static str,
        value: &'line [u8],
        usage: &'static str,
    },
    Surplus {
        value: &'line [u8],
        usage: &'static str,
    },
}

pub const HELP: &str = "commands=ticks,ticks_reset,fill,dirty,verify,stop,spin,halt,reset,help \
usage=\"ticks [reset] | fill <MiB> | dirty <MiB/s> <working set MiB> | verify | stop | \
spin <on|off> | halt | reset | help\"";

/// Reads one line. `Ok(None)` is a blank line, which gets no answer.
pub fn parse(line: &[u8]) -> Result<Option<Command>, Rejection<'_>> {
    let mut words = Words { rest: line };
    let Some(name) = words.next() else {
        return Ok(None);
    };
    let command = match name {
        b"ticks" => ticks(&mut words)?,
        b"fill" => Command::Fill {
            mib: words.number("MiB", FILL_USAGE)?,
        },
        b"dirty" => Command::Dirty {
            mib_per_s: words.number("MiB/s", DIRTY_USAGE)?,
            working_set_mib: words.number("working set MiB", DIRTY_USAGE)?,
        },
        b"verify" => Command::Verify,
        b"stop" => Command::Stop,
        b"spin" => spin(&mut words)?,
        b"halt" => Command::Halt,
        b"reset" => Command::Reset,
        b"help" => Command::Help,
        word => return Err(Rejection::Unknown { word }),
    };
    match words.next() {
        None => Ok(Some(command)),
        Some(value) => Err(Rejection::Surplus {
            value,
            usage: usage(command),
        }),
    }
}

impl Rejection<'_> {
    /// Appends the operator's sentence: what is wrong and what to send instead.
    pub fn write_to(&self, text: &mut Text) {
        match *self {
            Rejection::Unknown { word } => {
                text.push("unknown command '")
                    .push_printable(word)
                    .push("'; send: help");
            }
            Rejection::Missing { argument, usage } => {
                text.push("argument <")
                    .push(argument)
                    .push("> is missing; send: ")
                    .push(usage);
            }
            Rejection::NotANumber {
                argument,
                value,
                usage,
            } => {
                text.push("argument <")
                    .push(argument)
                    .push("> is not a whole number: '");
                text.push_printable(value).push("'; send: ").push(usage);
            }
            Rejection::NotAChoice {
                argument,
                value,
                usage,
            } => {
                text.push("argument <")
                    .push(argument)
                    .push("> is not one of its choices: '");
                text.push_printable(value).push("'; send: ").push(usage);
            }
            Rejection::Surplus { value, usage } => {
                text.push("argument '").push_printable(value);
                text.push("' is one too many; send: ").push(usage);
            }
        }
    }
}

const TICKS_USAGE: &str = "ticks [reset]";
const FILL_USAGE: &str = "fill <MiB>";
const DIRTY_USAGE: &str = "dirty <MiB/s> <working set MiB>";
const SPIN_USAGE: &str = "spin <on|off>";

fn usage(command: Command) -> &'static str {
    match command {
        Command::Ticks | Command::TicksReset => TICKS_USAGE,
        Command::Fill { .. } => FILL_USAGE,
        Command::Dirty { .. } => DIRTY_USAGE,
        Command::SpinOn | Command::SpinOff => SPIN_USAGE,
        Command::Verify => "verify",
        Command::Stop => "stop",
        Command::Halt => "halt",
        Command::Reset => "reset",
        Command::Help => "help",
    }
}

fn ticks<'line>(words: &mut Words<'line>) -> Result<Command, Rejection<'line>> {
    match words.next() {
        None => Ok(Command::Ticks),
        Some(b"reset") => Ok(Command::TicksReset),
        Some(value) => Err(Rejection::NotAChoice {
            argument: "reset",
            value,
            usage: TICKS_USAGE,
        }),
    }
}

fn spin<'line>(words: &mut Words<'line>) -> Result<Command, Rejection<'line>> {
    match words.next() {
        None => Err(Rejection::Missing {
            argument: "on|off",
            usage: SPIN_USAGE,
        }),
        Some(b"on") => Ok(Command::SpinOn),
        Some(b"off") => Ok(Command::SpinOff),
        Some(value) => Err(Rejection::NotAChoice {
            argument: "on|off",
            value,
            usage: SPIN_USAGE,
        }),
    }
}

struct Words<'line> {
    rest: &'line [u8],
}

impl<'line> Words<'line> {
    fn next(&mut self) -> Option<&'line [u8]> {
        let start = self
            .rest
            .iter()
            .position(|byte| !byte.is_ascii_whitespace())?;
        let word = &self.rest[start..];
        let end = word
            .iter()
            .position(u8::is_ascii_whitespace)
            .unwrap_or(word.len());
        self.rest = &word[end..];
        Some(&word[..end])
    }

    fn number(
        &mut self,
        argument: &'static str,
        usage: &'static str,
    ) -> Result<u64, Rejection<'line>> {
        let value = self.next().ok_or(Rejection::Missing { argument, usage })?;
        parse_decimal(value).ok_or(Rejection::NotANumber {
            argument,
            value,
            usage,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(line: &str) -> String {
        let rejection = parse(line.as_bytes()).expect_err("the line is wrong on purpose");
        let mut text = Text::new();
        rejection.write_to(&mut text);
        String::from_utf8(text.as_bytes().to_vec()).expect("replies are ASCII")
    }

    #[test]
    fn every_command_is_understood() {
        let cases: [(&[u8], Command); 11] = [
            (b"ticks", Command::Ticks),
            (b"ticks reset", Command::TicksReset),
            (b"fill 64", Command::Fill { mib: 64 }),
            (
                b" dirty  10\t32 \r",
                Command::Dirty {
                    mib_per_s: 10,
                    working_set_mib: 32,
                },
            ),
            (b"verify", Command::Verify),
            (b"stop", Command::Stop),
            (b"spin on", Command::SpinOn),
            (b"spin off", Command::SpinOff),
            (b"halt", Command::Halt),
            (b"reset", Command::Reset),
            (b"help", Command::Help),
        ];
        for (line, command) in cases {
            assert_eq!(parse(line), Ok(Some(command)));
        }
    }

    #[test]
    fn a_blank_line_is_no_command() {
        assert_eq!(parse(b""), Ok(None));
        assert_eq!(parse(b" \r"), Ok(None));
    }

    #[test]
    fn a_refusal_names_the_argument_and_the_remedy() {
        assert_eq!(
            refusal("fill"),
            "argument <MiB> is missing; send: fill <MiB>"
        );
        assert_eq!(
            refusal("dirty 10 lots"),
            "argument <working set MiB> is not a whole number: 'lots'; \
             send: dirty <MiB/s> <working set MiB>"
        );
        assert_eq!(
            refusal("halt now"),
            "argument 'now' is one too many; send: halt"
        );
        assert_eq!(refusal("jump\u{7}"), "unknown command 'jump?'; send: help");
        assert_eq!(
            refusal("spin fast"),
            "argument <on|off> is not one of its choices: 'fast'; send: spin <on|off>"
        );
    }

    proptest! {
        #[test]
        fn any_line_is_answered_without_a_panic(line in proptest::collection::vec(any::<u8>(), 0..160)) {
            if let Err(rejection) = parse(&line) {
                let mut text = Text::new();
                rejection.write_to(&mut text);
                prop_assert!(text.as_bytes().iter().all(|byte| (b' '..=b'~').contains(byte)));
            }
        }
    }
}
