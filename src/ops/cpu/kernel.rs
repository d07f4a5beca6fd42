//! The innermost loop of every product, and its memory layouts.
//!
//! A tile of `rows × columns` results is kept in registers while looping over the inner dimension. The right matrix is
//! *packed*: columns in strips as wide as a tile, each strip `[K, columns]` contiguous. The left matrix is packed
//! likewise in strips of `[K, rows]`, or read in place, row by row.
//!
//! The inner dimension is counted in *units* of four bytes: one f32, or a pair of bf16.
//!
//! **Order of summation.** A result is a sum over blocks of [`KC`] units, each block a chain of fused multiply-adds in
//! order (within a pair, the second product first), with the blocks added in order. It does not depend on tile sizes,
//! threads or the rest of the batch: this is the row rule.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "raw tiles and functions that may only be called where an instruction set was detected"
)]

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::few;
use super::isa::Isa;
use super::vector::{Operand, Plain, Single, Vector, Widened};

/// Units per chain. Part of the result's definition: changing it changes low-order bits everywhere.
pub(super) const KC: usize = 288;

/// Bytes per unit.
pub(super) const UNIT: usize = 4;

/// Properties of an element type needed by the kernels; sealed.
pub trait Numbers: Copy + Default + Send + Sync + 'static {
    /// What a tile reads along the inner dimension at a time, four bytes. Every bit pattern is valid.
    type Unit: Copy + Default + Send + Sync;
    /// Elements per unit.
    const PER_UNIT: usize;
    /// A unit of neighbours along the inner dimension; the second is ignored if a unit is one element.
    fn unit(first: Self, second: Self) -> Self::Unit;
    /// The tiles for a supported instruction set.
    fn kernel(isa: Isa) -> Kernel;
}

impl Numbers for f32 {
    type Unit = Self;
    const PER_UNIT: usize = 1;
    #[inline]
    fn unit(first: Self, _second: Self) -> Self {
        first
    }
    fn kernel(isa: Isa) -> Kernel {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => turning(few::single, x86::AVX512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::AVX2,
            _ => PORTABLE,
        }
    }
}

impl Numbers for bf16 {
    type Unit = [Self; 2];
    const PER_UNIT: usize = 2;
    #[inline]
    fn unit(first: Self, second: Self) -> [Self; 2] {
        [first, second]
    }
    fn kernel(isa: Isa) -> Kernel {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => turning(few::pairs, x86::AVX512_BF16),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => turning(few::widened, x86::AVX512_WIDENED),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::AVX2_WIDENED,
            _ => PORTABLE_WIDENED,
        }
    }
}

/// The left matrix of a tile. Strides are in bytes: bf16 rows need not start at a unit boundary.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// Address of unit (0, 0).
    pub(super) data: *const u8,
    /// Distance between rows.
    pub(super) row_stride: usize,
    /// Distance between units.
    pub(super) k_stride: usize,
}

/// Destination of a tile: row-major, rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) data: *mut f32,
    pub(super) stride: usize,
    /// Add to the existing values rather than overwrite them.
    pub(super) add: bool,
}

/// One tile: `(units, left, strip of the right matrix, place)`.
///
/// # Safety
/// The processor has the instruction set; `left` covers `rows × units`, the strip `units × columns`, the place
/// `rows × columns`.
pub(super) type Tile = unsafe fn(usize, Left, *const u8, Place);

/// Most rows per call of [`Few`], and of the low tiles.
pub(super) const MOST: usize = 4;

/// One chain of one to [`MOST`] rows against sixteen columns:
/// `(units, rows and their number, columns and a prefetch address, place)`. Units are a multiple of sixteen, and
/// contiguous within a row or column. The prefetch address may be any: as many bytes from it as the columns have are
/// fetched into the L2 cache.
///
/// # Safety
/// The processor has the instruction set; rows and columns cover `units`, the place all their results.
pub(super) type Few = unsafe fn(usize, (Left, usize), (Left, *const u8), Place);

/// Stores a tile's results transposed: `((tile, its stride), (rows, columns), (place, its stride))`, at most sixteen
/// rows.
///
/// # Safety
/// The processor has the instruction set; the tile covers `rows × columns`, the place has room for `columns × rows`.
pub(super) type Turn = unsafe fn((*const f32, usize), (usize, usize), (*mut f32, usize));

/// The tiles of one instruction set and element type.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "function pointers say nothing")]
pub struct Kernel {
    /// Rows and columns of `packed` and `strided`.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Both matrices packed.
    pub(super) packed: Tile,
    /// The left matrix read in place.
    pub(super) strided: Tile,
    /// Rows and columns of `narrow`.
    pub(super) narrow_rows: usize,
    pub(super) narrow_columns: usize,
    /// As `strided`, one register wide.
    pub(super) narrow: Tile,
    /// As `strided` with one row, two, and so on.
    pub(super) low: [Tile; MOST],
    /// Few rows against sixteen columns, if registers can be transposed.
    pub(super) few: Option<Few>,
    /// Stores a tile transposed, if registers can be transposed.
    pub(super) turn: Option<Turn>,
}

/// AVX-512 tiles, with its register-transposing functions.
#[cfg(target_arch = "x86_64")]
fn turning(few: Few, tiles: Kernel) -> Kernel {
    Kernel { few: Some(few), turn: Some(super::shuffle::turned_to), ..tiles }
}

/// Adds or stores one tile. `PACKED` fixes the left matrix's strides at compile time.
#[inline(always)]
unsafe fn tile<O: Operand, const ROWS: usize, const REGISTERS: usize, const PACKED: bool>(
    units: usize,
    left: Left,
    strip: *const u8,
    place: Place,
) {
    let lanes = O::Sum::LANES;
    let (row_stride, k_stride) =
        if PACKED { (UNIT, ROWS * UNIT) } else { (left.row_stride, left.k_stride) };
    // SAFETY: all reads and writes stay within what the caller promised of `left`, `strip` and `place`.
    unsafe {
        let mut sums = [[O::Sum::splat(0.0); REGISTERS]; ROWS];
        let (mut a, mut b) = (left.data, strip);
        for _ in 0..units {
            // No `array::from_fn`: it has none of the kernel's target features, so its closure's intrinsics are inlined only
            // where all of it is, and were called one by one in the AVX2 kernels of bf16, a tenth as fast.
            let mut columns = [O::load(b); REGISTERS];
            for (j, column) in columns.iter_mut().enumerate().skip(1) {
                *column = O::load(b.add(j * lanes * UNIT));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let value = O::splat(a.add(i * row_stride));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = value.fma(column, *sum);
                }
            }
            a = a.add(k_stride);
            b = b.add(REGISTERS * lanes * UNIT);
        }
        for (i, sums) in sums.iter().enumerate() {
            let row = place.data.add(i * place.stride);
            for (j, sum) in sums.iter().enumerate() {
                let to = row.add(j * lanes);
                let value = if place.add { O::Sum::load(to).add(*sum) } else { *sum };
                value.store(to);
            }
        }
    }
}

/// Declares the three tiles of an instruction set.
macro_rules! tiles {
    ($(#[$doc:meta])* $name:ident = $operand:ty, $rows:literal x $registers:literal, narrow $narrow:literal $(, $feature:literal)?) => {
        $(#[$doc])*
        pub(in crate::ops::cpu) const $name: Kernel = {
            type O = $operand;
            $(#[target_feature(enable = $feature)])?
            unsafe fn packed(units: usize, left: Left, strip: *const u8, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<O, $rows, $registers, true>(units, left, strip, place) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn strided(units: usize, left: Left, strip: *const u8, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<O, $rows, $registers, false>(units, left, strip, place) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn narrow(units: usize, left: Left, strip: *const u8, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<O, $narrow, 1, false>(units, left, strip, place) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn low<const ROWS: usize>(units: usize, left: Left, strip: *const u8, place: Place) {
                // SAFETY: the caller's promise.
                unsafe { tile::<O, ROWS, $registers, false>(units, left, strip, place) }
            }
            Kernel {
                rows: $rows,
                columns: $registers * <O as Operand>::Sum::LANES,
                packed,
                strided,
                narrow_rows: $narrow,
                narrow_columns: <O as Operand>::Sum::LANES,
                narrow,
                low: [low::<1>, low::<2>, low::<3>, low::<4>],
                few: None,
                turn: None,
            }
        };
    };
}

tiles! {
    /// Sized for sixteen registers of four lanes, which every machine has.
    PORTABLE = Single<Plain<8>>, 4 x 1, narrow 4
}
tiles! {
    /// As `PORTABLE`, for bf16.
    PORTABLE_WIDENED = Widened<Plain<8>>, 4 x 1, narrow 4
}

/// AVX-512's shapes in plain Rust, so that tests cover them on every machine.
#[cfg(test)]
mod rehearsal {
    use super::*;
    tiles! {
        REHEARSAL = Single<Plain<16>>, 12 x 2, narrow 12
    }
    tiles! {
        REHEARSAL_WIDENED = Widened<Plain<16>>, 12 x 2, narrow 12
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::{Avx2, Avx512, Operand, Pairs, Single, Vector, Widened};
    use super::{Kernel, Left, Place, tile};
    tiles! {
        /// 12 of 16 registers hold sums.
        AVX2 = Single<Avx2>, 6 x 2, narrow 12, "avx2,fma"
    }
    tiles! {
        /// 8 of 16 registers hold sums; operands take two registers each.
        AVX2_WIDENED = Widened<Avx2>, 4 x 2, narrow 8, "avx2,fma"
    }
    tiles! {
        /// 24 of 32 registers hold sums.
        AVX512 = Single<Avx512>, 12 x 2, narrow 12, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
    }
    tiles! {
        /// As `AVX512`, for bf16, widened.
        AVX512_WIDENED = Widened<Avx512>, 12 x 2, narrow 12, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
    }
    tiles! {
        /// As `AVX512`, for bf16, multiplied in pairs.
        AVX512_BF16 = Pairs, 12 x 2, narrow 12, "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"
    }
}

#[cfg(test)]
pub(super) use rehearsal::{REHEARSAL, REHEARSAL_WIDENED};
