//! Products with a block-quantised matrix of 4 or 8 bits, for generation: exact integer dot products, then scaled.
//!
//! Left rows are quantised to 8 bits in blocks of 32, each with a scale, as in llama.cpp. The result of a row and a
//! column is `Σ_b fma(m_b, s_b, fma(d_b · x_b, n_b, ·))` over the blocks `b` in order, in f32: `n_b` is the integer dot
//! product, `d_b` and `m_b` the weights' scale and minimum, `x_b` the row's scale, `s_b` the row's sum. It is
//! bit-identical on every instruction set, for any number of threads and whatever the other rows: the row rule holds.

#![expect(
    unsafe_code,
    reason = "columns of one row are written by several threads; blocks are read by pointer"
)]
#![expect(
    clippy::inline_always,
    reason = "a body must be compiled within each instruction set's own function"
)]

use half::f16;
use rayon::prelude::*;

use super::awake::share;
use super::isa::Isa;
use super::simd::multiversion;

/// Weights per block.
pub const BLOCK: usize = 32;
/// Columns computed together.
const LANES: usize = 8;
/// Rows that share one read of a block.
const ROWS: usize = 4;
/// Bytes of a strip's scales per block.
const SCALES: usize = 2 * LANES;

/// Bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// `n · d + m`, `n` from 0 to 15.
    Four,
    /// `n · d`, `n` from −127 to 127.
    Eight,
}

impl Bits {
    /// Bytes per block, over all lanes.
    fn bytes(self) -> usize {
        match self {
            Self::Four => 2 * SCALES + LANES * BLOCK / 2,
            Self::Eight => SCALES + LANES * BLOCK,
        }
    }
}

/// One block of one column.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// `d`.
    pub scale: f16,
    /// `m`; 0 for eight bits.
    pub minimum: f16,
    /// `n`.
    pub numbers: [i8; BLOCK],
}

/// A matrix `[O, I]` whose rows, the columns of the product `x · Wᵀ`, are interleaved by eight in strips of blocks.
#[derive(Clone, Debug)]
pub struct BlockMatrix {
    outer: usize,
    blocks: usize,
    bits: Bits,
    strips: Vec<u8>,
}

impl BlockMatrix {
    /// Lays out a matrix of `outer` rows of `inner` weights; `block(row, index)` returns its blocks.
    ///
    /// # Panics
    /// `inner` is not a multiple of [`BLOCK`].
    pub fn new(
        (outer, inner): (usize, usize),
        bits: Bits,
        block: impl Fn(usize, usize) -> Block + Sync,
    ) -> Self {
        assert!(inner.is_multiple_of(BLOCK), "rows of {inner} weights in blocks of {BLOCK}");
        let blocks = inner / BLOCK;
        let len = blocks * bits.bytes();
        let mut strips = vec![0; outer.div_ceil(LANES) * len];
        strips.par_chunks_mut(len.max(1)).enumerate().for_each(|(strip, bytes)| {
            for (index, bytes) in bytes.chunks_exact_mut(bits.bytes()).enumerate() {
                for lane in 0..LANES.min(outer - strip * LANES) {
                    place(bytes, bits, lane, &block(strip * LANES + lane, index));
                }
            }
        });
        Self { outer, blocks, bits, strips }
    }

    /// Shape, `(O, I)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.outer, self.blocks * BLOCK)
    }

    /// One row as f32 values.
    pub fn row(&self, row: usize, out: &mut Vec<f32>) {
        let size = self.bits.bytes();
        let strip = &self.strips[row / LANES * self.blocks * size..][..self.blocks * size];
        for bytes in strip.chunks_exact(size) {
            let Block { scale, minimum, numbers } = taken(bytes, self.bits, row % LANES);
            let value = |n: i8| f32::from(n).mul_add(scale.to_f32(), minimum.to_f32());
            out.extend(numbers.map(value));
        }
    }
}

/// Four bits: a group of 4 weights of all lanes in the low nibbles, and the group 16 further on in the high ones. Eight
/// bits: pairs of weights of all lanes.
fn place(bytes: &mut [u8], bits: Bits, lane: usize, block: &Block) {
    bytes[2 * lane..][..2].copy_from_slice(&block.scale.to_le_bytes());
    match bits {
        Bits::Four => {
            bytes[SCALES + 2 * lane..][..2].copy_from_slice(&block.minimum.to_le_bytes());
            for (k, n) in block.numbers.iter().enumerate() {
                let (group, shift) = (k % 16 / 4, k / 16 * 4);
                bytes[2 * SCALES + group * 32 + lane * 4 + k % 4] |= (*n as u8 & 15) << shift;
            }
        }
        Bits::Eight => {
            for (k, n) in block.numbers.iter().enumerate() {
                bytes[SCALES + k / 2 * 16 + lane * 2 + k % 2] = n.cast_unsigned();
            }
        }
    }
}

#[inline(always)]
fn taken(bytes: &[u8], bits: Bits, lane: usize) -> Block {
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let scale = half(2 * lane);
    match bits {
        Bits::Four => Block {
            scale,
            minimum: half(SCALES + 2 * lane),
            numbers: std::array::from_fn(|k| {
                let (group, shift) = (k % 16 / 4, k / 16 * 4);
                (bytes[2 * SCALES + group * 32 + lane * 4 + k % 4] >> shift & 15) as i8
            }),
        },
        Bits::Eight => Block {
            scale,
            minimum: f16::ZERO,
            numbers: std::array::from_fn(|k| {
                bytes[SCALES + k / 2 * 16 + lane * 2 + k % 2].cast_signed()
            }),
        },
    }
}

/// Rows `[T, I]` quantised to 8 bits in blocks.
#[derive(Clone, Debug)]
pub struct RoundedRows {
    rows: usize,
    blocks: usize,
    numbers: Vec<i8>,
    /// The same values in 16 bits.
    wide: Vec<i16>,
    scales: Vec<f32>,
    /// Scaled sum of each block's quantised values.
    sums: Vec<f32>,
}

impl RoundedRows {
    /// Quantises rows of `inner` values.
    ///
    /// # Panics
    /// `inner` is not a multiple of [`BLOCK`].
    pub fn new(x: &[f32], inner: usize) -> Self {
        assert!(inner.is_multiple_of(BLOCK) && x.len().is_multiple_of(inner.max(1)));
        let blocks = x.len() / BLOCK;
        let mut rounded = Self {
            rows: x.len() / inner,
            blocks: inner / BLOCK,
            numbers: vec![0; x.len()],
            wide: vec![0; x.len()],
            scales: vec![0.0; blocks],
            sums: vec![0.0; blocks],
        };
        round(&mut rounded, x);
        rounded
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

#[inline(always)]
fn round_body(to: &mut RoundedRows, x: &[f32]) {
    for (index, x) in x.chunks_exact(BLOCK).enumerate() {
        let top = x.iter().fold(0.0_f32, |top, x| if x.abs() > top { x.abs() } else { top });
        let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
        // Integers have no NaN, so it is kept in the scale.
        let scale = if x.iter().any(|x| x.is_nan()) { f32::NAN } else { top / 127.0 };
        let numbers = &mut to.numbers[index * BLOCK..][..BLOCK];
        let wide = &mut to.wide[index * BLOCK..][..BLOCK];
        let mut sum = 0_i32;
        for ((number, wide), x) in numbers.iter_mut().zip(wide).zip(x) {
            let rounded = (x * inverse).round_ties_even() as i32;
            sum += rounded;
            *wide = rounded as i16;
            *number = rounded as i8;
        }
        to.scales[index] = scale;
        to.sums[index] = sum as f32 * scale;
    }
}

multiversion! {
    fn round(to: &mut RoundedRows, x: &[f32]) = round_body
}

/// Destination `[T, O]`, written by several threads, each its own columns.
#[derive(Clone, Copy)]
struct Out {
    data: *mut f32,
    outer: usize,
}

// SAFETY: threads write to columns of their own strips only.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// `x · Wᵀ` for several matrices at once, each `[T, O]`.
///
/// # Panics
/// A matrix whose row length differs from that of `x`.
pub fn products(x: &RoundedRows, weights: &[&BlockMatrix]) -> Vec<Vec<f32>> {
    let mut results: Vec<Vec<f32>> =
        weights.iter().map(|weight| vec![0.0; x.rows * weight.outer]).collect();
    let mut strips = Vec::new();
    for (weight, result) in weights.iter().zip(&mut results) {
        assert_eq!(weight.blocks, x.blocks, "rows of other lengths");
        let out = Out { data: result.as_mut_ptr(), outer: weight.outer };
        strips.extend((0..weight.outer.div_ceil(LANES)).map(|strip| (*weight, strip, out)));
    }
    // A task reads some 64 KiB of weights, so that its overhead is small.
    let bytes = weights.first().map_or(1, |weight| weight.blocks * weight.bits.bytes());
    let tasks = (strips.len() / (4 * rayon::current_num_threads())).max(1);
    let chunk = tasks.min(((64 << 10) / bytes.max(1)).max(1) * x.rows.clamp(1, 4));
    share(strips.len().div_ceil(chunk), |task| {
        for &(weight, strip, out) in strips.iter().skip(task * chunk).take(chunk) {
            one_strip(x, weight, strip, out);
        }
    });
    results
}

/// All rows times the columns of one strip.
fn one_strip(x: &RoundedRows, weight: &BlockMatrix, strip: usize, out: Out) {
    let len = weight.blocks * weight.bits.bytes();
    let bytes = &weight.strips[strip * len..][..len];
    let first = strip * LANES;
    let columns = LANES.min(weight.outer - first);
    let kernel = Kernel::current();
    let mut row = 0;
    while row < x.rows {
        let rows = ROWS.min(x.rows - row);
        let mut sums = [[0.0; LANES]; ROWS];
        kernel.run(x, (row, rows), (weight.bits, bytes), &mut sums);
        for (index, sums) in sums.iter().enumerate().take(rows) {
            // SAFETY: row and columns lie within `[T, O]`, and no other thread writes these columns.
            let to = unsafe {
                std::slice::from_raw_parts_mut(
                    out.data.add((row + index) * out.outer + first),
                    columns,
                )
            };
            to.copy_from_slice(&sums[..columns]);
        }
        row += rows;
    }
}

/// Implementation for a strip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Kernel {
    fn current() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Isa::current() >= Isa::Avx2 && std::arch::is_x86_feature_detected!("f16c") {
            return Self::Avx2;
        }
        Self::Portable
    }

    fn run(
        self,
        x: &RoundedRows,
        (row, rows): (usize, usize),
        (bits, bytes): (Bits, &[u8]),
        sums: &mut [[f32; LANES]; ROWS],
    ) {
        match self {
            Self::Portable => {
                for (index, sums) in sums.iter_mut().enumerate().take(rows) {
                    portable(x, row + index, (bits, bytes), sums);
                }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the features were detected; `rows` rows from `row` on are there.
            Self::Avx2 => unsafe {
                match (bits, rows) {
                    (Bits::Four, 1) => avx2::four::<1>(x, row, bytes, sums),
                    (Bits::Four, 2) => avx2::four::<2>(x, row, bytes, sums),
                    (Bits::Four, 3) => avx2::four::<3>(x, row, bytes, sums),
                    (Bits::Four, _) => avx2::four::<4>(x, row, bytes, sums),
                    (Bits::Eight, 1) => avx2::eight::<1>(x, row, bytes, sums),
                    (Bits::Eight, 2) => avx2::eight::<2>(x, row, bytes, sums),
                    (Bits::Eight, 3) => avx2::eight::<3>(x, row, bytes, sums),
                    (Bits::Eight, _) => avx2::eight::<4>(x, row, bytes, sums),
                }
            },
        }
    }
}

fn portable(x: &RoundedRows, row: usize, (bits, bytes): (Bits, &[u8]), sums: &mut [f32; LANES]) {
    for (index, bytes) in bytes.chunks_exact(bits.bytes()).enumerate() {
        let at = row * x.blocks + index;
        let numbers = &x.numbers[at * BLOCK..][..BLOCK];
        for (lane, sum) in sums.iter_mut().enumerate() {
            let block = taken(bytes, bits, lane);
            let pairs = block.numbers.iter().zip(numbers);
            let dot: i32 = pairs.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
            *sum = (block.scale.to_f32() * x.scales[at]).mul_add(dot as f32, *sum);
            if bits == Bits::Four {
                *sum = block.minimum.to_f32().mul_add(x.sums[at], *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256,
        _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps,
        _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps,
        _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_ps,
    };

    use super::{BLOCK, Bits, LANES, ROWS, RoundedRows, SCALES};

    /// Scales of all lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn halves(at: *const u8) -> __m256 {
        // SAFETY: the caller's 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }

    /// `M` rows from `row` on times a 4-bit strip.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn four<const M: usize>(
        x: &RoundedRows,
        row: usize,
        bytes: &[u8],
        sums: &mut [[f32; LANES]; ROWS],
    ) {
        assert!(bytes.len() == x.blocks * Bits::Four.bytes() && row + M <= x.rows);
        // SAFETY: blocks and rows lie within their buffers, as just checked; loads need no alignment.
        unsafe {
            let low_halves = _mm256_set1_epi8(15);
            let ones = _mm256_set1_epi16(1);
            let mut totals = [_mm256_setzero_ps(); M];
            for index in 0..x.blocks {
                let block = bytes.as_ptr().add(index * Bits::Four.bytes());
                let (scale, minimum) = (halves(block), halves(block.add(SCALES)));
                let first: [usize; M] = std::array::from_fn(|r| (row + r) * x.blocks + index);
                // Eight products of pairs: at most 8 · 2 · 15 · 127, which fits 16 bits.
                let mut dots = [_mm256_setzero_si256(); M];
                for group in 0..4 {
                    let both = _mm256_loadu_si256(block.add(2 * SCALES + group * 32).cast());
                    let low = _mm256_and_si256(both, low_halves);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low_halves);
                    for r in 0..M {
                        let four = x.numbers.as_ptr().add(first[r] * BLOCK + group * 4);
                        let near = _mm256_set1_epi32(four.cast::<i32>().read_unaligned());
                        let far = _mm256_set1_epi32(four.add(16).cast::<i32>().read_unaligned());
                        dots[r] = _mm256_add_epi16(dots[r], _mm256_maddubs_epi16(low, near));
                        dots[r] = _mm256_add_epi16(dots[r], _mm256_maddubs_epi16(high, far));
                    }
                }
                for r in 0..M {
                    let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r], ones));
                    let factor =
                        _mm256_mul_ps(scale, _mm256_set1_ps(*x.scales.as_ptr().add(first[r])));
                    totals[r] = _mm256_fmadd_ps(factor, dot, totals[r]);
                    let sum = _mm256_set1_ps(*x.sums.as_ptr().add(first[r]));
                    totals[r] = _mm256_fmadd_ps(minimum, sum, totals[r]);
                }
            }
            for (sums, total) in sums.iter_mut().zip(totals) {
                _mm256_storeu_ps(sums.as_mut_ptr(), total);
            }
        }
    }

    /// `M` rows from `row` on times an 8-bit strip.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn eight<const M: usize>(
        x: &RoundedRows,
        row: usize,
        bytes: &[u8],
        sums: &mut [[f32; LANES]; ROWS],
    ) {
        assert!(bytes.len() == x.blocks * Bits::Eight.bytes() && row + M <= x.rows);
        // SAFETY: blocks and rows lie within their buffers, as just checked; loads need no alignment.
        unsafe {
            let mut totals = [_mm256_setzero_ps(); M];
            for index in 0..x.blocks {
                let block = bytes.as_ptr().add(index * Bits::Eight.bytes());
                let scale = halves(block);
                let first: [usize; M] = std::array::from_fn(|r| (row + r) * x.blocks + index);
                let mut dots = [_mm256_setzero_si256(); M];
                for pair in 0..BLOCK / 2 {
                    let both = _mm_loadu_si128(block.add(SCALES + pair * 16).cast());
                    let both = _mm256_cvtepi8_epi16(both);
                    for r in 0..M {
                        let two = x.wide.as_ptr().add(first[r] * BLOCK + pair * 2);
                        let two = _mm256_set1_epi32(two.cast::<i32>().read_unaligned());
                        dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(both, two));
                    }
                }
                for r in 0..M {
                    let dot = _mm256_cvtepi32_ps(dots[r]);
                    let factor =
                        _mm256_mul_ps(scale, _mm256_set1_ps(*x.scales.as_ptr().add(first[r])));
                    totals[r] = _mm256_fmadd_ps(factor, dot, totals[r]);
                }
            }
            for (sums, total) in sums.iter_mut().zip(totals) {
                _mm256_storeu_ps(sums.as_mut_ptr(), total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// A matrix of arbitrary values, including extremes.
    fn matrix(outer: usize, inner: usize, bits: Bits) -> BlockMatrix {
        let numbers = Stream::new(5, "blocks").normal(1, outer * inner, 60.0);
        BlockMatrix::new((outer, inner), bits, |row, block| Block {
            scale: f16::from_f32(0.01 + row as f32 * 0.003),
            minimum: match bits {
                Bits::Four => f16::from_f32(-0.07 + block as f32 * 0.01),
                Bits::Eight => f16::ZERO,
            },
            numbers: std::array::from_fn(|k| {
                let number = numbers[row * inner + block * BLOCK + k].clamp(-127.0, 127.0);
                match bits {
                    Bits::Four => (number.abs() as i8).min(15),
                    Bits::Eight => number as i8,
                }
            }),
        })
    }

    /// Product of the dequantised values, in f64.
    fn expected(x: &RoundedRows, weight: &BlockMatrix) -> Vec<f64> {
        let mut result = Vec::new();
        for row in 0..x.rows {
            for outer in 0..weight.outer {
                let mut w = Vec::new();
                weight.row(outer, &mut w);
                let at = |k: usize| {
                    let block = row * x.blocks + k / BLOCK;
                    f64::from(x.numbers[row * x.blocks * BLOCK + k]) * f64::from(x.scales[block])
                };
                result.push((0..w.len()).map(|k| f64::from(w[k]) * at(k)).sum());
            }
        }
        result
    }

    #[test]
    fn block_products_match_the_unpacked_numbers() {
        for bits in [Bits::Four, Bits::Eight] {
            for (rows, outer, inner) in [(1, 8, 32), (2, 3, 64), (3, 17, 96), (9, 40, 320)] {
                let weight = matrix(outer, inner, bits);
                let x = Stream::new(6, "blocks").normal(rows as u64, rows * inner, 1.0);
                let x = RoundedRows::new(&x, inner);
                let found = products(&x, &[&weight]).remove(0);
                for (found, expected) in found.iter().zip(expected(&x, &weight)) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 2e-4 * (1.0 + expected.abs()),
                        "{found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn row_is_bitwise_independent_of_batch_and_instruction_set() {
        for bits in [Bits::Four, Bits::Eight] {
            let (first, second) = (matrix(21, 160, bits), matrix(8, 160, bits));
            let x = Stream::new(7, "blocks").normal(1, 11 * 160, 1.0);
            let together = products(&RoundedRows::new(&x, 160), &[&first, &second]);
            for (row, x) in x.chunks(160).enumerate() {
                let x = RoundedRows::new(x, 160);
                let alone = products(&x, &[&second, &first]);
                assert!(alone[1] == together[0][row * 21..][..21]);
                assert!(alone[0] == together[1][row * 8..][..8]);
                let mut sums = [0.0; LANES];
                let len = first.blocks * bits.bytes();
                portable(&x, 0, (bits, &first.strips[len..][..len]), &mut sums);
                let equal = sums.iter().zip(&together[0][row * 21 + 8..]);
                assert!(equal.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }

    #[test]
    fn rounding_picks_the_nearest_of_255_levels_and_keeps_zeros_exact() {
        let x: Vec<f32> =
            (0..64).map(|i| if i < 32 { 0.0 } else { (i - 40) as f32 * 0.5 }).collect();
        let rounded = RoundedRows::new(&x, 64);
        assert_eq!((rounded.rows(), rounded.scales[0], rounded.sums[0]), (1, 0.0, 0.0));
        for (k, x) in x.iter().enumerate() {
            let found = f32::from(rounded.numbers[k]) * rounded.scales[k / BLOCK];
            assert!((found - x).abs() <= rounded.scales[k / BLOCK] * 0.5 + 1e-6, "{found} {x}");
            assert_eq!(i16::from(rounded.numbers[k]), rounded.wide[k]);
        }
        let sum: f32 = x[32..].iter().sum();
        assert!((rounded.sums[1] - sum).abs() < 0.2);
        // NaN of a diverged model propagates.
        let mut x = x;
        x[3] = f32::NAN;
        for bits in [Bits::Four, Bits::Eight] {
            let found = products(&RoundedRows::new(&x, 64), &[&matrix(9, 64, bits)]).remove(0);
            assert!(found.iter().all(|x| x.is_nan()), "{found:?}");
        }
    }
}
