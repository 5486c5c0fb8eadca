//! A guest's memory, held open.

use crate::process::VmmProcess;
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{GUEST_MEMORY_NAME, KeptMemory};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// The memfd behind a guest's memory. As long as this is held, the memory is there, whatever becomes of the VMM.
///
/// Whoever lets go last has the kernel give it back, which takes a while: [`Self::give_up`] waits for that, dropping
/// leaves it to a thread.
#[derive(Debug)]
pub(crate) struct HeldMemory(pub(super) Option<File>);

impl HeldMemory {
    /// Takes hold of what `process` has; `None` if it has no guest's memory, or more than one.
    pub(crate) fn of(process: &VmmProcess) -> io::Result<Option<Self>> {
        let directory = format!("/proc/{}/fd", process.id().pid);
        let name = format!("/memfd:{GUEST_MEMORY_NAME} (deleted)");
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            // One that is closed meanwhile is not what is looked for.
            if std::fs::read_link(&path).is_ok_and(|target| target == Path::new(&name)) {
                found.push(path);
            }
        }
        let [path] = &found[..] else { return Ok(None) };
        let file = File::options().read(true).write(true).open(path)?;
        // Looked at after the memory was taken hold of: it is of the right process.
        Ok(process.is_itself().then_some(Self(Some(file))))
    }

    /// Host memory that it takes.
    pub(crate) fn resident(&self) -> Bytes {
        let metadata = self.0.as_ref().map(File::metadata);
        Bytes(match metadata {
            Some(Ok(metadata)) => metadata.blocks() * 512,
            _ => 0,
        })
    }

    /// How a VMM finds it as long as this is held.
    pub(crate) fn place(&self) -> Option<KeptMemory> {
        let file = self.0.as_ref()?;
        Some(KeptMemory {
            path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(),
            inode: file.metadata().ok()?.ino(),
        })
    }

    /// Lets go; blocks until the kernel has the memory back, if nobody else holds it.
    pub(crate) fn give_up(mut self) {
        drop(self.0.take());
    }
}

impl Drop for HeldMemory {
    fn drop(&mut self) {
        if let Some(file) = self.0.take() {
            // Without a thread it is closed here.
            let going = std::thread::Builder::new()
                .name("memory".to_owned())
                .spawn(move || drop(file));
            if let Ok(thread) = going {
                let mut threads = GOING.lock().unwrap_or_else(PoisonError::into_inner);
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
            }
        }
    }
}

/// Threads that give memory back to the kernel.
static GOING: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Blocks until the kernel has back what was dropped so far.
pub(crate) fn wait_for_given_up() {
    let going = std::mem::take(&mut *GOING.lock().unwrap_or_else(PoisonError::into_inner));
    for thread in going {
        // Closing a file does not panic.
        let _ = thread.join();
    }
}
