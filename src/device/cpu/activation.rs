//! The functions of a feed-forward, each beside its slope.

use super::real::Real;

/// 1 / sqrt(2 pi), the normal density at 0.
const DENSITY: f64 = 0.398_942_280_401_432_7;

/// sqrt(2 / pi) and the cubic's factor of the tanh form.
const TANH: [f64; 2] = [0.797_884_560_802_865_4, 0.044_715];

/// f and f'.
pub trait Function {
    /// f(u).
    fn value<R: Real>(u: R) -> R;
    /// f'(u).
    fn slope<R: Real>(u: R) -> R;
}

/// u Phi(u), Phi by the error function.
pub struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn value<R: Real>(u: R) -> R {
        u * u.normal_cdf()
    }

    #[inline(always)]
    fn slope<R: Real>(u: R) -> R {
        (u * R::of(DENSITY)).mul_add((R::of(-0.5) * u * u).exp(), u.normal_cdf())
    }
}

/// Its approximation by tanh.
pub struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn value<R: Real>(u: R) -> R {
        let inner = R::of(TANH[0]) * (R::of(TANH[1]) * u * u).mul_add(u, u);
        R::of(0.5) * u * (R::ONE + inner.tanh())
    }

    #[inline(always)]
    fn slope<R: Real>(u: R) -> R {
        let t = (R::of(TANH[0]) * (R::of(TANH[1]) * u * u).mul_add(u, u)).tanh();
        let inner = R::of(TANH[0]) * (R::of(3.0 * TANH[1]) * u).mul_add(u, R::ONE);
        R::of(0.5) * ((R::ONE + t) + u * (R::ONE - t * t) * inner)
    }
}

/// max(u, 0).
pub struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn value<R: Real>(u: R) -> R {
        u.max(R::ZERO)
    }

    #[inline(always)]
    fn slope<R: Real>(u: R) -> R {
        if u > R::ZERO { R::ONE } else { R::ZERO }
    }
}
