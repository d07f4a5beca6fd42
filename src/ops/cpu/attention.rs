//! Forest attention on the CPU: one unit of work is one query head of one tree.
//!
//! For each segment the keys and values of its path are gathered end to end, so that a tile of queries multiplies one
//! dense block; scores exist for one tile of queries at a time, never `T × T`. The cost is proportional to the visible
//! pairs. The backward recomputes the scores from the log-sum-exp that the forward kept.

use rayon::prelude::*;

use super::element::Element;
use super::matmul::{Mat, Threads, matmul, matmul_into};
use super::simd;
use crate::ops::AttentionPlan;

/// Queries a tile.
const TILE: usize = 64;

/// Arguments of both passes. Shapes: `q` `[T, H, E]`; `k`, `v` `[T, G, E]`.
///
/// The forward's arithmetic is in f32 whatever the elements: generation repeats it row by row, to the bit. The backward
/// multiplies in the elements' type, with sums and softmax in f32: probabilities and the gradients of scores are rounded to
/// it, as FlashAttention does.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, N = f32> {
    /// Who sees whom.
    pub plan: &'a AttentionPlan,
    /// `H`.
    pub heads: usize,
    /// `G`.
    pub groups: usize,
    /// `E`.
    pub width: usize,
    /// Queries.
    pub q: &'a [N],
    /// Keys.
    pub k: &'a [N],
    /// Values.
    pub v: &'a [N],
}

/// One head's tokens of one tree, dense.
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

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    fn group(&self, head: usize) -> usize {
        head / (self.heads / self.groups)
    }

    /// Rows of the path to `span`, `span` last.
    fn path(&self, span: usize) -> Vec<std::ops::Range<usize>> {
        let mut path = self.plan.ancestors(span);
        let own = &self.plan.spans[span];
        path.push(own.start..own.start + own.len);
        path
    }
}

/// Copies one head's rows of `x` (`[T, heads, width]`) end to end.
fn gather<N: Element>(
    x: &[N],
    rows: impl Iterator<Item = usize>,
    (head, heads): (usize, usize),
    width: usize,
) -> Vec<N> {
    let mut out = Vec::new();
    for row in rows {
        out.extend_from_slice(&x[(row * heads + head) * width..][..width]);
    }
    out
}

/// Adds rows laid end to end along `path` back to where they lie in a tree that starts at `first`.
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

/// Adds the dense rows `[len, E]` of head `head` of `heads` into `out` `[T, heads, E]`.
fn spread(
    out: &mut [f32],
    rows: &[f32],
    first: usize,
    (head, heads): (usize, usize),
    width: usize,
) {
    for (offset, values) in rows.chunks_exact(width).enumerate() {
        simd::axpy(&mut out[((first + offset) * heads + head) * width..][..width], 1.0, values);
    }
}

/// Output `[T, H, E]` and log-sum-exp `[units, rows]`, units tree by tree and head by head.
pub fn forward<N: Element>(inputs: &Inputs<'_, N>) -> (Vec<N>, Vec<f32>) {
    let units = inputs.units();
    let results: Vec<(Vec<f32>, Vec<f32>)> =
        units.par_iter().map(|unit| forward_unit(inputs, unit)).collect();
    let Inputs { heads, width, .. } = *inputs;
    let mut out = vec![N::default(); inputs.q.len()];
    let mut log_sum_exp = Vec::with_capacity(inputs.plan.tokens * inputs.heads);
    for (unit, (rows, lse)) in units.iter().zip(results) {
        let (first, _) = inputs.rows(unit.tree);
        for (row, values) in (first..).zip(rows.chunks_exact(width)) {
            N::round_into(&mut out[(row * heads + unit.head) * width..][..width], values);
        }
        log_sum_exp.extend(lse);
    }
    (out, log_sum_exp)
}

fn forward_unit<N: Element>(inputs: &Inputs<'_, N>, unit: &Unit) -> (Vec<f32>, Vec<f32>) {
    let Inputs { plan, heads, groups, width, q, k, v } = *inputs;
    let (first, len) = inputs.rows(unit.tree);
    let (mut out, mut log_sum_exp) = (vec![0.0; len * width], vec![0.0; len]);
    for index in plan.trees[unit.tree].clone() {
        let span = &plan.spans[index];
        let path = inputs.path(index);
        let group = inputs.group(unit.head);
        let along = |x| gather(x, path.iter().cloned().flatten(), (group, groups), width);
        let (keys, values) = (along(k), along(v));
        let (mut wide_keys, mut wide_values, mut wide) = (Vec::new(), Vec::new(), Vec::new());
        let keys = N::widen(&keys, &mut wide_keys);
        let values = N::widen(&values, &mut wide_values);
        for tile in (0..span.len).step_by(TILE) {
            let rows = TILE.min(span.len - tile);
            let seen = span.position + tile + rows;
            let start = span.start + tile;
            let queries = gather(q, start..start + rows, (unit.head, heads), width);
            let queries = Mat::new(N::widen(&queries, &mut wide), rows, width);
            let mut scores = matmul(queries, Mat::new(keys, seen, width).t(), Threads::One);
            for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                let visible = seen - rows + row + 1;
                log_sum_exp[start - first + row] = softmax(scores, visible, inputs.scale());
            }
            let tile_out = &mut out[(start - first) * width..][..rows * width];
            matmul_into(
                tile_out,
                Mat::new(&scores, rows, seen),
                Mat::new(values, seen, width),
                false,
                Threads::One,
            );
        }
    }
    (out, log_sum_exp)
}

/// Softmax over the first `visible` scores, zeros after; returns the log-sum-exp of the scaled scores.
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
        .map(|(unit, offset)| backward_unit(inputs, unit, &log_sum_exp[offset..], (out, d_out)))
        .collect();
    let mut grads = [inputs.q, inputs.k, inputs.v].map(|x| vec![0.0; x.len()]);
    for (unit, rows) in units.iter().zip(results) {
        let (first, _) = inputs.rows(unit.tree);
        let group = inputs.group(unit.head);
        let [dq, dk, dv] = &mut grads;
        spread(dq, &rows[0], first, (unit.head, inputs.heads), inputs.width);
        spread(dk, &rows[1], first, (group, inputs.groups), inputs.width);
        spread(dv, &rows[2], first, (group, inputs.groups), inputs.width);
    }
    grads
}

fn backward_unit<N: Element>(
    inputs: &Inputs<'_, N>,
    unit: &Unit,
    log_sum_exp: &[f32],
    (out, d_out): (&[N], &[f32]),
) -> [Vec<f32>; 3] {
    let Inputs { plan, heads, groups, width, q, k, v } = *inputs;
    let (first, len) = inputs.rows(unit.tree);
    let mut grads = [(); 3].map(|()| vec![0.0; len * width]);
    for index in plan.trees[unit.tree].clone() {
        let span = &plan.spans[index];
        let path = inputs.path(index);
        let group = inputs.group(unit.head);
        let along = |x| gather(x, path.iter().cloned().flatten(), (group, groups), width);
        let (keys, values) = (along(k), along(v));
        let (mut d_keys, mut d_values) = (vec![0.0; keys.len()], vec![0.0; values.len()]);
        let mut narrowed = [(); 3].map(|()| Vec::new());
        let mut wide = Vec::new();
        for tile in (0..span.len).step_by(TILE) {
            let rows = TILE.min(span.len - tile);
            let seen = span.position + tile + rows;
            let start = span.start + tile;
            let (here, of) = (start..start + rows, (unit.head, heads));
            let queries = gather(q, here.clone(), of, width);
            let out_tile = gather(out, here.clone(), of, width);
            let out_tile = N::widen(&out_tile, &mut wide);
            let d_out = &gather(d_out, here, of, width);
            let [narrow_d, narrow_scores, narrow_probs] = &mut narrowed;
            let (queries, d_tile) = (Mat::new(&queries, rows, width), N::narrow(d_out, narrow_d));
            let d_tile = Mat::new(d_tile, rows, width);
            let keys = Mat::new(&keys, seen, width);
            let mut scores = matmul(queries, keys.t(), Threads::One);
            let d_probs = matmul(d_tile, Mat::new(&values, seen, width).t(), Threads::One);
            let mut probs = vec![0.0; rows * seen];
            for row in 0..rows {
                let visible = seen - rows + row + 1;
                let at = row * width..(row + 1) * width;
                let mean = simd::dot(&out_tile[at.clone()], &d_out[at]);
                let cells = row * seen..row * seen + visible;
                let constants = [log_sum_exp[start - first + row], mean, inputs.scale()];
                simd::scale(&mut scores[cells.clone()], inputs.scale());
                simd::softmax_grad(
                    &mut scores[cells.clone()],
                    &d_probs[cells.clone()],
                    &mut probs[cells],
                    constants,
                );
                scores[row * seen + visible..(row + 1) * seen].fill(0.0);
            }
            let d_scores = Mat::new(N::narrow(&scores, narrow_scores), rows, seen);
            let probs = Mat::new(N::narrow(&probs, narrow_probs), rows, seen);
            let d_queries = &mut grads[0][(start - first) * width..][..rows * width];
            matmul_into(d_queries, d_scores, keys, false, Threads::One);
            matmul_into(&mut d_keys[..seen * width], d_scores.t(), queries, true, Threads::One);
            matmul_into(&mut d_values[..seen * width], probs.t(), d_tile, true, Threads::One);
        }
        scatter(&mut grads[1], &d_keys, &path, first, width);
        scatter(&mut grads[2], &d_values, &path, first, width);
    }
    grads
}
