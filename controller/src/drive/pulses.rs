//! When each host was last heard, on the clock that only moves forward.
//!
//! ```text
//! heard ──(silent for the whole wait, declared during a turn)──▶ given up ──(heard again, during a turn)──▶ heard
//! ```
//! VMs are taken from a silent host only during a turn and only while it is given up; a host that was given up
//! gets its lease only after a turn has ended that state. So its heartbeat is answered either before any VM was
//! taken, or with the order to destroy every VM that was.

use crate::ha::detector::{self, Verdict, Waits};
use crate::ledger::Turn;
use crate::model::Liveness;
use godwit_wire::id::HostId;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;
use uuid::Uuid;

#[derive(Debug)]
struct Pulse {
    heard: Instant,
    given_up: bool,
    latest: Option<(Uuid, u64)>,
    /// The boot that is heard.
    boot: Option<Uuid>,
}

impl Pulse {
    fn begun(now: Instant) -> Self {
        Self {
            heard: now,
            given_up: false,
            latest: None,
            boot: None,
        }
    }
}

/// Who sends a heartbeat, and where it stands in the order of heartbeats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sender {
    pub(crate) incarnation: Uuid,
    pub(crate) sequence: u64,
    pub(crate) boot: Uuid,
}

/// What came of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Noted.
    Noted,
    /// The host was given up: take a turn, then call [`Pulses::revive`].
    GivenUp,
    /// A later heartbeat of the same agent was noted already.
    OutOfOrder,
    /// It is of another boot, and what the former boot ran may run still: another machine may have the same
    /// identity. Nothing was noted.
    AnotherBoot,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pulses {
    waits: Waits,
    by_host: Mutex<BTreeMap<HostId, Pulse>>,
}

impl Pulses {
    pub(crate) fn new(waits: Waits) -> Self {
        Self {
            waits,
            by_host: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostId, Pulse>> {
        // Each change below is one assignment or a complete one before anything can panic.
        self.by_host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a heartbeat. `stored` is the boot in the host's record, if it was ever heard.
    pub(crate) fn hear(
        &self,
        host: HostId,
        now: Instant,
        sender: Sender,
        stored: Option<Uuid>,
    ) -> Heard {
        let mut pulses = self.lock();
        let pulse = pulses.entry(host).or_insert(Pulse::begun(now));
        let another = pulse
            .boot
            .or(stored)
            .is_some_and(|boot| boot != sender.boot);
        let waited = now.saturating_duration_since(pulse.heard) >= self.waits.restart;
        if another && !waited && !pulse.given_up {
            return Heard::AnotherBoot;
        }
        if pulse
            .latest
            .is_some_and(|(known, latest)| known == sender.incarnation && sender.sequence <= latest)
        {
            return Heard::OutOfOrder;
        }
        pulse.boot = Some(sender.boot);
        pulse.latest = Some((sender.incarnation, sender.sequence));
        if pulse.given_up {
            return Heard::GivenUp;
        }
        pulse.heard = pulse.heard.max(now);
        Heard::Noted
    }

    /// Ends that a host is given up.
    pub(crate) fn revive(&self, _turn: &Turn<'_>, host: HostId, now: Instant) {
        if let Some(pulse) = self.lock().get_mut(&host) {
            pulse.given_up = false;
            pulse.heard = pulse.heard.max(now);
        }
    }

    /// Judges a host; one that was never heard counts as heard now, which is how a server's start gives every
    /// host a full wait.
    pub(crate) fn judge(&self, host: HostId, now: Instant) -> Verdict {
        let mut pulses = self.lock();
        let pulse = pulses.entry(host).or_insert(Pulse::begun(now));
        if pulse.given_up {
            return Verdict {
                liveness: Liveness::RestartAllowed,
                next: None,
            };
        }
        detector::judge(pulse.heard, now, &self.waits)
    }

    /// Gives a host up if it still is silent; tells whether it is given up now.
    pub(crate) fn give_up(&self, _turn: &Turn<'_>, host: HostId, now: Instant) -> bool {
        let mut pulses = self.lock();
        let Some(pulse) = pulses.get_mut(&host) else {
            return false;
        };
        let verdict = detector::judge(pulse.heard, now, &self.waits);
        pulse.given_up |= verdict.liveness == Liveness::RestartAllowed;
        pulse.given_up
    }

    /// Whether VMs may be taken from a host. Lasts as long as the caller's turn.
    pub(crate) fn is_given_up(&self, host: HostId) -> bool {
        self.lock().get(&host).is_some_and(|pulse| pulse.given_up)
    }

    /// Gives every host that is not given up a full wait again: this server itself was away.
    pub(crate) fn begin_anew(&self, now: Instant) {
        for pulse in self.lock().values_mut() {
            pulse.heard = pulse.heard.max(now);
        }
    }

    pub(crate) fn forget(&self, host: HostId) {
        self.lock().remove(&host);
    }
}
