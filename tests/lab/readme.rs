//! The README's section "Run your own Linux image", whose commands are run word for word.

use anyhow::{Context, ensure};
use godwit_tests::program;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

const SECTION: &str = "## Run your own Linux image";
const FENCE: &str = "```";
/// The lab may run as root on machines that have no sudo.
const PRELUDE: &str = "sudo() { \"$@\"; }\n";

/// The commands of the section's only block that contains `text`.
pub(crate) fn block_with(text: &str) -> anyhow::Result<String> {
    let readme = fs::read_to_string(program::checkout().join("README.md"))?;
    find_block(&readme, text).with_context(|| format!("the README has no block with {text:?}"))
}

fn find_block(readme: &str, text: &str) -> Option<String> {
    let (_, section) = readme.split_once(SECTION)?;
    let section = section.split("\n## ").next()?;
    // Every second part lies between fences; its first line is the language.
    let mut blocks = section.split(FENCE).skip(1).step_by(2);
    let block = blocks.find(|block| block.contains(text))?;
    Some(block.split_once('\n')?.1.to_owned())
}

/// Runs a block in `folder`, which is the user's home too, with more folders in reach and more in the environment.
pub(crate) async fn run_block(
    block: &str,
    folder: &Path,
    programs: &[&Path],
    environment: &[(&str, String)],
    patience: Duration,
) -> anyhow::Result<()> {
    let mut path = std::env::var("PATH").unwrap_or_default();
    for programs in programs {
        path = format!("{path}:{}", programs.display());
    }
    let mut command = Command::new("bash");
    command
        .args(["-euc", &format!("{PRELUDE}{block}")])
        .current_dir(folder)
        .env("PATH", path + ":/usr/sbin:/sbin")
        .env("HOME", folder)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(patience, command.output())
        .await
        .with_context(|| format!("after {patience:?}: {block}"))??;
    ensure!(
        output.status.success(),
        "{block}ended with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_found_in_its_section_only() {
        let readme = format!(
            "# A\n```sh\nwanted elsewhere\n```\n{SECTION}\n```sh\nfirst\n```\ntext wanted\n```sh\nis wanted\nmore\n```\n\
             ## B\n```sh\nlater\n```\n"
        );
        assert_eq!(
            find_block(&readme, "wanted").as_deref(),
            Some("is wanted\nmore\n")
        );
        assert_eq!(find_block(&readme, "later"), None);
    }
}
