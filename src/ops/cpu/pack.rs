//! Packs matrices into per-thread scratch memory.

#![expect(
    unsafe_code,
    reason = "aligned scratch is viewed as plain numbers; packing reads rows by pointer"
)]
#![expect(
    clippy::inline_always,
    reason = "a body is compiled for an instruction set only inside the function that enables it"
)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::thread::LocalKey;

use super::isa::Isa;
use super::kernel::{Numbers, UNIT};
use super::matmul::Mat;
#[cfg(target_arch = "x86_64")]
use super::shuffle;

/// One cache line, so that a tile's loads never straddle two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its memory is used")] [f32; 16]);

thread_local! {
    static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// A buffer of units with arbitrary initial contents, aligned for tiles.
pub(super) struct Lines<E> {
    memory: Vec<Line>,
    len: usize,
    elements: PhantomData<E>,
}

impl<E: Numbers> Lines<E> {
    pub(super) fn new(len: usize) -> Self {
        Self { memory: vec![Line([0.0; 16]); len.div_ceil(16)], len, elements: PhantomData }
    }

    pub(super) fn units(&self) -> &[E::Unit] {
        const { assert!(size_of::<E::Unit>() == UNIT) };
        // SAFETY: the lines are initialised, `len` units of them or more, and every bit pattern is a unit.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }

    pub(super) fn units_mut(&mut self) -> &mut [E::Unit] {
        units_of::<E>(&mut self.memory, self.len)
    }
}

/// The first `len` units in a buffer of lines.
fn units_of<E: Numbers>(lines: &mut [Line], len: usize) -> &mut [E::Unit] {
    const { assert!(size_of::<E::Unit>() == UNIT) };
    assert!(len <= lines.len() * 16, "{len} units of {} lines", lines.len());
    // SAFETY: the lines are initialised, `len` units of them or more, and every bit pattern is a unit.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
}

/// Scratch for the left matrix, `len` units with arbitrary contents.
pub(super) fn with_left<E: Numbers, R>(len: usize, work: impl FnOnce(&mut [E::Unit]) -> R) -> R {
    with::<E, R>(&LEFT, len, work)
}

/// Scratch for the right matrix, `len` units with arbitrary contents.
pub(super) fn with_right<E: Numbers, R>(len: usize, work: impl FnOnce(&mut [E::Unit]) -> R) -> R {
    with::<E, R>(&RIGHT, len, work)
}

fn with<E: Numbers, R>(
    slot: &'static LocalKey<Cell<Vec<Line>>>,
    len: usize,
    work: impl FnOnce(&mut [E::Unit]) -> R,
) -> R {
    // Taken rather than borrowed: a thread that waits for others may start another product meanwhile.
    let mut lines = slot.take();
    let needed = len.div_ceil(16);
    if lines.len() < needed {
        lines.resize(needed, Line([0.0; 16]));
    }
    let result = work(units_of::<E>(&mut lines, len));
    slot.set(lines);
    result
}

/// Copies a matrix `[rows, K]` into strips of `width` rows, each strip `[units of K, width]`, padded with zeros.
///
/// # Panics
/// `to` is not exactly the size of the strips.
pub(super) fn pack<E: Numbers>(source: Mat<'_, E>, width: usize, to: &mut [E::Unit]) {
    let strips = source.rows.div_ceil(width);
    assert_eq!(to.len(), source.units() * width * strips, "{strips} strips of {width}");
    match Isa::current() {
        // SAFETY: the features were detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { pack_avx512(source, width, to) },
        // SAFETY: the features were detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { pack_avx2(source, width, to) },
        _ => pack_any::<E, false>(source, width, to),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn pack_avx512<E: Numbers>(source: Mat<'_, E>, width: usize, to: &mut [E::Unit]) {
    pack_any::<E, true>(source, width, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_avx2<E: Numbers>(source: Mat<'_, E>, width: usize, to: &mut [E::Unit]) {
    pack_any::<E, false>(source, width, to);
}

/// `AVX512` may be true only if the processor supports it.
#[inline(always)]
fn pack_any<E: Numbers, const AVX512: bool>(source: Mat<'_, E>, width: usize, to: &mut [E::Unit]) {
    match width {
        4 => pack_in::<E, 4, AVX512>(source, to),
        6 => pack_in::<E, 6, AVX512>(source, to),
        8 => pack_in::<E, 8, AVX512>(source, to),
        12 => pack_in::<E, 12, AVX512>(source, to),
        16 => pack_in::<E, 16, AVX512>(source, to),
        32 => pack_in::<E, 32, AVX512>(source, to),
        _ => {
            let strips = source.rows.div_ceil(width);
            (0..strips).for_each(|strip| pack_edge(source, strip * width, width, to));
        }
    }
}

#[inline(always)]
fn pack_in<E: Numbers, const WIDTH: usize, const AVX512: bool>(
    source: Mat<'_, E>,
    to: &mut [E::Unit],
) {
    let Mat { data, rows, row_stride, col_stride, cols } = source;
    let (whole, units) = (rows / WIDTH, source.units());
    if whole > 0 && cols > 0 {
        let last = (whole * WIDTH - 1) * row_stride + (cols - 1) * col_stride;
        assert!(last < data.len(), "a strip beyond its matrix");
    }
    let (from, strips) = (data.as_ptr(), to.as_mut_ptr().cast::<[E::Unit; WIDTH]>());
    // SAFETY: the last element that is read lies within `data`, and `to` has room for `units` rows of every strip.
    unsafe {
        if row_stride == 1 {
            // In memory order, so that each page is visited once.
            for unit in 0..units {
                let (first, second) = (unit * E::PER_UNIT, (unit + 1) * E::PER_UNIT - 1);
                let row = |k: usize| from.add(k * col_stride).cast::<[E; WIDTH]>();
                let second = (second < cols).then(|| row(second));
                for strip in 0..whole {
                    let to = strips.add(strip * units + unit);
                    side_by_side::<E, WIDTH, AVX512>(
                        row(first).add(strip),
                        second.map(|row| row.add(strip)),
                        to,
                    );
                }
            }
        } else if col_stride == 1 {
            for strip in 0..whole {
                let from = from.add(strip * WIDTH * row_stride);
                transpose::<E, WIDTH, AVX512>(from, row_stride, cols, strips.add(strip * units));
            }
        } else {
            (0..whole).for_each(|strip| pack_edge(source, strip * WIDTH, WIDTH, to));
        }
    }
    if whole * WIDTH < rows {
        pack_edge(source, whole * WIDTH, WIDTH, to);
    }
}

/// Interleaves two rows of the inner dimension into `WIDTH` units; only the first row if there is no second one, or if
/// a unit is one element.
///
/// # Safety
/// The rows cover `WIDTH` elements, `to` as many units; `AVX512` as for [`pack_any`].
#[inline(always)]
unsafe fn side_by_side<E: Numbers, const WIDTH: usize, const AVX512: bool>(
    first: *const [E; WIDTH],
    second: Option<*const [E; WIDTH]>,
    to: *mut [E::Unit; WIDTH],
) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if let (true, 2, Some(second)) = (AVX512, E::PER_UNIT, second) {
            return shuffle::interleave::<WIDTH>(first.cast(), second.cast(), to.cast());
        }
        let a = first.read_unaligned();
        let b = second.map_or([E::default(); WIDTH], |second| second.read_unaligned());
        to.write(std::array::from_fn(|i| E::unit(a[i], b[i])));
    }
}

/// Transposes `WIDTH` rows of `k` elements into rows of `WIDTH` units, several units at a time.
///
/// # Safety
/// `from` covers the rows, `row_stride` apart; `to` has room; `AVX512` as for [`pack_any`].
#[inline(always)]
unsafe fn transpose<E: Numbers, const WIDTH: usize, const AVX512: bool>(
    from: *const E,
    row_stride: usize,
    k: usize,
    to: *mut [E::Unit; WIDTH],
) {
    const FEW: usize = 4;
    let wide = AVX512 && WIDTH >= 12;
    let step = E::PER_UNIT * if wide { shuffle::SIDE } else { FEW };
    // SAFETY: the caller's promise; every access is at a row below `WIDTH` and a column below `k`.
    unsafe {
        let whole = k / step * step;
        for first in (0..whole).step_by(step) {
            let to = to.add(first / E::PER_UNIT);
            #[cfg(target_arch = "x86_64")]
            if wide {
                let row_bytes = row_stride * size_of::<E>();
                shuffle::transpose::<WIDTH>(from.add(first).cast(), row_bytes, to.cast());
                continue;
            }
            let rows: [[E::Unit; FEW]; WIDTH] = std::array::from_fn(|i| {
                from.add(i * row_stride + first).cast::<[E::Unit; FEW]>().read_unaligned()
            });
            for j in 0..FEW {
                to.add(j).write(std::array::from_fn(|i| rows[i][j]));
            }
        }
        for first in (whole..k).step_by(E::PER_UNIT) {
            let second = first + E::PER_UNIT - 1;
            to.add(first / E::PER_UNIT).write(std::array::from_fn(|i| {
                let row = from.add(i * row_stride);
                E::unit(*row.add(first), if second < k { *row.add(second) } else { E::default() })
            }));
        }
    }
}

/// One strip, element by element.
fn pack_edge<E: Numbers>(source: Mat<'_, E>, first: usize, width: usize, to: &mut [E::Unit]) {
    let Mat { data, rows, row_stride, col_stride, cols } = source;
    let units = source.units();
    let at = |row: usize, k: usize| {
        if row < rows && k < cols { data[row * row_stride + k * col_stride] } else { E::default() }
    };
    let to = &mut to[first * units..][..width * units];
    for (unit, to) in to.chunks_exact_mut(width).enumerate() {
        let k = unit * E::PER_UNIT;
        for (row, to) in (first..).zip(to) {
            *to = E::unit(at(row, k), at(row, k + E::PER_UNIT - 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn strips_hold_columns_padded_with_zeros() {
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

    #[test]
    fn pairs_are_adjacent_and_an_odd_one_is_padded_with_zero() {
        let data: Vec<bf16> = (0..21 * 26).map(|i| bf16::from_f32((i % 251) as f32)).collect();
        for columns in [26, 3, 9] {
            let source = Mat::strided(&data, 21, columns, 26);
            for view in [source, source.t()] {
                for width in [4, 5, 6, 16] {
                    let (strips, units) = (view.rows.div_ceil(width), view.cols.div_ceil(2));
                    let mut to = vec![[bf16::NAN; 2]; strips * units * width];
                    pack(view, width, &mut to);
                    for (at, pair) in to.iter().enumerate() {
                        let (strip, unit) = (at / width / units, at / width % units);
                        let row = strip * width + at % width;
                        for (k, value) in (2 * unit..).zip(pair) {
                            let from = row * view.row_stride + k * view.col_stride;
                            let inside = row < view.rows && k < view.cols;
                            let expected = if inside { data[from] } else { bf16::ZERO };
                            assert_eq!(*value, expected, "{row} {k}");
                        }
                    }
                }
            }
        }
    }
}
