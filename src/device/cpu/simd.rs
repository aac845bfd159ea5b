//! Loops compiled for the widest instruction set of the processor, chosen at run time.
//!
//! A loop over plain numbers is vectorised by the compiler for the instructions it may use. [`Arch::run`] compiles the
//! closure it is given once for each set and calls the best one that this processor has. The closure must be
//! `#[inline(always)]`, and so must be what it calls: a function of its own is compiled for the oldest processor.

/// The instruction set that loops run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the target has at least.
    Plain,
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
                return Arch::Avx512;
            }
            if avx2 {
                return Arch::Avx2;
            }
        }
        Arch::Plain
    }

    /// Calls `f(state)`, compiled for this instruction set. What `f` writes to is in `state`: a closure that captures
    /// shared references alone is called without a shim between, which would not be compiled for the set.
    #[inline(always)]
    pub fn run<S, T>(self, state: S, f: impl Fn(S) -> T) -> T {
        match self {
            // SAFETY: `detect` gives this value only where the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 => unsafe { avx512(state, f) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx2 => unsafe { avx2(state, f) },
            Arch::Plain => f(state),
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
        let best = Arch::detect();
        assert_eq!(run(best), run(Arch::Plain));
        #[cfg(target_arch = "x86_64")]
        if best == Arch::Avx512 {
            assert_eq!(run(Arch::Avx2), run(Arch::Plain));
        }
    }
}
