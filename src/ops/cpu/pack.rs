//! Packed copies of matrices, in scratch memory that a thread keeps.

#![expect(
    unsafe_code,
    reason = "aligned scratch is viewed as plain numbers; packing reads rows by pointer"
)]

use std::cell::Cell;
use std::thread::LocalKey;

use super::matmul::Mat;

/// One cache line, so that a tile's loads never straddle two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its memory is used")] [f32; 16]);

thread_local! {
    static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Scratch for the left matrix, `len` numbers of any value.
pub(super) fn with_left<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    with(&LEFT, len, work)
}

/// Scratch for the right matrix, `len` numbers of any value.
pub(super) fn with_right<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    with(&RIGHT, len, work)
}

fn with<R>(
    slot: &'static LocalKey<Cell<Vec<Line>>>,
    len: usize,
    work: impl FnOnce(&mut [f32]) -> R,
) -> R {
    // Taken, not borrowed: a thread that waits for others may start another product meanwhile.
    let mut lines = slot.take();
    let needed = len.div_ceil(16);
    if lines.len() < needed {
        lines.resize(needed, Line([0.0; 16]));
    }
    // SAFETY: the lines are initialised numbers, `len` of them or more.
    let result = work(unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) });
    slot.set(lines);
    result
}

/// Copies a matrix `[rows, K]` into strips of `width` rows, each strip `[K, width]`; rows that the source does not
/// have become zeros.
///
/// # Panics
/// Where `to` has not room for exactly the strips that the rows fill.
pub(super) fn pack(source: Mat<'_>, width: usize, to: &mut [f32]) {
    let strips = source.rows.div_ceil(width);
    assert_eq!(to.len(), source.cols * width * strips, "{strips} strips of {width}");
    match width {
        4 => pack_in::<4>(source, to),
        6 => pack_in::<6>(source, to),
        8 => pack_in::<8>(source, to),
        12 => pack_in::<12>(source, to),
        16 => pack_in::<16>(source, to),
        32 => pack_in::<32>(source, to),
        _ => (0..strips).for_each(|strip| pack_edge(source, strip * width, width, to)),
    }
}

fn pack_in<const WIDTH: usize>(source: Mat<'_>, to: &mut [f32]) {
    let Mat { data, rows, row_stride, col_stride, cols } = source;
    let whole = rows / WIDTH;
    if whole > 0 && cols > 0 {
        let last = (whole * WIDTH - 1) * row_stride + (cols - 1) * col_stride;
        assert!(last < data.len(), "a strip beyond its matrix");
    }
    let (from, strips) = (data.as_ptr(), to.as_mut_ptr().cast::<[f32; WIDTH]>());
    // SAFETY: the last element that is read lies within `data`, and `to` has room for `cols` rows of every strip.
    unsafe {
        if row_stride == 1 {
            // Along the rows of memory, so that a page is visited once.
            for k in 0..cols {
                let from = from.add(k * col_stride).cast::<[f32; WIDTH]>();
                for strip in 0..whole {
                    strips.add(strip * cols + k).write(from.add(strip).read_unaligned());
                }
            }
        } else if col_stride == 1 {
            for strip in 0..whole {
                transpose::<WIDTH>(
                    from.add(strip * WIDTH * row_stride),
                    row_stride,
                    cols,
                    strips.add(strip * cols),
                );
            }
        } else {
            (0..whole).for_each(|strip| pack_edge(source, strip * WIDTH, WIDTH, to));
        }
    }
    if whole * WIDTH < rows {
        pack_edge(source, whole * WIDTH, WIDTH, to);
    }
}

/// `WIDTH` rows of `k` numbers to `k` rows of `WIDTH`, four at a time.
///
/// # Safety
/// `from` covers the rows, `row_stride` apart; `to` has room.
unsafe fn transpose<const WIDTH: usize>(
    from: *const f32,
    row_stride: usize,
    k: usize,
    to: *mut [f32; WIDTH],
) {
    const STEP: usize = 4;
    // SAFETY: the caller's promise; every access is at a row below `WIDTH` and a column below `k`.
    unsafe {
        let whole = k / STEP * STEP;
        for first in (0..whole).step_by(STEP) {
            let rows: [[f32; STEP]; WIDTH] = std::array::from_fn(|i| {
                from.add(i * row_stride + first).cast::<[f32; STEP]>().read_unaligned()
            });
            for j in 0..STEP {
                to.add(first + j).write(std::array::from_fn(|i| rows[i][j]));
            }
        }
        for k in whole..k {
            to.add(k).write(std::array::from_fn(|i| *from.add(i * row_stride + k)));
        }
    }
}

/// One strip, number by number.
fn pack_edge(source: Mat<'_>, first: usize, width: usize, to: &mut [f32]) {
    let Mat { data, rows, row_stride, col_stride, cols } = source;
    let to = &mut to[first * cols..][..width * cols];
    for (k, to) in to.chunks_exact_mut(width).enumerate() {
        for (row, to) in (first..).zip(to) {
            *to = if row < rows { data[row * row_stride + k * col_stride] } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_hold_columns_and_zeros() {
        let data: Vec<f32> = (0..21 * 26).map(|i| i as f32).collect();
        for source in [Mat::new(&data, 21, 26), Mat::strided(&data, 21, 3, 26)] {
            for view in [source, source.t()] {
                for width in [4, 5, 6, 16] {
                    let strips = view.rows.div_ceil(width);
                    let mut to = vec![f32::NAN; strips * view.cols * width];
                    pack(view, width, &mut to);
                    for (at, value) in to.iter().enumerate() {
                        let (strip, k) = (at / width / view.cols, at / width % view.cols);
                        let row = strip * width + at % width;
                        let from = row * view.row_stride + k * view.col_stride;
                        let expected = if row < view.rows { data[from] } else { 0.0 };
                        assert!((value - expected).abs() < 0.5, "{value} {expected}");
                    }
                }
            }
        }
    }
}
