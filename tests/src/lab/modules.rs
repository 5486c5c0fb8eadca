//! Kernel modules and what they depend on, without depmod: each module names its dependencies itself.

use super::packages::{Kernel, run};
use anyhow::Context;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A module's field that names what it depends on (`modinfo -F depends`).
const DEPENDS: &[u8] = b"\0depends=";

/// A module, ready for insmod.
#[derive(Clone, Debug)]
pub struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

/// The modules `wanted` and all they depend on, each after those it depends on. Names that are built into the
/// kernel are left out.
pub fn in_order(kernel: &Kernel, wanted: &[&str]) -> anyhow::Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(&kernel.modules, &mut files)?;
    let builtin = fs::read_to_string(kernel.modules.join("modules.builtin")).unwrap_or_default();
    let mut loaded = Vec::new();
    for name in wanted {
        let file = format!("/{}.ko", name);
        let dashed = format!("/{}.ko", name.replace('_', "-"));
        if builtin
            .lines()
            .any(|line| line.ends_with(&file) || line.ends_with(&dashed))
        {
            continue;
        }
        load(name, &files, &mut loaded)
            .with_context(|| format!("module {name} of {}", kernel.release))?;
    }
    Ok(loaded)
}

fn load(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    loaded: &mut Vec<Module>,
) -> anyhow::Result<()> {
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let content = read(files.get(name).context("there is no such module")?)?;
    for dependency in dependencies(&content) {
        load(&dependency, files, loaded)?;
    }
    loaded.push(Module {
        name: name.to_owned(),
        content,
    });
    Ok(())
}

/// Module names use `_` where file names may have `-`.
fn dependencies(module: &[u8]) -> Vec<String> {
    let Some(at) = module
        .windows(DEPENDS.len())
        .position(|window| window == DEPENDS)
    else {
        return Vec::new();
    };
    let rest = &module[at + DEPENDS.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some((name, _)) = path
            .file_name()
            .and_then(|name| name.to_str()?.split_once(".ko"))
        {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .context("xz")?;
    anyhow::ensure!(output.status.success(), "xz -dc {}", path.display());
    Ok(output.stdout)
}

/// Copies programs and every library they load to the same paths below `tree`.
pub fn copy_with_libraries(programs: &[PathBuf], tree: &Path) -> anyhow::Result<()> {
    for program in programs {
        let text = run(Command::new("ldd").arg(program))?;
        let libraries = text
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
            .map(PathBuf::from);
        for library in libraries {
            let to = tree.join(library.strip_prefix("/").unwrap_or(&library));
            fs::create_dir_all(to.parent().context("a library lies in a folder")?)?;
            fs::copy(&library, &to).with_context(|| library.display().to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_its_dependencies() {
        let module = b"\x7fELF\0license=GPL\0depends=kvm,ccp-crypto\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "ccp_crypto"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
