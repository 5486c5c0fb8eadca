//! Writes an initial RAM disk: an uncompressed cpio archive in the "newc" format
//! (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Written here rather than by cpio(1) because the console's device node needs no root this way.

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// Adds a directory.
    #[must_use]
    pub fn directory(self, path: &str) -> Self {
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// Adds an executable file.
    #[must_use]
    pub fn program(self, path: &str, content: &[u8]) -> Self {
        self.entry(path, PROGRAM, (0, 0), content)
    }

    /// Adds a symbolic link at `path`.
    #[must_use]
    pub fn symlink(self, path: &str, to: &str) -> Self {
        self.entry(path, SYMLINK, (0, 0), to.as_bytes())
    }

    /// Adds a character device.
    #[must_use]
    pub fn character_device(self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[])
    }

    /// The finished archive.
    pub fn finish(self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]).bytes
    }

    fn entry(mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) -> Self {
        let size = u32::try_from(content.len()).expect("files of a test guest are small");
        let name_size = u32::try_from(path.len() + 1).expect("names are short");
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        for field in [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_their_content_start_at_multiples_of_four() {
        let archive = Initramfs::default()
            .directory("dev")
            .program("init", b"12345")
            .finish();
        assert_eq!(archive.len() % 4, 0);
        let starts: Vec<_> = archive
            .windows(6)
            .enumerate()
            .filter(|(_, w)| w == b"070701")
            .map(|(at, _)| at)
            .collect();
        assert_eq!(starts.len(), 3);
        assert!(starts.iter().all(|at| at % 4 == 0));
        assert!(
            archive
                .windows(4)
                .position(|window| window == b"1234")
                .is_some_and(|at| at % 4 == 0)
        );
    }
}
