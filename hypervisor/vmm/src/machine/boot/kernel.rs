//! Kernel files: what they are, whether this machine can boot them, and putting them into guest memory.

use super::{HIGH_RAM, open_file};
use crate::machine::MachineError;
use crate::memory::GuestRam;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{GuestAddress, ReadVolatile};

/// Field of the spec that names the kernel.
pub(super) const KERNEL: &str = "boot.kernel";
/// Most program headers of a kernel; Linux has five.
const MAX_PROGRAM_HEADERS: usize = 64;
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ELF_MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Where the setup header lies in a bzImage, and in the zero page (`Documentation/arch/x86/boot.rst`).
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// Where the zero page's next field begins.
const SETUP_HEADER_END_LIMIT: usize = 0x290;
/// Oldest boot protocol with a 64-bit entry point that says so: Linux 3.8.
const OLDEST_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
const PAGE_ALIGNMENT: u64 = 0x1000;

/// Compressed files are recognised so that the refusal can say what to do.
const COMPRESSED: [(&[u8], &str); 5] = [
    (&[0x1f, 0x8b], "gzip"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
    (b"BZh", "bzip2"),
];

/// A kernel file that this machine could boot, memory permitting.
#[derive(Debug)]
pub(super) struct Kernel {
    file: File,
    format: Format,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Format {
    /// First byte behind the last segment, in guest memory.
    Elf {
        end: u64,
    },
    BzImage(SetupHeader),
}

/// What a bzImage says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetupHeader {
    /// The header as it is in the file, for the zero page.
    pub(super) raw: Vec<u8>,
    /// Last address that an initial RAM disk may take.
    pub(super) initrd_addr_max: u64,
    /// Longest command line, without its final NUL.
    pub(super) cmdline_bytes: usize,
    alignment: u64,
    relocatable: bool,
    preferred: u64,
    /// Memory the kernel needs from its load address on until it knows the memory map.
    init_bytes: u64,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Placed {
    /// How it is entered.
    pub(super) entry: Protocol,
    /// First byte behind it.
    pub(super) end: u64,
    /// Its setup header, if it is a bzImage.
    pub(super) header: Option<SetupHeader>,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// 64-bit mode, a zero page in RSI.
    Linux64(u64),
    /// 32-bit protected mode, an `hvm_start_info` in EBX.
    Pvh(u64),
}

impl Kernel {
    /// Opens and recognises the kernel at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, MachineError> {
        let file = open_file(KERNEL, path)?;
        let mut start = [0; SETUP_HEADER_END_LIMIT];
        let mut length = 0;
        while length < start.len() {
            let offset = length as u64;
            match file.read_at(&mut start[length..], offset) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(source) => {
                    return Err(MachineError::File {
                        field: KERNEL,
                        path: path.to_owned(),
                        source,
                    });
                }
            }
        }
        let format = recognise(&start[..length], |offset, bytes| {
            file.read_exact_at(bytes, offset).is_ok()
        })
        .map_err(not_a_kernel)?;
        Ok(Self { file, format })
    }

    /// Whether the kernel finds room below `low_ram_end` and takes a command line of `cmdline_bytes`.
    pub(super) fn check(&self, low_ram_end: u64, cmdline_bytes: usize) -> Result<(), MachineError> {
        match &self.format {
            Format::Elf { end } if *end > low_ram_end => Err(MachineError::KernelTooLarge {
                needed_bytes: *end,
                memory_bytes: low_ram_end,
            }),
            Format::Elf { .. } => Ok(()),
            Format::BzImage(header) if cmdline_bytes > header.cmdline_bytes => {
                Err(MachineError::CommandLineTooLong {
                    bytes: cmdline_bytes,
                    limit: header.cmdline_bytes,
                })
            }
            Format::BzImage(header) => header.place(low_ram_end).map(drop),
        }
    }

    /// Puts the kernel into `ram`.
    pub(super) fn place(mut self, ram: &GuestRam) -> Result<Placed, MachineError> {
        match self.format {
            Format::Elf { .. } => place_elf(&mut self.file, ram),
            Format::BzImage(header) => {
                let address = header.place(ram.segments()[0].bytes)?;
                BzImage::load(ram.map(), Some(GuestAddress(address)), &mut self.file, None)
                    .map_err(|error| not_a_kernel(error.to_string()))?;
                Ok(Placed {
                    entry: Protocol::Linux64(address + ENTRY_64),
                    end: address + header.init_bytes,
                    header: Some(header),
                })
            }
        }
    }
}

/// Puts an ELF image into `ram`. It is entered as its PVH note says, or at its entry point in 64-bit mode.
pub(super) fn place_elf<F>(image: &mut F, ram: &GuestRam) -> Result<Placed, MachineError>
where
    F: Read + Seek + ReadVolatile,
{
    let loaded = Elf::load(ram.map(), None, image, Some(GuestAddress(HIGH_RAM)))
        .map_err(|error| not_a_kernel(error.to_string()))?;
    Ok(Placed {
        entry: match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Protocol::Pvh(entry.0),
            _ => Protocol::Linux64(loaded.kernel_load.0),
        },
        end: loaded.kernel_end,
        header: None,
    })
}

fn not_a_kernel(reason: String) -> MachineError {
    MachineError::NotAKernel {
        field: KERNEL,
        reason,
    }
}

/// What the file that begins with `start` is; `read` fills a buffer from an offset of the file.
fn recognise(start: &[u8], read: impl Fn(u64, &mut [u8]) -> bool) -> Result<Format, String> {
    if start.starts_with(b"\x7fELF") {
        return recognise_elf(start, read).map(|end| Format::Elf { end });
    }
    if start.get(0x202..0x206) == Some(b"HdrS") {
        return SetupHeader::parse(start).map(Format::BzImage);
    }
    match COMPRESSED
        .iter()
        .find(|(magic, _)| start.starts_with(magic))
    {
        Some((_, format)) => Err(format!("it is compressed with {format}")),
        None => Err("it begins like neither".into()),
    }
}

/// Where the last segment of an ELF ends in guest memory.
fn recognise_elf(start: &[u8], read: impl Fn(u64, &mut [u8]) -> bool) -> Result<u64, String> {
    let header = start
        .get(..ELF_HEADER_BYTES)
        .ok_or("its ELF header is cut off")?;
    let u16_at = |offset: usize| u16::from_le_bytes([header[offset], header[offset + 1]]);
    if (header[4], header[5]) != (2, 1) || u16_at(18) != ELF_MACHINE_X86_64 {
        return Err("it is an ELF for another CPU".into());
    }
    let count = usize::from(u16_at(56));
    if usize::from(u16_at(54)) != PROGRAM_HEADER_BYTES || count > MAX_PROGRAM_HEADERS {
        return Err("its program headers have an unknown form".into());
    }
    let mut headers = vec![0; count * PROGRAM_HEADER_BYTES];
    if !read(u64_at(header, 32), &mut headers) {
        return Err("its program headers are cut off".into());
    }
    let mut end = 0;
    for segment in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        if segment[..4] == PT_LOAD.to_le_bytes() {
            let segment_end = u64_at(segment, 24)
                .checked_add(u64_at(segment, 40))
                .ok_or("a segment wraps around the end of memory")?;
            end = end.max(segment_end);
        }
    }
    if end == 0 {
        return Err("it has nothing to load".into());
    }
    Ok(end)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

impl SetupHeader {
    fn parse(start: &[u8]) -> Result<Self, String> {
        // The byte of the jump at 0x200 says where the header ends.
        let end = 0x202 + usize::from(start[0x201]);
        let raw = start
            .get(SETUP_HEADER..end.min(SETUP_HEADER_END_LIMIT))
            .ok_or("its setup header is cut off")?;
        let field = |offset: usize| raw.get(offset - SETUP_HEADER..).unwrap_or_default();
        let number = |offset: usize, bytes: usize| {
            field(offset)
                .iter()
                .take(bytes)
                .rev()
                .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let version = number(0x206, 2) as u16;
        if version < OLDEST_PROTOCOL {
            return Err(format!(
                "it speaks boot protocol {}.{:02}, from before 64-bit entry points",
                version >> 8,
                version & 0xff
            ));
        }
        if number(0x236, 2) as u16 & XLF_KERNEL_64 == 0 {
            return Err("it is a 32-bit kernel".into());
        }
        Ok(Self {
            raw: raw.to_vec(),
            initrd_addr_max: number(0x22c, 4),
            cmdline_bytes: number(0x238, 4) as usize,
            alignment: number(0x230, 4).max(PAGE_ALIGNMENT),
            relocatable: number(0x234, 1) != 0,
            preferred: number(0x258, 8),
            init_bytes: number(0x260, 4),
        })
    }

    /// Where the kernel goes: where it prefers to be, or if memory ends before that and it can be moved, as low as
    /// it can be.
    fn place(&self, low_ram_end: u64) -> Result<u64, MachineError> {
        let fits = |address: u64| {
            address >= HIGH_RAM
                && address
                    .checked_add(self.init_bytes)
                    .is_some_and(|end| end <= low_ram_end)
        };
        let lowest = HIGH_RAM.next_multiple_of(self.alignment);
        if fits(self.preferred) {
            Ok(self.preferred)
        } else if self.relocatable && fits(lowest) {
            Ok(lowest)
        } else {
            let start = if self.relocatable {
                lowest
            } else {
                self.preferred
            };
            Err(MachineError::KernelTooLarge {
                needed_bytes: start.saturating_add(self.init_bytes),
                memory_bytes: low_ram_end,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The beginning of a bzImage as Debian builds them.
    fn bzimage(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut image = vec![0; SETUP_HEADER_END_LIMIT];
        image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
        image[0x234] = 1;
        image[0x236] = 0x3f;
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x300_0000u32.to_le_bytes());
        change(&mut image);
        image
    }

    fn header(change: impl FnOnce(&mut [u8])) -> Result<SetupHeader, String> {
        match recognise(&bzimage(change), |_, _| false)? {
            Format::BzImage(header) => Ok(header),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_bzimage_goes_where_it_prefers_to_be_and_lower_when_memory_is_small() {
        let header = header(|_| {}).unwrap();
        assert_eq!(header.place(1 << 30).unwrap(), 0x100_0000);
        assert_eq!(header.place(0x3f0_0000).unwrap(), 0x20_0000);
        assert!(matches!(
            header.place(0x300_0000),
            Err(MachineError::KernelTooLarge {
                needed_bytes: 0x320_0000,
                memory_bytes: 0x300_0000
            })
        ));
    }

    #[test]
    fn a_kernel_that_cannot_be_moved_needs_its_own_place() {
        let header = header(|image| image[0x234] = 0).unwrap();
        assert_eq!(header.place(1 << 30).unwrap(), 0x100_0000);
        assert!(header.place(0x3f0_0000).is_err());
    }

    #[test]
    fn files_that_are_no_kernel_for_this_machine_are_told_apart() {
        let refused = |bytes: &[u8]| recognise(bytes, |_, _| true).unwrap_err();
        assert_eq!(refused(b"#!/bin/sh"), "it begins like neither");
        assert_eq!(refused(&[0x1f, 0x8b, 8]), "it is compressed with gzip");
        assert_eq!(
            refused(&[0x28, 0xb5, 0x2f, 0xfd]),
            "it is compressed with zstd"
        );
        assert_eq!(refused(b"\x7fELF"), "its ELF header is cut off");
        let mut arm = [0; 64];
        arm[..6].copy_from_slice(b"\x7fELF\x02\x01");
        arm[18] = 183;
        assert_eq!(refused(&arm), "it is an ELF for another CPU");
        assert_eq!(
            header(|image| image[0x236] = 0).unwrap_err(),
            "it is a 32-bit kernel"
        );
        assert!(
            header(|image| image[0x206] = 4)
                .unwrap_err()
                .contains("2.04")
        );
    }

    proptest! {
        #[test]
        fn no_file_makes_the_recogniser_panic(
            magic in prop::sample::select(vec![&b"\x7fELF\x02\x01"[..], b"", b"\x1f\x8b"]),
            tail in prop::collection::vec(any::<u8>(), 0..700),
            is_linux in any::<bool>(),
        ) {
            let mut bytes = [magic, &tail].concat();
            if is_linux && bytes.len() > 0x206 {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            let length = bytes.len().min(SETUP_HEADER_END_LIMIT);
            if let Ok(Format::BzImage(header)) = recognise(&bytes[..length], |_, buffer| {
                buffer.fill(0xff);
                true
            }) && let Ok(address) = header.place(1 << 30)
            {
                prop_assert!(address >= HIGH_RAM && address + header.init_bytes <= 1 << 30);
            }
        }
    }
}
