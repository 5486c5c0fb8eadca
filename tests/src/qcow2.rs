//! Blank copy-on-write images, written by hand: the hosts tests run on need no QEMU for them.
//!
//! Layout (QEMU: docs/interop/qcow2.rst): header, refcount table, one refcount block, an empty table of the first level.

use std::io;
use std::path::Path;

const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Bytes of disk that one entry of the first level covers.
const ENTRY_BYTES: u64 = CLUSTER * (CLUSTER / 8);
/// Clusters in use: header, refcount table, refcount block, table of the first level.
const CLUSTERS: u64 = 4;
const HEADER_BYTES: u32 = 104;
/// Header extension: format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Makes an image of `bytes` bytes at `path`; what it does not hold comes from the raw file called `base` beside it, or
/// is zero.
pub fn create(path: &Path, bytes: u64, base: Option<&str>) -> io::Result<()> {
    let entries = bytes.div_ceil(ENTRY_BYTES);
    assert!(entries <= CLUSTER / 8, "one cluster holds the first level");
    let mut image = vec![0; (CLUSTERS * CLUSTER) as usize];
    let mut put = |at: u64, field: &[u8]| {
        image[at as usize..at as usize + field.len()].copy_from_slice(field);
    };
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &bytes.to_be_bytes());
    put(36, &(entries as u32).to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    // 2^4 bits to a refcount.
    put(96, &4u32.to_be_bytes());
    put(100, &HEADER_BYTES.to_be_bytes());
    if let Some(base) = base {
        let extension = u64::from(HEADER_BYTES);
        put(extension, &BACKING_FORMAT.to_be_bytes());
        put(extension + 4, &3u32.to_be_bytes());
        put(extension + 8, b"raw");
        // Eight bytes of zeros end the extensions, then comes the name.
        let name = extension + 24;
        put(8, &name.to_be_bytes());
        put(16, &(base.len() as u32).to_be_bytes());
        put(name, base.as_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    for cluster in 0..CLUSTERS {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    std::fs::write(path, image)
}
