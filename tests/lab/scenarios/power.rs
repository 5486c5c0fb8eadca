//! Guests end and begin, by their own will and by the operator's.

use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::ensure;
use godwit_tests::lab::shell::READY;
use std::time::{Duration, Instant};

/// The operator gives a guest this long to stop; it needs a second or two.
const STOP_TIMEOUT_S: u64 = 120;
const REBOOT_PATIENCE: Duration = Duration::from_secs(180);

pub(crate) async fn off_and_on(pool: &mut Pool) -> anyhow::Result<()> {
    let mut guest = Guest::create(pool, "power", "host-1", GuestKernel::default(), &[]).await?;
    let first_boot = boot_id(&mut guest).await?;

    // The guest restarts itself. Whether the console stays attached is the product's choice; the boot id tells.
    guest
        .run("(sleep 0.2; reboot -f) >/dev/null 2>&1 &")
        .await?;
    guest.shell.wait_for(READY, REBOOT_PATIENCE).await?;
    ensure!(
        boot_id(&mut guest).await? != first_boot,
        "it never restarted"
    );

    guest
        .run("(sleep 0.2; poweroff -f) >/dev/null 2>&1 &")
        .await?;
    guest.wait_for_state(pool, "stopped").await?;

    pool.godwit(&["vm", "start", "power", "--wait"]).await?;
    let mut guest = Guest::attach(pool, "power").await?;
    guest.wait_for_boot().await?;
    let asked = Instant::now();
    let limit = STOP_TIMEOUT_S.to_string();
    pool.godwit(&["vm", "stop", "power", "--timeout-s", &limit, "--wait"])
        .await?;
    guest.wait_for_state(pool, "stopped").await?;
    // Killed, it would have taken the whole timeout.
    ensure!(
        asked.elapsed() < Duration::from_secs(STOP_TIMEOUT_S),
        "the guest did not heed the power button"
    );
    guest
        .shell
        .wait_for("lab power button pressed", REBOOT_PATIENCE)
        .await?;
    guest.delete(pool).await
}

async fn boot_id(guest: &mut Guest) -> anyhow::Result<String> {
    guest.run("cat /proc/sys/kernel/random/boot_id").await
}
