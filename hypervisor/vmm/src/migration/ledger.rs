//! What is known of the migration under way: phase, figures, and who may go back. Shared by the migration's thread,
//! the driver and the API; every change of phase goes through here.

use super::hand_over::HandOverError;
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationPhase, MigrationProgress, MigrationRole, MigrationStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

/// The record of one migration at one end, with its hand-over state `H`.
#[derive(Debug)]
pub struct Ledger<H> {
    inner: Mutex<(MigrationStatus, H)>,
    started: Instant,
    changed: watch::Sender<u64>,
}

impl<H: Copy> Ledger<H> {
    /// A migration that begins now.
    pub fn new(migration: MigrationId, role: MigrationRole, hand_over: H) -> Self {
        let status = MigrationStatus {
            migration,
            sequence: 1,
            role,
            phase: MigrationPhase::Connecting,
            progress: MigrationProgress::default(),
            connected: false,
            reason: None,
        };
        Self {
            inner: Mutex::new((status, hand_over)),
            started: Instant::now(),
            changed: watch::Sender::new(1),
        }
    }

    /// The status as the API shows it.
    pub fn status(&self) -> MigrationStatus {
        self.lock().0.clone()
    }

    /// Where the hand-over stands.
    pub fn hand_over(&self) -> H {
        self.lock().1
    }

    /// Follows the sequence number.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Notes figures; not a change worth waking anybody for.
    pub fn progress(&self, note: impl FnOnce(&mut MigrationProgress)) {
        let mut inner = self.lock();
        if !inner.0.phase.is_final() {
            note(&mut inner.0.progress);
            inner.0.progress.elapsed_ms = self.started.elapsed().as_millis() as u64;
        }
    }

    /// Enters a phase, unless the migration is over.
    pub fn enter(&self, phase: MigrationPhase) {
        let mut inner = self.lock();
        if !inner.0.phase.is_final() {
            inner.0.phase = phase;
            inner.0.connected = true;
            self.announce(inner);
        }
    }

    /// The connection to the other end is there again.
    pub fn connected(&self) {
        let mut inner = self.lock();
        inner.0.connected = true;
        self.announce(inner);
    }

    /// The connection to the other end is gone, the migration is not.
    pub fn disconnected(&self) {
        let mut inner = self.lock();
        inner.0.connected = false;
        self.announce(inner);
    }

    /// Takes a step of the hand-over and, if it is allowed, enters `phase`. One atomic act, so a cancel and the
    /// sending of `Done` cannot both win.
    pub fn step(
        &self,
        step: impl FnOnce(H) -> Result<H, HandOverError>,
        phase: MigrationPhase,
        reason: Option<String>,
    ) -> Result<(), HandOverError> {
        self.step_to(step, |_| phase, reason).map(drop)
    }

    /// [`Self::step`] to a phase that depends on where the step leads, which it returns.
    pub fn step_to(
        &self,
        step: impl FnOnce(H) -> Result<H, HandOverError>,
        phase: impl FnOnce(H) -> MigrationPhase,
        reason: Option<String>,
    ) -> Result<H, HandOverError> {
        let mut inner = self.lock();
        inner.1 = step(inner.1)?;
        let reached = inner.1;
        if !inner.0.phase.is_final() {
            inner.0.phase = phase(reached);
            inner.0.reason = reason;
            inner.0.progress.elapsed_ms = self.started.elapsed().as_millis() as u64;
            inner.0.progress.remaining_bytes = Default::default();
            inner.0.progress.disk_remaining_bytes = Default::default();
            self.announce(inner);
        }
        Ok(reached)
    }

    fn announce(&self, mut inner: MutexGuard<'_, (MigrationStatus, H)>) {
        inner.0.sequence += 1;
        let sequence = inner.0.sequence;
        drop(inner);
        self.changed.send_replace(sequence);
    }

    fn lock(&self) -> MutexGuard<'_, (MigrationStatus, H)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
