//! The answer to whether a migration will converge, in fields and in words.

use crate::model::{Foreseen, ForeseenOutcome};
use crate::plan::dirtying::Dirtying;
use crate::plan::estimate::Figures;
use godwit_wire::unit::{Bytes, Mib};
use serde::Serialize;
use std::fmt;

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// What will become of it.
    pub verdict: Verdict,
    /// Downtime limit it was made for.
    pub limit_ms: u64,
    /// Memory the guest has touched.
    pub resident: Bytes,
    /// Size of the disks that move along.
    pub disks: Bytes,
    /// How it dirties memory.
    pub dirtying: Dirtying,
    /// What earlier migrations showed.
    pub figures: Figures,
}

/// What will become of a migration.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It gets below the downtime limit.
    Converges(Course),
    /// It does not, and the guest goes ahead of its memory, as the policy allows.
    GoesAhead(Course),
    /// It would be given up and the guest stay where it is.
    WillNot {
        /// How far it would get.
        course: Course,
        /// Why.
        because: Because,
        /// What would help, each of it alone.
        options: Vec<Remedy>,
    },
}

/// The way of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Course {
    /// From start to end.
    pub seconds: f64,
    /// Guest memory sent.
    pub mib: Mib,
    /// Time the guest stands still, or would if it were paused at the end.
    pub blackout_ms: u64,
    /// How much the guest is slowed down; 0 if that is not needed.
    pub throttle_percent: u8,
    /// Rounds while it runs.
    pub rounds: u32,
    /// What is left then.
    pub rest: Bytes,
}

/// Why a migration does not get below the downtime limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Because {
    /// Handing over alone takes longer than the guest may stand still.
    FixedCost {
        /// What it takes.
        fixed_ms: u64,
        /// What is allowed.
        limit_ms: u64,
    },
    /// The guest dirties memory faster than it can be sent, slowed down as far as is allowed.
    DirtiesTooFast {
        /// What it dirties when it is not slowed down.
        dirty_bytes_per_s: u64,
        /// What the link carries.
        bytes_per_s: u64,
        /// What is left after every round.
        rest: Bytes,
        /// For how long the guest would stand still for it.
        blackout_ms: u64,
        /// What is allowed.
        limit_ms: u64,
        /// How far it was slowed down.
        throttle_percent: u8,
    },
    /// More rounds would be needed.
    Rounds {
        /// What is allowed.
        max_rounds: u32,
        /// What it takes.
        needed: u32,
    },
    /// More time would be needed.
    Deadline {
        /// What is allowed.
        deadline_s: u64,
        /// What it takes.
        needed_s: u64,
    },
}

/// What would make it arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Remedy {
    /// The guest may go ahead of its memory.
    AllowPostCopy,
    /// The guest may stand still for longer.
    RaiseDowntimeLimit {
        /// For so long.
        limit_ms: u64,
    },
    /// The guest may be slowed down further.
    AllowThrottling {
        /// So far.
        percent: u8,
    },
    /// The migration may use more of the link.
    RaiseBandwidthLimit {
        /// So much.
        bytes_per_s: u64,
    },
    /// Hosts with a faster link.
    FasterLink {
        /// So fast.
        bytes_per_s: u64,
    },
    /// More rounds.
    AllowRounds {
        /// So many.
        rounds: u32,
    },
    /// More time.
    AllowTime {
        /// So much.
        deadline_s: u64,
    },
}

impl Forecast {
    /// What is kept of it with the migration, to be compared with what came of it.
    pub fn foreseen(&self) -> Foreseen {
        let (outcome, course) = match &self.verdict {
            Verdict::Converges(course) => (ForeseenOutcome::Converges, course),
            Verdict::GoesAhead(course) => (ForeseenOutcome::GoesAhead, course),
            Verdict::WillNot { course, .. } => (ForeseenOutcome::WillNotConverge, course),
        };
        Foreseen {
            outcome,
            took_ms: (course.seconds * 1_000.0).ceil() as u64,
            mib: course.mib.0,
            blackout_ms: course.blackout_ms,
            throttle_percent: course.throttle_percent,
        }
    }
}

/// What is added to the memory, if disks move along.
struct Disks(Bytes);

impl fmt::Display for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Bytes(0) => Ok(()),
            bytes => write!(f, " and up to {bytes} of disks"),
        }
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Converges(course) => {
                write!(
                    f,
                    "converges: {:.1} s, {}{}, blackout {} ms",
                    course.seconds,
                    course.mib,
                    Disks(self.disks),
                    course.blackout_ms
                )?;
                match course.throttle_percent {
                    0 => Ok(()),
                    percent => write!(f, "; the guest is slowed down by up to {percent} %"),
                }
            }
            Verdict::GoesAhead(course) => write!(
                f,
                "does not converge; the guest goes ahead of its memory: {:.1} s, {}{}, blackout {} ms, then {} follow",
                course.seconds,
                course.mib,
                Disks(self.disks),
                course.blackout_ms,
                course.rest
            ),
            Verdict::WillNot {
                because, options, ..
            } => {
                write!(
                    f,
                    "will not converge under the limit of {} ms because {because}",
                    self.limit_ms
                )?;
                for (number, option) in options.iter().enumerate() {
                    let before = if number == 0 { "; options: " } else { ", or " };
                    write!(f, "{before}{option}")?;
                }
                Ok(())
            }
        }
    }
}

impl Because {
    /// Its name in the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::FixedCost { .. } => "fixed_cost",
            Self::DirtiesTooFast { .. } => "dirties_too_fast",
            Self::Rounds { .. } => "rounds",
            Self::Deadline { .. } => "deadline",
        }
    }
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FixedCost { fixed_ms, .. } => write!(
                f,
                "saving, restoring and committing alone take {fixed_ms} ms"
            ),
            Self::DirtiesTooFast {
                dirty_bytes_per_s,
                bytes_per_s,
                rest,
                blackout_ms,
                throttle_percent,
                ..
            } => {
                write!(
                    f,
                    "the guest dirties {}/s and the link carries {}/s: what is left of each round is {rest}, for a blackout of {blackout_ms} ms",
                    Bytes(*dirty_bytes_per_s),
                    Bytes(*bytes_per_s)
                )?;
                match throttle_percent {
                    0 => Ok(()),
                    percent => write!(f, " even when the guest is slowed down by {percent} %"),
                }
            }
            Self::Rounds { max_rounds, needed } => {
                write!(f, "it takes {needed} rounds and {max_rounds} are allowed")
            }
            Self::Deadline {
                deadline_s,
                needed_s,
            } => write!(f, "it takes {needed_s} s and {deadline_s} s are allowed"),
        }
    }
}

impl Remedy {
    /// Its name in the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AllowPostCopy => "allow_post_copy",
            Self::RaiseDowntimeLimit { .. } => "raise_downtime_limit",
            Self::AllowThrottling { .. } => "allow_throttling",
            Self::RaiseBandwidthLimit { .. } => "raise_bandwidth_limit",
            Self::FasterLink { .. } => "faster_link",
            Self::AllowRounds { .. } => "allow_rounds",
            Self::AllowTime { .. } => "allow_time",
        }
    }

    /// What the limit would have to be, in the unit that the policy has it in.
    pub const fn value(&self) -> Option<u64> {
        match self {
            Self::AllowPostCopy => None,
            Self::RaiseDowntimeLimit { limit_ms } => Some(*limit_ms),
            Self::AllowThrottling { percent } => Some(*percent as u64),
            Self::RaiseBandwidthLimit { bytes_per_s } | Self::FasterLink { bytes_per_s } => {
                Some(*bytes_per_s)
            }
            Self::AllowRounds { rounds } => Some(*rounds as u64),
            Self::AllowTime { deadline_s } => Some(*deadline_s),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllowPostCopy => f.write_str("allow post-copy"),
            Self::RaiseDowntimeLimit { limit_ms } => {
                write!(f, "raise the downtime limit to {limit_ms} ms")
            }
            Self::AllowThrottling { percent } => {
                write!(f, "let the guest be slowed down by up to {percent} %")
            }
            Self::RaiseBandwidthLimit { bytes_per_s } => {
                write!(f, "raise the bandwidth limit to {}/s", Bytes(*bytes_per_s))
            }
            Self::FasterLink { bytes_per_s } => {
                write!(f, "use hosts whose link carries {}/s", Bytes(*bytes_per_s))
            }
            Self::AllowRounds { rounds } => write!(f, "allow {rounds} rounds"),
            Self::AllowTime { deadline_s } => write!(f, "allow {deadline_s} s"),
        }
    }
}
