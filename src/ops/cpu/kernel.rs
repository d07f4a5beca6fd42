//! The innermost loop of every product, and the layouts that it reads.
//!
//! A tile of `rows × columns` results lives in registers while the inner dimension passes by. The right matrix is
//! *packed*: columns in strips as wide as a tile, each strip `[K, columns]` in one piece. The left matrix is packed
//! likewise in strips of `[K, rows]`, or read where it lies, row by row.
//!
//! **Order of summation.** A result is a sum over blocks of [`KC`] products, each block a chain of fused
//! multiply-adds in order, the blocks added in order. Tile sizes, threads and the rest of the batch do not enter: this
//! is the row rule.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "raw tiles and functions that may only be called where an instruction set was detected"
)]

use super::isa::Isa;
use super::vector::{Plain, Vector};

/// Products in one chain. Part of what a result is: changing it changes last bits everywhere.
pub(super) const KC: usize = 288;

/// The left matrix of a tile.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// Element (0, 0).
    pub(super) data: *const f32,
    /// Distance between rows.
    pub(super) row_stride: usize,
    /// Distance between columns.
    pub(super) k_stride: usize,
}

/// Where a tile goes: row-major, rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) data: *mut f32,
    pub(super) stride: usize,
    /// Add to what is there rather than overwrite it.
    pub(super) add: bool,
}

/// One tile: `(k, left, strip of the right matrix, place)`.
///
/// # Safety
/// The instruction set is there; `left` covers `rows × k`, the strip `k × columns`, the place `rows × columns`.
pub(super) type Tile = unsafe fn(usize, Left, *const f32, Place);

/// The tiles of one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// Rows and columns of `packed` and `strided`.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Both matrices packed.
    pub(super) packed: Tile,
    /// The left matrix where it lies.
    pub(super) strided: Tile,
    /// Rows and columns of `narrow`.
    pub(super) narrow_rows: usize,
    pub(super) narrow_columns: usize,
    /// As `strided`, one register wide.
    pub(super) narrow: Tile,
}

impl Kernel {
    /// The tiles of an instruction set that the processor has.
    pub(super) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::AVX2,
            _ => PORTABLE,
        }
    }
}

/// Adds or stores one tile. `PACKED` fixes the left matrix's strides at compile time.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const REGISTERS: usize, const PACKED: bool>(
    k: usize,
    left: Left,
    strip: *const f32,
    place: Place,
) {
    let (row_stride, k_stride) = if PACKED { (1, ROWS) } else { (left.row_stride, left.k_stride) };
    // SAFETY: all reads and writes stay within what the caller promised of `left`, `strip` and `place`.
    unsafe {
        let mut sums = [[V::splat(0.0); REGISTERS]; ROWS];
        let (mut a, mut b) = (left.data, strip);
        for _ in 0..k {
            let mut columns = [V::splat(0.0); REGISTERS];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = V::load(b.add(j * V::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*a.add(i * row_stride));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = value.fma(column, *sum);
                }
            }
            a = a.add(k_stride);
            b = b.add(REGISTERS * V::LANES);
        }
        for (i, sums) in sums.iter().enumerate() {
            let row = place.data.add(i * place.stride);
            for (j, sum) in sums.iter().enumerate() {
                let to = row.add(j * V::LANES);
                let value = if place.add { V::load(to).add(*sum) } else { *sum };
                value.store(to);
            }
        }
    }
}

/// Declares the three tiles of an instruction set.
macro_rules! tiles {
    ($(#[$doc:meta])* $name:ident = $vector:ty, $rows:literal x $registers:literal, narrow $narrow:literal $(, $feature:literal)?) => {
        $(#[$doc])*
        pub(in crate::ops::cpu) const $name: Kernel = {
            type V = $vector;
            $(#[target_feature(enable = $feature)])?
            unsafe fn packed(k: usize, left: Left, strip: *const f32, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<V, $rows, $registers, true>(k, left, strip, place) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn strided(k: usize, left: Left, strip: *const f32, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<V, $rows, $registers, false>(k, left, strip, place) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn narrow(k: usize, left: Left, strip: *const f32, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<V, $narrow, 1, false>(k, left, strip, place) }
            }
            Kernel {
                rows: $rows,
                columns: $registers * V::LANES,
                packed,
                strided,
                narrow_rows: $narrow,
                narrow_columns: V::LANES,
                narrow,
            }
        };
    };
}

tiles! {
    /// Sixteen registers of four lanes are what any machine has.
    PORTABLE = Plain<8>, 4 x 1, narrow 4
}

/// AVX-512's shapes in plain Rust, so that tests cover them on every machine.
#[cfg(test)]
mod rehearsal {
    use super::*;
    tiles! {
        REHEARSAL = Plain<16>, 12 x 2, narrow 12
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::{Avx2, Avx512, Vector};
    use super::{Kernel, Left, Place, tile};
    tiles! {
        /// 12 of 16 registers hold sums.
        AVX2 = Avx2, 6 x 2, narrow 12, "avx2,fma"
    }
    tiles! {
        /// 24 of 32 registers hold sums.
        AVX512 = Avx512, 12 x 2, narrow 12, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
    }
}

#[cfg(test)]
pub(super) use rehearsal::REHEARSAL;
