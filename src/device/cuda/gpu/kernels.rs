//! The kernels of a loaded module, by name.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Mutex;

use cudarc::driver::result;
use cudarc::driver::sys as cu;

use super::lock;
use super::owned::{Module, Told};
use crate::error::{Error, Result};

/// Dynamic shared memory that a kernel gets without asking for the right to it.
const PLAIN_SHARED: u32 = 48 << 10;

/// The kernels on the card, each looked up once.
pub struct Kernels {
    found: Mutex<HashMap<&'static str, Kernel>>,
    module: Module,
    /// Shared memory that a block may have.
    most_shared: u32,
}

#[derive(Clone, Copy)]
struct Kernel {
    function: cu::CUfunction,
    /// Shared memory that the kernel has by itself.
    fixed_shared: u32,
    /// What a launch may ask for beside it.
    allowed: u32,
}

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Kernel {}

impl Kernels {
    /// The kernels of a module; a block may have so much shared memory.
    pub fn new(module: Module, most_shared: u32) -> Self {
        Self { found: Mutex::default(), module, most_shared }
    }

    /// A kernel, with the right to so much dynamic shared memory.
    pub fn get(&self, name: &'static str, shared: u32) -> Result<cu::CUfunction> {
        let mut found = lock(&self.found);
        let kernel = match found.get(name) {
            Some(kernel) if shared <= kernel.allowed => return Ok(kernel.function),
            Some(kernel) => *kernel,
            None => self.look_up(name)?,
        };
        let kernel = if shared <= kernel.allowed { kernel } else { self.allow(name, kernel, shared)? };
        found.insert(name, kernel);
        Ok(kernel.function)
    }

    fn look_up(&self, name: &'static str) -> Result<Kernel> {
        let c_name = CString::new(name).map_err(|_| Error::Device(format!("{name:?} is no kernel's name")))?;
        let function = self.module.function(&c_name)?;
        let attribute = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a module that is loaded.
        let fixed = unsafe { result::function::get_function_attribute(function, attribute) };
        let fixed_shared = u32::try_from(fixed.told("cuFuncGetAttribute")?).unwrap_or(0);
        Ok(Kernel { function, fixed_shared, allowed: PLAIN_SHARED.saturating_sub(fixed_shared) })
    }

    /// Allows all that the card can give: once is enough, and a launch takes no more than it asks for.
    fn allow(&self, name: &str, kernel: Kernel, shared: u32) -> Result<Kernel> {
        let allowed = self.most_shared.saturating_sub(kernel.fixed_shared);
        if shared > allowed {
            return Err(Error::Device(format!(
                "{name} asks for {shared} bytes of shared memory, this card has {allowed} for it"
            )));
        }
        let attribute = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a module that is loaded.
        let set = unsafe { result::function::set_function_attribute(kernel.function, attribute, allowed as i32) };
        set.told(&format!("cuFuncSetAttribute of {name} to {allowed} bytes of shared memory"))?;
        Ok(Kernel { allowed, ..kernel })
    }
}
