//! A frozen model beside the one in training: each row's distribution over the vocabulary is compared with its own.

use candle_core::{DType, Result, Tensor, bail};

use super::log_sum_exp;
use crate::ops::cpu::simd;

/// A model to stay close to. With `q` its distribution in a row and `p` that of the model in training, the row's
/// divergence is `KL(q‖p) = Σ q (ln q − ln p)` over the whole vocabulary, and its gradient by the logits `p − q`.
#[derive(Clone, Debug)]
pub struct Anchor {
    /// Its hidden states, `[T, D']`.
    pub hidden: Tensor,
    /// Its head's weight, `[V, D']`.
    pub weight: Tensor,
    /// The slope of each target's divergence, `[N]`; empty where nothing but the divergence is read.
    pub slopes: Vec<f32>,
}

impl Anchor {
    /// The same, detached, contiguous and in the types of the model beside it.
    pub(super) fn beside(&self, hidden: &Tensor, weight: &Tensor, targets: usize) -> Result<Self> {
        let Self { hidden: own, weight: head, slopes } = self;
        if own.dim(0)? != hidden.dim(0)? || head.dim(0)? != weight.dim(0)? {
            bail!(
                "an anchor of {} rows and {} ids is beside {} rows and {} ids",
                own.dim(0)?,
                head.dim(0)?,
                hidden.dim(0)?,
                weight.dim(0)?
            );
        }
        if ![0, targets].contains(&slopes.len()) {
            bail!("{} slopes of divergences for {targets} targets", slopes.len());
        }
        let like = |x: &Tensor, dtype: DType| x.detach().to_dtype(dtype)?.contiguous();
        Ok(Self {
            hidden: like(own, hidden.dtype())?,
            weight: like(head, weight.dtype())?,
            slopes: slopes.clone(),
        })
    }

    /// The slope of a row's divergence: the sum of those of its targets.
    pub(super) fn slope_of_row(&self, targets: &[(usize, u32)]) -> f32 {
        targets.iter().filter_map(|&(index, _)| self.slopes.get(index)).sum()
    }
}

/// `KL(q‖p)` of a row of logits of `p` from one of `q`, in whose place `q` itself is left. Exactly 0 where both rows are
/// the same.
pub(super) fn diverge(logits: &[f32], anchor: &mut [f32]) -> f32 {
    /// Elements at a time, so that what is read twice is still in the nearest cache.
    const PIECE: usize = 1024;
    let (log_p, log_q) = (log_sum_exp(logits), log_sum_exp(anchor));
    let mut gaps = [0.0; PIECE];
    let mut sum = 0.0;
    for (x, a) in logits.chunks(PIECE).zip(anchor.chunks_mut(PIECE)) {
        let gaps = &mut gaps[..x.len()];
        for ((gap, x), a) in gaps.iter_mut().zip(x).zip(a.iter()) {
            *gap = (a - log_q) - (x - log_p);
        }
        simd::exp_sub(a, log_q);
        sum += f64::from(simd::dot(a, gaps));
    }
    sum as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::random;

    #[test]
    fn divergence_matches_its_definition_and_is_zero_from_itself() {
        let rows = random(3, (2, 2500)).to_vec2::<f32>().unwrap();
        let wide: Vec<Vec<f64>> =
            rows.iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect();
        let softmax = |x: &[f64]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|x| x.exp()).sum();
            x.iter().map(|x| x.exp() / sum).collect()
        };
        let (p, q) = (softmax(&wide[0]), softmax(&wide[1]));
        let expected: f64 = p.iter().zip(&q).map(|(p, q)| q * (q / p).ln()).sum();
        let mut anchor = rows[1].clone();
        let found = diverge(&rows[0], &mut anchor);
        assert!((f64::from(found) - expected).abs() < 1e-5 * expected, "{found}, {expected}");
        for (found, expected) in anchor.iter().zip(&q) {
            assert!((f64::from(*found) - expected).abs() < 1e-5 * expected);
        }
        assert_eq!(diverge(&rows[0], &mut rows[0].clone()).to_bits(), 0);
    }
}
