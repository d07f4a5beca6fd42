//! Attention of single rows, for generation. Sums run in one order whatever else is in the batch.

#![expect(
    clippy::inline_always,
    reason = "a body must be compiled within each instruction set's own function"
)]
#![expect(
    unsafe_code,
    reason = "functions compiled for a CPU feature may only be called where it was detected"
)]

use super::simd::multiversion;

#[inline(always)]
fn scores_body(scores: &mut [f32], query: &[f32], keys: &[f32], scale: f32) {
    let width = query.len();
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
        let mut lanes = [0.0_f32; 16];
        let (query_chunks, key_chunks) = (query.chunks_exact(16), key.chunks_exact(16));
        let mut rest = 0.0_f32;
        for (a, b) in query_chunks.remainder().iter().zip(key_chunks.remainder()) {
            rest = a.mul_add(*b, rest);
        }
        for (a, b) in query_chunks.zip(key_chunks) {
            for i in 0..16 {
                lanes[i] = a[i].mul_add(b[i], lanes[i]);
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        *score = (lanes[0] + rest) * scale;
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
    /// `scores[i] = scale · query · keys[i]`; `keys` holds rows as wide as `query`.
    pub fn scores(scores: &mut [f32], query: &[f32], keys: &[f32], scale: f32) = scores_body
}
multiversion! {
    /// `out += Σ_i weights[i] · values[i]`; `values` holds rows as wide as `out`.
    pub fn mix(out: &mut [f32], weights: &[f32], values: &[f32]) = mix_body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_and_mixtures_follow_their_definitions() {
        let query: Vec<f32> = (0..18).map(|i| i as f32 * 0.1).collect();
        let keys: Vec<f32> = (0..54).map(|i| 1.0 - i as f32 * 0.02).collect();
        let mut found = [0.0; 3];
        scores(&mut found, &query, &keys, 0.5);
        for (i, found) in found.iter().enumerate() {
            let exact: f32 = (0..18).map(|k| query[k] * keys[i * 18 + k]).sum();
            assert!((found - exact * 0.5).abs() < 1e-5);
        }
        let mut out = [1.0, 2.0];
        mix(&mut out, &[2.0, -1.0], &[1.0, 1.0, 0.5, 3.0]);
        assert!((out[0] - 2.5).abs() < 1e-6 && (out[1] - 1.0).abs() < 1e-6);
    }
}
