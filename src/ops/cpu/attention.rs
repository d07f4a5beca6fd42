//! Forest attention on the CPU: a unit of work is one query head of one tree.
//!
//! For each segment the keys and values of its path are gathered contiguously, so that a tile of queries multiplies one
//! dense block; scores exist for one tile of queries at a time, never as `T × T`. The cost is proportional to the
//! visible pairs. The backward recomputes the scores from the log-sum-exp kept by the forward.

use rayon::prelude::*;

use super::element::Element;
use super::matmul::{Mat, Threads, matmul_into};
use super::packed::Packed;
use super::simd;
use crate::ops::AttentionPlan;

/// Queries per tile: a multiple of every kernel's tile rows.
const TILE: usize = 48;
/// Tokens assembled per task.
const ROWS: usize = 64;

/// Arguments of both passes. Shapes: `q` `[T, H, E]`; `k`, `v` `[T, G, E]`.
///
/// The forward computes in f32 for all dtypes, since generation reproduces it row by row, bit for bit. The backward
/// multiplies in the element type, with sums and softmax in f32: probabilities and score gradients are rounded to it,
/// as in FlashAttention.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, N = f32> {
    /// The attention mask.
    pub plan: &'a AttentionPlan,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key/value heads, `G`.
    pub groups: usize,
    /// Head dimension, `E`.
    pub width: usize,
    /// Queries.
    pub q: &'a [N],
    /// Keys.
    pub k: &'a [N],
    /// Values.
    pub v: &'a [N],
}

/// One head's tokens of one tree, contiguous.
struct Unit {
    tree: usize,
    head: usize,
}

impl<N: Element> Inputs<'_, N> {
    fn units(&self) -> Vec<Unit> {
        let trees = self.plan.trees.len();
        (0..trees).flat_map(|tree| (0..self.heads).map(move |head| Unit { tree, head })).collect()
    }

    /// First row and number of rows of a tree.
    fn rows(&self, tree: usize) -> (usize, usize) {
        let spans = &self.plan.spans[self.plan.trees[tree].clone()];
        (spans[0].start, spans.iter().map(|span| span.len).sum())
    }

    /// First unit and first row of each token's tree.
    fn homes(&self) -> Vec<(usize, usize)> {
        let mut homes = vec![(0, 0); self.plan.tokens];
        for tree in 0..self.plan.trees.len() {
            let (first, len) = self.rows(tree);
            homes[first..first + len].fill((tree * self.heads, first));
        }
        homes
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    fn group(&self, head: usize) -> usize {
        head / (self.heads / self.groups)
    }

    /// Rows of the path to `span`, ending with `span`.
    fn path(&self, span: usize) -> Vec<std::ops::Range<usize>> {
        let mut path = self.plan.ancestors(span);
        let own = &self.plan.spans[span];
        path.push(own.start..own.start + own.len);
        path
    }
}

/// Copies one head's rows of `x` (`[T, heads, width]`) contiguously.
fn gather<N: Element>(
    out: &mut Vec<N>,
    x: &[N],
    rows: impl Iterator<Item = usize>,
    (head, heads): (usize, usize),
    width: usize,
) {
    out.clear();
    for row in rows {
        out.extend_from_slice(&x[(row * heads + head) * width..][..width]);
    }
}

/// Adds contiguous rows along `path` back to their locations in a tree that starts at `first`.
fn scatter(
    out: &mut [f32],
    rows: &[f32],
    path: &[std::ops::Range<usize>],
    first: usize,
    width: usize,
) {
    for (row, values) in path.iter().cloned().flatten().zip(rows.chunks_exact(width)) {
        simd::axpy(&mut out[(row - first) * width..][..width], 1.0, values);
    }
}

/// Memory a thread reuses across units.
#[derive(Default)]
struct Scratch<N> {
    keys: Vec<N>,
    values: Vec<N>,
    queries: Vec<N>,
    out: Vec<N>,
    d_out: Vec<f32>,
    scores: Vec<f32>,
    d_probs: Vec<f32>,
    probs: Vec<f32>,
    wide: [Vec<f32>; 2],
    narrow: [Vec<N>; 3],
}

/// Output `[T, H, E]` and log-sum-exp `[units, rows]`, ordered by tree and head.
pub fn forward<N: Element>(inputs: &Inputs<'_, N>) -> (Vec<N>, Vec<f32>) {
    let units = inputs.units();
    let results: Vec<(Vec<f32>, Vec<f32>)> = units
        .par_iter()
        .map_init(Scratch::default, |scratch, unit| forward_unit(inputs, unit, scratch))
        .collect();
    let Inputs { heads, width, .. } = *inputs;
    let homes = inputs.homes();
    let mut out = vec![N::default(); inputs.q.len()];
    let rows = out.par_chunks_mut(heads * width).zip(homes).enumerate().with_min_len(ROWS);
    rows.for_each(|(row, (out, (unit, first)))| {
        for (head, out) in out.chunks_exact_mut(width).enumerate() {
            N::round_into(out, &results[unit + head].0[(row - first) * width..][..width]);
        }
    });
    let log_sum_exp = results.into_iter().flat_map(|(_, lse)| lse).collect();
    (out, log_sum_exp)
}

fn forward_unit<N: Element>(
    inputs: &Inputs<'_, N>,
    unit: &Unit,
    scratch: &mut Scratch<N>,
) -> (Vec<f32>, Vec<f32>) {
    let Inputs { plan, heads, groups, width, q, k, v } = *inputs;
    let Scratch { keys, values, queries, scores, wide: [wide, wide_values], .. } = scratch;
    let (first, len) = inputs.rows(unit.tree);
    let (mut out, mut log_sum_exp) = (vec![0.0; len * width], vec![0.0; len]);
    for index in plan.trees[unit.tree].clone() {
        let span = &plan.spans[index];
        let path = inputs.path(index);
        let of = (inputs.group(unit.head), groups);
        gather(keys, k, path.iter().cloned().flatten(), of, width);
        gather(values, v, path.iter().cloned().flatten(), of, width);
        let all = keys.len() / width;
        let keys = Packed::new(Mat::new(N::widen(keys, wide), all, width).t());
        let values = Packed::new(Mat::new(N::widen(values, wide_values), all, width));
        for tile in (0..span.len).step_by(TILE) {
            let rows = TILE.min(span.len - tile);
            let seen = span.position + tile + rows;
            let start = span.start + tile;
            gather(queries, q, start..start + rows, (unit.head, heads), width);
            let tile_queries = Mat::new(N::widen(queries, wide), rows, width);
            scores.resize(rows * seen, 0.0);
            keys.product_into(scores, tile_queries, seen);
            for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                let visible = seen - rows + row + 1;
                log_sum_exp[start - first + row] = softmax(scores, visible, inputs.scale());
            }
            let tile_out = &mut out[(start - first) * width..][..rows * width];
            values.product_into(tile_out, Mat::new(scores, rows, seen), width);
        }
    }
    (out, log_sum_exp)
}

/// Softmax over the first `visible` scores, zeros after them; returns the log-sum-exp of the scaled scores.
fn softmax(scores: &mut [f32], visible: usize, scale: f32) -> f32 {
    let (seen, hidden) = scores.split_at_mut(visible);
    simd::scale(seen, scale);
    let max = simd::max(seen);
    let sum = simd::exp_sub(seen, max);
    simd::scale(seen, 1.0 / sum);
    hidden.fill(0.0);
    max + sum.ln()
}

/// Gradients of q `[T, H, E]`, k and v `[T, G, E]`.
pub fn backward<N: Element>(
    inputs: &Inputs<'_, N>,
    log_sum_exp: &[f32],
    out: &[N],
    d_out: &[f32],
) -> [Vec<f32>; 3] {
    let units = inputs.units();
    let mut offset = 0;
    let offsets: Vec<usize> = units
        .iter()
        .map(|unit| {
            offset += inputs.rows(unit.tree).1;
            offset - inputs.rows(unit.tree).1
        })
        .collect();
    let results: Vec<[Vec<f32>; 3]> = units
        .par_iter()
        .zip(offsets)
        .map_init(Scratch::default, |scratch, (unit, offset)| {
            backward_unit(inputs, unit, (&log_sum_exp[offset..], out, d_out), scratch)
        })
        .collect();
    together(inputs, &results)
}

/// Scatters the units' gradients; a key's are summed over the query heads that share it.
fn together<N: Element>(inputs: &Inputs<'_, N>, results: &[[Vec<f32>; 3]]) -> [Vec<f32>; 3] {
    let Inputs { heads, groups, width, .. } = *inputs;
    let homes = inputs.homes();
    let mut grads = [inputs.q, inputs.k, inputs.v].map(|x| vec![0.0; x.len()]);
    let [dq, dk, dv] = &mut grads;
    let keys = dk.par_chunks_mut(groups * width).zip(dv.par_chunks_mut(groups * width));
    let rows = dq.par_chunks_mut(heads * width).zip(keys).zip(homes).enumerate();
    rows.with_min_len(ROWS).for_each(|(row, ((dq, (dk, dv)), (unit, first)))| {
        let of = |head: usize, which: usize| {
            &results[unit + head][which][(row - first) * width..][..width]
        };
        for head in 0..heads {
            dq[head * width..][..width].copy_from_slice(of(head, 0));
            let at = inputs.group(head) * width;
            simd::axpy(&mut dk[at..][..width], 1.0, of(head, 1));
            simd::axpy(&mut dv[at..][..width], 1.0, of(head, 2));
        }
    });
    grads
}

fn backward_unit<N: Element>(
    inputs: &Inputs<'_, N>,
    unit: &Unit,
    (log_sum_exp, out, d_out): (&[f32], &[N], &[f32]),
    scratch: &mut Scratch<N>,
) -> [Vec<f32>; 3] {
    let Inputs { plan, heads, groups, width, q, k, v } = *inputs;
    let (first, len) = inputs.rows(unit.tree);
    let mut grads = [(); 3].map(|()| vec![0.0; len * width]);
    for index in plan.trees[unit.tree].clone() {
        let span = &plan.spans[index];
        let path = inputs.path(index);
        let of = (inputs.group(unit.head), groups);
        gather(&mut scratch.keys, k, path.iter().cloned().flatten(), of, width);
        gather(&mut scratch.values, v, path.iter().cloned().flatten(), of, width);
        let all = scratch.keys.len() / width;
        let keys = Mat::new(&scratch.keys, all, width);
        let turned = [keys, Mat::new(&scratch.values, all, width)].map(|x| Packed::new(x.t()));
        let keys = Packed::new(keys);
        let (mut d_keys, mut d_values) = (vec![0.0; all * width], vec![0.0; all * width]);
        for tile in (0..span.len).step_by(TILE) {
            let rows = TILE.min(span.len - tile);
            let seen = span.position + tile + rows;
            let start = span.start + tile;
            let (here, of) = (start..start + rows, (unit.head, heads));
            gather(&mut scratch.queries, q, here.clone(), of, width);
            gather(&mut scratch.out, out, here.clone(), of, width);
            gather(&mut scratch.d_out, d_out, here, of, width);
            let lse = &log_sum_exp[start - first..][..rows];
            scratch.grad_of_scores(&turned, (seen, width), lse, inputs.scale());
            let Scratch { queries, d_out, scores, probs, narrow: [d, ds, p], .. } = scratch;
            let (queries, d_out) = (Mat::new(queries, rows, width), N::narrow(d_out, d));
            let d_scores = Mat::new(N::narrow(scores, ds), rows, seen);
            let (probs, d_out) = (N::narrow(probs, p), Mat::new(d_out, rows, width));
            let probs = Mat::new(probs, rows, seen);
            let d_queries = &mut grads[0][(start - first) * width..][..rows * width];
            keys.product_into(d_queries, d_scores, width);
            matmul_into(&mut d_keys[..seen * width], d_scores.t(), queries, true, Threads::One);
            matmul_into(&mut d_values[..seen * width], probs.t(), d_out, true, Threads::One);
        }
        scatter(&mut grads[1], &d_keys, &path, first, width);
        scatter(&mut grads[2], &d_values, &path, first, width);
    }
    grads
}

impl<N: Element> Scratch<N> {
    /// Computes `probs` and, in `scores`, the score gradients of the tile's queries, from keys and values as columns.
    fn grad_of_scores(
        &mut self,
        [keys, values]: &[Packed<N>; 2],
        (seen, width): (usize, usize),
        log_sum_exp: &[f32],
        scale: f32,
    ) {
        let rows = log_sum_exp.len();
        let Self { queries, out, d_out, scores, d_probs, probs, wide: [wide, _], .. } = self;
        let [narrow_d, ..] = &mut self.narrow;
        for buffer in [&mut *scores, d_probs, probs] {
            buffer.resize(rows * seen, 0.0);
        }
        keys.product_into(scores, Mat::new(queries, rows, width), seen);
        let d_tile = Mat::new(N::narrow(d_out, narrow_d), rows, width);
        values.product_into(d_probs, d_tile, seen);
        let out = N::widen(out, wide);
        for (row, log_sum_exp) in log_sum_exp.iter().enumerate() {
            let visible = seen - rows + row + 1;
            let at = row * width..(row + 1) * width;
            let mean = simd::dot(&out[at.clone()], &d_out[at]);
            let row = row * seen..(row + 1) * seen;
            let (scores, hidden) = scores[row.clone()].split_at_mut(visible);
            let (probs, hidden_probs) = probs[row.clone()].split_at_mut(visible);
            simd::scale(scores, scale);
            let constants = [*log_sum_exp, mean, scale];
            simd::softmax_grad(scores, &d_probs[row][..visible], probs, constants);
            hidden.fill(0.0);
            hidden_probs.fill(0.0);
        }
    }
}
