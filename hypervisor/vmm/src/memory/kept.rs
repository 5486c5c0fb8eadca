//! Memory that a VM had on this host before it moved away, taken up again for its return.
//!
//! It is content and nothing else: nobody believes it before it has been compared with what the VM has now.

use super::ram::available_memory;
use super::{GuestRam, RamError};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{GUEST_MEMORY_NAME, KeptMemory};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

impl GuestRam {
    /// Takes up memory that was kept, in pages of 4 KiB. It must be the memfd that was meant, of exactly `size`; nobody
    /// else may be using it.
    pub fn take_up(kept: &KeptMemory, size: Mib) -> Result<Self, RamError> {
        let unusable = |source| RamError::Kept {
            path: kept.path.clone(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .open(&kept.path)
            .map_err(unusable)?;
        check(&file, kept, size).map_err(unusable)?;
        let ram = Self::map_file(file, size, MemoryBacking::Standard)?;
        let missing = Bytes(ram.size().0.saturating_sub(ram.resident().0)).mib();
        match available_memory() {
            Some(available) if available < missing => Err(RamError::NotEnough {
                needed: missing,
                available,
            }),
            _ => Ok(ram),
        }
    }
}

fn check(file: &File, kept: &KeptMemory, size: Mib) -> io::Result<()> {
    let wrong = |detail: String| Err(io::Error::new(io::ErrorKind::InvalidData, detail));
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if name != std::path::Path::new(&format!("/memfd:{GUEST_MEMORY_NAME} (deleted)")) {
        return wrong(format!("it is {} and no guest's memory", name.display()));
    }
    let found = file.metadata()?;
    if found.ino() != kept.inode {
        return wrong(format!(
            "it has inode {} instead of {}",
            found.ino(),
            kept.inode
        ));
    }
    if found.len() != size.bytes().0 {
        return wrong(format!("it has {} instead of {size}", Bytes(found.len())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where this process has `file`.
    fn kept(file: &File) -> KeptMemory {
        KeptMemory {
            path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(),
            inode: file.metadata().unwrap().ino(),
        }
    }

    fn memory(name: &str) -> File {
        let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 16 << 20).unwrap();
        file.into()
    }

    #[test]
    fn kept_memory_is_taken_up_with_all_that_is_in_it() {
        let file = memory(GUEST_MEMORY_NAME);
        let before = GuestRam::take_up(&kept(&file), Mib(16)).unwrap();
        before.write(0x5000, b"as it was").unwrap();
        drop(before);
        let after = GuestRam::take_up(&kept(&file), Mib(16)).unwrap();
        let mut bytes = [0; 9];
        after.read(0x5000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"as it was");
        after.discard_all().unwrap();
        assert_eq!(after.resident(), Bytes(0));
        after.read(0x5000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 9]);
    }

    #[test]
    fn what_is_not_the_memory_that_was_meant_is_refused() {
        let file = memory(GUEST_MEMORY_NAME);
        let refused = |kept: &KeptMemory, size| match GuestRam::take_up(kept, Mib(size)) {
            Err(RamError::Kept { source, .. }) => source.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(refused(&kept(&file), 32).contains("instead of 32 MiB"));
        let mut another = kept(&file);
        another.inode += 1;
        assert!(refused(&another, 16).contains("inode"));
        assert!(refused(&kept(&memory("other")), 16).contains("no guest's memory"));
        let mut gone = kept(&file);
        gone.path = "/proc/self/fd/1000000".into();
        refused(&gone, 16);
    }
}
