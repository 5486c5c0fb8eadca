//! `godwit demo --lab`: the demo for machines that cannot run guests themselves.
//!
//! The lab emulates its hosts, so it needs nothing of this machine but a checkout, which has the script that builds it.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The script that starts the lab, seen from a checkout's root.
const SCRIPT: &str = "tests/run";
/// What a checkout has at its root; other projects have a `tests/run` too.
const LANDMARKS: [&str; 3] = [SCRIPT, "tests/lab", "Cargo.toml"];

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Neither here nor around the program is a checkout.
    #[error(
        "no checkout of Godwit was found above {}\n  remedy: the lab is built from the source: change into a checkout and repeat this, or run `{SCRIPT} lab try` there",
        places(searched)
    )]
    NoCheckout {
        /// Where the search went up from.
        searched: Vec<PathBuf>,
    },
    /// The script is there and does not start.
    #[error("{} cannot be started\n  remedy: check that it is executable and that bash is installed", script.display())]
    Script {
        /// Its path.
        script: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn places(searched: &[PathBuf]) -> String {
    let names: Vec<_> = searched
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    names.join(" or ")
}

/// Becomes the lab's script: Ctrl-C and the exit status are its own from here on. It returns only when that fails.
pub(super) fn become_lab() -> LabError {
    let here = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let searched: Vec<PathBuf> = here.into_iter().chain(program).collect();
    match searched.iter().find_map(|start| checkout_above(start)) {
        None => LabError::NoCheckout { searched },
        Some(checkout) => {
            let script = checkout.join(SCRIPT);
            let source = Command::new(&script).args(["lab", "try"]).exec();
            LabError::Script { script, source }
        }
    }
}

/// The nearest directory at or above `start` that is a checkout's root.
fn checkout_above(start: &Path) -> Option<&Path> {
    start
        .ancestors()
        .find(|folder| LANDMARKS.iter().all(|name| folder.join(name).exists()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_checkout_is_found_from_anywhere_inside_it_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("godwit"), dir.path().join("other"));
        let inside = root.join("target/debug");
        fs::create_dir_all(root.join("tests/lab")).unwrap();
        fs::create_dir_all(&inside).unwrap();
        fs::create_dir_all(other.join("tests")).unwrap();
        for folder in [&root, &other] {
            fs::write(folder.join("Cargo.toml"), "").unwrap();
            fs::write(folder.join(SCRIPT), "").unwrap();
        }
        assert_eq!(checkout_above(&inside.join("godwit")), Some(root.as_path()));
        assert_eq!(checkout_above(&root), Some(root.as_path()));
        assert_eq!(
            checkout_above(&other),
            None,
            "it has a tests/run, but no lab"
        );
    }

    #[test]
    fn the_refusal_names_every_place_and_the_remedy() {
        let text = LabError::NoCheckout {
            searched: vec!["/root".into(), "/usr/bin/godwit".into()],
        }
        .to_string();
        assert!(text.contains("/root or /usr/bin/godwit"), "{text}");
        assert!(text.contains("tests/run lab try"), "{text}");
    }
}
