//! What the README's section "Run your own Linux image" says: a whole Debian with systemd and cloud-init boots from its
//! image, finds its seed, and moves live.
//!
//! The blocks that make the image, create the VM and move it are run word for word. The one that starts an agent is
//! not: the lab's agents run already, with the shared storage pool under the same name.

use crate::debian::Debian;
use crate::guest::Guest;
use crate::pool::Pool;
use crate::readme::{block_with, run_block};
use anyhow::{Context, ensure};
use godwit_tests::lab::packages::lab_dir;
use godwit_tests::lab::shell::Shell;
use godwit_tests::program;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The VM, as the README calls it, and so its host name.
const NAME: &str = "web";
/// An image of some hundred megabytes crosses two emulations.
const CREATE_PATIENCE: Duration = Duration::from_secs(600);
const MIGRATE_PATIENCE: Duration = Duration::from_secs(300);
/// From the console's first line to cloud-init's last.
const BOOT_PATIENCE: Duration = Duration::from_secs(1500);
/// The login prompt answers within this time.
const LOGIN_PATIENCE: Duration = Duration::from_secs(180);
/// An answer that has not come by now was not asked for.
const TYPE_AGAIN: Duration = Duration::from_secs(15);
/// How cloud-init ends: the line names the data source.
const CLOUD_INIT_DONE: &str = "finished at";
const DATA_SOURCE: &str = "DataSourceNoCloud";

pub(crate) async fn as_the_readme_says(pool: &mut Pool) -> anyhow::Result<()> {
    let debian = Debian::made(&lab_dir())?;
    let key = make_key(debian.folder())?;
    let started = Instant::now();
    run(pool, &debian, "image import", CREATE_PATIENCE).await?;
    let created = started.elapsed();

    let started = Instant::now();
    let mut guest = Guest::attach(pool, NAME).await?;
    let console = read_boot(&mut guest.shell).await?;
    ensure!(
        console.iter().any(|line| line.contains(DATA_SOURCE)),
        "cloud-init did not find its seed: {}",
        console.last().map_or("", String::as_str)
    );
    ensure!(
        console
            .iter()
            .any(|line| line.contains("ci-info") && line.contains(&key)),
        "the user has not got the key {key}; see {NAME}.console.log"
    );
    log_in(&mut guest.shell, "before").await?;
    eprintln!(
        "lab:   imported and created in {:.0} s, booted in {:.0} s: {}",
        created.as_secs_f32(),
        started.elapsed().as_secs_f32(),
        console.last().map_or("", String::as_str).trim()
    );

    let started = Instant::now();
    run(pool, &debian, "vm migrate", MIGRATE_PATIENCE).await?;
    let host = guest.show(pool).await?["host_name"].clone();
    let mut guest = Guest::attach(pool, NAME).await?;
    log_in(&mut guest.shell, "after")
        .await
        .context("after the migration")?;
    eprintln!(
        "lab:   moved to {host} in {:.0} s",
        started.elapsed().as_secs_f32()
    );

    guest.delete(pool).await?;
    pool.godwit(&["network", "delete", "lan"]).await?;
    // The VM's disk goes with it, in an operation of its own, and is a thin copy of the image until then.
    pool.wait_until(&["disk", "list"], |disks| {
        let disks = disks.get("items").unwrap_or(disks).as_array();
        disks.is_some_and(|disks| {
            disks
                .iter()
                .all(|disk| disk["name"] != format!("{NAME}-root"))
        })
    })
    .await?;
    pool.godwit(&["image", "delete", "debian"]).await?;
    Ok(())
}

/// Runs the README's block that contains `text`, with the pool's access in the environment.
async fn run(pool: &Pool, debian: &Debian, text: &str, patience: Duration) -> anyhow::Result<()> {
    let programs = program::godwit().parent().context("a program's folder")?;
    run_block(
        &block_with(text)?,
        debian.folder(),
        &[programs],
        &pool.environment(),
        patience,
    )
    .await
}

/// Makes the key pair that the README's commands name; the comment of the key, which is like no other's.
fn make_key(home: &Path) -> anyhow::Result<String> {
    let folder = home.join(".ssh");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir(&folder)?;
    let comment = format!("lab-{}", std::process::id());
    godwit_tests::lab::packages::run(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", &comment, "-f"])
            .arg(folder.join("id_ed25519")),
    )?;
    Ok(comment)
}

/// Reads the console until cloud-init has said its last word; all lines.
async fn read_boot(shell: &mut Shell) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + BOOT_PATIENCE;
    let mut lines = Vec::new();
    loop {
        let line = shell
            .wait_for("", deadline.saturating_duration_since(Instant::now()))
            .await
            .with_context(|| format!("cloud-init has not finished after {BOOT_PATIENCE:?}"))?;
        let done = line.contains("Cloud-init") && line.contains(CLOUD_INIT_DONE);
        lines.push(line);
        if done {
            return Ok(lines);
        }
    }
}

/// Types a name that nobody has at the login prompt until it is answered: everything from the serial port to user space
/// lives. The prompt says the host's name.
async fn log_in(shell: &mut Shell, name: &str) -> anyhow::Result<()> {
    let answered = format!("{NAME} login: {name}");
    let deadline = Instant::now() + LOGIN_PATIENCE;
    loop {
        // The first line ends whatever stands at the prompt. What is typed while an earlier attempt is being turned down
        // is thrown away by the guest, hence again.
        shell.send(&format!("\n{name}\n")).await?;
        match shell.wait_for(&answered, TYPE_AGAIN).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
    }
}
