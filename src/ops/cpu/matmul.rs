//! Matrix product in f32, or in bf16 with f32 sums: packed, blocked for the caches, multi-threaded. The product backend
//! is this file and `kernel`.
//!
//! Results are bit-identical whatever the other rows and columns and the number of threads (see
//! [`kernel`](super::kernel) for the order of summation). Large products pack both matrices, after Goto and van de
//! Geijn (2008); products with few left rows read the right matrix in place, once.

#![expect(unsafe_code, reason = "tiles are raw pointers; bounds are checked where views are made")]

use rayon::prelude::*;

use super::awake::share;
use super::element::Element;
use super::isa::Isa;
use super::kernel::{Few, KC, Kernel, Left, MOST, Numbers, Place, Tile, UNIT};
use super::pack::{pack, with_left, with_right};
use super::shuffle::SIDE;

/// Most rows per block of the left matrix, in tiles: a block fits a core's L2 cache.
pub(super) const LEFT_TILES: usize = 16;
/// Strips of the right matrix processed per block at a time: they fit the L2 cache too, a tile's left rows the L1.
const RIGHT_STRIPS: usize = 12;
/// Left rows whose stride is a multiple of this many bytes are packed: in place they would map to few L1 sets and evict
/// each other.
pub(super) const CROWDED: usize = 2048;
/// Columns of the right matrix packed at a time; `KC` rows of them fit the shared cache.
const NC: usize = 3072;
/// Most strips of the right matrix packed per task.
const PACK: usize = 8;
/// Up to this many rows the right matrix is read in place: packing it would not pay off.
pub(super) const FEW: usize = 96;
/// Up to this many rows, lanes that hold a row each would be partly idle.
const FEWEST: usize = 8;
/// Minimum prefetch distance for weights, in bytes: long enough to cover memory latency.
const AHEAD: usize = 32 << 10;
/// Elements of the largest tile of any kernel.
pub(super) const TILE: usize = 12 * 32;
/// Multiply-adds below which a second thread does not pay off.
const SMALL: usize = 1 << 20;
/// The same threshold for few rows, where reading the right matrix dominates, in its elements.
pub(super) const SMALL_FEW: usize = 1 << 16;
/// Most tasks per thread when columns are distributed: enough to balance, few enough for low overhead.
pub(super) const TASKS: usize = 16;

/// A read-only matrix view: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, E = f32> {
    pub(super) data: &'a [E],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a, E: Numbers> Mat<'a, E> {
    /// A dense row-major matrix over the front of `data`.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows lie `row_stride` apart.
    ///
    /// # Panics
    /// `data` is too short.
    pub fn strided(data: &'a [E], rows: usize, cols: usize, row_stride: usize) -> Self {
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

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Units per row.
    pub(super) fn units(&self) -> usize {
        self.cols.div_ceil(E::PER_UNIT)
    }

    /// Rows `first..first + rows` and columns `from..from + cols`.
    pub(super) fn block(self, (first, rows): (usize, usize), (from, cols): (usize, usize)) -> Self {
        let start = if rows == 0 || cols == 0 {
            0
        } else {
            first * self.row_stride + from * self.col_stride
        };
        Self { data: &self.data[start..], rows, cols, ..self }
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

/// `out = a · b`, or `out += a · b` if `accumulate` is set. `out` is dense row-major, `[a.rows, b.cols]`.
///
/// # Panics
/// The inner dimensions differ, or `out` has another size.
pub fn matmul_into<E: Element>(
    out: &mut [f32],
    a: Mat<'_, E>,
    b: Mat<'_, E>,
    accumulate: bool,
    threads: Threads,
) {
    assert_eq!(
        out.len(),
        a.rows * b.cols,
        "product of {}x{} and {}x{}",
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    let place = Place { data: out.as_mut_ptr(), stride: b.cols, add: accumulate };
    // SAFETY: `out` holds exactly the product's elements.
    unsafe { product(&E::kernel(Isa::current()), a, b, place, threads) }
}

/// `a · b` in a new buffer that is not zeroed first. Shape `[a.rows, b.cols]`, row-major.
pub fn matmul<E: Element>(a: Mat<'_, E>, b: Mat<'_, E>, threads: Threads) -> Vec<f32> {
    let len = a.rows * b.cols;
    let mut out = Vec::with_capacity(len);
    let place = Place { data: out.as_mut_ptr(), stride: b.cols, add: false };
    // SAFETY: the capacity is the product's size, and a product that does not add writes every element without
    // reading it.
    unsafe {
        product(&E::kernel(Isa::current()), a, b, place, threads);
        out.set_len(len);
    }
    out
}

/// # Safety
/// `place` covers `[a.rows, b.cols]`, initialised if it is added to; nothing else reads or writes it.
pub(super) unsafe fn product<E: Numbers>(
    kernel: &Kernel,
    a: Mat<'_, E>,
    b: Mat<'_, E>,
    place: Place,
    threads: Threads,
) {
    assert_eq!(a.cols, b.rows, "product of {}x{} and {}x{}", a.rows, a.cols, b.rows, b.cols);
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let small = m * n * k < SMALL && (m > FEWEST || n * k < SMALL_FEW);
    let threads = if small { Threads::One } else { threads };
    // SAFETY: the caller's promise, handed on.
    unsafe {
        if k == 0 {
            let rows = if place.add { 0 } else { m };
            (0..rows).for_each(|i| place.data.add(i * place.stride).write_bytes(0, n));
        } else if m <= FEW && b.row_stride == 1 {
            few_rows(kernel, a, b, place, threads);
        } else {
            blocked(kernel, a, b, place, threads);
        }
    }
}

/// A pointer that may be used by tasks on several threads, each in its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub(super) Place);

// SAFETY: a place is only memory; here and in `packed` each task has rows or columns of its own.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The part of the place that starts at (row, column).
    ///
    /// # Safety
    /// The place covers it.
    pub(super) unsafe fn at(self, row: usize, column: usize) -> Place {
        // SAFETY: the caller's promise.
        Place { data: unsafe { self.0.data.add(row * self.0.stride + column) }, ..self.0 }
    }
}

/// Calls `task` with `0..count`, on this thread or on all threads.
pub(super) fn each(count: usize, threads: Threads, task: impl Fn(usize) + Sync + Send) {
    match threads {
        Threads::One => (0..count).for_each(task),
        Threads::All => share(count, task),
    }
}

pub(super) fn workers(threads: Threads) -> usize {
    if threads == Threads::All { rayon::current_num_threads() } else { 1 }
}

/// # Safety
/// As [`product`].
unsafe fn blocked<E: Numbers>(
    kernel: &Kernel,
    a: Mat<'_, E>,
    b: Mat<'_, E>,
    place: Place,
    threads: Threads,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let out = Shared(place);
    let workers = workers(threads);
    // Row blocks: equally many and of equal height for each worker.
    let tiles = m.div_ceil(kernel.rows);
    let blocks = tiles.div_ceil(LEFT_TILES).next_multiple_of(workers).min(tiles);
    let start_of = |block: usize| (block * tiles / blocks * kernel.rows).min(m);
    let chain = KC * E::PER_UNIT;
    for from in (0..n).step_by(NC) {
        let columns = NC.min(n - from);
        let strips = columns.div_ceil(kernel.columns);
        // With few row blocks, columns are distributed too, so that every thread has work.
        let slices = if threads == Threads::All { (4 * workers).div_ceil(blocks) } else { 1 };
        let slice = strips.div_ceil(slices);
        // With few columns, several chains are packed at once.
        let pass = chain * (NC / columns).max(1);
        for first in (0..k).step_by(pass) {
            let chains = |until: usize| {
                (first..until.min(first + pass))
                    .step_by(chain)
                    .map(move |first| (first, chain.min(until - first)))
            };
            let right = b.block((0, k), (from, columns)).t();
            let len = strips * kernel.columns * pass.min(k - first).div_ceil(E::PER_UNIT);
            with_right::<E, _>(len, |packed| {
                pack_right(kernel, (right, chains(k)), packed, workers);
                each(blocks * slices, threads, |task| {
                    let (block, strip) = (task / slices, task % slices * slice);
                    let (row, end) = (start_of(block), start_of(block + 1));
                    let start = (strip * kernel.columns).min(columns);
                    let columns = slice * kernel.columns;
                    let columns = columns.min(right.rows - start);
                    let mut packed = &*packed;
                    for (first, depth) in chains(k) {
                        let left = a.block((row, end - row), (first, depth));
                        let chain;
                        (chain, packed) = packed.split_at(strips * kernel.columns * left.units());
                        let strips = &chain[start * left.units()..];
                        // SAFETY: each task has rows and columns of its own, and they lie within `out`.
                        unsafe {
                            let place =
                                Place { add: place.add || first > 0, ..out.at(row, from + start) };
                            let stride = kernel.columns * left.units();
                            panel(kernel, left, Strips { units: strips, stride, columns }, place);
                        }
                    }
                });
            });
        }
    }
}

/// Packs the strips of some columns, given as rows, one chain after the other. A chain is (first element, length).
fn pack_right<E: Numbers>(
    kernel: &Kernel,
    (right, chains): (Mat<'_, E>, impl Iterator<Item = (usize, usize)>),
    packed: &mut [E::Unit],
    workers: usize,
) {
    let strips = right.rows.div_ceil(kernel.columns);
    let tasks = strips.div_ceil(PACK).next_multiple_of(workers);
    let share = strips.div_ceil(tasks) * kernel.columns;
    let (mut parts, mut rest) = (Vec::new(), packed);
    for (first, depth) in chains {
        for row in (0..right.rows).step_by(share) {
            let part = right.block((row, share.min(right.rows - row)), (first, depth));
            let to;
            (to, rest) =
                rest.split_at_mut(part.rows.next_multiple_of(kernel.columns) * part.units());
            parts.push((part, to));
        }
    }
    if workers == 1 {
        for (part, to) in parts {
            pack(part, kernel.columns, to);
        }
    } else {
        parts.into_par_iter().for_each(|(part, to)| pack(part, kernel.columns, to));
    }
}

/// Packed strips of `columns` columns, `stride` units apart.
#[derive(Clone, Copy)]
pub(super) struct Strips<'a, U> {
    pub(super) units: &'a [U],
    pub(super) stride: usize,
    pub(super) columns: usize,
}

/// A block of rows times packed column strips. Full tiles of rows are read in place if each row is contiguous.
///
/// # Safety
/// The strips hold the units of `left`; `place` covers `[left.rows, columns]`.
pub(super) unsafe fn panel<E: Numbers>(
    kernel: &Kernel,
    left: Mat<'_, E>,
    right: Strips<'_, E::Unit>,
    place: Place,
) {
    let Strips { units: right, stride, columns } = right;
    let (depth, row_bytes) = (left.units(), left.row_stride * size_of::<E>());
    let lies = left.col_stride == 1
        && left.cols.is_multiple_of(E::PER_UNIT)
        && !row_bytes.is_multiple_of(CROWDED);
    let in_place = if lies { left.rows / kernel.rows * kernel.rows } else { 0 };
    let rest = left.block((in_place, left.rows - in_place), (0, left.cols));
    with_left::<E, _>(rest.rows.next_multiple_of(kernel.rows) * depth, |packed| {
        pack(rest, kernel.rows, packed);
        for some in (0..columns).step_by(kernel.columns * RIGHT_STRIPS) {
            let some = some..columns.min(some + kernel.columns * RIGHT_STRIPS);
            for row in (0..left.rows).step_by(kernel.rows) {
                let (tile, left_tile) = if row < in_place {
                    let data = left.data[row * left.row_stride..].as_ptr().cast();
                    (kernel.strided, Left { data, row_stride: row_bytes, k_stride: UNIT })
                } else {
                    let data = packed[(row - in_place) * depth..].as_ptr().cast();
                    let k_stride = kernel.rows * UNIT;
                    (kernel.packed, Left { data, row_stride: UNIT, k_stride })
                };
                for from in some.clone().step_by(kernel.columns) {
                    let strip = &right[from / kernel.columns * stride..];
                    let strip = strip[..kernel.columns * depth].as_ptr().cast();
                    let size =
                        (kernel.rows.min(left.rows - row), kernel.columns.min(columns - from));
                    // SAFETY: the left rows and the strip hold `depth` units, and the tile lies within the place.
                    unsafe {
                        let data = place.data.add(row * place.stride + from);
                        let place = Place { data, ..place };
                        if size == (kernel.rows, kernel.columns) {
                            tile(depth, left_tile, strip, place);
                        } else {
                            edge((tile, kernel.columns), (depth, left_tile, strip), place, size);
                        }
                    }
                }
            }
        }
    });
}

/// A partial tile at the edge of the result: computed in a buffer, of which the valid part is stored.
///
/// # Safety
/// As for [`panel`]; `place` covers `size`.
pub(super) unsafe fn edge(
    (compute, stride): (Tile, usize),
    (depth, left, strip): (usize, Left, *const u8),
    place: Place,
    (rows, columns): (usize, usize),
) {
    let mut tile = [0.0_f32; TILE];
    let aside = Place { data: tile.as_mut_ptr(), stride, add: false };
    // SAFETY: `tile` has room for any kernel's tile, and `place` for its inner part.
    unsafe {
        compute(depth, left, strip, aside);
        for (i, tile) in tile.chunks_exact(stride).take(rows).enumerate() {
            let row = place.data.add(i * place.stride);
            for (j, value) in tile.iter().take(columns).enumerate() {
                let to = row.add(j);
                to.write(if place.add { *to + value } else { *value });
            }
        }
    }
}

/// A product with few rows: computed transposed, with `bᵀ` as the left matrix, read in place.
///
/// # Safety
/// As [`product`]; the columns of `b` have their elements side by side.
unsafe fn few_rows<E: Numbers>(
    kernel: &Kernel,
    a: Mat<'_, E>,
    b: Mat<'_, E>,
    place: Place,
    threads: Threads,
) {
    let (m, n, k, units) = (a.rows, b.cols, a.cols, a.units());
    let lies = a.col_stride == 1 && k.is_multiple_of(SIDE * E::PER_UNIT);
    if let Some(few) = kernel.few.filter(|_| m <= FEWEST && lies && n >= SIDE) {
        let whole = n / SIDE * SIDE;
        // SAFETY: the caller's promise; the columns that are left are another part of the place.
        unsafe {
            fewest(few, a, b.block((0, k), (0, whole)), place, threads);
            if whole < n {
                let rest = Shared(place).at(0, whole);
                few_rows(kernel, a, b.block((0, k), (whole, n - whole)), rest, threads);
            }
        }
        return;
    }
    let (rows, columns, tile) = if m <= kernel.narrow_columns {
        (kernel.narrow_rows, kernel.narrow_columns, kernel.narrow)
    } else {
        (kernel.rows, kernel.columns, kernel.strided)
    };
    let out = Shared(place);
    with_right::<E, _>(m.div_ceil(columns) * columns * units, |packed| {
        pack(a, columns, packed);
        let packed = &*packed;
        // Rows of `bᵀ` per task: enough to limit waiting, few enough to balance.
        let share = rows * 8;
        each(n.div_ceil(share), threads, |task| {
            let mut sums = [0.0_f32; TILE];
            for first in (task * share..((task + 1) * share).min(n)).step_by(rows) {
                let height = rows.min(n - first);
                let left = b.t().block((first, height), (0, k));
                let mut padded = Vec::new();
                let left = if height == rows && k.is_multiple_of(E::PER_UNIT) {
                    let row_stride = b.col_stride * size_of::<E>();
                    Left { data: left.data.as_ptr().cast(), row_stride, k_stride: UNIT }
                } else {
                    padded.resize(rows * units, E::Unit::default());
                    pack(left, rows, &mut padded);
                    Left { data: padded.as_ptr().cast(), row_stride: UNIT, k_stride: rows * UNIT }
                };
                for (strip, right) in packed.chunks_exact(columns * units).enumerate() {
                    let width = columns.min(m - strip * columns);
                    // SAFETY: the left rows and the strip hold `units` each; a task has columns of its own.
                    unsafe {
                        let place = out.at(strip * columns, first);
                        let size = (height, width);
                        if place.add {
                            transposed(&mut sums, size, columns, place, |sum, to| *sum = to.read());
                        }
                        column_tile((tile, columns), (left, right, units), &mut sums, place.add);
                        let there = (place.data, place.stride);
                        match kernel.turn {
                            Some(turn) => turn((sums.as_ptr(), columns), size, there),
                            None => {
                                transposed(&mut sums, size, columns, place, |sum, to| {
                                    to.write(*sum);
                                });
                            }
                        }
                    }
                }
            }
        });
    });
}

/// For so few rows that lanes would be idle: columns are transposed in registers.
///
/// # Safety
/// As [`few_rows`]; rows of `a` are contiguous, columns and the inner dimension's units are multiples of sixteen.
unsafe fn fewest<E: Numbers>(
    few: Few,
    a: Mat<'_, E>,
    b: Mat<'_, E>,
    place: Place,
    threads: Threads,
) {
    const { assert!(KC.is_multiple_of(SIDE)) };
    let (m, n, units) = (a.rows, b.cols, a.units());
    let out = Shared(place);
    let size = size_of::<E>();
    let strips = n / SIDE;
    let tasks = (TASKS * workers(threads)).min(strips);
    let start_of = |task: usize| task * strips / tasks * SIDE;
    let ahead = (2 * SIDE * b.col_stride).max(AHEAD / size);
    each(tasks, threads, |task| {
        for column in (start_of(task)..start_of(task + 1)).step_by(SIDE) {
            for first in (0..units).step_by(KC) {
                let depth = KC.min(units - first);
                let from = first * E::PER_UNIT;
                let columns = Left {
                    data: b.data[column * b.col_stride + from..].as_ptr().cast(),
                    row_stride: b.col_stride * size,
                    k_stride: UNIT,
                };
                // Adjacent columns form one memory range, and hardware prefetchers follow one stream better than
                // sixteen.
                let stretch = column * b.col_stride + first * E::PER_UNIT * SIDE + ahead;
                let ahead = b.data.get(stretch).map_or(b.data.as_ptr(), std::ptr::from_ref).cast();
                for row in (0..m).step_by(MOST) {
                    let rows = Left {
                        data: a.data[row * a.row_stride + from..].as_ptr().cast(),
                        row_stride: a.row_stride * size,
                        k_stride: UNIT,
                    };
                    // SAFETY: a task has columns of its own; the kernel came with its instruction set.
                    unsafe {
                        let to = Place { add: place.add || first > 0, ..out.at(row, column) };
                        few(depth, (rows, MOST.min(m - row)), (columns, ahead), to);
                    }
                }
            }
        }
    });
}

/// Computes all sums of one tile, block by block, in a buffer.
///
/// # Safety
/// `left` covers the tile's rows and `units`; `right` is a strip of `units`, four bytes each.
unsafe fn column_tile<U>(
    (tile, columns): (Tile, usize),
    (left, right, units): (Left, &[U], usize),
    sums: &mut [f32; TILE],
    add: bool,
) {
    for first in (0..units).step_by(KC) {
        let depth = KC.min(units - first);
        let place = Place { data: sums.as_mut_ptr(), stride: columns, add: add || first > 0 };
        // SAFETY: `sums` has room for any kernel's tile; the rest is the caller's promise.
        unsafe {
            let left = Left { data: left.data.add(first * left.k_stride), ..left };
            tile(depth, left, right[first * columns..].as_ptr().cast(), place);
        }
    }
}

/// Calls `visit` with each sum of a tile and its location in the transposed result.
///
/// # Safety
/// `place` covers `[width, height]`.
unsafe fn transposed(
    sums: &mut [f32; TILE],
    (height, width): (usize, usize),
    columns: usize,
    place: Place,
    visit: impl Fn(&mut f32, *mut f32),
) {
    for j in 0..width {
        for i in 0..height {
            // SAFETY: the caller's promise.
            let to = unsafe { place.data.add(j * place.stride + i) };
            visit(&mut sums[i * columns + j], to);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::kernel::{REHEARSAL, REHEARSAL_WIDENED};
    use super::*;
    use crate::rng::Stream;

    fn random<E: Element>(index: u64, len: usize) -> Vec<E> {
        E::rounded(Stream::new(9, "matmul").normal(index, len, 1.0))
    }

    /// Each kernel, and whether its rounding is the documented one: for pairs, AVX512-BF16 rounds as the processor
    /// does.
    fn kernels<E: Element>(rehearsal: Kernel) -> Vec<(Kernel, bool)> {
        let supported = Isa::ALL.into_iter().filter(|isa| isa.is_supported());
        let exact = |isa: Isa| E::PER_UNIT == 1 || isa != Isa::Avx512Bf16;
        let all = supported.map(|isa| (E::kernel(isa), exact(isa)));
        all.chain([(rehearsal, true)]).collect()
    }

    fn run<E: Element>(
        kernel: &Kernel,
        a: Mat<'_, E>,
        b: Mat<'_, E>,
        add: bool,
        threads: Threads,
    ) -> Vec<f32> {
        let mut out = vec![if add { 1.0 } else { f32::NAN }; a.rows * b.cols];
        let place = Place { data: out.as_mut_ptr(), stride: b.cols, add };
        // SAFETY: `out` holds exactly the product's elements.
        unsafe { product(kernel, a, b, place, threads) };
        out
    }

    /// The documented order of summation, one result at a time.
    fn exact<E: Element>(a: Mat<'_, E>, b: Mat<'_, E>) -> Vec<f32> {
        let value = |i: usize, j: usize| {
            let product = |sum: f32, k: usize| {
                let a = a.data[i * a.row_stride + k * a.col_stride];
                a.widened().mul_add(b.data[k * b.row_stride + j * b.col_stride].widened(), sum)
            };
            // Within a pair, the second product first.
            let unit = |sum: f32, first: usize| {
                let pair = first..(first + E::PER_UNIT).min(a.cols);
                pair.rev().fold(sum, product)
            };
            let block = KC * E::PER_UNIT;
            let sums = (0..a.cols).step_by(block).map(|first| {
                (first..(first + block).min(a.cols)).step_by(E::PER_UNIT).fold(0.0, unit)
            });
            sums.reduce(|sum, block| sum + block).unwrap_or(0.0)
        };
        (0..a.rows * b.cols).map(|ij| value(ij / b.cols, ij % b.cols)).collect()
    }

    fn every_orientation_is_the_promised_sum<E: Element>(rehearsal: Kernel) {
        let shapes = [
            (1, 1, 1),
            (2, 3, 0),
            (5, 7, 3),
            (13, 33, 17),
            (97, 50, 31),
            (1, 40, 600),
            (101, 19, 300),
            (3, 18, 601),
        ];
        for (m, n, k) in shapes {
            let (a, b) = (random::<E>(1, m * k), random::<E>(2, k * n));
            for (kernel, bitwise) in kernels::<E>(rehearsal) {
                for left in [Mat::new(&a, m, k), Mat::new(&a, k, m).t()] {
                    for right in [Mat::new(&b, k, n), Mat::new(&b, n, k).t()] {
                        let one = run(&kernel, left, right, false, Threads::One);
                        let expected = exact(left, right);
                        let near = one.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-4);
                        let holds = if bitwise { one == expected } else { near };
                        assert!(holds, "{m}x{n}x{k} in tiles of {}", kernel.rows);
                        assert!(run(&kernel, left, right, false, Threads::All) == one);
                        let more = run(&kernel, left, right, true, Threads::All);
                        let close = |(more, one): (&f32, &f32)| (more - 1.0 - one).abs() < 1e-4;
                        assert!(more.iter().zip(&one).all(close));
                    }
                }
            }
        }
    }

    #[test]
    fn every_orientation_and_odd_shape_matches_the_promised_sum_bitwise() {
        every_orientation_is_the_promised_sum::<f32>(REHEARSAL);
        every_orientation_is_the_promised_sum::<bf16>(REHEARSAL_WIDENED);
    }

    /// Few rows may be computed by transposing in registers, many never are.
    fn few_rows_are_those_of_many<E: Element>(rehearsal: Kernel) {
        // One chain and a partial one, three chains, column counts and depths that are not multiples of sixteen.
        for (n, k) in [(16, 32), (50, 576), (33, 1184), (130, 640), (40, 600), (7, 64)] {
            let (a, b) = (random::<E>(5, 130 * k), random::<E>(6, k * n));
            let right = Mat::new(&b, n, k).t();
            for (kernel, _) in kernels::<E>(rehearsal) {
                for add in [false, true] {
                    let many = run(&kernel, Mat::new(&a, 130, k), right, add, Threads::One);
                    for m in 1..=FEWEST + 1 {
                        let few = Mat::new(&a[..m * k], m, k);
                        let threads = if m.is_multiple_of(2) { Threads::All } else { Threads::One };
                        let few = run(&kernel, few, right, add, threads);
                        let same = few.iter().zip(&many).all(|(x, y)| x.to_bits() == y.to_bits());
                        assert!(same, "{m}x{n}x{k} in tiles of {}", kernel.rows);
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_match_many_rows_bitwise() {
        few_rows_are_those_of_many::<f32>(REHEARSAL);
        few_rows_are_those_of_many::<bf16>(REHEARSAL_WIDENED);
    }

    fn a_row_stands_alone<E: Element>() {
        let (n, k) = (70, 1153);
        let (a, b) = (random::<E>(3, 2048 * k), random::<E>(4, n * k));
        let weight = Mat::new(&b, n, k).t();
        let all = matmul(Mat::new(&a, 2048, k), weight, Threads::All);
        let start = random::<f32>(7, 2048 * n);
        let mut sums = start.clone();
        matmul_into(&mut sums, Mat::new(&a, 2048, k), weight, true, Threads::All);
        for m in [1, 3, 16, 17, 96, 97, 2048] {
            for threads in [Threads::One, Threads::All] {
                let a = Mat::new(&a, m, k);
                assert!(matmul(a, weight, threads) == all[..m * n], "{m} rows, {threads:?}");
                let mut sum = start[..m * n].to_vec();
                matmul_into(&mut sum, a, weight, true, threads);
                assert!(sum == sums[..m * n], "{m} rows added, {threads:?}");
            }
        }
    }

    #[test]
    fn row_is_bitwise_independent_of_row_and_thread_counts() {
        a_row_stands_alone::<f32>();
        a_row_stands_alone::<bf16>();
    }

    #[test]
    fn strided_view_gives_the_product_of_its_dense_copy() {
        let data = random::<f32>(5, 40 * 11);
        let view = Mat::strided(&data, 40, 5, 11);
        let dense: Vec<f32> = data.chunks(11).flat_map(|row| row[..5].to_vec()).collect();
        let other = random::<f32>(6, 5 * 9);
        let right = Mat::new(&other, 5, 9);
        assert_eq!(
            matmul(view, right, Threads::One),
            matmul(Mat::new(&dense, 40, 5), right, Threads::One)
        );
    }
}
