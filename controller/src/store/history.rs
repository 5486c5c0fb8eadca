//! Recent changes, for watchers: kept in memory and bounded, so a watcher that falls behind has to list again.

use super::contract::{Change, Revision, Watched, Write};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most changes kept.
pub(super) const MAX_HISTORY_CHANGES: usize = 10_000;

/// Recent changes and those who wait for more.
#[derive(Debug)]
pub(super) struct History {
    recent: Mutex<Recent>,
    grown: Condvar,
}

#[derive(Debug)]
struct Recent {
    changes: VecDeque<Change>,
    /// Watching from here or later is possible.
    oldest: Revision,
}

impl History {
    /// A history that begins after `revision`.
    pub(super) fn after(revision: Revision) -> Self {
        let recent = Recent {
            changes: VecDeque::new(),
            oldest: revision,
        };
        Self {
            recent: Mutex::new(recent),
            grown: Condvar::new(),
        }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        // A panic cannot leave the queue half-changed in a way that matters to a watcher.
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a transaction; calls come in the order of revisions.
    pub(super) fn push(&self, revision: Revision, writes: &[Write]) {
        let mut recent = self.recent();
        recent.changes.extend(writes.iter().map(|write| Change {
            revision,
            write: write.clone(),
        }));
        while recent.changes.len() > MAX_HISTORY_CHANGES {
            let Some(oldest) = recent.changes.front().map(|change| change.revision) else {
                break;
            };
            recent.forget(oldest);
        }
        drop(recent);
        self.grown.notify_all();
    }

    /// Forgets everything up to and including `upto`.
    pub(super) fn compact(&self, upto: Revision) {
        self.recent().forget(upto);
    }

    /// See [`Store::watch`](super::Store::watch).
    pub(super) fn watch(&self, prefix: &str, after: Revision, wait: Duration) -> Watched {
        let deadline = Instant::now() + wait;
        let mut recent = self.recent();
        loop {
            if after < recent.oldest {
                return Watched::Compacted {
                    oldest: recent.oldest,
                };
            }
            let found: Vec<Change> = recent
                .changes
                .iter()
                .filter(|change| change.revision > after && change.key().starts_with(prefix))
                .cloned()
                .collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if !found.is_empty() || left.is_zero() {
                return Watched::Changes(found);
            }
            let woken = self.grown.wait_timeout(recent, left);
            recent = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Recent {
    fn forget(&mut self, upto: Revision) {
        while self
            .changes
            .front()
            .is_some_and(|change| change.revision <= upto)
        {
            self.changes.pop_front();
        }
        self.oldest = self.oldest.max(upto);
    }
}

impl Change {
    /// The key that was written.
    pub fn key(&self) -> &str {
        match &self.write {
            Write::Put { key, .. } | Write::Delete { key } => key,
        }
    }
}
