//! What we ask of qcow2 files: to be made, to grow, and, when imported, to stand on their own.
//!
//! A hostile image names files of the host as its backing or data file and hands them to its guest: such an image is
//! refused before anything opens it. Making and growing is imago's work, the same library that serves the disk.

use super::error::StorageError;
use godwit_wire::storage::MAX_DISK;
use godwit_wire::unit::Bytes;
use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatCreateBuilder, FormatDriverBuilder};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use tokio::runtime::Handle;

/// `QFI\xfb`.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest header with extensions looked at: they must fit into the first cluster, whose largest size this is.
const MAX_HEADER_BYTES: u64 = 2 << 20;
/// Cluster sizes of the specification, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const EXTERNAL_DATA_FILE: u64 = 0b100;
/// Header extension with the name of a data file.
const DATA_FILE_EXTENSION: u32 = 0x4441_5441;
/// Most header extensions looked at.
const MAX_EXTENSIONS: usize = 64;

/// The file a thin copy shows where nothing was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    /// Relative to the new file.
    pub(crate) file: String,
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
}

/// Writes an empty image of `size` into `file`. Must be called outside asynchronous code.
pub(crate) fn create(file: File, size: Bytes, backing: Option<Backing>) -> io::Result<()> {
    let storage = imago::file::File::try_from(file)?;
    let mut builder = Qcow2::<imago::file::File>::create_builder(storage).size(size.0);
    if let Some(backing) = backing {
        builder = builder.backing(backing.file, backing.format.to_owned());
    }
    Handle::current().block_on(builder.create())
}

/// Makes the image in `file` larger. Must be called outside asynchronous code, while nobody else uses the file.
pub(crate) fn grow(file: File, size: Bytes) -> io::Result<()> {
    let storage = imago::file::File::try_from(file)?;
    Handle::current().block_on(async {
        let image = Qcow2::<imago::file::File>::builder(storage)
            .backing(None)
            .write(true)
            .open(DenyImplicitOpenGate::default())
            .await?;
        image.resize_grow(size.0, PreallocateMode::None).await?;
        image.flush().await
    })
}

/// Size of the disk in a qcow2 file.
pub(crate) fn virtual_size(file: &File) -> io::Result<Bytes> {
    let mut field = [0; 32];
    file.read_exact_at(&mut field, 0)?;
    if field[..4] != MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is no qcow2 file",
        ));
    }
    Ok(Bytes(u64::from_be_bytes(
        field[24..32].try_into().unwrap_or_default(),
    )))
}

/// Checks a qcow2 file from outside and tells the size of the disk in it.
pub(crate) fn inspect(file: &File) -> Result<Bytes, StorageError> {
    let length = file
        .metadata()
        .map_err(|error| bad(format!("the file cannot be read: {error}")))?
        .len();
    let mut head = vec![0; usize::try_from(length.min(MAX_HEADER_BYTES)).unwrap_or_default()];
    file.read_exact_at(&mut head, 0)
        .map_err(|error| bad(format!("the file cannot be read: {error}")))?;
    inspect_header(&head)
}

/// The same for the first bytes of the file.
fn inspect_header(head: &[u8]) -> Result<Bytes, StorageError> {
    let truncated = || bad("its qcow2 header is cut off".to_owned());
    let word = |at: usize| -> Result<u32, StorageError> {
        let bytes = head.get(at..at + 4).ok_or_else(truncated)?;
        Ok(u32::from_be_bytes(bytes.try_into().unwrap_or_default()))
    };
    let long = |at: usize| -> Result<u64, StorageError> {
        Ok(u64::from(word(at)?) << 32 | u64::from(word(at + 4)?))
    };
    if head.get(..4) != Some(&MAGIC) {
        return Err(bad("it is no qcow2 file".to_owned()));
    }
    let version = word(4)?;
    if !(2..=3).contains(&version) {
        return Err(bad(format!("qcow2 version {version} is not known")));
    }
    if long(8)? != 0 {
        return Err(refers("backing file"));
    }
    let cluster_bits = word(20)?;
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(bad(format!("its clusters have 2^{cluster_bits} bytes")));
    }
    let size = Bytes(long(24)?);
    if size > MAX_DISK || size == Bytes(0) {
        return Err(bad(format!("it holds a disk of {} bytes", size.0)));
    }
    if word(32)? != 0 {
        return Err(StorageError::BadImage {
            problem: "it is encrypted".to_owned(),
            remedy: "decrypt it with `qemu-img convert` first",
        });
    }
    let mut extension_at = 72;
    if version == 3 {
        let features = long(72)?;
        if features & EXTERNAL_DATA_FILE != 0 {
            return Err(refers("data file"));
        }
        if features != 0 {
            return Err(StorageError::BadImage {
                problem: format!("it uses features {features:#x} that are not supported"),
                remedy: "convert it with `qemu-img convert -O qcow2` first",
            });
        }
        extension_at = usize::try_from(word(100)?).map_err(|_| truncated())?;
        if extension_at < 104 {
            return Err(bad(format!("its header has {extension_at} bytes")));
        }
    }
    let cluster = 1_usize << cluster_bits;
    for _ in 0..MAX_EXTENSIONS {
        if extension_at + 8 > cluster.min(head.len()) {
            break;
        }
        match word(extension_at)? {
            0 => return Ok(size),
            DATA_FILE_EXTENSION => return Err(refers("data file")),
            _ => {}
        }
        let length = usize::try_from(word(extension_at + 4)?).map_err(|_| truncated())?;
        extension_at = extension_at
            .checked_add(8)
            .and_then(|at| at.checked_add(length.checked_next_multiple_of(8)?))
            .ok_or_else(truncated)?;
    }
    Ok(size)
}

fn bad(problem: String) -> StorageError {
    StorageError::BadImage {
        problem,
        remedy: "check the file with `qemu-img check`",
    }
}

fn refers(what: &str) -> StorageError {
    StorageError::BadImage {
        problem: format!("it refers to a {what}"),
        remedy: "make it stand on its own with `qemu-img convert -O qcow2`",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(&MAGIC);
        head[4..8].copy_from_slice(&3_u32.to_be_bytes());
        head[20..24].copy_from_slice(&16_u32.to_be_bytes());
        head[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        head[100..104].copy_from_slice(&104_u32.to_be_bytes());
        head
    }

    fn refusal(head: &[u8]) -> String {
        inspect_header(head).unwrap_err().to_string()
    }

    #[test]
    fn an_image_that_reaches_for_other_files_is_refused() {
        assert_eq!(inspect_header(&header()).unwrap(), Bytes(1 << 30));
        let mut backed = header();
        backed[15] = 112;
        assert!(refusal(&backed).contains("backing file"));
        let mut split = header();
        split[79] = 0b100;
        assert!(refusal(&split).contains("data file"));
        let mut named = header();
        named[104..108].copy_from_slice(&DATA_FILE_EXTENSION.to_be_bytes());
        assert!(refusal(&named).contains("data file"));
        let mut after_another = header();
        after_another[104..112].copy_from_slice(&[1, 2, 3, 4, 0, 0, 0, 5]);
        after_another[120..124].copy_from_slice(&DATA_FILE_EXTENSION.to_be_bytes());
        assert!(refusal(&after_another).contains("data file"));
    }

    #[test]
    fn an_image_of_an_impossible_size_is_refused() {
        let mut large = header();
        large[24] = 1;
        assert!(refusal(&large).contains("disk of"));
        assert!(refusal(&header()[..50]).contains("cut off"));
    }

    proptest! {
        #[test]
        fn no_header_panics_the_inspection(mut head in proptest::collection::vec(any::<u8>(), 0..600), genuine in any::<bool>()) {
            if genuine && head.len() >= 32 {
                head[..24].copy_from_slice(&header()[..24]);
            }
            let _ = inspect_header(&head);
        }
    }
}
