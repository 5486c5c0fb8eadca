//! The program's own pages in memory: those that only its start touched go back to the system.
//!
//! One program plays all roles, so its text is large, and every fault maps the pages around the one it is for. What
//! parsed arguments, built the machine and loaded the kernel is never run again, but would stay mapped in each VMM.

use std::ffi::{c_int, c_void};

/// Takes the program's and its libraries' read-only pages out of this process's mapping. Those that are needed again
/// come back from the page cache by minor faults: some dozens in a machine that runs.
///
/// Nothing is returned: pages that are locked in memory stay, as whoever locked them wished.
pub fn release_start_pages() {
    // SAFETY: the callback has the signature that is asked for, does not unwind, and uses no data.
    unsafe { libc::dl_iterate_phdr(Some(release_object), std::ptr::null_mut()) };
}

/// Lets go of one loaded object's segments that were mapped without the right to write; relocations are never made in
/// those, so their pages are what the file holds.
extern "C" fn release_object(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut c_void,
) -> c_int {
    // SAFETY: the loader hands out an object that lives at least as long as this call, with as many program headers
    // as it says.
    let (base, headers) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        let headers = match object.dlpi_phdr.is_null() {
            true => &[],
            false => std::slice::from_raw_parts(object.dlpi_phdr, count),
        };
        (object.dlpi_addr, headers)
    };
    let page_bytes = rustix::param::page_size() as u64;
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let begin = base.wrapping_add(header.p_vaddr);
        let end = begin
            .saturating_add(header.p_memsz)
            .next_multiple_of(page_bytes);
        let begin = begin - begin % page_bytes;
        // SAFETY: the range is a private mapping of a file that nobody in this process may write to, so dropping its
        // pages loses nothing: whoever reads or runs them next gets the same bytes from the file.
        let _ = unsafe {
            rustix::mm::madvise(
                begin as *mut c_void,
                (end - begin) as usize,
                rustix::mm::Advice::LinuxDontNeed,
            )
        };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of this process that belong to files.
    fn resident_file_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("RssFile:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn pages_of_the_program_go_and_come_back_as_they_were() {
        static TABLE: [u64; 65536] = [0x5eed; 65536];
        let sum = |table: &[u64]| {
            table
                .iter()
                .fold(0_u64, |sum, word| sum.wrapping_add(*word))
        };
        let before = sum(std::hint::black_box(&TABLE));
        let resident = resident_file_kib();
        release_start_pages();
        let left = resident_file_kib();
        assert!(left < resident, "{left} of {resident} KiB are left");
        assert_eq!(sum(std::hint::black_box(&TABLE)), before);
    }
}
