//! Kernels for generation that keep the row rule: each output row depends on that row's inputs alone, bit for bit,
//! whatever else is in the batch. Sums run over the inner dimension in one order for every batch size.

#![expect(
    clippy::inline_always,
    reason = "a body must be compiled within each instruction set's own function"
)]
#![expect(
    unsafe_code,
    reason = "functions compiled for a CPU feature may only be called where it was detected"
)]

use rayon::prelude::*;

use super::simd::multiversion;

/// Rows of the left matrix in one register tile, and of the weight: 32 x 8, or 16 x 16 for small batches.
const WIDE: usize = 32;
const NARROW: usize = 16;
/// Weight rows of one parallel task.
const TASK: usize = 64;

/// Sums of `M` rows of the left matrix with `N` rows of the weight.
type Tile<const M: usize, const N: usize> = [[f32; M]; N];

/// One tile of `w · xᵀ`: `tile[n][m] = Σ_k w[n][k] · panel[k][m]`, summed in the order of `k`.
#[inline(always)]
fn tile_body<const M: usize, const N: usize>(
    tile: &mut Tile<M, N>,
    panel: &[f32],
    weights: [&[f32]; N],
) {
    let width = panel.len() / M;
    let weights = weights.map(|row| &row[..width]);
    let mut sums = [[0.0_f32; M]; N];
    for (k, x) in panel.chunks_exact(M).enumerate() {
        for n in 0..N {
            let weight = weights[n][k];
            for m in 0..M {
                sums[n][m] = weight.mul_add(x[m], sums[n][m]);
            }
        }
    }
    *tile = sums;
}

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
    fn wide_tile(tile: &mut Tile<WIDE, 8>, panel: &[f32], weights: [&[f32]; 8]) = tile_body
}
multiversion! {
    fn narrow_tile(tile: &mut Tile<NARROW, 16>, panel: &[f32], weights: [&[f32]; 16]) = tile_body
}
multiversion! {
    /// `scores[i] = scale · query · keys[i]`; `keys` holds rows as wide as `query`.
    pub fn scores(scores: &mut [f32], query: &[f32], keys: &[f32], scale: f32) = scores_body
}
multiversion! {
    /// `out += Σ_i weights[i] · values[i]`; `values` holds rows as wide as `out`.
    pub fn mix(out: &mut [f32], weights: &[f32], values: &[f32]) = mix_body
}

/// `x · wᵀ`, the row rule kept.
///
/// # Shapes
/// - `x`: `[M, width]`, `weight`: `[N, width]`, `out`: `[M, N]`, all dense row-major
///
/// # Panics
/// Where the lengths do not fit together: the caller's shapes are wrong.
pub fn linear(out: &mut [f32], x: &[f32], weight: &[f32], width: usize) {
    let (m, n) = (x.len() / width, weight.len() / width);
    assert_eq!(out.len(), m * n, "product of {m} rows and {n} columns");
    if m == 0 || n == 0 {
        return;
    }
    if m <= NARROW {
        blocked(out, x, weight, width, narrow_tile);
    } else {
        blocked(out, x, weight, width, wide_tile);
    }
}

/// [`linear`] in tiles of one size. The size changes nothing in the sums.
fn blocked<const M: usize, const N: usize>(
    out: &mut [f32],
    x: &[f32],
    weight: &[f32],
    width: usize,
    tile: impl Fn(&mut Tile<M, N>, &[f32], [&[f32]; N]) + Sync,
) {
    let (m, n) = (x.len() / width, weight.len() / width);
    let padded = m.div_ceil(M) * M;
    let columns = transposed_panels::<M>(x, m, width);
    let mut product = vec![0.0_f32; n * padded];
    let task = |(index, out): (usize, &mut [f32])| {
        let first = index * TASK;
        let mut sums = [[0.0; M]; N];
        for (group, out) in out.chunks_mut(N * padded).enumerate() {
            let row = first + group * N;
            // Past the last row the tile repeats it; the copies are not stored.
            let rows: [&[f32]; N] =
                std::array::from_fn(|i| &weight[(row + i).min(n - 1) * width..][..width]);
            for (panel, columns) in columns.chunks_exact(width * M).enumerate() {
                tile(&mut sums, columns, rows);
                for (out, sums) in out.chunks_exact_mut(padded).zip(&sums) {
                    out[panel * M..][..M].copy_from_slice(sums);
                }
            }
        }
    };
    if m * n * width < 1 << 18 {
        product.chunks_mut(TASK * padded).enumerate().for_each(task);
    } else {
        product.par_chunks_mut(TASK * padded).enumerate().for_each(task);
    }
    untranspose(out, &product, n, padded);
}

/// `x` as panels of `M` rows, each transposed to `[width, M]` and padded with zeros.
fn transposed_panels<const M: usize>(x: &[f32], m: usize, width: usize) -> Vec<f32> {
    let mut columns = vec![0.0; m.div_ceil(M) * M * width];
    for (panel, rows) in columns.chunks_exact_mut(width * M).zip(x.chunks(M * width)) {
        for (offset, row) in rows.chunks_exact(width).enumerate() {
            for (k, value) in row.iter().enumerate() {
                panel[k * M + offset] = *value;
            }
        }
    }
    columns
}

/// `[N, padded]` to the first rows of `[M, N]`, sixteen rows at a time so that reads stay in order.
fn untranspose(out: &mut [f32], product: &[f32], n: usize, padded: usize) {
    const ROWS: usize = 16;
    let copy = |(block, out): (usize, &mut [f32])| {
        let rows = out.len() / n;
        for (column, values) in product.chunks_exact(padded).enumerate() {
            for row in 0..rows {
                out[row * n + column] = values[block * ROWS + row];
            }
        }
    };
    if out.len() < 1 << 16 {
        out.chunks_mut(ROWS * n).enumerate().for_each(copy);
    } else {
        out.par_chunks_mut(ROWS * n).enumerate().for_each(copy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_row_of_a_product_is_the_same_bits_in_every_batch() {
        let stream = Stream::new(5, "test");
        for (n, width) in [(7, 5), (96, 64), (130, 33)] {
            let weight = stream.normal(1, n * width, 1.0);
            let x = stream.normal(2, 70 * width, 1.0);
            let mut all = vec![0.0; 70 * n];
            linear(&mut all, &x, &weight, width);
            for m in [1, 3, 16, 33] {
                let mut some = vec![0.0; m * n];
                linear(&mut some, &x[..m * width], &weight, width);
                assert_eq!(some, all[..m * n], "{m} rows");
            }
            for (row, out) in all.chunks(n).enumerate() {
                for (column, value) in out.iter().enumerate() {
                    let exact: f64 = (0..width)
                        .map(|k| {
                            f64::from(x[row * width + k]) * f64::from(weight[column * width + k])
                        })
                        .sum();
                    assert!((f64::from(*value) - exact).abs() < 1e-4);
                }
            }
        }
    }

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
