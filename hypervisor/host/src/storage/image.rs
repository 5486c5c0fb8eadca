//! Images: read-only bases of disks.

use super::copy::{Part, receive};
use super::error::StorageError;
use super::pool::{Kind, Pool};
use super::qcow2;
use super::work::{Begin, Key, Progress};
use super::{OpenPool, Storage};
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{ImageId, PoolId};
use godwit_wire::storage::{
    DiskReport, ImageReport, ImportImage, ImportSource, MAX_DISK, MIN_DISK, WorkState,
};
use godwit_wire::unit::Bytes;
use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long the content of an upload may be waited for.
const UPLOAD_BEGINS_WITHIN: Duration = Duration::from_secs(600);
/// Pieces of an upload that wait to be written.
pub(crate) const MAX_PIECES_WAITING: usize = 8;
/// A raw disk has whole sectors.
const SECTOR_BYTES: u64 = 512;

/// First bytes of formats that are no disk of ours, and whose bytes would make a useless raw disk.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"KDMV", "a VMware image (VMDK)"),
    (b"vhdxfile", "a Hyper-V image (VHDX)"),
    (b"conectix", "a Virtual PC image (VHD)"),
    (b"<<< ", "a VirtualBox image (VDI)"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"PK\x03\x04", "a ZIP archive"),
];

impl Storage {
    /// Begins to import an image; must be called inside a tokio runtime, may block.
    pub(crate) fn import_image(
        self: &Arc<Self>,
        pool: PoolId,
        image: ImageId,
        ask: ImportImage,
    ) -> Result<ImageReport, StorageError> {
        let open = self.pool(pool)?;
        let key = image_key(pool, image);
        match self.image(pool, image) {
            Ok(report) if !matches!(report.state, WorkState::Failed { .. }) => return Ok(report),
            Ok(_) | Err(StorageError::NoSuchImage(_)) => {}
            Err(error) => return Err(error),
        }
        let sha256 = ask.sha256.map(|text| text.to_ascii_lowercase());
        if let Some(sha256) = &sha256
            && (sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()))
        {
            return Err(StorageError::Invalid {
                field: "sha256",
                problem: format!("{sha256:?} is no SHA-256"),
                remedy: "give 64 hexadecimal digits, as sha256sum prints them",
            });
        }
        let (source, total, upload) = open_source(&ask.source)?;
        let progress = Progress::new(total);
        let import = Import {
            image,
            format: ask.format,
            sha256,
            total,
            progress: progress.clone(),
        };
        let begin = Begin {
            key,
            format: ask.format.unwrap_or(DiskFormat::Raw),
            virtual_bytes: Bytes(0),
            progress,
            upload,
        };
        let (storage, pool_of_work) = (self.clone(), open.clone());
        match self.work.begin(begin, move || {
            let mut source = source.open()?;
            import.carry_out(&storage, &pool_of_work, &mut source)
        }) {
            // Somebody was faster.
            Ok(()) | Err(StorageError::Busy { .. }) => self.image(pool, image),
            Err(error) => Err(error),
        }
    }

    /// How an image is; may block.
    pub(crate) fn image(&self, pool: PoolId, image: ImageId) -> Result<ImageReport, StorageError> {
        let open = self.pool(pool)?;
        let under_way = self.work.look(image_key(pool, image), |work| ImageReport {
            image,
            state: work.state(),
            format: work.format,
            virtual_bytes: work.virtual_bytes,
            file_bytes: Bytes(0),
            sha256: String::new(),
        });
        match under_way {
            // Recorded a moment ago, perhaps; but not all of the work is done.
            Some(report) if matches!(report.state, WorkState::Working { .. }) => Ok(report),
            under_way => open
                .read_record(Kind::Image, image.0)?
                .or(under_way)
                .ok_or(StorageError::NoSuchImage(image)),
        }
    }

    /// Deletes an image, or stops its import; may block.
    pub(crate) fn delete_image(&self, pool: PoolId, image: ImageId) -> Result<(), StorageError> {
        let open = self.pool(pool)?;
        let guard = open.lock()?;
        self.work.cancel(image_key(pool, image));
        for disk in open.records::<DiskReport>(Kind::Disk)? {
            if disk.base == Some(image) {
                return Err(StorageError::ImageInUse {
                    image,
                    child: disk.disk,
                });
            }
        }
        open.remove(&guard, Kind::Image, image.0)
    }

    /// Takes the content of an announced upload; the receiver's end of `pieces` is what the importer reads.
    pub(crate) fn begin_upload(
        &self,
        pool: PoolId,
        image: ImageId,
        pieces: mpsc::Receiver<bytes::Bytes>,
    ) -> Result<(), StorageError> {
        let key = image_key(pool, image);
        let busy = || StorageError::Busy {
            what: "image",
            id: image.to_string(),
        };
        if self.work.look(key, |_| ()).is_none() {
            return Err(StorageError::NoSuchImage(image));
        }
        let upload = self.work.take_upload(key).ok_or_else(busy)?;
        upload.send(pieces).map_err(|_| busy())
    }
}

pub(super) const fn image_key(pool: PoolId, image: ImageId) -> Key {
    Key {
        pool,
        kind: Kind::Image,
        id: image.0,
    }
}

/// Where the bytes come from.
enum Source {
    File(File),
    Upload(oneshot::Receiver<mpsc::Receiver<bytes::Bytes>>),
}

/// A source that gives bytes.
enum OpenSource {
    File(File),
    Upload {
        pieces: mpsc::Receiver<bytes::Bytes>,
        rest: bytes::Bytes,
    },
}

fn open_source(
    source: &ImportSource,
) -> Result<(Source, Bytes, Option<super::work::Upload>), StorageError> {
    let too_large = |field, bytes| StorageError::Invalid {
        field,
        problem: format!("{bytes} are more than a disk can have"),
        remedy: "import a smaller image",
    };
    match source {
        ImportSource::Path { path } => {
            let refused = |problem: String| StorageError::Invalid {
                field: "source.path",
                problem,
                remedy: "give the full path of an image file on this host",
            };
            let file = File::open(path)
                .map_err(|error| refused(format!("{}: {error}", path.display())))?;
            let metadata = file
                .metadata()
                .map_err(|error| refused(format!("{}: {error}", path.display())))?;
            let kind = metadata.file_type();
            if !path.is_absolute() || !(kind.is_file() || kind.is_block_device()) {
                return Err(refused(format!("{} is no image file", path.display())));
            }
            let bytes = Bytes(metadata.len());
            if bytes > MAX_DISK {
                return Err(too_large("source.path", bytes));
            }
            Ok((Source::File(file), bytes, None))
        }
        ImportSource::Upload { bytes } => {
            if *bytes > MAX_DISK {
                return Err(too_large("source.bytes", *bytes));
            }
            let (sender, receiver) = oneshot::channel();
            Ok((Source::Upload(receiver), *bytes, Some(sender)))
        }
    }
}

impl Source {
    /// Waits for the content of an upload.
    fn open(self) -> Result<OpenSource, StorageError> {
        match self {
            Self::File(file) => Ok(OpenSource::File(file)),
            Self::Upload(content) => {
                let comes = tokio::time::timeout(UPLOAD_BEGINS_WITHIN, content);
                let pieces = tokio::runtime::Handle::current()
                    .block_on(comes)
                    .ok()
                    .and_then(Result::ok)
                    .ok_or(StorageError::BadImage {
                        problem: "its content was not sent".to_owned(),
                        remedy: "import it again and send the content at once",
                    })?;
                Ok(OpenSource::Upload {
                    pieces,
                    rest: bytes::Bytes::new(),
                })
            }
        }
    }
}

impl Read for OpenSource {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(buffer),
            Self::Upload { pieces, rest } => {
                while rest.is_empty() {
                    match pieces.blocking_recv() {
                        Some(piece) => *rest = piece,
                        None => return Ok(0),
                    }
                }
                let length = rest.len().min(buffer.len());
                buffer[..length].copy_from_slice(&rest.split_to(length));
                Ok(length)
            }
        }
    }
}

struct Import {
    image: ImageId,
    format: Option<DiskFormat>,
    sha256: Option<String>,
    total: Bytes,
    progress: Arc<Progress>,
}

impl Import {
    fn carry_out(
        &self,
        storage: &Storage,
        pool: &OpenPool,
        source: &mut OpenSource,
    ) -> Result<(), StorageError> {
        let part = Part::create(pool, pool.part(Kind::Image, self.image.0))?;
        let upload = matches!(source, OpenSource::Upload { .. });
        let limit = if upload { self.total } else { MAX_DISK };
        let received = receive(source, &part, limit.0, &self.progress)?;
        if upload && received.bytes != self.total.0 {
            return Err(StorageError::BadImage {
                problem: format!(
                    "only {} of {} bytes were sent",
                    received.bytes, self.total.0
                ),
                remedy: "send it again",
            });
        }
        if let Some(wanted) = &self.sha256
            && *wanted != received.sha256
        {
            return Err(StorageError::BadImage {
                problem: format!("its SHA-256 is {} and not {wanted}", received.sha256),
                remedy: "fetch the image anew and check where it comes from",
            });
        }
        let (format, virtual_bytes) = self.examine(&part, received.bytes)?;
        part.file
            .set_permissions(Permissions::from_mode(0o400))
            .map_err(|error| part.failed(error))?;
        part.sync()?;
        let report = ImageReport {
            image: self.image,
            state: WorkState::Ready,
            format,
            virtual_bytes,
            file_bytes: allocated(&part.file),
            sha256: received.sha256,
        };
        let guard = pool.lock()?;
        // Whoever deletes it holds the same lock.
        self.progress.wanted()?;
        if pool
            .read_record::<ImageReport>(Kind::Image, self.image.0)?
            .is_some()
        {
            // Another host was faster with the same image.
            return Ok(());
        }
        pool.publish(
            &guard,
            &part.path,
            (Kind::Image, self.image.0, format),
            &report,
        )?;
        tracing::info!(image = %self.image, pool = pool.name(), %virtual_bytes, "an image is imported");
        storage.pools_changed();
        Ok(())
    }

    /// What was received, and how large the disk in it is.
    fn examine(&self, part: &Part<'_>, bytes: u64) -> Result<(DiskFormat, Bytes), StorageError> {
        let mut head = [0; 8];
        let length = bytes.min(head.len() as u64) as usize;
        part.file
            .read_exact_at(&mut head[..length], 0)
            .map_err(|error| part.failed(error))?;
        let format = match self.format {
            Some(format) => format,
            None if head.starts_with(&qcow2::MAGIC) => DiskFormat::Qcow2,
            None => {
                if let Some((_, what)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
                    return Err(StorageError::BadImage {
                        problem: format!("it is {what}"),
                        remedy: "unpack it, or convert it with `qemu-img convert -O qcow2`",
                    });
                }
                DiskFormat::Raw
            }
        };
        let size = match format {
            DiskFormat::Qcow2 => qcow2::inspect(&part.file)?,
            DiskFormat::Raw => {
                let size = bytes.next_multiple_of(SECTOR_BYTES);
                part.set_length(size)?;
                Bytes(size)
            }
        };
        if size < MIN_DISK {
            return Err(StorageError::BadImage {
                problem: format!("it holds a disk of {} bytes", size.0),
                remedy: "images have at least 1 MiB",
            });
        }
        Ok((format, size))
    }
}

/// Room a file takes.
pub(super) fn allocated(file: &File) -> Bytes {
    Bytes(file.metadata().map_or(0, |found| found.blocks() * 512))
}

/// The same by its path.
pub(super) fn allocated_at(path: &Path) -> Bytes {
    Bytes(std::fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512))
}

/// The path of an image's file, relative to a disk's.
pub(super) fn from_disk(pool: &Pool, image: ImageId, format: DiskFormat) -> String {
    let data = pool.data(Kind::Image, image.0, format);
    let name = data.file_name().unwrap_or_default().to_string_lossy();
    format!("../images/{name}")
}
