//! How fast a running guest dirties memory, watched for a while without anything being sent.

use crate::kvm::{DirtyBitmap, DirtyLog, DirtyLogSource, KvmError, Watch};
use crate::memory::GuestRam;
use godwit_wire::unit::PAGE_BYTES;
use godwit_wire::vmm_api::DirtyReading;
use std::time::{Duration, Instant};

/// How long a watcher waits for another one to finish.
const PATIENCE: Duration = Duration::from_secs(6);
/// Pages whose dirty bits are cleared together (32 MiB): for that long the guest's page faults wait.
const SLICE_PAGES: usize = 8192;

/// Watches until the last of `moments`, which are in order, and reads at each of them. `None` when somebody needs the
/// log: a migration or a snapshot never waits for a watcher. The log is switched off in any case.
pub fn watch_dirtying(
    source: &DirtyLogSource,
    ram: &GuestRam,
    moments: &[Duration],
) -> Result<Option<Vec<DirtyReading>>, KvmError> {
    match source.start_watching(PATIENCE)? {
        Some(log) => readings(&log, ram, moments),
        None => Ok(None),
    }
}

fn readings(
    log: &DirtyLog,
    ram: &GuestRam,
    moments: &[Duration],
) -> Result<Option<Vec<DirtyReading>>, KvmError> {
    let began = Instant::now();
    // What devices wrote before does not count. Whoever copies memory begins with the same.
    ram.take_written();
    let mut seen = log.first_round();
    for (index, all) in seen.iter().enumerate() {
        for start in (0..all.pages()).step_by(SLICE_PAGES) {
            if log.watch_until(began) == Watch::LetGo {
                return Ok(None);
            }
            let end = (start + SLICE_PAGES as u64).min(all.pages());
            log.clear(index, all, start..end)?;
        }
    }
    // Clearing takes a while on a large guest; the average page has been watched since half of it.
    let clean = began + began.elapsed() / 2;
    for bitmap in &mut seen {
        *bitmap = DirtyBitmap::new(Vec::new(), bitmap.pages());
    }
    let mut readings = Vec::with_capacity(moments.len());
    for moment in moments {
        if log.watch_until(clean + *moment) == Watch::LetGo {
            return Ok(None);
        }
        let after = clean.elapsed();
        // Where reading clears, what an earlier reading showed must not be forgotten.
        for ((known, guest), devices) in seen.iter_mut().zip(log.read()?).zip(ram.take_written()) {
            known.merge(&guest);
            known.merge(&devices);
        }
        readings.push(DirtyReading {
            after_us: after.as_micros() as u64,
            bytes: seen.iter().map(DirtyBitmap::count).sum::<u64>() * PAGE_BYTES,
        });
    }
    Ok(Some(readings))
}
