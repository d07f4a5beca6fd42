//! A right matrix that is packed once for several products.

#![expect(unsafe_code, reason = "tiles are raw pointers; bounds are checked where products begin")]

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::element::Element;
use super::isa::Isa;
use super::kernel::{KC, Kernel, Left, MOST, Place, UNIT};
use super::matmul::{
    CROWDED, FEW, LEFT_TILES, Mat, SMALL_FEW, Shared, Strips, TASKS, Threads, each, edge, panel,
    workers,
};
use super::pack::{Lines, pack};
use super::with_slice;

/// A matrix `[K, N]` in column strips. Results are bit-identical to [`matmul`](super::matmul::matmul).
pub struct Packed<E: Element> {
    kernel: Kernel,
    rows: usize,
    columns: usize,
    /// The strips, contiguous, each `[units of K, columns of a tile]`.
    lines: Lines<E>,
}

impl<E: Element> std::fmt::Debug for Packed<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

impl<E: Element> Packed<E> {
    /// Packs a matrix on the calling thread.
    pub(super) fn new(right: Mat<'_, E>) -> Self {
        let (mut packed, right) = (Self::empty(right), right.t());
        pack(right, packed.kernel.columns, packed.lines.units_mut());
        packed
    }

    /// Packs the matrix whose columns are the rows of `weight`, `[N, K]`, using all threads.
    ///
    /// # Panics
    /// `weight` is not a whole number of rows.
    pub fn of_rows(weight: &[E], inner: usize) -> Self {
        assert!(weight.len().is_multiple_of(inner.max(1)), "rows of another length");
        let right = Mat::new(weight, weight.len() / inner.max(1), inner);
        let mut packed = Self::empty(right.t());
        let (width, stride) = (packed.kernel.columns, packed.stride());
        let strips = packed.lines.units_mut().par_chunks_mut(stride.max(1)).enumerate();
        strips.for_each(|(strip, to)| {
            let first = strip * width;
            let columns = width.min(right.rows() - first);
            pack(right.block((first, columns), (0, inner)), width, to);
        });
        packed
    }

    fn empty(right: Mat<'_, E>) -> Self {
        let kernel = E::kernel(Isa::current());
        let (rows, columns) = (right.rows(), right.cols());
        let width = columns.next_multiple_of(kernel.columns);
        Self { kernel, rows, columns, lines: Lines::new(width * right.t().units()) }
    }

    /// Units per strip.
    fn stride(&self) -> usize {
        self.rows.div_ceil(E::PER_UNIT) * self.kernel.columns
    }

    /// Appends a column as f32 values.
    ///
    /// # Panics
    /// There is no such column.
    pub fn column(&self, column: usize, out: &mut Vec<f32>) {
        assert!(column < self.columns, "column {column} of {}", self.columns);
        let width = self.kernel.columns;
        let strip = &self.lines.units()[column / width * self.stride()..][..self.stride()];
        let end = out.len() + self.rows;
        out.extend(strip.iter().skip(column % width).step_by(width).flat_map(|&unit| E::of(unit)));
        // The last unit may be half full.
        out.truncate(end);
    }

    /// `out = left · right`, using as many of the matrix's rows as `left` has columns, and its first `columns` columns;
    /// on the calling thread. `out` is dense row-major, `[left.rows, columns]`.
    ///
    /// # Panics
    /// The matrix has fewer rows or columns, or `out` has another size.
    pub(super) fn product_into(&self, out: &mut [f32], left: Mat<'_, E>, columns: usize) {
        assert!(left.cols() <= self.rows && columns <= self.columns, "beyond what was packed");
        assert_eq!(out.len(), left.rows() * columns, "product of {} rows", left.rows());
        if left.cols() == 0 {
            out.fill(0.0);
            return;
        }
        let place = Place { data: out.as_mut_ptr(), stride: columns, add: false };
        // SAFETY: `out` is the product's size.
        unsafe { self.panels(left, (0, columns), place) }
    }

    /// # Safety
    /// `place` covers `[left.rows, columns]`, written and not read. `left` has columns, at most as many as this has rows.
    unsafe fn panels(&self, left: Mat<'_, E>, (from, columns): (usize, usize), place: Place) {
        let (width, stride) = (self.kernel.columns, self.stride());
        let chain = KC * E::PER_UNIT;
        for first in (0..left.cols()).step_by(chain) {
            let start = from / width * stride + first / E::PER_UNIT * width;
            let left = left.block((0, left.rows()), (first, chain.min(left.cols() - first)));
            let right = Strips { units: &self.lines.units()[start..], stride, columns };
            let place = Place { add: first > 0, ..place };
            // SAFETY: each strip holds from here on at least the units of `left`; every element is written by the first
            // chain.
            unsafe { panel(&self.kernel, left, right, place) };
        }
    }

    /// Parallel over blocks of rows and slices of columns.
    ///
    /// # Safety
    /// `place` covers `[left.rows, N]`.
    unsafe fn many(&self, left: Mat<'_, E>, place: Place) {
        let (out, workers) = (Shared(place), workers(Threads::All));
        let tiles = left.rows().div_ceil(self.kernel.rows);
        let blocks = tiles.div_ceil(LEFT_TILES);
        let strips = self.strips();
        let slices = (4 * workers).div_ceil(blocks.max(1)).min(strips).max(1);
        let row_of = |block: usize| (block * tiles / blocks * self.kernel.rows).min(left.rows());
        let column_of =
            |slice: usize| (slice * strips / slices * self.kernel.columns).min(self.columns);
        each(blocks * slices, Threads::All, |task| {
            let (block, slice) = (task / slices, task % slices);
            let (row, end) = (row_of(block), row_of(block + 1));
            let (from, until) = (column_of(slice), column_of(slice + 1));
            let left = left.block((row, end - row), (0, self.rows));
            // SAFETY: each task has rows and columns of its own.
            unsafe { self.panels(left, (from, until - from), out.at(row, from)) }
        });
    }

    /// Number of column strips.
    fn strips(&self) -> usize {
        self.columns.div_ceil(self.kernel.columns)
    }

    /// All rows times one strip.
    ///
    /// # Safety
    /// `place` covers `[left.rows, columns of the strip]`; rows are whole units.
    unsafe fn strip(&self, left: Mat<'_, E>, strip: usize, place: Place) {
        let (units, width) = (left.units(), self.kernel.columns);
        let columns = width.min(self.columns - strip * width);
        let packed = &self.lines.units()[strip * self.stride()..][..self.stride()];
        let row_stride = left.row_stride * size_of::<E>();
        let crowded = row_stride.is_multiple_of(CROWDED);
        for first in (0..units).step_by(KC) {
            let depth = KC.min(units - first);
            let right = packed[first * width..][..depth * width].as_ptr().cast();
            let mut row = 0;
            while row < left.rows() {
                let rest = left.rows() - row;
                let (tile, height) = if rest >= self.kernel.rows && !crowded {
                    (self.kernel.strided, self.kernel.rows)
                } else {
                    let height = rest.min(MOST);
                    (self.kernel.low[height - 1], height)
                };
                let at = row * left.row_stride + first * E::PER_UNIT;
                let data = left.data[at..].as_ptr().cast();
                let rows = Left { data, row_stride, k_stride: UNIT };
                // SAFETY: the rows and the strip hold `depth` units from here on, and the tile lies within the place.
                unsafe {
                    let to = place.data.add(row * place.stride);
                    let place = Place { data: to, add: first > 0, ..place };
                    if columns == width {
                        tile(depth, rows, right, place);
                    } else {
                        edge((tile, width), (depth, rows, right), place, (height, columns));
                    }
                }
                row += height;
            }
        }
    }
}

/// `left · right` for each matrix using all threads, row-major, `[T, N]`; `left`: `[T, K]`.
///
/// # Panics
/// The matrices differ in inner dimension, or it does not match `left`.
pub fn products<E: Element>(left: &[E], matrices: &[&Packed<E>]) -> Vec<Vec<f32>> {
    let Some(first) = matrices.first() else { return Vec::new() };
    let inner = first.rows;
    assert!(matrices.iter().all(|matrix| matrix.rows == inner), "other inner dimensions");
    let rows = left.len() / inner.max(1);
    assert_eq!(rows * inner, left.len(), "rows of another length");
    let left = Mat::new(left, rows, inner);
    let mut results: Vec<Vec<f32>> =
        matrices.iter().map(|matrix| Vec::with_capacity(rows * matrix.columns)).collect();
    let outs: Vec<(&Packed<E>, Shared)> = matrices
        .iter()
        .zip(&mut results)
        .map(|(&matrix, result)| {
            let place = Place { data: result.as_mut_ptr(), stride: matrix.columns, add: false };
            (matrix, Shared(place))
        })
        .collect();
    if rows <= FEW && inner.is_multiple_of(E::PER_UNIT) {
        // SAFETY: each place has room for its product.
        unsafe { few(left, &outs) };
    } else {
        // SAFETY: each place has room for its product.
        outs.iter().for_each(|(matrix, out)| unsafe { matrix.many(left, out.0) });
    }
    for (matrix, result) in matrices.iter().zip(&mut results) {
        // SAFETY: the capacity is the product's size, and all of it was written.
        unsafe { result.set_len(rows * matrix.columns) }
    }
    results
}

/// For few rows, where reading the strips dominates: each is read from memory once, and no thread waits between two
/// matrices.
///
/// # Safety
/// Each place has room for its product; rows are whole units.
unsafe fn few<E: Element>(left: Mat<'_, E>, outs: &[(&Packed<E>, Shared)]) {
    let strips: usize = outs.iter().map(|(matrix, _)| matrix.strips()).sum();
    let numbers: usize = outs.iter().map(|(matrix, _)| matrix.rows * matrix.columns).sum();
    let threads = if numbers < SMALL_FEW { Threads::One } else { Threads::All };
    let tasks = (TASKS * workers(threads)).min(strips);
    each(tasks, threads, |task| {
        let (mut start, end) = (task * strips / tasks, (task + 1) * strips / tasks);
        let mut before = 0;
        for (matrix, out) in outs {
            let after = before + matrix.strips();
            while start < end.min(after) {
                let strip = start - before;
                // SAFETY: each strip's columns are written by one task, and the place has room for all of them.
                unsafe { matrix.strip(left, strip, out.at(0, strip * matrix.kernel.columns)) }
                start += 1;
            }
            before = after;
        }
    });
}

/// A packed weight `[O, I]`.
#[derive(Debug)]
pub enum PackedWeight {
    /// Of f32.
    F32(Packed<f32>),
    /// Of bf16.
    Bf16(Packed<bf16>),
}

impl PackedWeight {
    /// Packs a contiguous weight using all threads.
    ///
    /// # Errors
    /// A dtype other than f32 and bf16, or a device other than the CPU.
    pub fn new(weight: &Tensor) -> candle_core::Result<Self> {
        let (_, inner) = weight.dims2()?;
        match weight.dtype() {
            DType::F32 => with_slice(weight, |weight| Self::F32(Packed::of_rows(weight, inner))),
            DType::BF16 => with_slice(weight, |weight| Self::Bf16(Packed::of_rows(weight, inner))),
            other => candle_core::bail!("packing of {other:?}, expected f32 or bf16"),
        }
    }

    /// `x · Wᵀ` for each weight, in f32; `x`: `[T, I]` in the weights' dtype.
    ///
    /// # Errors
    /// Rows of another dtype.
    ///
    /// # Panics
    /// Rows of another length.
    pub fn times<E: Element>(x: &[E], weights: &[&Self]) -> candle_core::Result<Vec<Vec<f32>>> {
        let matrices: Option<Vec<&Packed<E>>> =
            weights.iter().map(|&weight| E::packed(weight)).collect();
        match matrices {
            Some(matrices) => Ok(products(x, &matrices)),
            None => candle_core::bail!("rows of {:?} meet {weights:?}", E::DTYPE),
        }
    }

    /// Dtype of its elements.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::BF16,
        }
    }

    /// Appends a row as f32 values.
    ///
    /// # Panics
    /// There is no such row.
    pub fn row(&self, row: usize, out: &mut Vec<f32>) {
        match self {
            Self::F32(weight) => weight.column(row, out),
            Self::Bf16(weight) => weight.column(row, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::awake::awake;
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
        // The whole matrix on all threads, and its columns unpacked again.
        let packed = Packed::of_rows(&turned, k);
        let expected = matmul(Mat::new(&a, m, k), Mat::new(&b, k, n), Threads::One);
        let narrow = Packed::of_rows(&turned[..columns * k], k);
        // With rayon's queues, and with a board.
        for led in [false, true] {
            let all = || products(&a, &[&narrow, &packed]);
            let [less, found] = if led { awake(all) } else { all() }.try_into().unwrap();
            assert_eq!(bits(&found), bits(&expected), "{m}x{k}x{n} on all threads");
            let of_less = matmul(Mat::new(&a, m, k), Mat::strided(&b, k, columns, n), Threads::One);
            assert_eq!(bits(&less), bits(&of_less), "{m}x{k}x{columns} beside it");
        }
        assert_eq!(products(&[], &[&packed]), [vec![0.0_f32; 0]]);
        let mut column = vec![];
        packed.column(columns - 1, &mut column);
        let expected = &turned[(columns - 1) * k..columns * k];
        let expected: Vec<f32> = expected.iter().map(|x| x.widened()).collect();
        assert_eq!(bits(&column), bits(&expected));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products_of_packed_weights_match_packing_each_time_bitwise(
            (m, k, n) in (1_usize..120, 1_usize..1300, 1_usize..200),
            less in (0_usize..1300, 0_usize..80),
        ) {
            agrees::<f32>((m, k, n), less);
            agrees::<bf16>((m, k, n), less);
        }
    }
}
