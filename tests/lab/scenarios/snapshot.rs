//! A machine is saved while it runs, ends, and goes on from what was saved.
//!
//! The pool's API has no snapshots yet: they are asked of the VMM itself, on its host.

use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};

const HOST: &str = "host-1";
const DIRECTORY: &str = "/state/snapshot";
/// Memory that holds random pages.
const FILLED_MIB: u32 = 16;
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
/// A process whose only trace is in memory.
const COUNT: &str =
    "(i=0; while :; do i=$((i+1)); echo $i >/tmp/count; usleep 50000; done) >/dev/null 2>&1 &";
/// What it has come to. The file is empty for a moment each time it is written.
const READ_COUNT: &str = "until n=$(cat /tmp/count) && [ -n \"$n\" ]; do :; done; echo $n";
/// The restored machine's console is the standard input and output of its VMM.
const RESTORE: &str = "mkfifo /state/restored.in; (setsid godwit vmm --restore /state/snapshot <>/state/restored.in \
>/state/restored.out 2>&4; echo $? >/state/restored.status) >&4 2>&1 3>&- &";

pub(crate) async fn goes_on(pool: &mut Pool) -> anyhow::Result<()> {
    let mut guest = Guest::create(pool, "saved", HOST, GuestKernel::default(), &[]).await?;
    guest.run(&format!("agent fill {FILLED_MIB}")).await?;
    guest.run(COUNT).await?;
    let boot_id = guest.run(BOOT_ID).await?;
    let before = number(&guest.run(READ_COUNT).await?)?;
    let vm = guest.show(pool).await?;
    let (id, epoch) = (vm["id"].as_str().context("an id")?, &vm["epoch"]);
    let saved = pool
        .on_host(
            HOST,
            &format!(
                "curl -sS --fail-with-body --unix-socket /state/host/vms/{id}/vmm.sock \
                 -H 'content-type: application/json' -d '{{\"epoch\":{epoch},\"directory\":\"{DIRECTORY}\"}}' \
                 http://localhost/v1/snapshot"
            ),
        )
        .await?;
    // The guest goes on; nothing of what it does from here on is in the snapshot.
    guest.run("touch /tmp/afterwards").await?;
    let after = number(&guest.run(READ_COUNT).await?)?;
    guest.delete(pool).await?;

    pool.on_host(HOST, RESTORE).await?;
    let mut restored = Restored { pool, asked: 0 };
    let same = restored.ask(BOOT_ID).await?;
    ensure!(same == boot_id, "the guest is another one: {same}");
    let count = number(&restored.ask(READ_COUNT).await?)?;
    ensure!(count >= before, "it went back from {before} to {count}");
    restored
        .ask(&format!(
            "until n=$(cat /tmp/count) && [ -n \"$n\" ] && [ $n -gt {count} ]; do usleep 50000; done"
        ))
        .await
        .context("the process does not go on")?;
    let left = restored.ask("ls /tmp").await?;
    ensure!(
        !left.contains("afterwards"),
        "what was done after the snapshot is there"
    );
    let verified = restored.ask("agent verify").await.context("the memory")?;
    eprintln!("lab:   {saved}; count {before} before, {after} after, {count} restored; {verified}");
    restored.end().await
}

fn number(text: &str) -> anyhow::Result<u64> {
    text.trim().parse().with_context(|| text.to_owned())
}

/// The machine that was restored, beyond the pool's ken.
struct Restored<'a> {
    pool: &'a mut Pool,
    asked: u32,
}

impl Restored<'_> {
    /// Runs a command without single quotes in the guest that must succeed; what it printed.
    async fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        self.asked += 1;
        let id = format!("@restored.{}", self.asked);
        let answer = self
            .pool
            .on_host(
                HOST,
                &format!(
                    "echo '{id} {command}' >/state/restored.in; \
                     until grep -q '{id}>>' /state/restored.out || [ -e /state/restored.status ]; do usleep 50000; done; \
                     sed -n '/<<{id}/,/{id}>>/p' /state/restored.out"
                ),
            )
            .await?;
        let (text, status) = answer
            .trim_end()
            .rsplit_once(&format!("{id}>>"))
            .with_context(|| format!("the VMM ended: {answer}"))?;
        ensure!(status == "0", "`{command}` ended with {status}: {text}");
        let text = text.split_once('\n').map_or("", |(_, text)| text);
        Ok(text.trim_end().to_owned())
    }

    /// Powers it off and clears the host up.
    async fn end(self) -> anyhow::Result<()> {
        self.pool
            .on_host(
                HOST,
                "echo '@end poweroff -f' >/state/restored.in; \
                 until [ -s /state/restored.status ]; do usleep 50000; done; \
                 grep -qx 0 /state/restored.status && rm -r /state/snapshot /state/restored.*",
            )
            .await
            .context("it powers off and its VMM ends well")?;
        Ok(())
    }
}
