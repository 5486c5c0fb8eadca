//! Reading what the guest prints.

use std::str::FromStr;

use crate::pure::constants::BANNER_PREFIX;

/// One line of the shell, whatever the command was. Parsing accepts a trailing line end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The text after `ok `.
    Ok(String),
    /// The text after `error `.
    Error(String),
}

/// The first line after boot: `pilot <version> vcpus=<n> memory_mib=<n>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Banner {
    pub version: String,
    /// How many vCPUs run, which is fewer than asked for when some did not start.
    pub vcpus: u64,
    /// RAM in the boot memory map, rounded up.
    pub memory_mib: u64,
}

/// The answer to `ticks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// The sum over all vCPUs; it grows from one answer to the next.
    pub ticks: u64,
    pub per_vcpu: Vec<u64>,
    pub uptime_ms: u64,
    /// Gaps above the threshold since `ticks reset`. A stall of the whole guest counts once on
    /// every vCPU.
    pub blackouts: u64,
    /// The most recent blackout of any vCPU, without the tick period it would have waited anyway.
    pub last_blackout_us: u64,
    pub max_blackout_us: u64,
    /// How often the clock went backwards between two ticks of one vCPU.
    pub backwards: u64,
    /// How often the time stamp counter did.
    pub tsc_backwards: u64,
    pub clock: Clock,
    /// Every vCPU's tick period.
    pub period_us: u64,
}

/// What the guest tells time by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    Kvmclock,
    Tsc,
}

/// The answer to `fill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    pub filled_mib: u64,
    pub pages: u64,
    pub ms: u64,
}

/// The answer to `dirty`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirtying {
    pub mib_per_s: u64,
    pub working_set_mib: u64,
}

/// The answer to `verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// Every filled page holds its last write.
    Intact {
        pages: u64,
        /// Page writes since boot.
        writes: u64,
    },
    Corrupt {
        /// Pages of which a part is lost, old or foreign.
        torn: u64,
        /// Whole pages that hold an earlier write.
        stale: u64,
        /// Whole pages that belong elsewhere.
        misplaced: u64,
        first_page: u64,
    },
}

/// Why a line is not the expected answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    #[error("not an answer of the guest's shell: {line:?}")]
    NotAReply { line: String },
    #[error("the guest refused: {message}")]
    Refused { message: String },
    #[error("the guest's answer has no {key}=: {line:?}")]
    Missing { key: &'static str, line: String },
    #[error("the guest's answer has no sensible {key}=: {value:?}")]
    BadValue { key: &'static str, value: String },
}

impl Reply {
    /// The text after `ok `, or the refusal as an error.
    pub fn into_ok(self) -> Result<String, ReplyError> {
        match self {
            Reply::Ok(text) => Ok(text),
            Reply::Error(message) => Err(ReplyError::Refused { message }),
        }
    }
}

impl FromStr for Reply {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        let line = line.trim_end();
        if let Some(text) = line.strip_prefix("ok ") {
            Ok(Reply::Ok(text.to_owned()))
        } else if let Some(message) = line.strip_prefix("error ") {
            Ok(Reply::Error(message.to_owned()))
        } else {
            Err(ReplyError::NotAReply {
                line: line.to_owned(),
            })
        }
    }
}

impl FromStr for Banner {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        let not_a_reply = || ReplyError::NotAReply {
            line: line.trim_end().to_owned(),
        };
        let text = line.strip_prefix(BANNER_PREFIX).ok_or_else(not_a_reply)?;
        let (version, _) = text.split_once(' ').ok_or_else(not_a_reply)?;
        let pairs = Pairs(text);
        Ok(Banner {
            version: version.to_owned(),
            vcpus: pairs.number("vcpus")?,
            memory_mib: pairs.number("memory_mib")?,
        })
    }
}

impl FromStr for Ticks {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        let text = line.parse::<Reply>()?.into_ok()?;
        let pairs = Pairs(&text);
        let per_vcpu = pairs.value("per_vcpu")?;
        Ok(Ticks {
            ticks: pairs.number("ticks")?,
            per_vcpu: per_vcpu
                .split(',')
                .map(|count| parse_number("per_vcpu", count))
                .collect::<Result<_, _>>()?,
            uptime_ms: pairs.number("uptime_ms")?,
            blackouts: pairs.number("blackouts")?,
            last_blackout_us: pairs.number("last_blackout_us")?,
            max_blackout_us: pairs.number("max_blackout_us")?,
            backwards: pairs.number("backwards")?,
            tsc_backwards: pairs.number("tsc_backwards")?,
            clock: match pairs.value("clock")? {
                "kvmclock" => Clock::Kvmclock,
                "tsc" => Clock::Tsc,
                other => {
                    return Err(ReplyError::BadValue {
                        key: "clock",
                        value: other.to_owned(),
                    });
                }
            },
            period_us: pairs.number("period_us")?,
        })
    }
}

impl FromStr for Filled {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        let text = line.parse::<Reply>()?.into_ok()?;
        let pairs = Pairs(&text);
        Ok(Filled {
            filled_mib: pairs.number("filled_mib")?,
            pages: pairs.number("pages")?,
            ms: pairs.number("ms")?,
        })
    }
}

impl FromStr for Dirtying {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        let text = line.parse::<Reply>()?.into_ok()?;
        let pairs = Pairs(&text);
        Ok(Dirtying {
            mib_per_s: pairs.number("dirty_mib_per_s")?,
            working_set_mib: pairs.number("working_set_mib")?,
        })
    }
}

impl FromStr for Verified {
    type Err = ReplyError;

    fn from_str(line: &str) -> Result<Self, ReplyError> {
        match line.parse::<Reply>()? {
            Reply::Ok(text) => {
                let pairs = Pairs(&text);
                Ok(Verified::Intact {
                    pages: pairs.number("verified_pages")?,
                    writes: pairs.number("writes")?,
                })
            }
            Reply::Error(text) if text.starts_with("corrupt ") => {
                let pairs = Pairs(&text);
                Ok(Verified::Corrupt {
                    torn: pairs.number("torn")?,
                    stale: pairs.number("stale")?,
                    misplaced: pairs.number("misplaced")?,
                    first_page: pairs.number("first_page")?,
                })
            }
            Reply::Error(message) => Err(ReplyError::Refused { message }),
        }
    }
}

/// Words of the shape `key=value`; keys that nobody asks for are ignored.
struct Pairs<'text>(&'text str);

impl<'text> Pairs<'text> {
    fn value(&self, key: &'static str) -> Result<&'text str, ReplyError> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .ok_or_else(|| ReplyError::Missing {
                key,
                line: self.0.to_owned(),
            })
    }

    fn number(&self, key: &'static str) -> Result<u64, ReplyError> {
        parse_number(key, self.value(key)?)
    }
}

fn parse_number(key: &'static str, value: &str) -> Result<u64, ReplyError> {
    value.parse().map_err(|_| ReplyError::BadValue {
        key,
        value: value.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_banner_is_read() {
        assert_eq!(
            "pilot 0.1.0 vcpus=2 memory_mib=256\n".parse(),
            Ok(Banner {
                version: "0.1.0".to_owned(),
                vcpus: 2,
                memory_mib: 256
            })
        );
        assert!("ok stopped".parse::<Banner>().is_err());
    }

    #[test]
    fn ticks_are_read() {
        let line = "ok ticks=30 per_vcpu=10,20 uptime_ms=40 blackouts=1 last_blackout_us=5000 \
                    max_blackout_us=6000 backwards=0 tsc_backwards=2 clock=kvmclock \
                    period_us=2000\r\n";
        assert_eq!(
            line.parse(),
            Ok(Ticks {
                ticks: 30,
                per_vcpu: vec![10, 20],
                uptime_ms: 40,
                blackouts: 1,
                last_blackout_us: 5_000,
                max_blackout_us: 6_000,
                backwards: 0,
                tsc_backwards: 2,
                clock: Clock::Kvmclock,
                period_us: 2_000,
            })
        );
    }

    #[test]
    fn fill_and_dirty_answers_are_read() {
        assert_eq!(
            "ok filled_mib=64 pages=16384 ms=12".parse(),
            Ok(Filled {
                filled_mib: 64,
                pages: 16_384,
                ms: 12
            })
        );
        assert_eq!(
            "ok dirty_mib_per_s=10 working_set_mib=32".parse(),
            Ok(Dirtying {
                mib_per_s: 10,
                working_set_mib: 32
            })
        );
    }

    #[test]
    fn corruption_is_a_finding_and_not_a_refusal() {
        assert_eq!(
            "ok verified_pages=4096 torn=0 stale=0 misplaced=0 writes=9000".parse(),
            Ok(Verified::Intact {
                pages: 4_096,
                writes: 9_000
            })
        );
        assert_eq!(
            "error corrupt torn=1 stale=2 misplaced=3 first_page=77".parse(),
            Ok(Verified::Corrupt {
                torn: 1,
                stale: 2,
                misplaced: 3,
                first_page: 77
            })
        );
        assert_eq!(
            "error unknown command 'verifi'; send: help".parse::<Verified>(),
            Err(ReplyError::Refused {
                message: "unknown command 'verifi'; send: help".to_owned()
            })
        );
    }

    #[test]
    fn a_missing_or_garbled_value_is_named() {
        assert_eq!(
            "ok filled_mib=64 ms=1".parse::<Filled>(),
            Err(ReplyError::Missing {
                key: "pages",
                line: "filled_mib=64 ms=1".to_owned()
            })
        );
        assert_eq!(
            "ok filled_mib=lots pages=1 ms=1".parse::<Filled>(),
            Err(ReplyError::BadValue {
                key: "filled_mib",
                value: "lots".to_owned()
            })
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(line in any::<String>()) {
            let _ = line.parse::<Reply>();
            let _ = line.parse::<Banner>();
            let _ = format!("ok {line}").parse::<Ticks>();
            let _ = format!("error corrupt {line}").parse::<Verified>();
        }
    }
}
