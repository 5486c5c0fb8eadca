//! Copy-on-write images (qcow2), through imago.
//!
//! An image may come from anybody, and a guest writes into it: it must not make the host open other files. Only the
//! header's backing file is followed, never a data file; it must lie in the same pool as the image (the directory
//! tree with the pool's mark, or else the image's own directory tree) and its format must be recorded, since a guest
//! could write a header into a raw file and have it taken for an image.
//!
//! imago is asynchronous in form only: its files are read and written with blocking calls. Each call is driven to its
//! end on the thread that makes it; several threads may, and the library keeps them apart.

use super::image::{ImageError, Opening, open_file};
use super::lock::DiskLock;
use super::request::Range;
use crate::chain::Segment;
use crate::memory::GuestMemory;
use crate::sys::guarded::{GuardedFile, WriteGate};
use godwit_wire::devices::DiskAccess;
use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use std::fs::File;
use std::future::Future;
use std::io;
use std::ops;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use vm_memory::{GuestMemory as _, Permissions};

/// Most layers of one image: it, its backing file, that one's, and so on.
const MAX_LAYERS: usize = 16;
/// Marks the directory of a pool.
const POOL_MARK: &str = "godwit-pool.json";
/// Most directories between an image and its pool.
const MAX_DEPTH: usize = 16;

/// First bytes of every image.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header that are looked at before the library sees the file.
const HEADER_BYTES: usize = 80;
/// Cluster sizes of the specification, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Incompatible feature: the metadata is known to be damaged.
const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: the data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

type Layer = FormatAccess<GuardedFile<Gate>>;

/// Lets writes pass while the disk's lock does; a layer that is only read has none to pass.
#[derive(Debug)]
enum Gate {
    Closed,
    Open,
    Locked(Arc<DiskLock>),
}

impl WriteGate for Gate {
    fn pass(&self) -> io::Result<()> {
        match self {
            Self::Closed => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Self::Open => Ok(()),
            Self::Locked(lock) => lock
                .check()
                .map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error)),
        }
    }
}

/// An open image with everything under it.
#[derive(Debug)]
pub(crate) struct Qcow2Image {
    /// Writers of data share it; what takes clusters away or makes them zero is alone: the library looks at the rest of a
    /// cluster before it zeroes all of it, and nobody may write there in between.
    image: RwLock<Layer>,
}

impl Qcow2Image {
    pub(crate) fn open(path: &Path, opening: &Opening) -> Result<Self, ImageError> {
        let path = path.canonicalize().map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        let pool = pool_of(&path);
        let image = open_image(&path, &pool, opening, 1)?;
        Ok(Self {
            image: RwLock::new(image),
        })
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.shared().size()
    }

    pub(crate) fn read(
        &self,
        memory: &GuestMemory,
        segments: &[Segment],
        offset: u64,
    ) -> io::Result<()> {
        let slices = slices(memory, segments, Permissions::Write)?;
        // The guard marks the pages when it goes.
        let (pieces, _guard) = IoVectorMut::from_volatile_slice(&slices[..]);
        drive(self.shared().readv(pieces, offset))
    }

    pub(crate) fn write(
        &self,
        memory: &GuestMemory,
        segments: &[Segment],
        offset: u64,
    ) -> io::Result<()> {
        let slices = slices(memory, segments, Permissions::Read)?;
        let (pieces, _guard) = IoVector::from_volatile_slice(&slices[..]);
        drive(self.shared().writev(pieces, offset))
    }

    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        drive(self.shared().read(buffer, offset))
    }

    pub(crate) fn write_at(&self, content: &[u8], offset: u64) -> io::Result<()> {
        drive(self.shared().write(content, offset))
    }

    /// The first stretch between `offset` and `end` that is not known to be zero in this image and all under it.
    pub(crate) fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<ops::Range<u64>>> {
        let image = self.shared();
        let mut next = offset;
        while next < end {
            let (mapping, length) = drive(image.get_mapping(next, end - next))?;
            let stop = next.saturating_add(length).min(end);
            match mapping {
                Mapping::Zero { .. } if length > 0 => next = stop,
                Mapping::Eof { .. } => return Ok(None),
                _ if length == 0 => return Ok(Some(next..end)),
                _ => return Ok(Some(next..stop)),
            }
        }
        Ok(None)
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        drive(async {
            image.flush().await?;
            image.sync().await
        })
    }

    /// Writes back what the library keeps of the image's tables.
    pub(crate) fn write_back(&self) -> io::Result<()> {
        drive(self.shared().flush())
    }

    pub(crate) fn discard(&self, range: Range) -> io::Result<()> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        match drive(image.discard_to_any(range.offset, range.bytes)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    pub(crate) fn write_zeroes(&self, range: Range) -> io::Result<()> {
        let image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        drive(image.write_zeroes(range.offset, range.bytes))
    }

    pub(crate) fn grow(&self, bytes: u64) -> io::Result<()> {
        let image = self.shared();
        drive(async {
            image.resize_grow(bytes, PreallocateMode::None).await?;
            image.flush().await?;
            image.sync().await
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Layer> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_image(
    path: &Path,
    pool: &Path,
    opening: &Opening,
    layer: usize,
) -> Result<Layer, ImageError> {
    let bad = |reason: String| ImageError::NotQcow2 {
        path: path.to_owned(),
        reason,
    };
    let file = open_file(path, opening.access())?;
    inspect(&file).map_err(|problem| match problem {
        HeaderProblem::DataFile => ImageError::Reference {
            path: path.to_owned(),
            target: "a separate data file".to_owned(),
            reason: "that is not supported; convert it with qemu-img convert -O qcow2".to_owned(),
        },
        other => bad(other.to_string()),
    })?;
    let gate = match opening {
        Opening::Reading => Gate::Closed,
        Opening::Writing(None) => Gate::Open,
        Opening::Writing(Some(lock)) => Gate::Locked(Arc::clone(lock)),
    };
    let writable = opening.access() == DiskAccess::ReadWrite;
    let storage = GuardedFile::new(file, gate).map_err(|error| bad(error.to_string()))?;
    let opened = Qcow2::<GuardedFile<Gate>>::builder(storage)
        .backing(None)
        .data_file(None)
        .write(writable)
        .open(DenyImplicitOpenGate::default());
    let mut image: Qcow2<GuardedFile<Gate>> =
        drive(opened).map_err(|error| bad(error.to_string()))?;
    if let Some(name) = image.implicit_backing_file().cloned() {
        let format = image.implicit_backing_format().cloned();
        let backing = open_backing(path, pool, &name, format.as_deref(), layer)?;
        image.set_backing(Some(backing));
    }
    Ok(FormatAccess::new(image))
}

/// Opens what an image refers to, if it may refer to it.
fn open_backing(
    path: &Path,
    pool: &Path,
    name: &str,
    format: Option<&str>,
    layer: usize,
) -> Result<Layer, ImageError> {
    let refused = |reason: String| ImageError::Reference {
        path: path.to_owned(),
        target: name.to_owned(),
        reason,
    };
    if layer >= MAX_LAYERS {
        return Err(refused(format!(
            "that is more than {MAX_LAYERS} layers, or a circle; flatten it with qemu-img convert"
        )));
    }
    // Names such as `json:{…}` or `nbd://…` are QEMU's own, and reach anywhere.
    let named = name.split('/').next().unwrap_or_default();
    if named.contains(':') {
        return Err(refused("only files are followed".to_owned()));
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let target = directory
        .join(name)
        .canonicalize()
        .map_err(|error| refused(format!("it cannot be opened: {error}")))?;
    if !target.starts_with(pool) {
        return Err(refused(format!(
            "that is outside {}; move it there, or flatten the image with qemu-img convert",
            pool.display()
        )));
    }
    match format {
        Some("qcow2") => open_image(&target, pool, &Opening::Reading, layer + 1),
        Some("raw" | "file") => {
            let file = open_file(&target, DiskAccess::ReadOnly)?;
            let opened = GuardedFile::new(file, Gate::Closed)
                .and_then(|storage| drive(Raw::open_image(storage, false)));
            let raw = opened.map_err(|error| refused(error.to_string()))?;
            Ok(FormatAccess::new(raw))
        }
        Some(other) => Err(refused(format!("its format {other} is not known"))),
        None => Err(refused(
            "the image does not say in which format that is; record it with qemu-img rebase -u -F"
                .to_owned(),
        )),
    }
}

/// The tree that an image's references must stay in.
fn pool_of(path: &Path) -> PathBuf {
    let own = path.parent().unwrap_or(Path::new("/"));
    own.ancestors()
        .take(MAX_DEPTH)
        .find(|directory| directory.join(POOL_MARK).is_file())
        .unwrap_or(own)
        .to_owned()
}

/// What is wrong with an image's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum HeaderProblem {
    #[error("it does not begin as one does; check the format that was given")]
    Magic,
    #[error("version {0} is not known")]
    Version(u32),
    #[error("its clusters have 2^{0} bytes")]
    ClusterBits(u32),
    #[error("it is encrypted; decrypt it with qemu-img convert")]
    Encrypted,
    #[error("it is marked as damaged; repair it with qemu-img check -r all")]
    Corrupt,
    #[error("its data is in another file")]
    DataFile,
}

fn inspect(file: &File) -> Result<(), HeaderProblem> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)
        .map_err(|_| HeaderProblem::Magic)?;
    inspect_header(&header)
}

fn inspect_header(header: &[u8; HEADER_BYTES]) -> Result<(), HeaderProblem> {
    let word = |at: usize| {
        let [a, b, c, d] = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        u32::from_be_bytes([a, b, c, d])
    };
    if header[..4] != MAGIC {
        return Err(HeaderProblem::Magic);
    }
    let version = word(4);
    if !(2..=3).contains(&version) {
        return Err(HeaderProblem::Version(version));
    }
    let bits = word(20);
    if !CLUSTER_BITS.contains(&bits) {
        return Err(HeaderProblem::ClusterBits(bits));
    }
    if word(32) != 0 {
        return Err(HeaderProblem::Encrypted);
    }
    let features = match version {
        2 => 0,
        _ => (u64::from(word(72)) << 32) | u64::from(word(76)),
    };
    if features & EXTERNAL_DATA != 0 {
        return Err(HeaderProblem::DataFile);
    }
    if features & CORRUPT != 0 {
        return Err(HeaderProblem::Corrupt);
    }
    Ok(())
}

type Slice<'a> =
    vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, vm_memory::bitmap::AtomicBitmap>>;

fn slices<'a>(
    memory: &'a GuestMemory,
    segments: &[Segment],
    access: Permissions,
) -> io::Result<Vec<Slice<'a>>> {
    let fault = |_| io::Error::from_raw_os_error(libc::EFAULT);
    let mut found = Vec::with_capacity(segments.len());
    for segment in segments {
        let part = memory
            .get_slices(segment.address, segment.len as usize, access)
            .map_err(fault)?;
        for slice in part {
            found.push(slice.map_err(fault)?);
        }
    }
    Ok(found)
}

/// Drives a future to its end on this thread.
fn drive<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
