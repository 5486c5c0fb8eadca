//! The scenario all others lead to: a guest moves while it computes, writes its disk and speaks to another guest.

use super::migration::migrate;
use super::network::{LISTEN, get_address, wait_for_listener};
use super::{IMAGE, NETWORK, need_image, need_network};
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};
use std::time::Duration;

/// What remains in flight when the writers are told to stop arrives within this time.
const DRAIN_PATIENCE: Duration = Duration::from_secs(120);
/// Counts up on a TCP connection until told to stop; what it sent last is in `/tmp/sent`.
const TALK: &str = "(i=0; until [ -e /tmp/stop ]; do i=$((i+1)); echo $i; usleep 5000; done; echo $i >/tmp/sent) | \
nc ADDRESS 5000 >/tmp/talk.log 2>&1 & echo $! >/tmp/talk.pid";
/// Writes files of random data and their checksums, each down to the disk, round and round.
const WRITE: &str = "(i=0; until [ -e /tmp/stop ]; do i=$((i+1)); f=/disk/file$((i%8)); \
dd if=/dev/urandom of=$f.new bs=64k count=4 conv=fsync; md5sum <$f.new >$f.sum; mv $f.new $f; echo $i >/tmp/written; \
done; sync; touch /tmp/writer.done) >/tmp/write.log 2>&1 &";
/// Waits until the disk's writer gets on.
const WRITES_MORE: &str =
    "n=$(cat /tmp/written); until [ $(cat /tmp/written) -gt $n ]; do usleep 50000; done";
/// Drops what the guest remembers of its disk and compares every file with its checksum; the number of files.
const COMPARE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; n=0; for f in /disk/file?; do \
[ \"$(md5sum <$f)\" = \"$(cat $f.sum)\" ] || { echo $f differs; exit 1; }; n=$((n+1)); done; echo $n";

/// There and back, with everything going on.
pub(crate) async fn moves(pool: &mut Pool) -> anyhow::Result<()> {
    need_image(pool).await?;
    need_network(pool).await?;
    let network = ["--network", NETWORK];
    let both = ["--network", NETWORK, "--image", IMAGE];
    let mut peer = Guest::create(pool, "peer", "host-2", GuestKernel::default(), &network).await?;
    let mut busy = Guest::create(pool, "busy", "host-1", GuestKernel::default(), &both).await?;
    let peer_address = get_address(&mut peer).await?;
    get_address(&mut busy).await?;

    peer.run(&format!("{LISTEN} &")).await?;
    wait_for_listener(&mut peer).await?;
    busy.run("mount -t ext4 /dev/vda /disk").await?;
    busy.run("agent fill 32").await?;
    busy.run("agent dirty 4 8").await?;
    busy.run(WRITE).await?;
    busy.run(&TALK.replace("ADDRESS", &peer_address)).await?;
    let mut heard = 0;
    busy.run(WRITES_MORE)
        .await
        .context("the disk before any move")?;
    for target in ["host-2", "host-1"] {
        heard = wait_for_more(&mut peer, heard).await?;
        migrate(pool, "busy", target).await?;
        busy = Guest::attach(pool, "busy").await?;
        let disk = busy.run(WRITES_MORE).await;
        disk.with_context(|| format!("the disk after the move to {target}"))?;
        heard = wait_for_more(&mut peer, heard)
            .await
            .with_context(|| format!("the connection after the move to {target}"))?;
    }
    finish(&mut busy, &mut peer).await?;
    busy.delete(pool).await?;
    peer.delete(pool).await
}

/// Waits until the peer has heard more than `before`; how much it has heard.
async fn wait_for_more(peer: &mut Guest, before: u64) -> anyhow::Result<u64> {
    let text = peer
        .shell
        .run(
            &format!(
                "until [ $(wc -l </tmp/got) -gt {before} ]; do usleep 50000; done; wc -l </tmp/got"
            ),
            DRAIN_PATIENCE,
        )
        .await?;
    text.trim().parse().context("a number of lines")
}

/// Stops all work and compares what is with what should be.
async fn finish(busy: &mut Guest, peer: &mut Guest) -> anyhow::Result<()> {
    busy.run("touch /tmp/stop").await?;
    busy.shell
        .run(
            "until [ -s /tmp/sent ] && [ -e /tmp/writer.done ]; do usleep 50000; done",
            DRAIN_PATIENCE,
        )
        .await?;
    let sent = busy.run("cat /tmp/sent").await?;
    let sent = sent.trim();
    peer.shell
        .run(
            &format!("until [ $(wc -l </tmp/got) -ge {sent} ]; do usleep 50000; done"),
            DRAIN_PATIENCE,
        )
        .await?;
    peer.run(&format!("seq 1 {sent} | cmp - /tmp/got"))
        .await
        .context("the TCP stream has gaps")?;
    let files = busy.run(COMPARE).await.context("the disk")?;
    let written = busy.run("cat /tmp/written").await?;
    busy.run("agent stop").await?;
    let memory = busy.run("agent verify").await.context("the memory")?;
    ensure!(files.trim() != "0", "nothing was written");
    eprintln!(
        "lab:   {sent} lines over TCP, {} files written; {memory}",
        written.trim()
    );
    Ok(())
}
