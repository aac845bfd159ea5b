//! What cuBLASLt is told of a product, made and given back.
//!
//! Column-major, as cuBLASLt has it, a row-major matrix is its own transpose. So y = left right is asked for as
//! y' = right' left': the right side comes first, and a side that lies transposed is transposed for cuBLASLt, too.

use std::ffi::{CStr, c_int};
use std::{mem, ptr};

use cudarc::cublaslt::sys as lt;

use super::key::Key;
use crate::device::cuda::card::{Number, Precision};
use crate::device::cuda::library::CublasLt;
use crate::error::{Error, Result};

/// cuBLASLt, opened for a context.
pub struct Handle {
    pub library: &'static CublasLt,
    pub handle: lt::cublasLtHandle_t,
}

impl Handle {
    /// Opens it for the context that is current.
    pub fn new(library: &'static CublasLt) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the place outlives the call.
        ok(library, "cublasLtCreate", unsafe { (library.functions.cublasLtCreate)(&mut handle) })?;
        Ok(Self { library, handle })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { (self.library.functions.cublasLtDestroy)(self.handle) };
    }
}

/// What is done: transposes, and the type that sums are in.
pub struct Operation {
    library: &'static CublasLt,
    pub operation: lt::cublasLtMatmulDesc_t,
}

impl Operation {
    pub fn new(library: &'static CublasLt, key: &Key) -> Result<Self> {
        let compute = match key.precision {
            Precision::F32 | Precision::Bf16 => lt::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Precision::Tf32 => lt::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        let mut operation = ptr::null_mut();
        // SAFETY: the place outlives the call.
        let made = unsafe {
            (library.functions.cublasLtMatmulDescCreate)(&mut operation, compute, lt::cudaDataType::CUDA_R_32F)
        };
        ok(library, "cublasLtMatmulDescCreate", made)?;
        let made = Self { library, operation };
        use lt::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        made.set(CUBLASLT_MATMUL_DESC_TRANSA, i32::from(key.right_transposed))?;
        made.set(CUBLASLT_MATMUL_DESC_TRANSB, i32::from(key.left_transposed))?;
        Ok(made)
    }

    /// Sets an attribute that is an `int32_t`; of `cublasOperation_t`, 0 is as it lies and 1 transposed.
    fn set(&self, attribute: lt::cublasLtMatmulDescAttributes_t, value: i32) -> Result<()> {
        // SAFETY: the operation is there, and the value is read before the call returns.
        let result = unsafe {
            (self.library.functions.cublasLtMatmulDescSetAttribute)(
                self.operation,
                attribute,
                ptr::from_ref(&value).cast(),
                mem::size_of_val(&value),
            )
        };
        ok(self.library, "cublasLtMatmulDescSetAttribute", result)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { (self.library.functions.cublasLtMatmulDescDestroy)(self.operation) };
    }
}

/// Where numbers lie, for one length.
pub struct Layouts {
    library: &'static CublasLt,
    pub right: lt::cublasLtMatrixLayout_t,
    pub left: lt::cublasLtMatrixLayout_t,
    pub to: lt::cublasLtMatrixLayout_t,
}

impl Layouts {
    pub fn new(library: &'static CublasLt, key: &Key, length: usize) -> Result<Self> {
        let (m, n, k) = key.shape(length);
        let inputs = match key.precision {
            Precision::F32 | Precision::Tf32 => lt::cudaDataType::CUDA_R_32F,
            Precision::Bf16 => lt::cudaDataType::CUDA_R_16BF,
        };
        let output = match key.number {
            Number::F32 => lt::cudaDataType::CUDA_R_32F,
            Number::Bf16 => lt::cudaDataType::CUDA_R_16BF,
        };
        let mut made = Self { library, right: ptr::null_mut(), left: ptr::null_mut(), to: ptr::null_mut() };
        let create = |number, rows: usize, columns: usize| {
            let mut layout = ptr::null_mut();
            // SAFETY: the place outlives the call.
            let result = unsafe {
                (library.functions.cublasLtMatrixLayoutCreate)(
                    &mut layout,
                    number,
                    rows as u64,
                    columns as u64,
                    rows as i64,
                )
            };
            ok(library, "cublasLtMatrixLayoutCreate", result).map(|()| layout)
        };
        // Rows of cuBLASLt's are what lies together: the columns of ours.
        let (rows, columns) = if key.right_transposed { (k, n) } else { (n, k) };
        made.right = create(inputs, rows, columns)?;
        let (rows, columns) = if key.left_transposed { (m, k) } else { (k, m) };
        made.left = create(inputs, rows, columns)?;
        made.to = create(output, n, m)?;
        Ok(made)
    }
}

impl Drop for Layouts {
    fn drop(&mut self) {
        for layout in [self.right, self.left, self.to] {
            if !layout.is_null() {
                // SAFETY: made once, destroyed once.
                unsafe { (self.library.functions.cublasLtMatrixLayoutDestroy)(layout) };
            }
        }
    }
}

/// What a search for algorithms keeps to.
pub struct Preference {
    library: &'static CublasLt,
    pub preference: lt::cublasLtMatmulPreference_t,
}

impl Preference {
    pub fn new(library: &'static CublasLt) -> Result<Self> {
        let mut preference = ptr::null_mut();
        // SAFETY: the place outlives the call.
        let made = unsafe { (library.functions.cublasLtMatmulPreferenceCreate)(&mut preference) };
        ok(library, "cublasLtMatmulPreferenceCreate", made).map(|()| Self { library, preference })
    }

    /// Sets an attribute, whose type decides how many bytes it is: `uint64_t` for a workspace, else `uint32_t`.
    pub fn set<T: Copy>(&self, attribute: lt::cublasLtMatmulPreferenceAttributes_t, value: T) -> Result<()> {
        // SAFETY: the preference is there, and the value is read before the call returns.
        let result = unsafe {
            (self.library.functions.cublasLtMatmulPreferenceSetAttribute)(
                self.preference,
                attribute,
                ptr::from_ref(&value).cast(),
                mem::size_of::<T>(),
            )
        };
        ok(self.library, "cublasLtMatmulPreferenceSetAttribute", result)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { (self.library.functions.cublasLtMatmulPreferenceDestroy)(self.preference) };
    }
}

/// What cuBLASLt says about a result.
pub fn status(library: &CublasLt, result: c_int) -> String {
    // SAFETY: it takes any number and gives text that stays, or nothing.
    let text = unsafe { (library.functions.cublasLtGetStatusString)(result) };
    if text.is_null() {
        return format!("status {result}");
    }
    // SAFETY: it is text that ends in a zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The result as this crate's.
pub fn ok(library: &CublasLt, call: &str, result: c_int) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(Error::Device(format!("{call}: {}", status(library, result)))) }
}
