//! A whole Debian, made as the README says and kept until the README says something else.

use crate::readme::{block_with, run_block};
use anyhow::{Context, ensure};
use godwit_tests::lab::packages::Packages;
use rustix::process::geteuid;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the README's block that makes the image is known by.
const BLOCK: &str = "mmdebstrap";
/// The commands that made what is there; written last.
const STAMP: &str = "made-by";
/// A hundred packages are fetched, unpacked and configured.
const PATIENCE: Duration = Duration::from_secs(1800);
/// What guests boot with, and where the README has it on the hosts.
const HOST_FILES: [&str; 2] = ["vmlinuz", "initrd.img"];
const HOST_FOLDER: &str = "srv";

/// The folder with what the README's commands have made.
#[derive(Clone, Debug)]
pub(crate) struct Debian {
    folder: PathBuf,
}

impl Debian {
    /// What was made before, if anything.
    pub(crate) fn made(lab: &Path) -> anyhow::Result<Self> {
        let folder = lab.join("debian");
        ensure!(
            folder.join(STAMP).exists(),
            "there is no Debian image; see above why"
        );
        Ok(Self { folder })
    }

    /// Makes it, unless the same commands have made it already.
    pub(crate) async fn prepare(lab: &Path, packages: &Packages) -> anyhow::Result<Self> {
        let block = block_with(BLOCK)?;
        let folder = lab.join("debian");
        let stamp = folder.join(STAMP);
        if fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == block) {
            return Self::made(lab);
        }
        ensure!(
            geteuid().is_root(),
            "the README's commands make Debian's image as root"
        );
        eprintln!("lab: making a Debian image as the README says; that takes minutes");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let programs = packages.root().join("usr/bin");
        run_block(&block, &folder, &[&programs], &[], PATIENCE).await?;
        // What was packed is not needed a second time.
        fs::remove_dir_all(folder.join("debian"))?;
        fs::write(&stamp, &block)?;
        Self::made(lab)
    }

    /// Where the README's commands find the image.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Copies kernel and initrd to where the README has them on every host.
    pub(crate) fn copy_to(&self, data: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(data.join(HOST_FOLDER))?;
        for name in HOST_FILES {
            fs::copy(self.folder.join(name), data.join(HOST_FOLDER).join(name))
                .with_context(|| name.to_owned())?;
        }
        Ok(())
    }
}
