//! Attention of single rows, for generation, in the order of summation of [`matmul`](super::matmul): a row that is
//! drawn has the bits that training gives it.

#![expect(
    clippy::inline_always,
    reason = "a body must be compiled within each instruction set's own function"
)]
#![expect(
    unsafe_code,
    reason = "functions compiled for a CPU feature may only be called where it was detected"
)]

use super::kernel::KC;
use super::simd::{self, multiversion};

/// Keys that lie side by side: `[E, TILE]` is one tile.
pub const TILE: usize = 16;

/// Calls for the cache line at any address, into the second-level cache.
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

/// The same for numbers that are read soon.
#[inline]
pub fn call_for_all<E>(numbers: &[E]) {
    const LINE: usize = 64;
    let first: *const u8 = numbers.as_ptr().cast();
    (0..size_of_val(numbers)).step_by(LINE).for_each(|at| call_for(first.wrapping_add(at)));
}

#[inline(always)]
fn scores_body(scores: &mut [f32], query: &[f32], tile: &[f32], scale: f32) {
    let mut total = [0.0_f32; TILE];
    for (block, (query, keys)) in query.chunks(KC).zip(tile.chunks(KC * TILE)).enumerate() {
        let mut sums = [0.0_f32; TILE];
        for (value, keys) in query.iter().zip(keys.chunks_exact(TILE)) {
            for i in 0..TILE {
                sums[i] = value.mul_add(keys[i], sums[i]);
            }
        }
        for i in 0..TILE {
            total[i] = if block == 0 { sums[i] } else { total[i] + sums[i] };
        }
    }
    for (score, sum) in scores.iter_mut().zip(total) {
        *score = sum * scale;
    }
}

/// The same for `N` queries, which share the reading of the keys.
#[inline(always)]
fn many_body<const N: usize>(
    scores: &mut [[f32; TILE]],
    queries: &[f32],
    tile: &[f32],
    scale: f32,
) {
    let width = tile.len() / TILE;
    let mut totals = [[0.0_f32; TILE]; N];
    for (block, keys) in tile.chunks(KC * TILE).enumerate() {
        let mut sums = [[0.0_f32; TILE]; N];
        for (e, keys) in keys.chunks_exact(TILE).enumerate() {
            for (n, sums) in sums.iter_mut().enumerate() {
                let value = queries[n * width + block * KC + e];
                for i in 0..TILE {
                    sums[i] = value.mul_add(keys[i], sums[i]);
                }
            }
        }
        for (total, sums) in totals.iter_mut().zip(sums) {
            for i in 0..TILE {
                total[i] = if block == 0 { sums[i] } else { total[i] + sums[i] };
            }
        }
    }
    for (scores, total) in scores.iter_mut().zip(totals) {
        for i in 0..TILE {
            scores[i] = total[i] * scale;
        }
    }
}

#[inline(always)]
fn two_body(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) {
    many_body::<2>(scores, queries, tile, scale);
}

#[inline(always)]
fn three_body(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) {
    many_body::<3>(scores, queries, tile, scale);
}

#[inline(always)]
fn four_body(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) {
    many_body::<4>(scores, queries, tile, scale);
}

/// Columns of a mixture that stay in registers.
const COLUMNS: usize = 32;

#[inline(always)]
fn mix_body(out: &mut [f32], weights: &[f32], values: &[f32]) {
    let width = out.len();
    let mut chunks = out.chunks_exact_mut(COLUMNS);
    let mut first = 0;
    for out in &mut chunks {
        let mut sums = [0.0_f32; COLUMNS];
        sums.copy_from_slice(out);
        for (weight, value) in weights.iter().zip(values.chunks_exact(width)) {
            let value = &value[first..first + COLUMNS];
            for i in 0..COLUMNS {
                sums[i] = weight.mul_add(value[i], sums[i]);
            }
        }
        out.copy_from_slice(&sums);
        first += COLUMNS;
    }
    let rest = chunks.into_remainder();
    for (weight, value) in weights.iter().zip(values.chunks_exact(width)) {
        for (out, value) in rest.iter_mut().zip(&value[first..]) {
            *out = weight.mul_add(*value, *out);
        }
    }
}

multiversion! {
    fn two(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) = two_body
}
multiversion! {
    fn three(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) = three_body
}
multiversion! {
    fn four(scores: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) = four_body
}

/// [`scores`] of several queries `[N, E]` for all keys of a tile, the same bits.
///
/// # Panics
/// Where the queries are not as wide as the keys: the caller's shapes are wrong.
pub fn scores_of_many(out: &mut [[f32; TILE]], queries: &[f32], tile: &[f32], scale: f32) {
    let width = tile.len() / TILE;
    assert_eq!(out.len() * width, queries.len(), "queries of another width");
    for (out, queries) in out.chunks_mut(4).zip(queries.chunks(4 * width)) {
        match out.len() {
            4 => four(out, queries, tile, scale),
            3 => three(out, queries, tile, scale),
            2 => two(out, queries, tile, scale),
            _ => scores(&mut out[0], queries, tile, scale),
        }
    }
}

multiversion! {
    /// `scores[i] = scale · query · key i`, for at most [`TILE`] keys that lie transposed in `tile`, `[E, TILE]`.
    pub fn scores(scores: &mut [f32], query: &[f32], tile: &[f32], scale: f32) = scores_body
}
multiversion! {
    /// `out += Σ_i weights[i] · values[i]`; `values` holds rows as wide as `out`.
    fn mix(out: &mut [f32], weights: &[f32], values: &[f32]) = mix_body
}

/// A weighted sum of rows that come piece by piece, in the order of summation of a product.
#[derive(Debug)]
pub struct Mixture<'a> {
    out: &'a mut [f32],
    block: Vec<f32>,
    rows: usize,
}

impl<'a> Mixture<'a> {
    /// An empty sum, to be written to `out`.
    pub fn new(out: &'a mut [f32]) -> Self {
        out.fill(0.0);
        Self { block: vec![0.0; out.len()], out, rows: 0 }
    }

    /// Adds rows with their weights.
    pub fn add(&mut self, mut weights: &[f32], mut values: &[f32]) {
        while !weights.is_empty() {
            let take = (KC - self.rows % KC).min(weights.len());
            let (now, later) = weights.split_at(take);
            let (now_values, later_values) = values.split_at(take * self.out.len());
            mix(&mut self.block, now, now_values);
            self.rows += take;
            if self.rows.is_multiple_of(KC) {
                self.close_block();
            }
            (weights, values) = (later, later_values);
        }
    }

    /// Adds what the last block has.
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
    use super::super::matmul::{Mat, Threads, matmul};
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn scores_and_mixtures_are_a_products_bit_for_bit() {
        let stream = Stream::new(3, "rows");
        for (count, width) in [(1, 4), (16, 18), (40, 64), (700, 300)] {
            let (keys, values) =
                (stream.normal(1, count * width, 1.0), stream.normal(2, count * width, 1.0));
            let query = stream.normal(3, width, 1.0);
            let mut found = vec![0.0; count];
            for (tile, found) in found.chunks_mut(TILE).enumerate() {
                let mut keys_here = vec![0.0; width * TILE];
                for (i, key) in keys.chunks(width).skip(tile * TILE).take(TILE).enumerate() {
                    key.iter().enumerate().for_each(|(e, key)| keys_here[e * TILE + i] = *key);
                }
                scores(found, &query, &keys_here, 0.5);
            }
            let expected =
                matmul(Mat::new(&query, 1, width), Mat::new(&keys, count, width).t(), Threads::One);
            let queries = stream.normal(4, 7 * width, 1.0);
            let tile = stream.normal(5, width * TILE, 1.0);
            let mut together = [[f32::NAN; TILE]; 7];
            scores_of_many(&mut together, &queries, &tile, 0.25);
            for (together, query) in together.iter().zip(queries.chunks(width)) {
                let mut alone = [f32::NAN; TILE];
                scores(&mut alone, query, &tile, 0.25);
                assert!(together.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
            let scaled: Vec<f32> = expected.iter().map(|sum| sum * 0.5).collect();
            assert!(found == scaled);
            let mut out = vec![f32::NAN; width];
            let mut mixture = Mixture::new(&mut out);
            for (weights, values) in found.chunks(7).zip(values.chunks(7 * width)) {
                mixture.add(weights, values);
            }
            mixture.finish();
            let weights = Mat::new(&found, 1, count);
            assert!(out == matmul(weights, Mat::new(&values, count, width), Threads::One));
        }
    }
}
