//! A driver's memory: which commands were carried out, with what answer, and what is on disk.

use super::driver::Driver;
use crate::admission::{Admission, Stale};
use crate::record::{End, VmDirectory, VmRecord};
use godwit_channel::file::FileError;
use godwit_wire::host_api::VmReport;
use godwit_wire::id::{Epoch, Generation};
use godwit_wire::problem::Problem;
use std::time::Duration;
use tokio::time::Instant;

/// How long the reason of a failure is remembered for a VM that is not here.
const REFUSAL_KEPT: Duration = Duration::from_secs(600);

/// A way to write a record.
pub(super) type WriteRecord = fn(&VmDirectory, &VmRecord) -> Result<(), FileError>;

/// A command that failed.
#[derive(Debug)]
pub(super) struct Refusal {
    epoch: Epoch,
    generation: Generation,
    problem: Problem,
    at: Instant,
}

impl Refusal {
    /// When a VM that is not here need not be remembered for it any more.
    pub(super) fn forgotten_at(&self) -> Instant {
        self.at + REFUSAL_KEPT
    }
}

impl Driver {
    /// Judges a command to a VM that must be here under exactly this epoch.
    pub(super) fn admit_here(
        &mut self,
        epoch: Epoch,
        generation: Generation,
    ) -> Result<Admission, Problem> {
        let here = self.present_under(epoch)?;
        debug_assert_eq!(here, epoch);
        let mut fence = self.fence;
        let admission = fence
            .admit(epoch, generation)
            .map_err(|stale| stale.problem(self.vm))?;
        if admission == Admission::New {
            self.change_record(|record| {
                record.generation = generation;
                record.fence = fence;
            })?;
            self.fence = fence;
        }
        Ok(admission)
    }

    /// Checks that the VM is here under exactly this epoch.
    pub(super) fn present_under(&self, epoch: Epoch) -> Result<Epoch, Problem> {
        if epoch < self.fence.epoch {
            return Err(Stale::Epoch {
                given: epoch,
                known: self.fence.epoch,
            }
            .problem(self.vm));
        }
        let here = self
            .holding
            .as_ref()
            .ok_or_else(|| Problem::not_found("VM", self.vm))?
            .record
            .epoch;
        if epoch > here {
            let detail = format!(
                "VM {} is here under epoch {here}, not yet under {epoch}",
                self.vm
            );
            return Err(Problem::conflict("epoch-ahead", detail));
        }
        Ok(here)
    }

    /// Changes the record on disk, then in memory.
    pub(super) fn change_record(
        &mut self,
        change: impl FnOnce(&mut VmRecord),
    ) -> Result<(), Problem> {
        self.change_record_by(VmDirectory::write_record, change)
    }

    /// The same with one of the directory's ways to write.
    pub(super) fn change_record_by(
        &mut self,
        write: WriteRecord,
        change: impl FnOnce(&mut VmRecord),
    ) -> Result<(), Problem> {
        let Some(holding) = &mut self.holding else {
            return Err(Problem::not_found("VM", self.vm));
        };
        let mut record = holding.record.clone();
        change(&mut record);
        write(&self.directory, &record).map_err(|error| unwritable(&error))?;
        holding.record = record;
        Ok(())
    }

    /// The same command again: the same answer.
    pub(super) fn repeat(&self, epoch: Epoch, generation: Generation) -> Result<VmReport, Problem> {
        if let Some(refusal) = &self.refusal
            && (refusal.epoch, refusal.generation) == (epoch, generation)
        {
            return Err(refusal.problem.clone());
        }
        self.report().ok_or_else(|| {
            let detail = format!(
                "generation {generation} was carried out for VM {}, and the VM is not here",
                self.vm
            );
            Problem::conflict("generation-spent", detail).with_remedy("send a later generation")
        })
    }

    /// Remembers a failure, for [`repeat`](Self::repeat).
    pub(super) fn refuse<T>(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        problem: Problem,
    ) -> Result<T, Problem> {
        tracing::warn!(vm = %self.vm, %epoch, %generation, %problem, "a command failed");
        self.refusal = Some(Refusal {
            epoch,
            generation,
            problem: problem.clone(),
            at: Instant::now(),
        });
        Err(problem)
    }

    /// Writes down how the machine ended. A failure to write is only logged: a successor finds no process.
    pub(super) fn record_end(&mut self, end: End) {
        let written = self.change_record(|record| {
            record.end = Some(end.clone());
            record.process = None;
        });
        if let Err(problem) = written {
            tracing::error!(vm = %self.vm, %problem, "the VM's end could not be written down");
            if let Some(holding) = &mut self.holding {
                holding.record.end = Some(end);
            }
        }
        self.context.networks.detach(self.vm);
        if let Err(error) = self.directory.remove_sockets() {
            tracing::warn!(vm = %self.vm, %error, "sockets of an ended VMM are left");
        }
    }
}

/// A file of ours that cannot be read or written.
pub(super) fn unwritable(error: &FileError) -> Problem {
    Problem::internal(format!("{error}: {}", error.source))
        .with_remedy("make room on the agent's state directory, and check its permissions")
}
