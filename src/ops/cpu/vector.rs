//! Vector register operations for products, implemented per instruction set: on f32 sums, and on operands.

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
    /// Broadcasts `value` to every lane.
    unsafe fn splat(value: f32) -> Self;
    /// Loads the lanes.
    unsafe fn load(from: *const f32) -> Self;
    /// Stores the lanes.
    unsafe fn store(self, to: *mut f32);
    /// `self · factor + sum` with one rounding.
    unsafe fn fma(self, factor: Self, sum: Self) -> Self;
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Loads a pair of bf16 per lane: the first of each pair, and the second, widened.
    unsafe fn load_pairs(from: *const u8) -> (Self, Self);
    /// Broadcasts one pair to every lane.
    unsafe fn splat_pair(from: *const u8) -> (Self, Self);
}

/// A register of operands, one *unit* of four bytes per lane: one f32, or two bf16 that are neighbours along the inner
/// dimension.
///
/// # Safety
/// As for [`Vector`]; pointers are valid for four bytes a lane ([`load`](Self::load)) or four bytes.
pub(super) trait Operand: Copy {
    /// Type of the sums.
    type Sum: Vector;
    /// Loads one unit per lane.
    unsafe fn load(from: *const u8) -> Self;
    /// Broadcasts one unit to every lane.
    unsafe fn splat(from: *const u8) -> Self;
    /// `sum + self · other`, lane by lane. For pairs the second product is added first, as in AVX512-BF16; products of
    /// bf16 are exact in f32, so each addition rounds once.
    unsafe fn fma(self, other: Self, sum: Self::Sum) -> Self::Sum;
}

/// A unit is one f32.
#[derive(Clone, Copy)]
pub(super) struct Single<V>(V);

impl<V: Vector> Operand for Single<V> {
    type Sum = V;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { V::load(from.cast()) })
    }
    #[inline(always)]
    unsafe fn splat(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { V::splat(from.cast::<f32>().read_unaligned()) })
    }
    #[inline(always)]
    unsafe fn fma(self, other: Self, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { self.0.fma(other.0, sum) }
    }
}

/// A unit is two bf16, widened when loaded.
#[derive(Clone, Copy)]
pub(super) struct Widened<V> {
    first: V,
    second: V,
}

impl<V: Vector> Operand for Widened<V> {
    type Sum = V;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        let (first, second) = unsafe { V::load_pairs(from) };
        Self { first, second }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        let (first, second) = unsafe { V::splat_pair(from) };
        Self { first, second }
    }
    #[inline(always)]
    unsafe fn fma(self, other: Self, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { self.first.fma(other.first, self.second.fma(other.second, sum)) }
    }
}

/// The first bf16 of a pair in memory order, widened.
#[inline(always)]
fn first_of(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

/// The second bf16 of a pair, widened.
#[inline(always)]
fn second_of(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
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
    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> (Self, Self) {
        // SAFETY: the caller's promise.
        let pairs = unsafe { from.cast::<[u32; N]>().read_unaligned() };
        (Self(pairs.map(first_of)), Self(pairs.map(second_of)))
    }
    #[inline(always)]
    unsafe fn splat_pair(from: *const u8) -> (Self, Self) {
        // SAFETY: the caller's promise.
        let pair = unsafe { from.cast::<u32>().read_unaligned() };
        (Self([first_of(pair); N]), Self([second_of(pair); N]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m256i, __m512, __m512bh, __m512i, _mm256_add_ps, _mm256_and_si256,
        _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
        _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_add_ps,
        _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::{Operand, Vector};

    /// Implements [`Vector`] over one register type.
    macro_rules! vector {
        ($(#[$doc:meta])* $name:ident($register:ty, $lanes:literal): $splat:ident $load:ident $store:ident $fma:ident $add:ident,
            pairs $pairs:ty: $integers:ident $fill:ident $shift:ident $and:ident $cast:ident) => {
            $(#[$doc])*
            #[derive(Clone, Copy)]
            pub(in super::super) struct $name($register);

            impl $name {
                /// The two bf16 of each lane, widened.
                #[inline(always)]
                unsafe fn halves(pairs: $pairs) -> (Self, Self) {
                    // SAFETY: the caller's promise of the instruction set.
                    unsafe {
                        let second = $and(pairs, $fill(0xffff_0000_u32 as i32));
                        (Self($cast($shift::<16>(pairs))), Self($cast(second)))
                    }
                }
            }

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
                #[inline(always)]
                unsafe fn load_pairs(from: *const u8) -> (Self, Self) {
                    // SAFETY: the caller's promise of the instruction set and of the pointer.
                    unsafe { Self::halves($integers(from.cast())) }
                }
                #[inline(always)]
                unsafe fn splat_pair(from: *const u8) -> (Self, Self) {
                    // SAFETY: the caller's promise of the instruction set and of the pointer.
                    unsafe { Self::halves($fill(from.cast::<i32>().read_unaligned())) }
                }
            }
        };
    }

    vector! {
        /// 256 bits.
        Avx2(__m256, 8): _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_fmadd_ps _mm256_add_ps,
            pairs __m256i: _mm256_loadu_si256 _mm256_set1_epi32 _mm256_slli_epi32 _mm256_and_si256 _mm256_castsi256_ps
    }
    vector! {
        /// 512 bits.
        Avx512(__m512, 16): _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_fmadd_ps _mm512_add_ps,
            pairs __m512i: _mm512_loadu_si512 _mm512_set1_epi32 _mm512_slli_epi32 _mm512_and_si512 _mm512_castsi512_ps
    }

    /// A unit is two bf16, multiplied directly.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Pairs(__m512bh);

    impl Operand for Pairs {
        type Sum = Avx512;
        #[inline(always)]
        unsafe fn load(from: *const u8) -> Self {
            // SAFETY: the caller's promise; every bit pattern is a register of bf16.
            Self(unsafe {
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast()))
            })
        }
        #[inline(always)]
        unsafe fn splat(from: *const u8) -> Self {
            // SAFETY: the caller's promise; every bit pattern is a register of bf16.
            unsafe {
                let pair = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
                Self(std::mem::transmute::<__m512i, __m512bh>(pair))
            }
        }
        #[inline(always)]
        unsafe fn fma(self, other: Self, sum: Avx512) -> Avx512 {
            // SAFETY: the caller's promise of the instruction set.
            Avx512(unsafe { _mm512_dpbf16_ps(sum.0, self.0, other.0) })
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512, Pairs};
