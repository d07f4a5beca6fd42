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

#[inline(always)]
fn mix_body(out: &mut [f32], weights: &[f32], values: &[f32]) {
    for (weight, value) in weights.iter().zip(values.chunks_exact(out.len())) {
        for (out, value) in out.iter_mut().zip(value) {
            *out = weight.mul_add(*value, *out);
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
