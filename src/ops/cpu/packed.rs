//! A right matrix that is packed once and met by several products.

#![expect(unsafe_code, reason = "tiles are raw pointers; bounds are checked where products begin")]

use super::element::Element;
use super::isa::Isa;
use super::kernel::{KC, Kernel, Place};
use super::matmul::{Mat, Strips, panel};
use super::pack::{Lines, pack};

/// A matrix `[K, N]` in strips of columns, chain after chain. Results have the bits of
/// [`matmul`](super::matmul::matmul).
pub(super) struct Packed<E: Element> {
    kernel: Kernel,
    rows: usize,
    columns: usize,
    /// The strips of each chain, end to end.
    lines: Lines<E>,
}

impl<E: Element> Packed<E> {
    /// Packs a matrix on the calling thread.
    pub(super) fn new(right: Mat<'_, E>) -> Self {
        let kernel = E::kernel(Isa::current());
        let (rows, columns, right) = (right.rows(), right.cols(), right.t());
        let width = columns.next_multiple_of(kernel.columns);
        let mut lines = Lines::new(width * right.units());
        let mut rest = lines.units_mut();
        for first in (0..rows).step_by(KC * E::PER_UNIT) {
            let chain = right.block((0, columns), (first, (KC * E::PER_UNIT).min(rows - first)));
            let strips;
            (strips, rest) = rest.split_at_mut(width * chain.units());
            pack(chain, kernel.columns, strips);
        }
        Self { kernel, rows, columns, lines }
    }

    /// `out = left · right`, with as many of the matrix's first rows as `left` has columns, and its first `columns` columns;
    /// on the calling thread. `out` is dense row-major, `[left.rows, columns]`.
    ///
    /// # Panics
    /// Where the matrix has fewer rows or columns, or `out` has another size: the caller's shapes are wrong.
    pub(super) fn product_into(&self, out: &mut [f32], left: Mat<'_, E>, columns: usize) {
        assert!(left.cols() <= self.rows && columns <= self.columns, "beyond what was packed");
        assert_eq!(out.len(), left.rows() * columns, "product of {} rows", left.rows());
        if left.cols() == 0 {
            out.fill(0.0);
            return;
        }
        let (width, chain) = (self.columns.next_multiple_of(self.kernel.columns), KC * E::PER_UNIT);
        let mut rest = self.lines.units();
        for first in (0..left.cols()).step_by(chain) {
            let whole = chain.min(self.rows - first).div_ceil(E::PER_UNIT);
            let strips;
            (strips, rest) = rest.split_at(width * whole);
            let left = left.block((0, left.rows()), (first, chain.min(left.cols() - first)));
            let right = Strips { units: strips, stride: self.kernel.columns * whole, columns };
            let place = Place { data: out.as_mut_ptr(), stride: columns, add: first > 0 };
            // SAFETY: the strips hold `whole` units, at least those of `left`, for all columns; `out` is the product's size,
            // and every element is written by the first chain.
            unsafe { panel(&self.kernel, left, right, place) };
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::matmul::{Threads, matmul};
    use super::*;
    use crate::rng::Stream;

    fn agrees<E: Element>((m, k, n): (usize, usize, usize), (less_k, less_n): (usize, usize)) {
        let numbers = |index, len| E::rounded(Stream::new(3, "packed").normal(index, len, 1.0));
        let (a, b) = (numbers(0, m * k), numbers(1, k * n));
        let (used, columns) = (k - less_k.min(k - 1), n - less_n.min(n - 1));
        let left = Mat::strided(&a, m, used, k);
        let mut out = vec![f32::NAN; m * columns];
        Packed::new(Mat::new(&b, k, n)).product_into(&mut out, left, columns);
        let expected = matmul(left, Mat::strided(&b, used, columns, n), Threads::One);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out), bits(&expected), "{m}x{used} of {k}, {columns} of {n}");
        // Transposed, as keys are.
        let turned: Vec<E> = (0..n * k).map(|at| b[at % k * n + at / k]).collect();
        Packed::new(Mat::new(&turned, n, k).t()).product_into(&mut out, left, columns);
        assert_eq!(bits(&out), bits(&expected), "{m}x{used} of {k}, {columns} of {n}, turned");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products_have_the_bits_of_those_that_pack_each_time(
            (m, k, n) in (1_usize..100, 1_usize..1300, 1_usize..80),
            less in (0_usize..1300, 0_usize..80),
        ) {
            agrees::<f32>((m, k, n), less);
            agrees::<bf16>((m, k, n), less);
        }
    }
}
