//! Memory in whole cache lines: what buffers, packed weights and scratch are made of.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u64; 8]);

// SAFETY: all bit patterns of eight u64 are values, zero among them, and there is no padding.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// What lies in memory: a number whose every bit pattern is a value.
pub trait Element: Pod + Send + Sync {}
impl<T: Pod + Send + Sync> Element for T {}

/// Lines that `n` elements fill.
pub fn lines_of<E>(n: usize) -> usize {
    (n * size_of::<E>()).div_ceil(size_of::<Line>())
}

/// An array that begins at a cache line.
pub struct Lines<E> {
    data: Vec<Line>,
    len: usize,
    element: PhantomData<E>,
}

impl<E: Element> Lines<E> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self::from_lines(vec![Line::zeroed(); lines_of::<E>(len)], len)
    }

    /// The first `len` elements of lines that hold whatever they hold.
    ///
    /// # Panics
    ///
    /// Where the lines are too few.
    pub fn from_lines(data: Vec<Line>, len: usize) -> Self {
        assert!(lines_of::<E>(len) <= data.len(), "elements lie in their lines");
        Lines { data, len, element: PhantomData }
    }

    /// `len` zeros, in that many lines.
    pub fn with_room(len: usize, n_lines: usize) -> Self {
        Self::from_lines(vec![Line::zeroed(); n_lines], len)
    }

    /// The lines, out of which they can be made again.
    pub fn take_lines(&mut self) -> Vec<Line> {
        self.len = 0;
        std::mem::take(&mut self.data)
    }
}

impl<E: Element> Deref for Lines<E> {
    type Target = [E];
    #[inline(always)]
    fn deref(&self) -> &[E] {
        &bytemuck::cast_slice(&self.data)[..self.len]
    }
}

impl<E: Element> DerefMut for Lines<E> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [E] {
        let elements: &mut [E] = cast_lines(&mut self.data);
        &mut elements[..self.len]
    }
}

#[inline(always)]
fn cast_lines<E: Element>(lines: &mut [Line]) -> &mut [E] {
    bytemuck::cast_slice_mut(lines)
}

/// Asks for the `n` elements from `at` on to be brought into the second cache: a hint, which may point anywhere.
#[inline(always)]
pub fn prefetch<E>(at: *const E, n: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let into_line = at.addr() % size_of::<Line>();
        let line = at.wrapping_byte_sub(into_line);
        for byte in (0..into_line + n * size_of::<E>()).step_by(size_of::<Line>()) {
            // SAFETY: every x86-64 has the instruction, and it reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.wrapping_byte_add(byte).cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, n);
}

/// Gives memory that was freed back to the system. Loading frees a weight's numbers once they are packed, and glibc would
/// keep some of them: 17 MB where BERT-base's bytes are 110.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it touches no memory in use; glibc calls it safe from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with scratch memory of this thread, `n` and `m` elements of any content. It grows and is kept; where `f`
/// asks again, it gets another.
#[inline(always)]
pub fn with_scratch<A: Element, C: Element, T>(n: usize, m: usize, f: impl FnOnce(&mut [A], &mut [C]) -> T) -> T {
    let (a, c) = (lines_of::<A>(n), lines_of::<C>(m));
    let mut lines = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if lines.len() < a + c {
        lines = vec![Line::zeroed(); a + c];
    }
    let (left, right) = lines[..a + c].split_at_mut(a);
    let result = f(&mut cast_lines(left)[..n], &mut cast_lines(right)[..m]);
    SCRATCH.with_borrow_mut(|free| free.push(lines));
    result
}
