//! A host loses its power.

use super::disk::{check_data, mount, write_data};
use super::{IMAGE, need_image};
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use godwit_tests::lab::machine::Cpu;

const VICTIM: &str = "host-3";

/// The guest starts elsewhere with what it had written to its shared disk.
pub(crate) async fn after_a_power_cut(pool: &mut Pool) -> anyhow::Result<()> {
    need_image(pool).await?;
    pool.add_host(VICTIM, Cpu::Max).await?;
    let options = ["--image", IMAGE];
    let mut guest =
        Guest::create(pool, "survivor", VICTIM, GuestKernel::default(), &options).await?;
    mount(&mut guest).await?;
    let sum = write_data(&mut guest).await?;
    pool.cut_power(VICTIM).await?;
    pool.wait_until(&["vm", "show", "survivor"], |vm| {
        vm["state"] == "running" && vm["host_name"].is_string() && vm["host_name"] != VICTIM
    })
    .await?;
    let mut guest = Guest::attach(pool, "survivor").await?;
    guest.wait_for_boot().await?;
    check_data(&mut guest, &sum).await?;
    guest.delete(pool).await
}
