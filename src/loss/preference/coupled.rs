//! Losses that depend on the whole optimizer step: their statistics, and the loss of one pair given them.
//!
//! Statistics are taken over all pairs of the step before the first backward pass, independently of the split into
//! micro-batches. As in TRL, gradients treat them as constants.

use super::pairwise::smoothed;
use super::{LossOptions, Pair, PairLoss, PreferenceLoss};

impl PreferenceLoss {
    /// The step's statistic: the mean reward for `bco`; the KL estimate for `kto`, from the log-ratios of `mismatched`
    /// responses; two concatenated sorted lists for `aot`; empty for other losses.
    pub fn statistics(self, pairs: &[Pair], mismatched: &[f64], options: &LossOptions) -> Vec<f64> {
        let count = pairs.len().max(1) as f64;
        match self {
            Self::Bco => {
                let rewards = pairs.iter().map(|pair| {
                    let ratios = pair.log_ratios();
                    0.5 * options.beta * (ratios.chosen + ratios.rejected)
                });
                vec![rewards.sum::<f64>() / count]
            }
            Self::Kto => vec![kl_estimate(mismatched)],
            Self::Aot => sorted_lists(
                pairs.iter().map(|pair| pair.policy.gap()),
                pairs.iter().map(|pair| pair.reference.gap()),
            ),
            Self::AotUnpaired => sorted_lists(
                pairs.iter().map(|pair| pair.log_ratios().chosen),
                pairs.iter().map(|pair| pair.log_ratios().rejected),
            ),
            _ => Vec::new(),
        }
    }

    /// Length of [`statistics`](Self::statistics) for a step of `pairs` pairs.
    pub(super) fn statistics_len(self, pairs: usize) -> usize {
        match self {
            Self::Bco | Self::Kto => 1,
            Self::Aot | Self::AotUnpaired => 2 * pairs,
            _ => 0,
        }
    }
}

/// `KL(π ‖ π_ref)` of the step, in nats: mean log-ratio of responses to other prompts, clamped at 0 from below.
pub(super) fn kl_estimate(mismatched: &[f64]) -> f64 {
    (mismatched.iter().sum::<f64>() / mismatched.len().max(1) as f64).max(0.0)
}

/// The scalar statistic of `bco` and `kto`.
pub(super) fn shift(statistics: &[f64]) -> f64 {
    statistics.first().copied().unwrap_or(0.0)
}

fn sorted_lists(first: impl Iterator<Item = f64>, second: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut first: Vec<f64> = first.collect();
    let mut second: Vec<f64> = second.collect();
    first.sort_by(f64::total_cmp);
    second.sort_by(f64::total_cmp);
    first.append(&mut second);
    first
}

/// AOT pairs the k-th smallest values of the two lists: `−ln σ(β (a_k − b_k))`.
pub(super) fn aot(
    loss: PreferenceLoss,
    pair: &Pair,
    statistics: &[f64],
    options: &LossOptions,
) -> PairLoss {
    let (first, second) = statistics.split_at(statistics.len() / 2);
    let at = |rank: usize| {
        let (value, slope) =
            smoothed(options.beta * (first[rank] - second[rank]), options.label_smoothing);
        (value, options.beta * slope)
    };
    if loss == PreferenceLoss::Aot {
        let (value, slope) = over_ranks(first, pair.policy.gap(), at);
        return PairLoss { loss: value, d_chosen: slope, d_rejected: -slope };
    }
    let ratios = pair.log_ratios();
    let (value, up) = over_ranks(first, ratios.chosen, at);
    let (_, down) = over_ranks(second, ratios.rejected, at);
    PairLoss { loss: value, d_chosen: up, d_rejected: -down }
}

/// Mean of `at` over the ranks of `value` in a sorted list; ties share their ranks, since their order in the sort is
/// arbitrary. A value not in the list gives NaN, which ends the step.
fn over_ranks(list: &[f64], value: f64, at: impl Fn(usize) -> (f64, f64)) -> (f64, f64) {
    let low = list.partition_point(|other| *other < value);
    let high = list.partition_point(|other| *other <= value);
    if low == high {
        return (f64::NAN, f64::NAN);
    }
    let count = (high - low) as f64;
    let (mut loss, mut slope) = (0.0, 0.0);
    for rank in low..high {
        let (one, d) = at(rank);
        loss += one / count;
        slope += d / count;
    }
    (loss, slope)
}
