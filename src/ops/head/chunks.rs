//! The head on the CPU: our products, and rows of logits in place.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::anchor::diverge;
use super::{Detail, Grads, Pass, Readings, RowStats, Rows, TOP, entropy_among, log_of_sum};
use crate::ops::cpu::{
    self, Element,
    matmul::{Mat, Threads, matmul, matmul_into},
    simd,
};

/// Contiguous inputs on the CPU.
struct Dense<'a, E> {
    h: &'a [f32],
    w: &'a [E],
    t: usize,
    width: usize,
    vocab: usize,
}

impl<E: Element> Dense<'_, E> {
    /// Some of the hidden rows, in the weight's type.
    fn rows(&self, rows: &[u32]) -> Vec<E> {
        let mut x = Vec::with_capacity(rows.len() * self.width);
        for &row in rows {
            x.extend_from_slice(&self.h[row as usize * self.width..][..self.width]);
        }
        E::rounded(x)
    }
}

pub(super) fn on_cpu<E: Element>(
    (hidden, weight): (&Tensor, &Tensor),
    rows: &Rows,
    pass: Pass<'_>,
) -> Result<(Readings, Grads)> {
    with_dense::<E, _>((hidden, weight), |inputs| match pass.anchor {
        None => by_chunks(inputs, rows, (pass, None)),
        Some(anchor) => with_dense((&anchor.hidden, &anchor.weight), |beside| {
            by_chunks(inputs, rows, (pass, Some(beside)))
        }),
    })
}

fn with_dense<E: Element, R>(
    (hidden, weight): (&Tensor, &Tensor),
    run: impl FnOnce(&Dense<'_, E>) -> Result<R>,
) -> Result<R> {
    let ((t, width), vocab) = (hidden.dims2()?, weight.dim(0)?);
    cpu::with_slice(hidden, |h| {
        cpu::with_slice::<E, _>(weight, |w| run(&Dense { h, w, t, width, vocab }))
    })??
}

/// Products in the weight's type, logits and their softmax in f32.
fn by_chunks<E: Element>(
    inputs: &Dense<'_, E>,
    rows: &Rows,
    (pass, beside): (Pass<'_>, Option<&Dense<'_, E>>),
) -> Result<(Readings, Grads)> {
    let Dense { w, t, width, vocab, .. } = *inputs;
    let mut readings = Readings::zeros(rows.order.len(), pass.detail);
    let mut d_hidden = pass.gradient.map(|_| vec![0.0; t * width]);
    let mut d_weight =
        pass.gradient.and_then(|(_, wanted)| wanted.then(|| vec![0.0; vocab * width]));
    let weight = Mat::new(w, vocab, width);
    let chunk = Rows::chunk(vocab);
    for first in (0..rows.hidden.len()).step_by(chunk) {
        let slots = first..(first + chunk).min(rows.hidden.len());
        let x = inputs.rows(&rows.hidden[slots.clone()]);
        let x = Mat::new(&x, slots.len(), width);
        let mut logits = matmul(x, weight.t(), Threads::All);
        let mut anchors = beside.map(|beside| {
            let x = beside.rows(&rows.hidden[slots.clone()]);
            let head = Mat::new(beside.w, vocab, beside.width);
            matmul(Mat::new(&x, slots.len(), beside.width), head.t(), Threads::All)
        });
        let of_rows = logits.par_chunks_mut(vocab).zip(slots.clone());
        let found: Vec<OfRow> = match &mut anchors {
            None => of_rows.map(|(row, slot)| row_on_cpu(row, rows.targets(slot), pass)).collect(),
            Some(anchors) => of_rows
                .zip(anchors.par_chunks_mut(vocab))
                .map(|((row, slot), anchor)| row_beside(row, anchor, rows.targets(slot), pass))
                .collect(),
        };
        for (slot, (logps, row)) in slots.clone().zip(found) {
            for (&(index, _), logp) in rows.targets(slot).iter().zip(logps) {
                readings.set(index, logp, row);
            }
        }
        let Some(d_hidden) = &mut d_hidden else { continue };
        let d_logits = E::rounded_from(&logits);
        let d_logits = Mat::new(&d_logits, slots.len(), vocab);
        let d_x = matmul(d_logits, weight, Threads::All);
        for (&row, d_x) in rows.hidden[slots].iter().zip(d_x.chunks_exact(width)) {
            d_hidden[row as usize * width..][..width].copy_from_slice(d_x);
        }
        if let Some(d_weight) = &mut d_weight {
            matmul_into(d_weight, d_logits.t(), x, true, Threads::All);
        }
    }
    let device = candle_core::Device::Cpu;
    let grads = match d_hidden {
        Some(d_hidden) => {
            let d_weight =
                d_weight.map(|d| Tensor::from_vec(d, (vocab, width), &device)).transpose()?;
            Some((Tensor::from_vec(d_hidden, (t, width), &device)?, d_weight))
        }
        None => None,
    };
    Ok((readings, grads))
}

/// The log-probabilities of a row's targets, and what else is read of it.
type OfRow = (Vec<f32>, Option<RowStats>);

/// [`row_on_cpu`] beside an anchor's row, which is overwritten: reads the divergence too, and adds its gradient.
fn row_beside(
    logits: &mut [f32],
    anchor: &mut [f32],
    targets: &[(usize, u32)],
    pass: Pass<'_>,
) -> OfRow {
    let divergence = diverge(logits, anchor);
    let (logps, stats) = row_on_cpu(logits, targets, pass);
    let slope = pass.anchor.map_or(0.0, |anchor| anchor.slope_of_row(targets));
    if pass.gradient.is_some() {
        simd::axpy(logits, -slope, anchor);
    }
    (logps, stats.map(|stats| RowStats { divergence, ..stats }))
}

/// Reads one row's targets; where a gradient is asked for, turns the logits into `d logits` in place:
/// `Σ_n d_n · onehot(id_n)` and the two parts of [`Slopes::of_row`].
fn row_on_cpu(logits: &mut [f32], targets: &[(usize, u32)], pass: Pass<'_>) -> OfRow {
    let (max, vocab) = (simd::max(logits), logits.len());
    let picked: Vec<f32> = targets.iter().map(|&(_, id)| logits[id as usize]).collect();
    let moments = (pass.detail >= Detail::Rows).then(|| simd::moments(logits, max));
    let top = if pass.detail == Detail::Top { entropy_among(&largest(logits)) } else { 0.0 };
    let sum = match (pass.gradient, moments) {
        (Some(_), _) => simd::exp_sub(logits, max),
        (None, Some([sum, ..])) => sum,
        (None, None) => simd::sum_exp_sub(logits, max),
    };
    let log_sum_exp = log_of_sum(max, sum);
    if let Some((slopes, _)) = pass.gradient {
        let (softmax, one) = slopes.of_row(targets, log_sum_exp, vocab);
        // An anchor's divergence has the softmax in its gradient too.
        let softmax = softmax + pass.anchor.map_or(0.0, |anchor| anchor.slope_of_row(targets));
        simd::scale(logits, softmax / sum);
        if slopes.mean_logp != 0.0 {
            for logit in logits.iter_mut() {
                *logit += one;
            }
        }
        for &(index, id) in targets {
            logits[id as usize] += slopes.d_logps[index];
        }
    }
    let stats = moments.map(|[sum, first, squares, plain]| RowStats {
        log_sum_exp,
        mean_logit: max + plain / vocab as f32,
        entropy: sum.ln() - first / sum,
        log_sum_squares: squares.ln() - 2.0 * sum.ln(),
        best_logp: max - log_sum_exp,
        top_entropy: top,
        divergence: 0.0,
    });
    (picked.into_iter().map(|logit| logit - log_sum_exp).collect(), stats)
}

/// The [`TOP`] largest values in no order, or all where there are fewer.
fn largest(logits: &[f32]) -> Vec<f32> {
    /// Values that are passed over at once where none is large enough.
    const PIECE: usize = 256;
    let (first, rest) = logits.split_at(TOP.min(logits.len()));
    let mut found = first.to_vec();
    let least = |found: &[f32]| {
        let places = found.iter().copied().enumerate();
        places.min_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap_or((0, f32::NEG_INFINITY))
    };
    let (mut place, mut bound) = least(&found);
    for piece in rest.chunks(PIECE).filter(|piece| !piece.is_empty()) {
        if simd::max(piece) <= bound {
            continue;
        }
        for &logit in piece {
            if logit > bound {
                found[place] = logit;
                (place, bound) = least(&found);
            }
        }
    }
    found
}
