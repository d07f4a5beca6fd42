//! Single-row attention, for generation, in [`matmul`](super::matmul)'s order of summation: generated rows are
//! bit-identical to training's.

#![expect(
    clippy::inline_always,
    reason = "a body must be compiled within each instruction set's own function"
)]
#![expect(
    unsafe_code,
    reason = "functions compiled for a CPU feature may only be called where it was detected"
)]

use candle_core::DType;

use super::element::Element;
use super::kernel::KC;
use super::simd::{self, multiversion};

/// Keys per tile, interleaved: `[E, TILE]` is one tile.
pub const TILE: usize = 16;

/// Prefetches the cache line at any address into the L2 cache.
#[inline(always)]
pub(super) fn call_for(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 processor has it, and any address is one to it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Prefetches the first values of a range about to be read; the hardware prefetches the rest.
#[inline]
pub fn call_for_beginning<E>(numbers: &[E]) {
    const LINE: usize = 64;
    const LINES: usize = 16;
    let first: *const u8 = numbers.as_ptr().cast();
    let lines = (0..size_of_val(numbers)).step_by(LINE).take(LINES);
    lines.for_each(|at| call_for(first.wrapping_add(at)));
}

/// Queries processed together per tile: their sums stay in registers.
const QUERIES: usize = 4;

#[inline(always)]
fn widened<E: Element, const N: usize>(values: &[E; N]) -> [f32; N] {
    let mut wide = [0.0; N];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.widened();
    }
    wide
}

/// `T` tiles together, so that a sum's next multiply-add need not wait for the previous one's result.
#[inline(always)]
fn scores_body<E: Element, const N: usize, const T: usize>(
    scores: &mut [[f32; TILE]],
    queries: &[f32],
    tiles: &[&[E]],
    scale: f32,
) {
    let width = tiles[0].len() / TILE;
    let queries: [&[f32]; N] = std::array::from_fn(|n| &queries[n * width..][..width]);
    let mut keys: [_; T] = std::array::from_fn(|t| tiles[t].as_chunks::<TILE>().0.iter());
    let mut totals = [[[0.0_f32; TILE]; N]; T];
    for first in (0..width).step_by(KC) {
        let mut sums = [[[0.0_f32; TILE]; N]; T];
        for e in first..width.min(first + KC) {
            for (keys, sums) in keys.iter_mut().zip(&mut sums) {
                let Some(keys) = keys.next() else { return };
                let keys = widened(keys);
                for (query, sums) in queries.iter().zip(sums) {
                    for i in 0..TILE {
                        sums[i] = query[e].mul_add(keys[i], sums[i]);
                    }
                }
            }
        }
        for (total, sums) in totals.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            for i in 0..TILE {
                total[i] = if first == 0 { sums[i] } else { total[i] + sums[i] };
            }
        }
    }
    for (scores, total) in scores.iter_mut().zip(totals.as_flattened()) {
        for i in 0..TILE {
            scores[i] = total[i] * scale;
        }
    }
}

multiversion! {
    /// As [`scores`], for `N` queries and `T` tiles.
    fn some_scores<E: Element, const N, const T>(scores: &mut [[f32; TILE]], queries: &[f32], tiles: &[&[E]], scale: f32) = scores_body
}

/// `scale · query · key` of each query and all keys of one or two tiles, stored transposed, `[E, TILE]`.
///
/// # Shapes
/// - `queries`: `[N, E]`  →  `out`: `[tiles, N]`
///
/// # Panics
/// The queries' width differs from the keys', or `out` has another length.
pub fn scores<E: Element>(
    out: &mut [[f32; TILE]],
    queries: &[f32],
    tiles: &[&[E]],
    scale: f32,
    scratch: &mut [Vec<f32>; 2],
) {
    let width = tiles[0].len() / TILE;
    let count = queries.len() / width;
    assert_eq!(out.len() * width, queries.len() * tiles.len(), "scores of {count} queries");
    if count > QUERIES && E::DTYPE != DType::F32 {
        let [first, second] = scratch;
        let wide =
            [(0, first), (1, second)].map(|(t, to)| tiles.get(t).map(|tile| E::widen(tile, to)));
        let wide: Vec<&[f32]> = wide.into_iter().flatten().collect();
        return scores(out, queries, &wide, scale, &mut Default::default());
    }
    let mut some = [[0.0; TILE]; 2 * QUERIES];
    for (first, queries) in (0..).step_by(QUERIES).zip(queries.chunks(QUERIES * width)) {
        let len = queries.len() / width;
        let here = &mut some[..len * tiles.len()];
        match (len, tiles.len()) {
            (1, 1) => some_scores::<E, 1, 1>(here, queries, tiles, scale),
            (1, _) => some_scores::<E, 1, 2>(here, queries, tiles, scale),
            (2, 1) => some_scores::<E, 2, 1>(here, queries, tiles, scale),
            (2, _) => some_scores::<E, 2, 2>(here, queries, tiles, scale),
            (3, 1) => some_scores::<E, 3, 1>(here, queries, tiles, scale),
            (3, _) => some_scores::<E, 3, 2>(here, queries, tiles, scale),
            (_, 1) => some_scores::<E, 4, 1>(here, queries, tiles, scale),
            _ => some_scores::<E, 4, 2>(here, queries, tiles, scale),
        }
        for (out, here) in out.chunks_mut(count).zip(here.chunks(len)) {
            out[first..][..len].copy_from_slice(here);
        }
    }
}

/// Columns of a mixture kept in registers.
const COLUMNS: usize = 32;

#[inline(always)]
fn mix_body<E: Element, const N: usize>(
    out: &mut [f32],
    weights: &[f32],
    stride: usize,
    values: &[E],
) {
    let width = out.len() / N;
    let count = values.len() / width;
    let weights: [&[f32]; N] = std::array::from_fn(|n| &weights[n * stride..][..count]);
    let whole = width / COLUMNS * COLUMNS;
    for first in (0..whole).step_by(COLUMNS) {
        let mut sums = [[0.0_f32; COLUMNS]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&out[n * width + first..][..COLUMNS]);
        }
        for (row, values) in values.chunks_exact(width).enumerate() {
            let Some(values) = values[first..].first_chunk::<COLUMNS>() else { return };
            let values = widened(values);
            for (weights, sums) in weights.iter().zip(&mut sums) {
                for i in 0..COLUMNS {
                    sums[i] = weights[row].mul_add(values[i], sums[i]);
                }
            }
        }
        for (n, sums) in sums.iter().enumerate() {
            out[n * width + first..][..COLUMNS].copy_from_slice(sums);
        }
    }
    for (out, weights) in out.chunks_exact_mut(width).zip(weights) {
        for (weight, values) in weights.iter().zip(values.chunks_exact(width)) {
            for (out, value) in out[whole..].iter_mut().zip(&values[whole..]) {
                *out = weight.mul_add(value.widened(), *out);
            }
        }
    }
}

multiversion! {
    /// `out[n] += Σ_i weights[n · stride + i] · values[i]` for `N` sums; `values` holds rows as wide as each sum.
    fn mix<E: Element, const N>(out: &mut [f32], weights: &[f32], stride: usize, values: &[E]) = mix_body
}

/// Weighted sums of the same rows, added piece by piece, in a product's order of summation.
#[derive(Debug)]
pub struct Mixture<'a> {
    /// `[N, E]`.
    out: &'a mut [f32],
    block: Vec<f32>,
    width: usize,
    rows: usize,
}

impl<'a> Mixture<'a> {
    /// Empty sums of this width, to be written to `out`, `[N, E]`.
    pub fn new(out: &'a mut [f32], width: usize) -> Self {
        out.fill(0.0);
        Self { block: vec![0.0; out.len()], out, width, rows: 0 }
    }

    /// Adds rows, `[count, E]`, with weights for each sum, `stride` apart.
    pub fn add<E: Element>(&mut self, mut weights: &[f32], stride: usize, mut values: &[E]) {
        let width = self.width;
        while !values.is_empty() {
            let take = (KC - self.rows % KC).min(values.len() / width);
            let (now, later) = values.split_at(take * width);
            for (n, out) in self.block.chunks_mut(QUERIES * width).enumerate() {
                let weights = &weights[n * QUERIES * stride..];
                match out.len() / width {
                    1 => mix::<E, 1>(out, weights, stride, now),
                    2 => mix::<E, 2>(out, weights, stride, now),
                    3 => mix::<E, 3>(out, weights, stride, now),
                    _ => mix::<E, 4>(out, weights, stride, now),
                }
            }
            self.rows += take;
            if self.rows.is_multiple_of(KC) {
                self.close_block();
            }
            (weights, values) = (&weights[take..], later);
        }
    }

    /// Adds the last partial block.
    pub fn finish(mut self) {
        if !self.rows.is_multiple_of(KC) {
            self.close_block();
        }
    }

    fn close_block(&mut self) {
        if self.rows <= KC {
            self.out.copy_from_slice(&self.block);
        } else {
            simd::axpy(self.out, 1.0, &self.block);
        }
        self.block.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::matmul::{Mat, Threads, matmul};
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn scores_and_mixtures_match_matrix_products_bitwise() {
        check::<f32>();
        check::<bf16>();
    }

    fn check<E: Element>() {
        let stream = Stream::new(3, "rows");
        let numbers = |index, len| E::rounded(stream.normal(index, len, 1.0));
        for (queries, count, width) in
            [(1, 1, 4), (2, 16, 18), (3, 40, 64), (4, 33, 32), (7, 700, 300), (5, 600, 96)]
        {
            let (keys, values) = (numbers(1, count * width), numbers(2, count * width));
            let query = numbers(3, queries * width);
            // Sums are of widened values, as in training's attention.
            let wide = |x: &[E]| x.iter().map(|x| x.widened()).collect::<Vec<f32>>();
            let query = wide(&query);
            let tiles: Vec<Vec<E>> = keys
                .chunks(width * TILE)
                .map(|keys| {
                    let mut tile = vec![E::default(); width * TILE];
                    for (i, key) in keys.chunks(width).enumerate() {
                        key.iter().enumerate().for_each(|(e, key)| tile[e * TILE + i] = *key);
                    }
                    tile
                })
                .collect();
            let mut found = vec![f32::NAN; queries * count];
            for (pair, tiles) in tiles.chunks(2).enumerate() {
                let tiles: Vec<&[E]> = tiles.iter().map(|tile| &tile[..]).collect();
                let mut here = vec![[f32::NAN; TILE]; tiles.len() * queries];
                scores(&mut here, &query, &tiles, 0.5, &mut Default::default());
                for (index, here) in here.iter().enumerate() {
                    let first = (2 * pair + index / queries) * TILE;
                    let seen = TILE.min(count - first);
                    found[index % queries * count + first..][..seen].copy_from_slice(&here[..seen]);
                }
            }
            let left = Mat::new(&query, queries, width);
            let keys = wide(&keys);
            let expected = matmul(left, Mat::new(&keys, count, width).t(), Threads::One);
            let scaled: Vec<f32> = expected.iter().map(|sum| sum * 0.5).collect();
            assert!(bits(&found) == bits(&scaled), "{queries} queries, {count} keys of {width}");
            let mut out = vec![f32::NAN; queries * width];
            let mut mixture = Mixture::new(&mut out, width);
            for (piece, values) in values.chunks(7 * width).enumerate() {
                mixture.add(&found[piece * 7..], count, values);
            }
            mixture.finish();
            let (weights, values) = (Mat::new(&found, queries, count), wide(&values));
            let expected = matmul(weights, Mat::new(&values, count, width), Threads::One);
            assert!(bits(&out) == bits(&expected), "{queries} sums of {count} rows of {width}");
        }
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }
}
