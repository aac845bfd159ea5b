//! Memory that kernels read and write, and that shows what they do wrong with it.
//!
//! An allocation fills whole pages, its end at theirs to within 16 bytes, and a page that nothing may touch lies before
//! and behind. All of it is 0xff at first, which is NaN to any kernel; what it does not need of its pages, the slack,
//! must stay so. Addresses are never given twice, so that freed memory is missed as well.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ffi;

/// What memory is filled with.
const UNSET: u8 = 0xff;
static ALL_UNSET: [u8; 4096] = [UNSET; 4096];
/// What an allocation starts at a multiple of.
const ALIGNMENT: usize = 16;
/// How many addresses are taken from the system at once.
const RESERVE: usize = 1 << 38;

struct Memory {
    /// Where each live allocation begins, its size, and its pages.
    live: BTreeMap<usize, (usize, Range<usize>)>,
    /// Where each freed one began, and its size.
    freed: BTreeMap<usize, usize>,
    /// The addresses that have not been given yet.
    addresses: Range<usize>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory { live: BTreeMap::new(), freed: BTreeMap::new(), addresses: 0..0 });

fn memory() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pointer(at: usize) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(at)
}

/// Memory of so many bytes, all 0xff, at a multiple of 16.
///
/// # Panics
///
/// Where the system has no more.
pub fn allocate(bytes: usize) -> u64 {
    // SAFETY: asks for a number.
    let page = unsafe { ffi::emulated_grid_page() };
    let room = bytes.checked_next_multiple_of(page).filter(|room| *room < RESERVE - 2 * page);
    let room = room.unwrap_or_else(|| panic!("no memory of {bytes} bytes"));
    let mut memory = memory();
    if memory.addresses.len() < room + page {
        // SAFETY: the system chooses addresses that nobody has.
        let at = unsafe { ffi::emulated_grid_reserve(RESERVE) };
        assert!(!at.is_null(), "no more addresses");
        // The first page stays shut.
        memory.addresses = at.expose_provenance() + page..at.expose_provenance() + RESERVE;
    }
    let pages = memory.addresses.start..memory.addresses.start + room;
    memory.addresses.start = pages.end + page;
    // SAFETY: the pages are of our range, and have not been given before.
    let open = room == 0 || unsafe { ffi::emulated_grid_open(pointer(pages.start).cast(), room) };
    assert!(open, "no memory of {bytes} bytes");
    // SAFETY: they can be written to now, and nobody else knows them.
    unsafe { pointer(pages.start).write_bytes(UNSET, room) };
    let start = pages.end - bytes.next_multiple_of(ALIGNMENT);
    memory.live.insert(start, (bytes, pages));
    start as u64
}

/// Gives memory back; whoever touches it from now on is caught.
///
/// # Panics
///
/// Where no live allocation begins.
pub fn free(at: u64) {
    let mut memory = memory();
    let Some((size, pages)) = memory.live.remove(&(at as usize)) else {
        drop(memory);
        panic!("free of {at:#x}, where no live allocation begins");
    };
    // SAFETY: the pages are of our range, and their allocation lives no more.
    let closed =
        pages.is_empty() || unsafe { ffi::emulated_grid_close(pointer(pages.start).cast::<c_void>(), pages.len()) };
    assert!(closed, "the system keeps memory open");
    memory.freed.insert(at as usize, size);
}

impl Memory {
    /// Holds a range to lie in one live allocation.
    fn check(&self, what: &str, at: u64, bytes: usize) -> *mut u8 {
        let within = self.live.range(..=at as usize).next_back().is_some_and(|(start, (size, _))| {
            let offset = at as usize - start;
            offset <= *size && bytes <= size - offset
        });
        if !within {
            panic!("{what} {bytes} bytes at {at:#x}: {}", self.describe(at));
        }
        pointer(at as usize)
    }

    fn describe(&self, at: u64) -> String {
        let at = at as usize;
        if let Some((start, size)) = self.freed.range(..=at).next_back().filter(|(start, size)| at - **start < **size) {
            return format!("byte {} of an allocation of {size} that has been freed", at - start);
        }
        let before = self.live.range(..=at).next_back();
        let after = self.live.range(at..).next();
        let far = |distance: &usize| *distance <= 1 << 20;
        let behind = before.map(|(start, (size, _))| (at - start, *size));
        if let Some((offset, size)) = behind.filter(|(offset, size)| offset < size) {
            return format!("byte {offset} of an allocation of {size}");
        }
        let behind = behind.map(|(offset, size)| (offset - size, size)).filter(|(distance, _)| far(distance));
        let ahead = after.map(|(start, (size, _))| (start - at, *size)).filter(|(distance, _)| far(distance));
        match (behind, ahead) {
            (Some((past, size)), ahead) if ahead.is_none_or(|(short, _)| past <= short) => {
                format!("{past} bytes past the end of an allocation of {size}")
            }
            (_, Some((short, size))) => format!("{short} bytes before an allocation of {size}"),
            _ => "in no live allocation".to_owned(),
        }
    }
}

/// Where an address lies, in words.
pub(crate) fn describe(at: u64) -> String {
    memory().describe(at)
}

/// What of the slack of live allocations has been written to since the last call, in words.
pub(crate) fn check_slack() -> Option<String> {
    let mut found = None;
    for (start, (size, pages)) in &memory().live {
        for (slack, what) in [(pages.start..*start, "before"), (start + size..pages.end, "past the end of")] {
            // SAFETY: pages of a live allocation, which the lock keeps alive; the part that nobody may write to.
            let slack = unsafe { std::slice::from_raw_parts_mut(pointer(slack.start), slack.len()) };
            // By the whole, which is quick, before byte by byte.
            if slack.chunks(ALL_UNSET.len()).any(|chunk| *chunk != ALL_UNSET[..chunk.len()]) {
                let i = slack.iter().position(|byte| *byte != UNSET).unwrap_or(0);
                let distance = if what == "before" { slack.len() - i } else { i };
                slack.fill(UNSET);
                found = Some(format!("writes {distance} bytes {what} an allocation of {size}"));
            }
        }
    }
    found
}

/// Writes bytes.
///
/// # Panics
///
/// Where they do not lie in one live allocation.
pub fn write(to: u64, bytes: &[u8]) {
    let memory = memory();
    let to = memory.check("write", to, bytes.len());
    // SAFETY: the range is checked, and lives as long as the lock is held; `bytes` is Rust's, so it is elsewhere.
    unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

/// Reads bytes.
///
/// # Panics
///
/// Where they do not lie in one live allocation.
pub fn read(from: u64, bytes: &mut [u8]) {
    let memory = memory();
    let from = memory.check("read", from, bytes.len());
    // SAFETY: as in `write`.
    unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
}

/// Copies bytes.
///
/// # Panics
///
/// Where either side does not lie in one live allocation, or they overlap.
pub fn copy(to: u64, from: u64, bytes: usize) {
    let memory = memory();
    let (target, source) = (memory.check("copy to", to, bytes), memory.check("copy from", from, bytes));
    assert!(to.abs_diff(from) >= bytes as u64, "copy of {bytes} bytes from {from:#x} to {to:#x}, which overlap");
    // SAFETY: both ranges are checked, and live as long as the lock is held.
    unsafe { target.copy_from_nonoverlapping(source, bytes) };
}

/// Sets bytes to zero.
///
/// # Panics
///
/// Where they do not lie in one live allocation.
pub fn zero(at: u64, bytes: usize) {
    let memory = memory();
    let at = memory.check("zero", at, bytes);
    // SAFETY: as in `write`.
    unsafe { at.write_bytes(0, bytes) };
}
