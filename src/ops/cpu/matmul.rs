//! The f32 matrix product: one safe door to the `gemm` crate. The product backend is this file alone.

#![expect(unsafe_code, reason = "the gemm crate takes raw pointers; bounds are checked here")]

use gemm::Parallelism;

/// A read-only matrix view: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A dense row-major matrix over the front of `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows lie `row_stride` apart.
    ///
    /// # Panics
    /// Where `data` is too short: the caller's shapes are wrong.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(data.len() >= needed, "matrix {rows}x{cols} over {} elements", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// How many threads a product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: for products inside a parallel loop.
    One,
    /// All of rayon's pool.
    All,
}

/// `out = a · b`, or `out += a · b` where `accumulate` is set. `out` is dense row-major, `[a.rows, b.cols]`.
///
/// # Panics
/// Where the inner dimensions differ or `out` has another size: the caller's shapes are wrong.
pub fn matmul_into(out: &mut [f32], a: Mat<'_>, b: Mat<'_>, accumulate: bool, threads: Threads) {
    assert_eq!(
        out.len(),
        a.rows * b.cols,
        "product of {}x{} and {}x{}",
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    // SAFETY: `out` holds exactly the product's elements.
    unsafe { product(out.as_mut_ptr(), a, b, accumulate, threads) }
}

/// `a · b` in a fresh buffer that is never zeroed first. Shape `[a.rows, b.cols]`, row-major.
pub fn matmul(a: Mat<'_>, b: Mat<'_>, threads: Threads) -> Vec<f32> {
    let len = a.rows * b.cols;
    if a.cols == 0 {
        return vec![0.0; len];
    }
    let mut out = Vec::with_capacity(len);
    // SAFETY: the capacity is the product's size, and a product that does not accumulate writes every element
    // without reading it.
    unsafe {
        product(out.as_mut_ptr(), a, b, false, threads);
        out.set_len(len);
    }
    out
}

/// # Safety
/// `out` must be valid for writes of `a.rows * b.cols` elements, initialised where `accumulate` is set.
unsafe fn product(out: *mut f32, a: Mat<'_>, b: Mat<'_>, accumulate: bool, threads: Threads) {
    assert_eq!(a.cols, b.rows, "product of {}x{} and {}x{}", a.rows, a.cols, b.rows, b.cols);
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: `Mat` checked that its data covers its shape; `out` is the caller's promise.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            b.cols as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_every_orientation_agree_with_the_definition() {
        let a: Vec<f32> = (0..15).map(|i| i as f32 * 0.5 - 2.0).collect();
        let b: Vec<f32> = (0..20).map(|i| 1.0 - i as f32 * 0.25).collect();
        let expected: Vec<f32> =
            (0..12).map(|ij| (0..5).map(|k| a[ij / 4 * 5 + k] * b[k * 4 + ij % 4]).sum()).collect();
        assert_eq!(matmul(Mat::new(&a, 3, 5), Mat::new(&b, 5, 4), Threads::One), expected);
        let transposed: Vec<f32> = (0..20).map(|i| b[i % 5 * 4 + i / 5]).collect();
        let mut out = vec![1.0; 12];
        matmul_into(
            &mut out,
            Mat::new(&a, 3, 5),
            Mat::new(&transposed, 4, 5).t(),
            true,
            Threads::All,
        );
        assert!(
            out.iter().zip(&expected).all(|(out, expected)| (out - expected - 1.0).abs() < 1e-5)
        );
    }
}
