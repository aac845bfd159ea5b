//! What grid.cpp offers, as it is laid out there.

use std::ffi::{CStr, c_char, c_void};

#[repr(C)]
pub struct Kernel {
    name: *const c_char,
    pub before: *const Kernel,
    params: *const u32,
    n_params: u32,
    pub most_threads: u32,
    run: *const c_void,
}

impl Kernel {
    pub fn name(&self) -> &CStr {
        // SAFETY: a literal of C++.
        unsafe { CStr::from_ptr(self.name) }
    }

    /// Numbers of `Param`.
    pub fn params(&self) -> &[u32] {
        // SAFETY: a constant of C++, with so many numbers.
        unsafe { std::slice::from_raw_parts(self.params, self.n_params as usize) }
    }
}

#[repr(C)]
pub struct Launch {
    pub kernel: *const Kernel,
    pub variant: u32,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    pub order: u32,
    pub seed: u64,
    pub args: *const u64,
    pub without_file: *const c_char,
    pub without_line: i32,
}

unsafe extern "C" {
    pub fn emulated_grid_last_kernel(variant: u32) -> *const Kernel;
    pub fn emulated_grid_barrier(i: usize, file: *mut *const c_char, line: *mut i32) -> bool;
    pub fn emulated_grid_launch(launch: *const Launch, fault: *mut u64) -> *const c_char;
    pub fn emulated_grid_reserve(bytes: usize) -> *mut c_void;
    pub fn emulated_grid_open(at: *mut c_void, bytes: usize) -> bool;
    pub fn emulated_grid_close(at: *mut c_void, bytes: usize) -> bool;
    pub fn emulated_grid_page() -> usize;
}
