//! One to four rows times a matrix with contiguous columns, as in a model's weights during generation: sixteen columns
//! at a time are transposed in registers, so that each weight is read once and no lane is idle.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "bodies compiled within each instruction set's own function, over pointers"
)]

use super::kernel::{Left, MOST, Place, UNIT};
use super::shuffle::{SIDE, turned_from};
use super::vector::{Avx512, Operand, Pairs, Single, Vector, Widened};

/// Each result uses the same chain as in tiles: one multiply-add per unit, in order.
#[inline(always)]
unsafe fn body<O: Operand<Sum = Avx512>, const M: usize>(
    units: usize,
    rows: Left,
    (columns, ahead): (Left, *const u8),
    place: Place,
) {
    // SAFETY: all reads and writes stay within what the caller promised.
    unsafe {
        let mut sums = [Avx512::splat(0.0); M];
        for first in (0..units).step_by(SIDE) {
            let square = turned_from(
                columns.data.add(first * UNIT),
                columns.row_stride,
                ahead.wrapping_add(first * UNIT * SIDE),
            );
            for (k, column) in square.iter().enumerate() {
                let column = O::load(std::ptr::from_ref(column).cast());
                let at = rows.data.add((first + k) * UNIT);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = column.fma(O::splat(at.add(i * rows.row_stride)), *sum);
                }
            }
        }
        for (i, sum) in sums.iter().enumerate() {
            let to = place.data.add(i * place.stride);
            let value = if place.add { Avx512::load(to).add(*sum) } else { *sum };
            value.store(to);
        }
    }
}

macro_rules! few {
    ($(#[$doc:meta])* $name:ident = $operand:ty, $feature:literal) => {
        $(#[$doc])*
        #[target_feature(enable = $feature)]
        pub(super) unsafe fn $name(units: usize, rows: (Left, usize), columns: (Left, *const u8), place: Place) {
            let (rows, count) = rows;
            // SAFETY: the caller's promise.
            unsafe {
                match count {
                    1 => body::<$operand, 1>(units, rows, columns, place),
                    2 => body::<$operand, 2>(units, rows, columns, place),
                    3 => body::<$operand, 3>(units, rows, columns, place),
                    _ => body::<$operand, MOST>(units, rows, columns, place),
                }
            }
        }
    };
}

few! {
    /// f32.
    single = Single<Avx512>, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
}
few! {
    /// bf16, widened.
    widened = Widened<Avx512>, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
}
few! {
    /// bf16, multiplied in pairs.
    pairs = Pairs, "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"
}
