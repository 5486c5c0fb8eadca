//! Memory that follows a guest which runs here already, or is about to.
//!
//! ```text
//!              ┌─────── resumed ───────┐
//!              ▼                       │
//!   (armed) linked ──link breaks──▶ broken
//!              │ committed, and nothing missing
//!              ▼
//!          complete            abandoned: from any state, when the guest is not to run or its memory is not needed
//! ```

use super::lanes::Content;
use crate::memory::{Absent, AbsentError};
use godwit_wire::migration::{FrameHeader, PostCopyProgress};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often figures are looked at while memory arrives.
const LOOK: Duration = Duration::from_millis(100);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest is this side's and everything is here.
    Complete,
    /// The connections are gone; something may still be missing.
    Broken(String),
    /// Nobody needs it any more.
    Abandoned,
}

/// A set of connections; ends those that wait for faults over them when its other end is dropped.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) stop: Arc<OwnedFd>,
    /// Which connections they are: those of an earlier link have nothing to say about a later one.
    pub(super) number: u64,
}

/// The connections that the memory's source came with.
pub(super) const FIRST_LINK: u64 = 1;

#[derive(Debug, Default)]
struct State {
    committed: bool,
    abandoned: bool,
    broken: Option<String>,
    /// Number of the present connections.
    number: u64,
    /// Dropped to stop those that serve faults over them.
    link: Option<OwnedFd>,
    /// Pages that were asked for over connections that broke.
    ask_again: Vec<u64>,
    figures: PostCopyProgress,
}

/// Guest memory that is arriving.
#[derive(Debug)]
pub(in crate::migration) struct Pull {
    absent: Absent,
    /// The round its pages belong to.
    pub(super) round: u32,
    state: Mutex<State>,
    changed: Condvar,
}

impl Pull {
    /// Arms `absent`.
    pub(super) fn arm(absent: Absent, round: u32) -> Result<Self, AbsentError> {
        absent.arm()?;
        let owed_bytes = Bytes(absent.left() * PAGE_BYTES);
        let pull = Self {
            absent,
            round,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        pull.lock().figures.owed_bytes = owed_bytes;
        Ok(pull)
    }

    pub(super) const fn absent(&self) -> &Absent {
        &self.absent
    }

    /// New connections; what is returned tells those that serve faults over them when to end.
    pub(super) fn link(&self) -> io::Result<Link> {
        let (stop, link) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let mut state = self.lock();
        state.broken = None;
        state.number += 1;
        state.link = (!state.abandoned).then_some(link);
        Ok(Link {
            stop: Arc::new(stop),
            number: state.number,
        })
    }

    /// The store gave the guest to this side.
    pub(super) fn committed(&self) {
        self.change(|state| state.committed = true);
    }

    /// The connections with this number do not carry any more.
    pub(super) fn broke(&self, link: u64, reason: &str) {
        self.change(|state| {
            if state.number != link {
                return;
            }
            state.broken.get_or_insert_with(|| reason.to_owned());
            state.link = None;
        });
    }

    /// Nobody needs the memory any more; whoever waits for some goes on.
    pub(super) fn abandon(&self) {
        self.change(|state| {
            state.abandoned = true;
            state.link = None;
        });
        self.absent.end();
    }

    /// Whether something is still missing.
    pub(super) fn lacks_some(&self) -> bool {
        self.absent.left() > 0
    }

    /// Why nothing arrives at the moment, if something is missing.
    pub(super) fn cut_off(&self) -> Option<String> {
        self.lock().broken.clone().filter(|_| self.lacks_some())
    }

    /// Whether the source has nothing more to give.
    pub(super) fn is_over(&self) -> bool {
        let state = self.lock();
        state.abandoned || state.committed && self.absent.left() == 0
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }

    /// Waits for the next thing to happen; `look` is called now and then.
    pub(super) fn wait(&self, mut look: impl FnMut(PostCopyProgress)) -> Event {
        let mut state = self.lock();
        loop {
            look(self.figures_of(&state));
            if state.abandoned {
                return Event::Abandoned;
            }
            // First: a guest that has everything does not wait for a source that is gone.
            if state.committed && self.absent.left() == 0 {
                state.link = None;
                return Event::Complete;
            }
            if let Some(reason) = &state.broken {
                return Event::Broken(reason.clone());
            }
            state = self
                .changed
                .wait_timeout(state, LOOK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn figures_of(&self, state: &State) -> PostCopyProgress {
        PostCopyProgress {
            missing_bytes: Bytes(self.absent.left() * PAGE_BYTES),
            ..state.figures
        }
    }

    /// The next page that the guest waits for; `None` when those that serve faults are to end.
    pub(super) fn next_wanted(&self, link: &Link) -> Result<Option<u64>, AbsentError> {
        loop {
            let Some(address) = self.lock().ask_again.pop() else {
                return self.absent.next_wanted(&link.stop);
            };
            if self.absent.is_expected(address) {
                return Ok(Some(address));
            }
            self.absent.settle(address)?;
        }
    }

    /// The answer to a want was lost.
    pub(super) fn ask_again(&self, address: u64) {
        self.change(|state| state.ask_again.push(address));
    }

    /// The guest waited for a page for so long.
    pub(super) fn waited(&self, time: Duration) {
        let us = time.as_micros() as u64;
        let mut state = self.lock();
        state.figures.wanted_pages += 1;
        state.figures.waited_us += us;
        state.figures.longest_wait_us = state.figures.longest_wait_us.max(us);
    }

    pub(super) fn was_interrupted(&self) {
        self.lock().figures.interruptions += 1;
    }

    /// Fills the pages that a frame brought.
    pub(super) fn fill(
        &self,
        header: &FrameHeader,
        content: Content<'_>,
    ) -> Result<(), AbsentError> {
        match content {
            Content::Zeros => self
                .absent
                .fill_zeros(header.address, u64::from(header.pages))?,
            Content::Bytes(bytes) => self.absent.fill(header.address, bytes)?,
        }
        if self.absent.left() == 0 {
            self.change(|_| ());
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
