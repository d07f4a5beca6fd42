//! The five operations that a product needs of a vector register, once for each instruction set.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "intrinsics of an instruction set are inlined into functions that enable it and are called where it was detected"
)]

/// A register of f32 lanes.
///
/// # Safety
/// Every function may run only on a processor that has the implementation's instruction set, and is inlined into a
/// function that enables it. Pointers must be valid for [`LANES`](Self::LANES) elements; they need no alignment.
pub(super) trait Vector: Copy {
    /// Lanes of one register.
    const LANES: usize;
    /// `value` in every lane.
    unsafe fn splat(value: f32) -> Self;
    /// Reads the lanes.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes the lanes.
    unsafe fn store(self, to: *mut f32);
    /// `self · factor + sum` with one rounding.
    unsafe fn fma(self, factor: Self, sum: Self) -> Self;
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
}

/// Plain Rust, `N` lanes.
#[derive(Clone, Copy)]
pub(super) struct Plain<const N: usize>([f32; N]);

impl<const N: usize> Vector for Plain<N> {
    const LANES: usize = N;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; N])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[f32; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; N]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, sum: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_storeu_ps,
    };

    use super::Vector;

    /// Implements [`Vector`] over one register type.
    macro_rules! vector {
        ($(#[$doc:meta])* $name:ident($register:ty, $lanes:literal): $splat:ident $load:ident $store:ident $fma:ident $add:ident) => {
            $(#[$doc])*
            #[derive(Clone, Copy)]
            pub(in super::super) struct $name($register);

            impl Vector for $name {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    // SAFETY: the caller's promise of the instruction set.
                    Self(unsafe { $splat(value) })
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: the caller's promise of the instruction set and of the pointer.
                    Self(unsafe { $load(from) })
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: the caller's promise of the instruction set and of the pointer.
                    unsafe { $store(to, self.0) }
                }
                #[inline(always)]
                unsafe fn fma(self, factor: Self, sum: Self) -> Self {
                    // SAFETY: the caller's promise of the instruction set.
                    Self(unsafe { $fma(self.0, factor.0, sum.0) })
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: the caller's promise of the instruction set.
                    Self(unsafe { $add(self.0, other.0) })
                }
            }
        };
    }

    vector! {
        /// 256 bits.
        Avx2(__m256, 8): _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_fmadd_ps _mm256_add_ps
    }
    vector! {
        /// 512 bits.
        Avx512(__m512, 16): _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_fmadd_ps _mm512_add_ps
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};
