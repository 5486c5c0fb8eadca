//! Files that are either the old or the new content, whatever happens in between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only the owner (mode 0600): keys, tokens, state.
    Private,
    /// Everybody (mode 0644): certificates.
    Public,
}

impl Access {
    const fn mode(self) -> u32 {
        match self {
            Self::Private => 0o600,
            Self::Public => 0o644,
        }
    }
}

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// `read`, `write`, `create`.
    pub action: &'static str,
    /// Which file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// Names the file an I/O error is about.
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the file does not exist.
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Replaces the content of `path`: written beside it, synced, renamed over it, and the directory synced, so that
/// after a crash of the host there is the old content or the new, never a mixture.
pub fn write_atomically(path: &Path, content: &[u8], access: Access) -> Result<(), FileError> {
    let failed = |source| FileError::new("write", path, source);
    let file = replace(path, content, access, |file| file.sync_all()).map_err(failed)?;
    drop(file);
    File::open(directory_of(path))
        .and_then(|directory| directory.sync_all())
        .map_err(failed)
}

/// As [`write_atomically`], but does not wait for the disk: other processes and a restarted one see the old content or
/// the new, and only a crash of the host itself may lose it.
pub fn replace_atomically(path: &Path, content: &[u8], access: Access) -> Result<(), FileError> {
    let failed = |source| FileError::new("write", path, source);
    replace(path, content, access, |_| Ok(()))
        .map(drop)
        .map_err(failed)
}

fn replace(
    path: &Path,
    content: &[u8],
    access: Access,
    settle: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<File> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // A leftover of a crash may have other permissions: start from nothing.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(access.mode())
        .open(&beside)?;
    file.write_all(content)?;
    settle(&file)?;
    fs::rename(&beside, path)?;
    Ok(file)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Reads a text file of at most `limit_bytes`.
pub fn read_text(path: &Path, limit_bytes: u64) -> Result<String, FileError> {
    let failed = |source| FileError::new("read", path, source);
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if length > limit_bytes {
        let error = format!("it has {length} bytes, more than the {limit_bytes} allowed");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, error)));
    }
    io::read_to_string(file).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_private_file_is_replaced_whole_and_stays_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(directory.path().join("key.new"), "left behind by a crash").unwrap();
        write_atomically(&path, b"one", Access::Private).unwrap();
        write_atomically(&path, b"two", Access::Private).unwrap();
        assert_eq!(read_text(&path, 100).unwrap(), "two");
        replace_atomically(&path, b"three", Access::Private).unwrap();
        assert_eq!(read_text(&path, 100).unwrap(), "three");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_beyond_its_limit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("long");
        fs::write(&path, "12345").unwrap();
        assert!(read_text(&path, 4).is_err());
        assert!(
            read_text(&directory.path().join("none"), 4)
                .unwrap_err()
                .is_missing()
        );
    }
}
