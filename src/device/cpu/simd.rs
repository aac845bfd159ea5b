//! Loops compiled for the widest instruction set of the processor, chosen at run time.
//!
//! A loop over plain numbers is vectorised by the compiler for the instructions it may use. [`Arch::run`] compiles the
//! closure it is given once for each set and calls the best one that this processor has. The closure must be
//! `#[inline(always)]`, and so must be what it calls: a function of its own is compiled for the oldest processor.

use crate::error::{Error, Result};

/// The variable that forces an instruction set.
pub const FORCE: &str = "BITFIT_CPU";

/// The instruction set that loops and tiles run in.
///
/// A value is a promise that this processor has the instructions, so only this file makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx512 {
        /// And the dot products of bytes (VNNI).
        vnni: bool,
        /// And those of bf16 pairs.
        bf16: bool,
    },
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx2,
    /// What the target has at least.
    Portable,
}

impl Arch {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                let vnni = is_x86_feature_detected!("avx512vnni");
                return Arch::Avx512 { vnni, bf16: vnni && is_x86_feature_detected!("avx512bf16") };
            }
            if avx2 {
                return Arch::Avx2;
            }
        }
        Arch::Portable
    }

    /// Every set that this processor can run, the best last.
    pub fn available() -> Vec<Self> {
        let best = Self::detect();
        let mut all = vec![Arch::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if best != Arch::Portable {
                all.push(Arch::Avx2);
            }
            if let Arch::Avx512 { vnni, bf16 } = best {
                all.push(Arch::Avx512 { vnni: false, bf16: false });
                if vnni {
                    all.push(Arch::Avx512 { vnni, bf16: false });
                }
                if bf16 {
                    all.push(best);
                }
            }
        }
        all
    }

    /// The set that `$BITFIT_CPU` names (`portable`, `avx2`, `avx512`, `avx512-vnni`, `avx512-bf16`), else the best.
    ///
    /// # Errors
    ///
    /// Where this processor cannot run it.
    pub fn chosen() -> Result<Self> {
        let Some(name) = std::env::var_os(FORCE).filter(|name| !name.is_empty()) else { return Ok(Self::detect()) };
        let available = Self::available();
        available.iter().find(|arch| arch.name() == name).copied().ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|arch| arch.name()).collect();
            let expected = format!("{}, or nothing at all for the best", names.join(", "));
            Error::setting(FORCE, expected, format_args!("`{}`", name.to_string_lossy()))
        })
    }

    /// Whether it has the dot product of bf16 pairs.
    pub fn multiplies_bf16(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { bf16, .. } => bf16,
            _ => false,
        }
    }

    /// Whether it has the dot product of bytes.
    #[cfg(test)]
    pub(crate) fn multiplies_bytes(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { vnni, .. } => vnni,
            _ => false,
        }
    }

    /// Its name in `$BITFIT_CPU`.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { bf16: true, .. } => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { vnni: true, .. } => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { .. } => "avx512",
            #[cfg(target_arch = "x86_64")]
            Arch::Avx2 => "avx2",
            Arch::Portable => "portable",
        }
    }

    /// Calls `f(state)`, compiled for this instruction set. What `f` writes to is in `state`: a closure that captures
    /// shared references alone is called without a shim between, which would not be compiled for the set.
    #[inline(always)]
    pub(crate) fn run<S, T>(self, state: S, f: impl Fn(S) -> T) -> T {
        match self {
            // SAFETY: `detect` gives this value only where the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { .. } => unsafe { avx512(state, f) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx2 => unsafe { avx2(state, f) },
            Arch::Portable => f(state),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn avx512<S, T>(state: S, f: impl Fn(S) -> T) -> T {
    f(state)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<S, T>(state: S, f: impl Fn(S) -> T) -> T {
    f(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_of_this_processor_gives_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        let run = |arch: Arch| {
            let mut y = vec![0f32; 1000];
            arch.run(
                &mut y,
                #[inline(always)]
                |y: &mut Vec<f32>| {
                    for (y, x) in y.iter_mut().zip(&x) {
                        *y = x.mul_add(*x, 0.1);
                    }
                },
            );
            y
        };
        for arch in Arch::available() {
            assert_eq!(run(arch), run(Arch::Portable), "{}", arch.name());
        }
    }
}
