//! Products by cuBLASLt: one algorithm for a weight, however many rows it meets.
//!
//! cuBLASLt's own choice goes by the whole shape, so that a row would get other bits in another batch. Here it is asked
//! once for each kind of product ([`Key`]), about a batch of [`LENGTH`] rows, and what it says is used for every batch.
//! What this rests on:
//!
//! - Split-K is off: the only reduction scheme allowed is none, and a candidate's own number of splits is read back.
//! - cuBLASLt also has stream-K kernels, which share the sum over K among blocks as the number of rows would have it. No
//!   attribute names them. But they pass partial sums through the workspace: so an algorithm that asks for none, at any
//!   number of rows that is tried, goes before one that does, whatever cuBLASLt thinks of their speed.
//! - Tile, stages and cluster are part of the algorithm, and inside a tile K is summed in one order.
//!
//! None of this is promised in cuBLASLt's documentation: a test on a card holds rows of mixed batches to the bit.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::{mem, ptr};

use cudarc::cublaslt::sys as lt;

use super::descriptors::{Handle, Layouts, Operation, Preference, ok, status};
use super::key::Key;
use super::owned::{Memory, Stream};
use crate::device::cuda::card::Product;
use crate::device::cuda::library::{Candidate, CublasLt};
use crate::error::{Error, Result};

/// The number of rows, or for the gradient of a weight of terms, that an algorithm is chosen for.
const LENGTH: usize = 4096;
/// Numbers that an algorithm should also take: those of small batches, odd ones, large ones.
const LENGTHS: [usize; 6] = [1, 7, 64, 1000, LENGTH, 65_536];
/// How many candidates cuBLASLt is asked for.
const CANDIDATES: usize = 32;
/// A chosen algorithm, for people.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Algorithm {
    /// cuBLASLt's numbers for the algorithm, its tile and its stages.
    pub id: (i32, u32, u32),
    /// Splits of K, and the scheme that adds them.
    pub splits: (i32, u32),
    /// Workspace that it needs for the rows that it was chosen for.
    pub workspace_bytes: usize,
    /// Its place among cuBLASLt's candidates, fastest first.
    pub rank: usize,
}

/// cuBLASLt, and the algorithms that were chosen.
pub struct Products {
    handle: Handle,
    workspace_bytes: usize,
    plans: HashMap<Key, Plan>,
}

/// A kind of product, ready for any length.
struct Plan {
    key: Key,
    operation: Operation,
    candidate: Candidate,
    algorithm: Algorithm,
    /// Made once for each length; an encoder's batches have some thousands at most.
    layouts: HashMap<usize, Layouts>,
}

// SAFETY: descriptors and the handle are plain memory of cuBLASLt's, and all calls go through `&mut Products`.
unsafe impl Send for Products {}

impl Products {
    /// Opens cuBLASLt for the context that is current.
    pub fn new(library: &'static CublasLt, workspace_bytes: usize) -> Result<Self> {
        Ok(Self { handle: Handle::new(library)?, workspace_bytes, plans: HashMap::new() })
    }

    /// Gives the product to the stream.
    ///
    /// # Errors
    ///
    /// Where cuBLASLt has no algorithm for it, or the one chosen does not take this many rows.
    pub fn run(&mut self, product: &Product, workspace: &Memory, stream: &Stream) -> Result<()> {
        let (key, length) = Key::of(product);
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(&self.handle, key, self.workspace_bytes, true)?;
            self.plans.insert(key, plan);
        }
        match self.plans.get_mut(&key) {
            Some(plan) => plan.run(&self.handle, length, product, workspace, stream),
            None => Ok(()),
        }
    }

    /// A product, each time by the algorithm that cuBLASLt thinks the fastest for its shape: a measure of the card.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn fastest<'a>(
        &'a self,
        product: &'a Product,
        workspace: &'a Memory,
    ) -> Result<impl FnMut(&Stream) -> Result<()> + 'a> {
        let (key, length) = Key::of(product);
        let mut plan = Plan::new(&self.handle, key, self.workspace_bytes, false)?;
        Ok(move |stream: &Stream| plan.run(&self.handle, length, product, workspace, stream))
    }

    /// The algorithms so far, each after the product that it is for.
    pub fn algorithms(&self) -> Vec<(String, Algorithm)> {
        let mut all: Vec<_> = self.plans.values().map(|plan| (plan.name(), plan.algorithm)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

impl Plan {
    /// Chooses an algorithm: `fixed`, one that does the same whatever the length; or the fastest.
    fn new(handle: &Handle, key: Key, workspace_bytes: usize, fixed: bool) -> Result<Self> {
        let operation = Operation::new(handle.library, &key)?;
        let length = if fixed { LENGTH } else { key.n };
        let layouts = Layouts::new(handle.library, &key, length)?;
        let candidates = candidates(handle, &key, &operation, &layouts, workspace_bytes, fixed)?;
        let mut ranked = Vec::new();
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let algorithm = Algorithm::read(handle.library, &candidate, rank)?;
            if !fixed {
                ranked.push(((0, 0), candidate, algorithm));
            } else if matches!(algorithm.splits, (0 | 1, 0)) {
                let workspaces = workspaces(handle, &key, &operation, &candidate)?;
                let refused =
                    workspaces.iter().filter(|bytes| bytes.is_none_or(|bytes| bytes > workspace_bytes)).count();
                let through_workspace = workspaces.iter().filter(|bytes| bytes.is_some_and(|bytes| bytes > 0)).count();
                ranked.push(((refused, through_workspace), candidate, algorithm));
            }
        }
        // The first of equals: candidates come fastest first.
        let best = ranked.into_iter().min_by_key(|(faults, ..)| *faults);
        let (_, candidate, algorithm) = best.ok_or_else(|| {
            let CublasLt { version, path, .. } = handle.library;
            Error::Device(format!("cuBLASLt {version} ({}) has no algorithm for {key:?}", path.display()))
        })?;
        Ok(Self { key, operation, candidate, algorithm, layouts: HashMap::new() })
    }

    fn run(
        &mut self,
        handle: &Handle,
        length: usize,
        product: &Product,
        workspace: &Memory,
        stream: &Stream,
    ) -> Result<()> {
        if !self.layouts.contains_key(&length) {
            let layouts = Layouts::new(handle.library, &self.key, length)?;
            let checked = check(handle, &self.operation, &layouts, &self.candidate);
            let checked = checked.and_then(|bytes| match bytes <= workspace.size_bytes() {
                true => Ok(()),
                false => Err(format!("it needs {bytes} bytes of workspace")),
            });
            checked.map_err(|reason| {
                let ((m, n, k), name) = (self.key.shape(length), self.name());
                Error::Device(format!(
                    "cuBLASLt's algorithm for {name} does not take m {m}, n {n}, k {k}: {reason}; another would give a \
                     row other bits than it has in other batches"
                ))
            })?;
            self.layouts.insert(length, layouts);
        }
        let layouts = &self.layouts[&length];
        let (alpha, beta) = (1.0_f32, if self.key.accumulate { 1.0_f32 } else { 0.0 });
        let pointer = |at: u64| at as *mut c_void;
        // SAFETY: layouts, operation and algorithm belong together, as was checked; the factors are f32 on the host, as
        // the operation says, and read before the call returns. That matrices lie where the product says, and stay
        // until it is done, is on who made it.
        let result = unsafe {
            (handle.library.functions.cublasLtMatmul)(
                handle.handle,
                self.operation.operation,
                ptr::from_ref(&alpha).cast(),
                pointer(product.right.at),
                layouts.right,
                pointer(product.left.at),
                layouts.left,
                ptr::from_ref(&beta).cast(),
                pointer(product.to),
                layouts.to,
                pointer(product.to),
                layouts.to,
                &self.candidate.algorithm,
                pointer(workspace.at()),
                workspace.size_bytes(),
                stream.raw().cast(),
            )
        };
        let (m, n, k) = self.key.shape(length);
        ok(handle.library, "cublasLtMatmul", result)
            .map_err(|e| Error::Device(format!("{e} (m {m}, n {n}, k {k}, {:?})", self.key.precision)))
    }

    /// The product, `m` or `k` for the length that varies.
    fn name(&self) -> String {
        let Key { m, n, k, precision, number, .. } = self.key;
        let side = |rows: String, columns: String, transposed| {
            format!("({rows}, {columns}){}", if transposed { "'" } else { "" })
        };
        let named = |length: usize, letter: &str| {
            if length == 0 { letter.to_string() } else { length.to_string() }
        };
        let left = side(named(m, "m"), named(k, "k"), self.key.left_transposed);
        let right = side(named(k, "k"), n.to_string(), self.key.right_transposed);
        let adds = if self.key.accumulate { ", added" } else { "" };
        format!("{left} {right} in {precision:?} to {number:?}{adds}, aligned to {}", self.key.alignment)
    }
}

impl Algorithm {
    fn read(library: &'static CublasLt, candidate: &Candidate, rank: usize) -> Result<Self> {
        use lt::cublasLtMatmulAlgoConfigAttributes_t::*;
        let read = |attribute| {
            // All that are read here are of four bytes: `int32_t` or `uint32_t`.
            let (mut value, mut written) = (0_u32, 0);
            // SAFETY: the algorithm is one that cuBLASLt gave, and both places outlive the call.
            let result = unsafe {
                (library.functions.cublasLtMatmulAlgoConfigGetAttribute)(
                    &candidate.algorithm,
                    attribute,
                    ptr::from_mut(&mut value).cast(),
                    mem::size_of_val(&value),
                    &mut written,
                )
            };
            ok(library, "cublasLtMatmulAlgoConfigGetAttribute", result).map(|()| value)
        };
        Ok(Self {
            id: (
                read(CUBLASLT_ALGO_CONFIG_ID)? as i32,
                read(CUBLASLT_ALGO_CONFIG_TILE_ID)?,
                read(CUBLASLT_ALGO_CONFIG_STAGES_ID)?,
            ),
            splits: (read(CUBLASLT_ALGO_CONFIG_SPLITK_NUM)? as i32, read(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)?),
            workspace_bytes: candidate.workspace_bytes,
            rank,
        })
    }
}

/// What cuBLASLt would do, fastest first; without split-K where `fixed`.
fn candidates(
    handle: &Handle,
    key: &Key,
    operation: &Operation,
    layouts: &Layouts,
    workspace_bytes: usize,
    fixed: bool,
) -> Result<Vec<Candidate>> {
    use lt::cublasLtMatmulPreferenceAttributes_t::*;
    let (library, calls) = (handle.library, &handle.library.functions);
    let preference = Preference::new(library)?;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes as u64)?;
    if fixed {
        let none = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, none)?;
    }
    for side in [
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ] {
        preference.set(side, key.alignment)?;
    }
    let mut found = [Candidate::EMPTY; CANDIDATES];
    let mut count = 0;
    // SAFETY: all descriptors are there, and there is room for as many candidates as are asked for.
    let result = unsafe {
        (calls.cublasLtMatmulAlgoGetHeuristic)(
            handle.handle,
            operation.operation,
            layouts.right,
            layouts.left,
            layouts.to,
            layouts.to,
            preference.preference,
            CANDIDATES as c_int,
            found.as_mut_ptr(),
            &mut count,
        )
    };
    ok(library, "cublasLtMatmulAlgoGetHeuristic", result)
        .map_err(|e| Error::Device(format!("{e} (cuBLASLt {}, {key:?})", library.version)))?;
    let count = usize::try_from(count).unwrap_or(0);
    Ok(found.into_iter().take(count).filter(|candidate| candidate.state == 0).collect())
}

/// The workspace that an algorithm needs for each of [`LENGTHS`]; `None` where it does not take one.
fn workspaces(
    handle: &Handle,
    key: &Key,
    operation: &Operation,
    candidate: &Candidate,
) -> Result<[Option<usize>; LENGTHS.len()]> {
    let mut bytes = [None; LENGTHS.len()];
    for (bytes, length) in bytes.iter_mut().zip(LENGTHS) {
        let layouts = Layouts::new(handle.library, key, length)?;
        *bytes = check(handle, operation, &layouts, candidate).ok();
    }
    Ok(bytes)
}

/// Whether an algorithm takes these layouts: the workspace that it then needs, or why not.
fn check(handle: &Handle, operation: &Operation, layouts: &Layouts, candidate: &Candidate) -> Result<usize, String> {
    let mut checked = Candidate::EMPTY;
    // SAFETY: all descriptors are there, and the place outlives the call.
    let result = unsafe {
        (handle.library.functions.cublasLtMatmulAlgoCheck)(
            handle.handle,
            operation.operation,
            layouts.right,
            layouts.left,
            layouts.to,
            layouts.to,
            &candidate.algorithm,
            &mut checked,
        )
    };
    match (result, checked.state) {
        (0, 0) => Ok(checked.workspace_bytes),
        (0, state) => Err(status(handle.library, state)),
        (result, _) => Err(status(handle.library, result)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::card::Side;
    use crate::device::cuda::card::{Number, Precision};

    fn product(m: usize, k: usize, left_transposed: bool, to: u64) -> Product {
        let side = |at, transposed| Side { at, transposed };
        let (left, right) = (side(0x1000, left_transposed), side(0x2000, false));
        Product { m, n: 768, k, precision: Precision::Bf16, left, right, to, number: Number::F32, accumulate: false }
    }

    #[test]
    fn an_algorithm_is_for_every_batch_and_every_place_that_is_aligned_alike() {
        let key = |m, k, transposed, to| Key::of(&product(m, k, transposed, to)).0;
        assert_eq!(key(1, 3072, false, 0x3000), key(5000, 3072, false, 0x3010));
        assert_ne!(key(1, 3072, false, 0x3000), key(1, 768, false, 0x3000));
        assert_ne!(key(1, 3072, false, 0x3000), key(1, 3072, false, 0x3008));
        // The gradient of a weight is summed over the batch.
        assert_eq!(key(3072, 1, true, 0x3000), key(3072, 5000, true, 0x3000));
        assert_ne!(key(3072, 1, true, 0x3000), key(768, 1, true, 0x3000));
        for (transposed, length) in [(false, 11), (true, 13)] {
            let (key, found) = Key::of(&product(11, 13, transposed, 0x3000));
            assert_eq!((found, key.shape(found)), (length, (11, 768, 13)));
        }
        assert_eq!([0x3000, 0x3008, 0x3004, 0x3002].map(|to| key(1, 1, false, to).alignment), [16, 8, 4, 2]);
    }
}
