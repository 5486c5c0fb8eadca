//! The driver's part in watching how fast the guest dirties memory. The watching itself happens outside the driver's
//! thread and never keeps a migration or a snapshot waiting.

use super::*;
use crate::memory::GuestRam;
use crate::migration::watch_dirtying;
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest, VcpuBusy, VcpuInfo};

impl DriverHandle {
    /// Watches for as long as asked. Blocks meanwhile.
    pub(in crate::process) fn watch_dirtying(
        &self,
        request: DirtyRateRequest,
    ) -> Result<DirtyRate, Problem> {
        let problems = request.problems();
        if !problems.is_empty() {
            return Err(Problem::invalid(problems));
        }
        let ending = || Problem::internal("this VMM is ending");
        let (log, ram, before) = self
            .call_blocking(|driver| driver.watchable())
            .ok_or_else(ending)??;
        let began = Instant::now();
        let watched = watch_dirtying(&log, &ram, &request.moments())
            .map_err(|error| Problem::internal(error.to_string()))?;
        let took = began.elapsed();
        let Some(series) = watched else {
            // Whoever took the log is the better reason; it may be done already.
            self.call_blocking(|driver| driver.watchable().map(drop))
                .ok_or_else(ending)??;
            return Err(
                Problem::conflict("dirty-log-busy", "something else needed the dirty log")
                    .with_remedy("repeat this"),
            );
        };
        let after = self
            .call_blocking(|driver| driver.watchable())
            .and_then(Result::ok)
            .map_or(Vec::new(), |(_, _, vcpus)| vcpus);
        let whole = series.last().map_or(0, |last| {
            let per_second = u128::from(last.bytes) * 1_000_000 / u128::from(last.after_us.max(1));
            u64::try_from(per_second).unwrap_or(u64::MAX)
        });
        Ok(DirtyRate {
            bytes_per_s: whole,
            series,
            vcpus: busy(&before, &after, took.as_millis() as u64),
        })
    }
}

impl Driver {
    /// What is needed to watch, if nothing else uses the dirty log.
    fn watchable(&self) -> Result<(DirtyLogSource, GuestRam, Vec<VcpuInfo>), Problem> {
        self.admit_without_snapshot()?;
        self.admit_without_succession()?;
        if self
            .migration_status()
            .is_some_and(|status| !status.phase.is_final())
        {
            return Err(
                Problem::conflict("migrating", "a migration is watching dirty pages")
                    .with_remedy("read the dirty rate from the migration's progress"),
            );
        }
        let machine = self.machine()?;
        let (vcpus, ..) = machine.vcpu_info();
        Ok((machine.dirty_log().clone(), machine.ram().clone(), vcpus))
    }
}

fn busy(before: &[VcpuInfo], after: &[VcpuInfo], took_ms: u64) -> Vec<VcpuBusy> {
    before
        .iter()
        .zip(after)
        .map(|(before, after)| {
            let ran_ms = after.cpu_time_ms.saturating_sub(before.cpu_time_ms);
            let percent = ran_ms.saturating_mul(100) / took_ms.max(1);
            VcpuBusy {
                index: after.index,
                busy_percent: percent.min(100) as u8,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_told_by_its_share_of_the_time() {
        let vcpu = |index, cpu_time_ms| VcpuInfo {
            index,
            cpu_time_ms,
            exits: 0,
        };
        let busy = busy(
            &[vcpu(0, 100), vcpu(1, 100)],
            &[vcpu(0, 350), vcpu(1, 9_000)],
            1_000,
        );
        let shares: Vec<_> = busy.iter().map(|vcpu| vcpu.busy_percent).collect();
        assert_eq!(shares, [25, 100]);
    }
}
